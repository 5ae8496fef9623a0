"""FactorStack: what many layers at one target add, each to rows of its own, by two products."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from adapterkit.kinds import Factors


class FactorStack:
    """`scale_i * (x[i] down_i^T * mid_i) up_i^T (+ scale_i bias_i)` for each row `i`, with the factors of its layer.

    Called with `x (rows, tokens, in)` it gives `(rows, tokens, out)`, in the widest dtype of the factors. Ranks may
    differ: lower ones are padded with zeros. It holds `rows * r * (in + out)` numbers; but layers with the same
    matrices in memory (VeRA's A and B) use them as they are, and have only their vectors by row.

    Args:
        layers: one for each adapter, all at one module.
        slots: `(rows,)`, which of them each row has; `None`: the rows have one each, in this order.
    """

    def __init__(self, layers: Sequence[Any], slots: Tensor | None) -> None:
        found = [layer.factors().flat() for layer in layers]
        self.bias: Tensor | None = None
        self.mid: Tensor | None = None
        self.scale: Tensor | None = None
        if _have_one_pair(found):
            self.up, self.down = found[0].up.t(), found[0].down
            if found[0].mid is not None:
                self.mid = _by_row([f.mid for f in found], slots)[:, None]
            scales = [f.scale if isinstance(f.scale, Tensor) else self.up.new_full((1,), f.scale) for f in found]
            self.scale = _by_row(scales, slots)[:, None]
            return
        found = [f.folded() for f in found]
        rank = max(f.rank for f in found)
        dtype = reduce(torch.promote_types, (f.up.dtype for f in found))
        # Measured: these two layouts are the ones in which a product with few tokens runs over rows of memory.
        self.down = _by_row([_padded(f.down.to(dtype), rank) for f in found], slots)
        self.up = _by_row([_padded(f.up.to(dtype).t(), rank) for f in found], slots)
        if any(f.bias is not None for f in found):
            none = self.up.new_zeros(self.up.shape[2])
            self.bias = _by_row([none if f.bias is None else f.bias.to(dtype) for f in found], slots)[:, None]

    def __call__(self, x: Tensor) -> Tensor:
        """See the class."""
        x = x.to(self.down.dtype)
        if self.scale is not None:
            hidden = x @ self.down.t()
            out: Tensor = (hidden if self.mid is None else hidden * self.mid) @ self.up * self.scale
            return out
        hidden = torch.bmm(x, self.down.mT)
        return torch.bmm(hidden, self.up) if self.bias is None else torch.baddbmm(self.bias, hidden, self.up)


def _have_one_pair(found: Sequence[Factors]) -> bool:
    """Whether all have the same two matrices in memory, and differ in vectors alone; compiled, that is not asked."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    first = found[0]
    return all(
        f.bias is None
        and (f.mid is None) == (first.mid is None)
        and isinstance(f.scale, Tensor) == isinstance(first.scale, Tensor)
        and (f.up.data_ptr(), f.down.data_ptr()) == (first.up.data_ptr(), first.down.data_ptr())
        and (f.up.shape, f.down.shape) == (first.up.shape, first.down.shape)
        for f in found
    )


def _by_row(tensors: Sequence[Any], slots: Tensor | None) -> Tensor:
    """`(rows, ...)`: for each row the tensor at its slot; without slots they are the rows' in turn."""
    stacked = torch.stack(list(tensors))
    return stacked if slots is None else stacked.index_select(0, slots)


def _padded(matrix: Tensor, rank: int) -> Tensor:
    missing = rank - matrix.shape[0]
    return F.pad(matrix, (0, 0, 0, missing)) if missing else matrix
