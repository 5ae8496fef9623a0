"""AdapterLayer: the small module that one adapter has at one target."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from adapterkit.errors import UnsupportedError
from adapterkit.kinds import LayerKind
from adapterkit.tiles import AddTile

Base = Callable[[Tensor], Tensor]


class AdapterLayer(nn.Module):
    """What a method puts at one target. It owns parameters, and never the target's.

    An additive method defines `delta(x)`, what is added to the layer's output; several such layers at
    one target are summed. Any other method overrides `forward(x, base)`; of several, the first active
    is the innermost.
    """

    kind: LayerKind

    def __init__(self, kind: LayerKind) -> None:
        super().__init__()
        self.kind = kind

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "delta" in cls.__dict__ and "add_to" not in cls.__dict__:
            cls.add_to = AdapterLayer.add_to  # type: ignore[method-assign] # an inherited one adds another delta

    def delta(self, x: Tensor) -> Tensor:
        """What this adapter adds to the layer's output for the layer's input `x`."""
        raise UnsupportedError(f"{type(self).__name__} must define delta(x) or override forward(x, base).")

    def add_to(self, out: Tensor, x: Tensor) -> Tensor:
        """`out + delta(x)`, not in place: the layer's output `out` with this adapter's part, in the wider dtype.

        A method overrides this where it can add with less work than by making `delta(x)` first.
        """
        return out + self.delta(x)

    def forward(self, x: Tensor, base: Base) -> Tensor:
        """The layer's output, where `base(x)` is what it is without this adapter (the layer's bias included)."""
        out = base(x)
        return self.add_to(out, x).to(out.dtype)

    def tile_adder(self, dtype: torch.dtype) -> AddTile | None:
        """How to add `dW` to a weight with less work than by its factors; `None`, the default: by them.

        For an additive method whose factors have so high a rank that making entries of `dW` costs less than
        multiplying by them. It changes no bias.

        Returns:
            `add(block, rows, columns)`, which adds `dW[rows, columns]`, scaling included, to `block` in place. The
            block, of this dtype, is a part of the canonical `(out, in)` weight or a copy of it, and may be transposed
            in memory.
        """
        return None

    def accepts(self, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        """Whether a file may give the parameters named these other shapes than they have; by default not."""
        return False

    @property
    def additive(self) -> bool:
        """Whether the adapter's effect is `base(x) + delta(x)` and nothing else."""
        return type(self).forward is AdapterLayer.forward
