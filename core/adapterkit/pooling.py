"""Pooling: one vector out of the hidden states of a row, without its padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from adapterkit.errors import ConfigError, UnsupportedError
from adapterkit.lowrank import working

Pooling = Literal["mean", "cls", "last"]


def check(pooling: object) -> None:
    """Raise `ConfigError` for a pooling that does not exist."""
    if pooling is not None and pooling not in get_args(Pooling):
        raise ConfigError(f"pooling = {pooling!r} must be one of {', '.join(map(repr, get_args(Pooling)))} or None.")


def pool(hidden: Tensor, mask: Tensor | None, pooling: Pooling | None, number: int) -> Tensor:
    """Pool one batch.

    Args:
        hidden: `(rows, length, hidden)`, or a feature map `(rows, hidden, height, width)`.
        mask: `(rows, length)`, 0 where there is padding; `None`: there is none.
        number: the batch's, for messages.

    Returns:
        `(rows, hidden)`, or `(rows, length, hidden)` without pooling; on the CPU, float32 or float64.
    """
    if hidden.dim() == 4:
        if pooling in ("cls", "last"):
            raise ConfigError(f"pooling = {pooling!r} has no meaning for a feature map; take 'mean'.")
        hidden = hidden.flatten(2).transpose(1, 2)
    if hidden.dim() != 3:
        raise UnsupportedError(f"Hidden states of shape {tuple(hidden.shape)} are no sequence that can be pooled.")
    hidden = working(hidden)
    real = _real(hidden, mask, number)
    rows = torch.arange(len(hidden), device=hidden.device)
    if pooling == "cls":
        return hidden[rows, real.int().argmax(1)].cpu()
    if pooling == "last":
        return hidden[rows, real.shape[1] - 1 - real.flip(1).int().argmax(1)].cpu()
    hidden = hidden.masked_fill(~real[..., None], 0.0)  # not a product: 0 times inf is nan
    return (hidden if pooling is None else hidden.sum(1) / real.sum(1, keepdim=True)).cpu()


def _real(hidden: Tensor, mask: Tensor | None, number: int) -> Tensor:
    """Which places are no padding, `(rows, length)`."""
    if mask is None:
        return torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
    if mask.shape != hidden.shape[:2]:
        raise UnsupportedError(
            f"Batch {number}: the mask has shape {tuple(mask.shape)}, the hidden states {tuple(hidden.shape)}, so it "
            "is not known which of them are padding."
        )
    real = mask.to(hidden.device) != 0
    empty = (~real.any(1)).nonzero()
    if len(empty):
        raise ConfigError(f"Batch {number}: row {int(empty[0])} is all padding.")
    return real


def stack_rows(parts: Sequence[Tensor]) -> Tensor:
    """The batches' `(rows, ..., length, hidden)` one under another; shorter ones are filled up with zeros."""
    if not parts:
        raise ConfigError("There are no batches. A generator can be read only once.")
    shapes = {part.shape[1:] for part in parts}
    if len(shapes) == 1 or parts[0].dim() < 3:
        return torch.cat(list(parts))
    longest = max(part.shape[-2] for part in parts)
    return torch.cat([torch.nn.functional.pad(part, (0, 0, 0, longest - part.shape[-2])) for part in parts])
