"""The LoHa layer: its parameters, its change and its factors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from adapterkit import Base, CheckpointError, DenseLayer, Factors, Target, kaiming
from adapterkit_loha.config import LoHaConfig


class LoHaLayer(DenseLayer):
    """`dW = scaling * (A1 B1) * (A2 B2)`: A `(out, r)` is `hada_w*_a`, B `(r, in)` is `hada_w*_b`.

    An effective convolution has `hada_w*_a (r, out)`, `hada_w*_b (r, channels)` and a core `hada_t*
    (r, r, *kernel)`, with `B[i, (c, k)] = sum_j t[i, j, k] w_b[j, c]`.
    """

    def setup(self, target: Target, config: LoHaConfig) -> None:
        """See `AdapterLayer.setup`."""
        r, out, down = config.r, target.out_features, target.kind.down_shape(config.r)
        kernel = down[2:]
        self.r, self.rank, self.scaling = r, r * r, config.alpha / r
        self.row_dropout, self.module_dropout = config.rank_dropout, config.module_dropout
        self.effective = config.use_effective_conv2d and math.prod(kernel) > 1
        a, b = ((r, out), (r, down[1])) if self.effective else ((out, r), (r, target.in_features))
        self.hada_w1_a, self.hada_w1_b = target.new(*a, init=kaiming), target.new(*b, init=kaiming)
        self.hada_w2_a = target.new(*a, init=kaiming)
        self.hada_w2_b = target.new(*b, init=0.0 if config.init_weights else kaiming)
        if self.effective:
            core = (r, r, *kernel, 1) if len(kernel) == 1 else (r, r, *kernel)  # as PEFT's files have it
            self.hada_t1, self.hada_t2 = target.new(*core, init=kaiming), target.new(*core, init=kaiming)

    def matrices(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`scaling * A1`, B1, A2 and B2: scaled while it is small."""
        a1: Tensor = self.hada_w1_a
        b1: Tensor = self.hada_w1_b
        a2: Tensor = self.hada_w2_a
        b2: Tensor = self.hada_w2_b
        if self.effective:
            a1, b1, a2, b2 = a1.t(), with_kernel(self.hada_t1, b1), a2.t(), with_kernel(self.hada_t2, b2)
        return a1 * self.scaling, b1, a2, b2

    def change(self) -> Tensor:
        """See `DenseLayer.change`."""
        a1, b1, a2, b2 = self.matrices()
        return (a1 @ b1) * (a2 @ b2)

    def tile(self, rows: slice, columns: slice) -> Tensor:
        """See `DenseLayer.tile`."""
        a1, b1, a2, b2 = self.matrices()
        return (a1[rows] @ b1[:, columns]) * (a2[rows] @ b2[:, columns])

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """See `AdapterLayer.merged`: `weight + change()` in one pass."""
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
        """See `DenseLayer.few`: `sum_ab A1[o, a] A2[o, b] (B1[a] * B2[b]) . x` by way of a matrix `(r, r)` a token."""
        a1, b1, a2, b2 = self.matrices()
        core = (x[:, None, :] * b1) @ b2.t()
        return ((a1 @ core) * a2).sum(-1)

    def adopt(self, other: LoHaLayer | None) -> Mapping[str, Tensor]:
        """See `AdapterLayer.adopt`: lower ranks padded with zeros, the other's scaling worked into A1."""
        if other is None:
            return {"hada_w2_a": torch.zeros_like(self.hada_w2_a)}
        if other.r > self.r:
            raise CheckpointError(f"its rank is {other.r}, and the adapter's is {self.r}")
        if self.effective and not other.effective:
            raise CheckpointError(
                "it has no cores of an effective convolution, and the adapter has (use_effective_conv2d)"
            )
        if self.scaling == 0 != other.scaling:
            raise CheckpointError("the adapter's scaling is 0 (alpha), so it can change nothing")
        given: dict[str, Tensor] = dict(other.named_parameters())
        if other.effective and not self.effective:
            b1, b2 = with_kernel(other.hada_t1, other.hada_w1_b), with_kernel(other.hada_t2, other.hada_w2_b)
            given = {
                "hada_w1_a": other.hada_w1_a.t(),
                "hada_w1_b": b1,
                "hada_w2_a": other.hada_w2_a.t(),
                "hada_w2_b": b2,
            }
        if other.scaling != self.scaling:
            given["hada_w1_a"] = given["hada_w1_a"] * (other.scaling / self.scaling)
        return {name: padded(value, self.get_parameter(name).shape) for name, value in given.items()}


class LoHaEmbedding(LoHaLayer):
    """LoHa at an embedding: only the columns of the change that are looked up are made."""

    def forward(self, base: Base, x: Tensor) -> Tensor:
        """See `AdapterLayer.forward`: column `i` of the change is `(A1 B1[:, i]) * (A2 B2[:, i])`."""
        a1, b1, a2, b2 = self.matrices()
        rows = F.linear(self.kind.project(x, b2), a2)
        out: Tensor = base(x) + self.kind.expand(self.kind.project(x, b1), a1) * rows
        return out


def padded(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """The tensor with zeros behind its values in each dimension where `shape` has more."""
    more = [wide - own for own, wide in zip(tensor.shape, shape, strict=True)]
    found: Tensor = F.pad(tensor, [n for last in reversed(more) for n in (0, last)])
    return found


def with_kernel(core: Tensor, channels: Tensor) -> Tensor:
    """`B (r, channels * kernel)` of an effective convolution: `core (r, r, *kernel)` times `channels (r, channels)`."""
    return torch.einsum("ijk,jc->ick", core.flatten(2), channels).flatten(1)
