"""Joint: what several layers at one target add, in inference, as one product with factors that are kept."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from adapterkit.factors import Factors
from adapterkit.layer import AdapterLayer
from adapterkit.watched import Watched

# Factors are kept up to this share of the numbers that the layer's own weight has.
SHARE = 0.5


class Joint:
    """The active layers of one class at one target, which add as one.

    Their joint factors (`AdapterLayer.joined`) are made at the second forward without gradients in which the layers
    are as they were in the first, so what is used once or trained costs nothing more; and dropped at the first
    forward in which something is another, that needs gradients, or after the active adapters are others. In
    inference nobody writes to the layers; a write that torch does not count, through `parameter.data` or a numpy
    view, is seen after the next `activate`.

    The cost rule: with factors of rank R in all there are three kernels for any number of layers, and as many
    multiplications as one after another. Measured by benchmarks/forward.py: with hidden 256 and 8 tokens two LoRA
    layers of rank 8 take a fifth less time jointly, four two fifths less, and one LoHa layer, whose factors are then
    not built in each forward, half; with hidden 2048 and 1024 tokens four LoRA layers take a tenth less. Kept are
    `R (in + out)` numbers, if that is at most `SHARE` of the layer's own weight.
    """

    def __init__(self, layers: Sequence[AdapterLayer]) -> None:
        self.layers = layers
        self._kept: tuple[Watched, tuple[Factors, float] | None, bool] | None = None

    def add_to(self, out: Tensor, x: Tensor) -> Tensor:
        """`out` with what all the layers add, in the wider dtype."""
        found = self.factors()
        if found is None:
            for layer in self.layers:
                out = layer.add_to(out, x)
            return out
        kind, (factors, scale) = self.layers[0].kind, found
        return kind.expand_onto(out, kind.project(x, factors.down), factors.up, factors.bias, scale)

    def factors(self) -> tuple[Factors, float] | None:
        """The joint factors and what multiplies them, or `None`: the layers add one after another."""
        kept = self._kept
        if torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
            self._kept = None
            return None
        if kept is None or not kept[0].unchanged():
            self._kept = Watched(self.layers), None, False
            return None
        watched, found, made = kept
        if not made:
            found = None if watched.learns else self._make(watched.tensors[0].device)
            self._kept = watched, found, True
        return found

    def _make(self, device: torch.device) -> tuple[Factors, float] | None:
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
            found = type(self.layers[0]).joined(self.layers)
        kind = self.layers[0].kind
        numbers = 0 if found is None else found[0].rank * (kind.in_features + kind.out_features)
        return None if numbers > SHARE * kind.in_features * kind.out_features else found


def adders(layers: Sequence[AdapterLayer]) -> list[AdapterLayer | Joint]:
    """The layers, those that may be joined in groups of one class."""
    groups: dict[type[AdapterLayer], list[AdapterLayer]] = {}
    for layer in layers:
        groups.setdefault(type(layer), []).append(layer)
    found: list[AdapterLayer | Joint] = []
    for cls, group in groups.items():
        found += [Joint(group)] if 0 < cls.joined_from <= len(group) else group
    return found
