"""Factors: the exact low-rank form of a weight's change."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Factors(NamedTuple):
    """The change of a layer in low-rank form, `dW = up @ down`, every scaling included.

    `up` has shape `(out, r)` and `down` shape `(r, in)`, on the canonical `(out, in)` weight of the
    layer (see `LayerKind`). `bias`, of shape `(out,)`, is the change of the layer's bias, or `None`.
    `scale` is the part of `up` that is a method's scaling (LoRA's `alpha / r`); it is in `up` already, and
    only what works on the parameters themselves divides it out.
    """

    up: Tensor
    down: Tensor
    bias: Tensor | None = None
    scale: float = 1.0

    @property
    def rank(self) -> int:
        """The inner size `r`: an upper bound of the rank of `dW`."""
        return int(self.down.shape[0])

    def delta(self) -> Tensor:
        """The dense `dW`, shape `(out, in)`, in the dtype of the factors."""
        return self.up @ self.down


def numerical_rank(s: Tensor, size: int) -> int:
    """How many singular values of a matrix with sides up to `size` are more than rounding: `s > eps size s_max`."""
    return int((s > s.max() * size * torch.finfo(s.dtype).eps).sum()) if len(s) else 0
