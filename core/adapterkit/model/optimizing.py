"""What an optimizer gets: groups of parameters; and a warning if a training leaves out a part of the method."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from adapterkit.contract import Shared
from adapterkit.errors import ConfigError, UnsupportedError, warn
from adapterkit.model.adapter import Adapter

Options = Mapping[str, Any]


def parameter_groups(
    adapters: Sequence[Adapter], options: Mapping[str, Options], ratio: float | None
) -> list[dict[str, Any]]:
    """The groups of `Adapters.parameter_groups`, for adapters that train."""
    if ratio is not None and not (isinstance(ratio, int | float) and math.isfinite(ratio) and ratio > 0):
        raise ConfigError(f"lora_plus_ratio = {ratio!r} must be a positive number.")
    groups = []
    for adapter in adapters:
        own = options.get(adapter.name, {})
        if not isinstance(own, Mapping) or "params" in own:
            raise ConfigError(f"The options of {adapter.name!r} must be those of a group, such as {{'lr': 1e-4}}.")
        up = {} if ratio is None else _up_factor(adapter, own)
        plain = [p for p in adapter.parameters() if p.requires_grad and id(p) not in up]
        groups.append({"params": plain, "name": adapter.name, **own})
        if ratio is not None:
            groups.append({"params": [*up.values()], "name": f"{adapter.name}.up", **own, "lr": own["lr"] * ratio})
    return [group for group in groups if group["params"]]


def _up_factor(adapter: Adapter, options: Options) -> dict[int, nn.Parameter]:
    """The trained parameters of the up factors, by `id`.

    Raises:
        ConfigError: there is no learning rate that the ratio could multiply.
        UnsupportedError: the method does not say which parameters these are.
    """
    if "lr" not in options:
        raise ConfigError(
            f"lora_plus_ratio multiplies a learning rate, and the options of {adapter.name!r} have none: "
            f"parameter_groups({{{adapter.name!r}: {{'lr': 1e-4}}}}, lora_plus_ratio=...)."
        )
    method, layers = adapter.config.method, adapter.layers.values()
    if not any(layer.up_factor for layer in layers):
        raise UnsupportedError(
            f"LoRA+ is for methods with an up factor B behind a down factor A, and the layers of adapter "
            f"{adapter.name!r} name none (AdapterLayer.up_factor; the method is {method!r}). Give it a learning rate "
            "alone, in a call without lora_plus_ratio."
        )
    named = ((p, name in layer.up_factor) for layer in layers for name, p in layer.named_parameters())
    return {id(p): p for p, is_up in named if is_up and p.requires_grad}


# The reminder

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
        if not moved:  # what follows a step may still be called after this one
            continue
        del _watched[adapter]
        shared, lacking = type(adapter.shared), []
        if shared.step is not Shared.step and not adapter.steps:  # type: ignore[union-attr]
            lacking.append("call adapters.step() after each optimizer.step()")
        if shared.penalty is not Shared.penalty and not adapter.penalised:  # type: ignore[union-attr]
            lacking.append("add ak.penalty(model) to the loss")
        if lacking:
            warn(
                f"Adapter {adapter.name!r} trains without a part of its method {adapter.config.method!r}: "
                f"{', and '.join(lacking)}. transformers' Trainer does both with "
                "adapterkit.integrations.transformers.AdapterTrainerMixin."
            )
