"""Adding to a weight tile by tile, so that what is worked on stays in the processor's cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

# `add(block, rows, columns)`: adds the change's part at these rows and columns to the block, in place.
AddTile = Callable[[Tensor, slice, slice], object]

# Half of a usual second-level cache, and small enough for malloc to use the same memory again.
TILE_BYTES = 1 << 19
_ALL = slice(None)


def add(weight: Tensor, changes: Sequence[tuple[AddTile, bool]], work: torch.dtype) -> None:
    """Add changes to a matrix in place; the sum is made in the dtype `work` and rounded once.

    Args:
        changes: each change, and whether it takes tiles. If none does, and the weight has the dtype `work`, each gets
            the whole weight.
    """
    is_dense = weight.is_contiguous() or weight.t().is_contiguous()  # matrix products can write to it as it is
    whole = weight.dtype == work and is_dense and not any(tiled for _, tiled in changes)
    buffer = None
    for rows, columns in [(_ALL, _ALL)] if whole else _tiles(weight, work):
        block = weight[rows, columns]
        if weight.dtype != work and (buffer is None or buffer.shape != block.shape):
            buffer = torch.empty_like(block, dtype=work)  # with the same strides
        total = block if buffer is None else buffer.copy_(block)
        for change, _ in changes:
            change(total, rows, columns)
        if buffer is not None:
            block.copy_(total)


def _tiles(weight: Tensor, work: torch.dtype) -> Iterator[tuple[slice, slice]]:
    """Bands along the dimension that is contiguous in memory."""
    across = 1 if weight.stride(0) < weight.stride(1) else 0
    step = max(1, TILE_BYTES // max(1, weight.shape[1 - across] * work.itemsize))
    for start in range(0, weight.shape[across], step):
        band = slice(start, min(start + step, weight.shape[across]))
        yield (band, _ALL) if across == 0 else (_ALL, band)
