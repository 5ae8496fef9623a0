"""FactorStack: the low-rank changes of many rows as two batched products."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

from adapterkit.factors import Factors


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
