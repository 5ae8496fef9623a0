"""Groups of parameters for an optimizer, and warnings about a training loop that leaves something out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary, ref

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
        plain = [p for _, p in adapter.named_parameters() if p.requires_grad and id(p) not in up]
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


# What a training loop forgets


@dataclass
class _Watched:
    """How often an optimizer has moved an adapter, and the first one of the same model that stepped without it."""

    model: ref[nn.Module]
    moved: int = 0
    without: ref[Optimizer] | None = None


# Adapters of which it is not known yet whether they train as they should.
_watched: WeakKeyDictionary[Adapter, _Watched] = WeakKeyDictionary()


def watch(adapter: Adapter, model: nn.Module) -> None:
    """Warn at an optimizer's second step if it lacks the adapter, or if the loop leaves out a part of the method."""
    _watch_optimizers()
    _watched[adapter] = _Watched(ref(model))


@cache
def _watch_optimizers() -> None:
    register_optimizer_step_post_hook(_after_step)


def _after_step(optimizer: Optimizer, *_: Any) -> None:
    moved: set[int] = set()
    for adapter, seen in list(_watched.items()):
        own = {id(p) for p in adapter.parameters() if p.grad is not None} if adapter.may_train() else set()
        if not own:
            continue
        moved = moved or {id(p) for group in optimizer.param_groups for p in group["params"]}
        if own.isdisjoint(moved):
            _missed(adapter, seen, optimizer, moved)
        else:
            _moved(adapter, seen)


def _missed(adapter: Adapter, seen: _Watched, optimizer: Optimizer, moved: set[int]) -> None:
    """Warn if this optimizer of the same model steps a second time, and the adapter's own has not in between."""
    model = seen.model()
    if model is None or moved.isdisjoint(map(id, model.parameters())):
        return
    if seen.without is None:
        seen.without = ref(optimizer)
    elif seen.without() is optimizer:
        del _watched[adapter]
        warn(
            f"Adapter {adapter.name!r} gets gradients, and the optimizer that steps has other parameters of its model, "
            f"so {adapter.name!r} does not change. Add adapters, and activate what should train, before you make the "
            "optimizer. To let others act for a while, as in an evaluation, use adapters.activated(...)."
        )


def _moved(adapter: Adapter, seen: _Watched) -> None:
    """Warn if the loop leaves out the method's step or penalty."""
    shared = Shared if adapter.shared is None else type(adapter.shared)
    steps, penalised = shared.step is not Shared.step, shared.penalty is not Shared.penalty
    seen.moved += 1
    if seen.moved == 1 and (steps or penalised):  # what follows a step may still be called after this one
        return
    del _watched[adapter]
    lacking = ["call adapters.step() after each optimizer.step()"] * (steps and not adapter.steps)
    lacking += ["add ak.penalty(model) to the loss"] * (penalised and not adapter.penalised)
    if lacking:
        warn(
            f"Adapter {adapter.name!r} trains without a part of its method {adapter.config.method!r}: "
            f"{', and '.join(lacking)}. transformers' Trainer does both with "
            "adapterkit.integrations.transformers.AdapterTrainerMixin."
        )
