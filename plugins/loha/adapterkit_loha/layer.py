"""The LoHa layer: its parameters, its change and its factors."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from adapterkit import Base, DenseLayer, Factors, LayerKind, Target, kaiming
from adapterkit_loha.config import LoHaConfig


class LoHaLayer(DenseLayer):
    """`dW = scaling * (A1 B1) * (A2 B2)`: A `(out, r)` is `hada_w*_a`, B `(r, in)` is `hada_w*_b`.

    An effective convolution has `hada_w*_a (r, out)`, `hada_w*_b (r, channels)` and a core `hada_t*
    (r, r, *kernel)`, with `B[i, (c, k)] = sum_j t[i, j, k] w_b[j, c]`.
    """

    def setup(self, target: Target, config: LoHaConfig) -> None:
        r, out, kernel = config.r, target.out_features, kernel_of(target.kind)
        self.r, self.rank, self.scaling = r, r * r, config.scaling
        self.row_dropout, self.module_dropout = config.rank_dropout, config.module_dropout
        self.effective = config.use_effective_conv2d and bool(kernel)
        channels = target.kind.down_shape(r)[1]
        a, b = ((r, out), (r, channels)) if self.effective else ((out, r), (r, target.in_features))
        self.hada_w1_a, self.hada_w1_b = target.new(*a, init=kaiming), target.new(*b, init=kaiming)
        self.hada_w2_a = target.new(*a, init=kaiming)
        self.hada_w2_b = target.new(*b, init=0.0 if config.init_weights else kaiming)
        if self.effective:
            self.hada_t1 = target.new(r, r, *kernel, init=kaiming)
            self.hada_t2 = target.new(r, r, *kernel, init=kaiming)

    def matrices(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`scaling * A1`, B1, A2 and B2: scaled while it is small."""
        held: tuple[Tensor, ...] = (self.hada_w1_a, self.hada_w1_b, self.hada_w2_a, self.hada_w2_b)
        a1, b1, a2, b2 = held
        if self.effective:
            a1, b1, a2, b2 = a1.t(), with_kernel(self.hada_t1, b1), a2.t(), with_kernel(self.hada_t2, b2)
        return a1 * self.scaling, b1, a2, b2

    def change(self) -> Tensor:
        a1, b1, a2, b2 = self.matrices()
        return (a1 @ b1) * (a2 @ b2)

    def tile(self, rows: slice, columns: slice) -> Tensor:
        a1, b1, a2, b2 = self.matrices()
        return (a1[rows] @ b1[:, columns]) * (a2[rows] @ b2[:, columns])

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """`weight + change()` in one pass."""
        a1, b1, a2, b2 = (matrix.to(weight.dtype) for matrix in self.matrices())
        return torch.addcmul(weight, a1 @ b1, a2 @ b2), bias

    def factors(self) -> Factors:
        """The exact factors of rank `r * r`.

        `dW[o, i] = sum_a A1[o, a] B1[a, i] * sum_b A2[o, b] B2[b, i]`, so with the pair `(a, b)` as one index,
        `up[o, ab] = A1[o, a] A2[o, b]` (the row-wise Khatri-Rao product) and `down[ab, i] = B1[a, i] B2[b, i]`
        (the column-wise one).
        """
        a1, b1, a2, b2 = self.matrices()
        up = a1[:, :, None] * a2[:, None, :]
        down = b1[:, None, :] * b2[None, :, :]
        return Factors(up.flatten(1), down.flatten(0, 1))

    def few(self, x: Tensor) -> Tensor:
        """`sum_ab A1[o, a] A2[o, b] (B1[a] * B2[b]) . x` by way of a matrix `(r, r)` a token."""
        a1, b1, a2, b2 = self.matrices()
        core = (x[:, None, :] * b1) @ b2.t()
        return ((a1 @ core) * a2).sum(-1)


class LoHaEmbedding(LoHaLayer):
    """LoHa at an embedding: only the columns of the change that are looked up are made."""

    def forward(self, base: Base, x: Tensor) -> Tensor:
        """Column `i` of the change is `(A1 B1[:, i]) * (A2 B2[:, i])`."""
        a1, b1, a2, b2 = self.matrices()
        rows = F.linear(self.kind.project(x, b2), a2)
        out: Tensor = base(x) + self.kind.expand(self.kind.project(x, b1), a1) * rows
        return out


def kernel_of(kind: LayerKind) -> tuple[int, ...]:
    """The kernel of an effective convolution as PEFT's files have it, `(k, 1)` in one dimension; `()`: not for this."""
    kernel = kind.down_shape(1)[2:]
    if math.prod(kernel) <= 1:
        return ()
    return (*kernel, 1) if len(kernel) == 1 else kernel


def with_kernel(core: Tensor, channels: Tensor) -> Tensor:
    """`B (r, channels * kernel)` of an effective convolution: `core (r, r, *kernel)` times `channels (r, channels)`."""
    return torch.einsum("ijk,jc->ick", core.flatten(2), channels).flatten(1)
