"""Linear layers: torch's, and transformers' `Conv1D`, which keeps its weight as `(in, out)`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor, nn

from adapterkit.kinds.base import LayerKind, is_floating_weight
from adapterkit.tensors import shape_of


@dataclass(frozen=True)
class Linear(LayerKind):
    """`torch.nn.Linear` and its subclasses with a floating weight."""

    name = "Linear"
    all_linear = True

    @classmethod
    def of(cls, module: nn.Module) -> Self | None:
        """See `LayerKind.of`."""
        if isinstance(module, nn.Linear) and is_floating_weight(module, 2):
            return cls(module.out_features, module.in_features)
        return None

    def computes_plainly(self, forward: Callable[..., Any], module: nn.Module) -> bool:
        """See `LayerKind.computes_plainly`."""
        return getattr(forward, "__func__", forward) is nn.Linear.forward


@dataclass(frozen=True)
class TransposedLinear(LayerKind):
    """transformers' `Conv1D` (GPT-2): a linear layer with its weight stored as `(in, out)`."""

    name = "Conv1D"
    all_linear = True

    @classmethod
    def of(cls, module: nn.Module) -> Self | None:
        """See `LayerKind.of`. Imports nothing: if transformers is not loaded, no such layer exists."""
        utils = sys.modules.get("transformers.pytorch_utils")
        if utils is None or not isinstance(module, utils.Conv1D) or not is_floating_weight(module, 2):
            return None
        in_features, out_features = shape_of(module.weight)
        return cls(out_features, in_features)

    def computes_plainly(self, forward: Callable[..., Any], module: nn.Module) -> bool:
        """See `LayerKind.computes_plainly`."""
        plain = sys.modules["transformers.pytorch_utils"].Conv1D.forward
        return getattr(forward, "__func__", forward) is plain

    def canonical(self, weight: Tensor) -> Tensor:
        """See `LayerKind.canonical`: a transposed view."""
        return weight.t()

    def laid_out(self, weight: Tensor, own: Tensor) -> Tensor:
        """See `LayerKind.laid_out`."""
        return weight.t()
