"""AdapterLayer: the small module that one adapter has at one target."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapterkit.contract.target import Target
from adapterkit.errors import CheckpointError, UnsupportedError
from adapterkit.kinds import AddTile, Factors, LayerKind

Base = Callable[[Tensor], Tensor]

# What a method may have beside `delta`, and what must be of the same class as it.
_FASTER = {"add_to", "with_weight", "stacked", "adopt"}


class Holder(nn.Module):
    """A module that holds parameters, for keys such as `lora_A.weight`: `Holder(weight=...).weight`."""

    # The names that files most often have; there are those that it is given.
    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, **parameters: nn.Parameter | None) -> None:
        super().__init__()
        for name, parameter in parameters.items():
            self.register_parameter(name, parameter)


def kaiming(parameter: Tensor) -> None:
    """What `nn.Linear` starts with, in place: uniform within `1 / sqrt(in)`."""
    nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))


class AdapterLayer(nn.Module):
    """What a method puts at one target. It owns parameters, and never the target's.

    An author writes no `__init__`: `setup` makes the parameters and buffers.

    An additive method defines `delta(x)`, what is added to the layer's output; several such layers at
    one target are summed. Any other method overrides `forward(x, base)`; of several, the first active
    is the innermost.
    """

    kind: LayerKind
    config: Any
    # What all layers of the adapter share, or `None`.
    shared: Any
    # The name of the method that made it; set by the core.
    method: str = ""

    def __init__(self, target: Target, config: Any, shared: Any = None) -> None:
        super().__init__()
        # Shared tensors are the adapter's, not the layer's, so no registry of this module may list them.
        self.__dict__.update(kind=target.kind, config=config, shared=shared)
        self.setup(target, config)

    def setup(self, target: Target, config: Any) -> None:
        """Make the parameters and buffers, with `target.new(...)`. Called once: when an adapter is added or loaded."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "delta" in cls.__dict__:  # what is inherited computes another delta
            for name in _FASTER - cls.__dict__.keys():
                setattr(cls, name, AdapterLayer.__dict__[name])

    def delta(self, x: Tensor) -> Tensor:
        """What this adapter adds to the layer's output for the layer's input `x`."""
        raise UnsupportedError(f"{type(self).__name__} must define delta(x) or override forward(x, base).")

    def add_to(self, out: Tensor, x: Tensor) -> Tensor:
        """`out + delta(x)`, not in place: the layer's output `out` with this adapter's part, in the wider dtype.

        A method overrides this where it can add with less work than by making `delta(x)` first.
        """
        return out + self.delta(x)

    @classmethod
    def stacked(cls, layers: Sequence[Self], slots: Tensor | None) -> Callable[[Tensor], Tensor] | None:
        """What many layers at one target add, each to its own row: `Adapters.per_sample` at the speed of one adapter.

        A method overrides this, most with `FactorStack`. `slots (rows,)` has the place in `layers` of each row's;
        `None`: there is a row for each of the layers, in their order. The function returned gives for
        `x (rows, tokens, in)` what `layers[slots[i]].delta(x[i])` is for each row `i`, `(rows, tokens, out)`. It is
        called once and not kept. Asked only for layers whose kind `is_plain`. `None`, the default: the layers are
        called in turn.
        """
        return None

    def with_weight(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        """The layer's output from one product with its own `weight` changed by `dW`, or `None`: add to it instead.

        A method overrides this where that can be cheaper than `add_to`. It is asked when it is the only adapter at a
        layer that computes plainly (`LayerKind.is_plain_forward`), with a frozen weight of `x`'s dtype, float32 or
        float64, in memory, and neither under autocast nor under functorch's transforms. The dtype of its own parameters
        may be another.

        Args:
            weight: `(out, in)`, see `LayerKind.read`; not to be changed.
            bias: the layer's.
        """
        return None

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

    def adopt(self, other: Self | None) -> Mapping[str, Tensor]:
        """The tensors, by their names here, with which this layer does what `other` does: `Adapters.swap`.

        A method overrides this where its sizes or its scaling may differ from one adapter to another. Shapes are
        this layer's own; a tensor that may stay is left out. By default the other's parameters and persistent buffers,
        of the same shapes and from the same config.

        Args:
            other: another adapter's layer at the same target; `None`: the layer is to change nothing.

        Raises:
            CheckpointError: it cannot; says why, to go on from "at 'path' ".
        """
        if other is None:
            raise CheckpointError("the file has nothing, and the method does not say what changes nothing")
        made_again = {
            f"{path}.{name}" if path else name
            for path, module in other.named_modules()
            for name in module._non_persistent_buffers_set
        }
        fixed = {name: buffer for name, buffer in other.named_buffers() if name not in made_again}
        return {**dict(other.named_parameters()), **fixed}

    def accepts(self, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        """Whether a file may give the parameters named these other shapes than they have; by default not."""
        return False

    @property
    def additive(self) -> bool:
        """Whether the adapter's effect is `base(x) + delta(x)` and nothing else."""
        return type(self).forward is AdapterLayer.forward

    @property
    def changes_weight(self) -> bool:
        """Whether the method has `with_weight`."""
        return type(self).with_weight is not AdapterLayer.with_weight


class FactorStack:
    """`x[i] down_i^T up_i^T (+ bias_i)` for each row `i`, with `up_i, down_i` the factors at `slots[i]`.

    Ranks may differ: smaller ones are filled up with zeros. Called with `x (rows, tokens, in)` it gives
    `(rows, tokens, out)`, in the widest dtype of the factors; two products whatever the number of factors.
    It holds `rows * r * (in + out)` numbers.

    Args:
        factors: one for each adapter, all for one layer.
        slots: `(rows,)`, which of them each row has; `None`: the rows have one each, in this order.
    """

    def __init__(self, factors: Sequence[Factors], slots: Tensor | None) -> None:
        rank = max(f.rank for f in factors)
        dtype = reduce(torch.promote_types, (f.up.dtype for f in factors))
        # Measured: these two layouts are the ones in which a product with few tokens runs over rows of memory.
        self.down = by_row([_filled(f.down.to(dtype), rank) for f in factors], slots)
        self.up = by_row([_filled(f.up.to(dtype).t(), rank) for f in factors], slots)
        self.bias: Tensor | None = None
        if any(f.bias is not None for f in factors):
            none = self.up.new_zeros(self.up.shape[2])
            biases = [none if f.bias is None else f.bias.to(dtype) for f in factors]
            self.bias = by_row(biases, slots)[:, None]

    def __call__(self, x: Tensor) -> Tensor:
        """See the class."""
        hidden = torch.bmm(x.to(self.down.dtype), self.down.mT)
        if self.bias is None:
            return torch.bmm(hidden, self.up)
        return torch.baddbmm(self.bias, hidden, self.up)


def by_row(tensors: Sequence[Tensor], slots: Tensor | None) -> Tensor:
    """`(rows, ...)`: for each row the tensor at its slot; without slots they are the rows' in turn."""
    stacked = torch.stack(list(tensors))
    return stacked if slots is None else stacked.index_select(0, slots)


def _filled(matrix: Tensor, rank: int) -> Tensor:
    missing = rank - matrix.shape[0]
    return F.pad(matrix, (0, 0, 0, missing)) if missing else matrix
