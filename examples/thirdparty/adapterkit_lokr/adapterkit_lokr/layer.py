"""LoKr's mathematics as pure functions, and the layer that holds its parameters."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from adapterkit import DenseLayer, Factors, LayerKind, Target, kaiming
from adapterkit_lokr.config import LoKrConfig

Pair = tuple[Tensor, Tensor]


def split(number: int, factor: int) -> tuple[int, int]:
    """`(a, b)` with `a * b == number` and `a <= b`, unless `factor` divides `number`: then `a` is that. As LyCORIS."""
    if factor > 0 and number % factor == 0:
        return factor, number // factor
    limit = number if factor == -1 else factor
    small = max(d for d in range(1, math.isqrt(number) + 1) if number % d == 0 and d <= limit)
    return small, number // small


def kron_factors(w1: Tensor | Pair, w2: Tensor | Pair) -> Factors:
    """Exact factors of `kron(w1, w2)`; each of the two is a matrix or a pair `(up, down)` whose product it is.

    By the mixed-product rule `kron(a b, c d) = kron(a, c) kron(b, d)`. A matrix is a pair with the identity,
    on the side that gives the smaller rank.
    """
    if isinstance(w1, Tensor):
        w1 = _with_identity(w1)
    if isinstance(w2, Tensor):
        w2 = _with_identity(w2)
    return Factors(_kron(w1[0], w2[0]), _kron(w1[1], w2[1]))


def _kron(a: Tensor, b: Tensor) -> Tensor:
    """`torch.kron` of two matrices, which fails on transposed ones."""
    return (a[:, None, :, None] * b[None, :, None, :]).reshape(a.shape[0] * b.shape[0], -1)


def _with_identity(matrix: Tensor) -> Pair:
    rows, columns = matrix.shape
    one = torch.eye(min(rows, columns), dtype=matrix.dtype, device=matrix.device)
    return (one, matrix) if rows < columns else (matrix, one)


def apply_kron(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """`kron(w1, w2)` applied to the last dimension of `x`, without forming it."""
    parts = x.unflatten(-1, (w1.shape[1], w2.shape[1]))
    out: Tensor = w1 @ (parts @ w2.t())
    return out.flatten(-2)


@dataclass(frozen=True)
class Layout:
    """How a layer is split: `rows = (a, b)`, `columns = (c, d)`, and which of w1 and w2 is decomposed."""

    rows: tuple[int, int]
    columns: tuple[int, int]
    kernel: tuple[int, ...]
    decomposes: tuple[bool, bool]
    effective: bool

    @classmethod
    def of(cls, kind: LayerKind, r: int, config: LoKrConfig) -> Layout:
        """The layout of a layer of this kind at rank `r`."""
        _, channels, *kernel = kind.down_shape(1)
        rows, columns = split(kind.out_features, config.decompose_factor), split(channels, config.decompose_factor)
        decomposes = (config.decompose_both and r < max(rows[0], columns[0]) / 2, r < max(rows[1], columns[1]) / 2)
        effective = decomposes[1] and config.use_effective_conv2d and math.prod(kernel) > 1
        return cls(rows, columns, tuple(kernel), decomposes, effective)


class LoKrLayer(DenseLayer):
    """`dW = scaling * kron(w1, w2)`: w1 `(a, c)`, w2 `(b, d * kernel)`, `a b` outputs and `c d` input channels.

    In place of `lokr_w1` and `lokr_w2` there can be `_a` and `_b`, whose product it is; `lokr_t2 (r, r, *kernel)`
    stands between `lokr_w2_a (r, b)` and `lokr_w2_b (r, d)` of an effective convolution.
    """

    lokr_w1: nn.Parameter
    lokr_w2: nn.Parameter
    lokr_t2: nn.Parameter

    def setup(self, target: Target, config: LoKrConfig) -> None:
        """See `AdapterLayer.setup`."""
        r = config.r
        self.scaling = config.alpha / r
        layout = Layout.of(target.kind, r, config)
        self.decomposes, self.effective = layout.decomposes, layout.effective
        self.row_dropout, self.row_dropout_rescales = config.rank_dropout, config.rank_dropout_scale
        self.module_dropout = config.module_dropout
        (a, b), (c, d), kernel = layout.rows, layout.columns, layout.kernel
        zero_first = 0.0 if config.init_weights is True else kaiming
        zero_second = 0.0 if config.init_weights == "lycoris" else kaiming
        if self.decomposes[0]:
            self.lokr_w1_a, self.lokr_w1_b = target.new(a, r, init=zero_first), target.new(r, c, init=kaiming)
        else:
            self.lokr_w1 = target.new(a, c, init=zero_first)
        if not self.decomposes[1]:
            self.lokr_w2 = target.new(b, d, *kernel, init=zero_second)
        elif self.effective:
            # The shape is that of PEFT's files.
            self.lokr_t2 = target.new(r, r, *kernel, *(1 for _ in range(2 - len(kernel))), init=kaiming)
            self.lokr_w2_a, self.lokr_w2_b = target.new(r, b, init=kaiming), target.new(r, d, init=zero_second)
        else:
            columns = d * math.prod(kernel)
            self.lokr_w2_a, self.lokr_w2_b = target.new(b, r, init=kaiming), target.new(r, columns, init=zero_second)

    def first(self) -> Tensor | Pair:
        """w1 or its two factors."""
        return (self.lokr_w1_a, self.lokr_w1_b) if self.decomposes[0] else self.lokr_w1

    def second(self) -> Tensor | Pair:
        """w2, its kernel flat, or its two factors."""
        if not self.decomposes[1]:
            return self.lokr_w2.flatten(1)
        if not self.effective:
            return self.lokr_w2_a, self.lokr_w2_b
        return self.lokr_w2_a.t(), torch.einsum("ijk,jc->ick", self.lokr_t2.flatten(2), self.lokr_w2_b).flatten(1)

    def products(self) -> tuple[Tensor, Tensor]:
        """w1 and w2 as matrices."""
        first, second = self.first(), self.second()
        w1, w2 = (w if isinstance(w, Tensor) else w[0] @ w[1] for w in (first, second))
        return w1, w2

    def change(self) -> Tensor:
        """See `DenseLayer.change`."""
        w1, w2 = self.products()
        return _kron(w1 * self.scaling, w2)

    def few(self, x: Tensor) -> Tensor:
        """See `DenseLayer.few`: by w1 and w2 apart."""
        w1, w2 = self.products()
        return apply_kron(x, w1 * self.scaling, w2)

    def factors(self) -> Factors:
        """See `DenseLayer.factors`."""
        return kron_factors(self.first(), self.second())._replace(scale=self.scaling)
