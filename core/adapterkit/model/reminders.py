"""A warning for a training that does not call what the adapter's method needs at each step."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from adapterkit.contract import Shared
from adapterkit.errors import AdapterWarning
from adapterkit.model.adapter import Adapter

# Adapters whose methods have a step or a penalty, and how often an optimizer has moved them without either.
_watched: WeakKeyDictionary[Adapter, int] = WeakKeyDictionary()


def remind(adapter: Adapter) -> None:
    """Warn at an optimizer's second step if the training left out the method's own step or penalty."""
    shared = Shared if adapter.shared is None else type(adapter.shared)
    if shared.step is Shared.step and shared.penalty is Shared.penalty:
        return
    _watch_optimizers()
    _watched[adapter] = 0


@cache
def _watch_optimizers() -> None:
    register_optimizer_step_post_hook(_after_step)


def _after_step(optimizer: Optimizer, *_: Any) -> None:
    for adapter, moved in list(_watched.items()):
        if not adapter.may_train():
            continue
        own = {id(p) for p in adapter.parameters() if p.grad is not None}
        if not any(id(p) in own for group in optimizer.param_groups for p in group["params"]):
            continue
        _watched[adapter] = moved + 1
        if moved:  # the first step is over, so what follows a step was called, or is not
            del _watched[adapter]
            _warn(adapter, type(adapter.shared))


def _warn(adapter: Adapter, shared: Any) -> None:
    lacking = []
    if shared.step is not Shared.step and not adapter.steps:
        lacking.append("call adapters.step() after each optimizer.step()")
    if shared.penalty is not Shared.penalty and not adapter.penalised:
        lacking.append("add ak.penalty(model) to the loss")
    if lacking:
        warnings.warn(
            f"Adapter {adapter.name!r} trains without a part of its method {adapter.config.method!r}: "
            f"{', and '.join(lacking)}. transformers' Trainer does both with "
            "adapterkit.integrations.transformers.AdapterTrainerMixin.",
            AdapterWarning,
            stacklevel=4,
        )
