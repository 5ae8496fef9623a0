"""Factors: the exact low-rank form of a weight's change."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Factors(NamedTuple):
    """The change of a layer in low-rank form, `dW = scale * up @ diag(mid) @ down`.

    `up` has shape `(out, r)` and `down` shape `(r, in)`, on the canonical `(out, in)` weight of the layer (see
    `LayerKind`); both may also have the shapes of files, which flatten to these.

    Attributes:
        bias: the change of the layer's bias is `scale * bias`, `(out,)`; `None`: it has none.
        scale: a number, or one for each output, `(out,)`.
        mid: `(r,)`; `None` stands for ones.
    """

    up: Tensor
    down: Tensor
    bias: Tensor | None = None
    scale: float | Tensor = 1.0
    mid: Tensor | None = None

    @property
    def rank(self) -> int:
        """The inner size `r`: an upper bound of the rank of `dW`."""
        return int(self.down.shape[0])

    def flat(self) -> Factors:
        """The same with `up` and `down` as matrices."""
        if self.up.dim() == self.down.dim() == 2:
            return self
        return self._replace(up=self.up.flatten(1), down=self.down.flatten(1))

    def folded(self, dtype: torch.dtype | None = None, *, scaled: bool = True) -> Factors:
        """The same as matrices with `dW = up @ down`: `mid` and `scale` are in `up`, and `scale` in `bias`.

        Args:
            dtype: cast to this first, so that no product is rounded to less.
            scaled: if false, a number stays in `scale`; a scale for each output does not.
        """
        up, down, bias, scale, mid = self.flat()
        if dtype is not None:
            up, down, bias = up.to(dtype), down.to(dtype), None if bias is None else bias.to(dtype)
        if mid is not None:
            up = up * mid.to(up.dtype)
        if isinstance(scale, Tensor):
            scale = scale.to(up.dtype)
            up, bias = scale[:, None] * up, None if bias is None else bias * scale
        elif not scaled:
            return Factors(up, down, bias, scale)
        elif scale != 1.0:
            up, bias = up * scale, None if bias is None else bias * scale
        return Factors(up, down, bias)

    def delta(self) -> Tensor:
        """The dense `dW`, shape `(out, in)`, in the dtype of the factors."""
        up, down, *_ = self.folded()
        return up @ down


def numerical_rank(s: Tensor, size: int) -> int:
    """How many singular values of a matrix with sides up to `size` are more than rounding: `s > eps size s_max`."""
    return int((s > s.max() * size * torch.finfo(s.dtype).eps).sum()) if len(s) else 0
