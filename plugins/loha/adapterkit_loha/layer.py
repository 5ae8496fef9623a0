"""LoHa's mathematics as pure functions, and the layer that holds its parameters.

A *pair* is the two low-rank products whose elementwise product the change is: `first = (A1, B1)` and
`second = (A2, B2)`, each with an up factor `(out, r)` and a down factor `(r, in)`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from adapterkit import AdapterLayer, Factors, FactorStack, LayerKind, Target
from adapterkit_loha.config import LoHaConfig

# What writing or reading an element of a matrix costs, counted in multiplications inside a matrix product: the
# ratio of arithmetic to memory speed, which differs little between machines. Measured by benchmarks/loha_forms.py.
PASS = 25
# Multiplications in the layer's own product below which a `Function` costs more time than the memory it saves is worth.
SMALL = 2**24
# Up to this rank a merge multiplies by the Khatri-Rao factors. Above it, two products of rank r and a pass over a tile
# in the cache take less time than one product of rank r^2; where that begins hardly depends on the layer's size.
MERGED_BY_FACTORS = 5


def hadamard(first: Factors, second: Factors) -> Tensor:
    """The dense change `(A1 B1) * (A2 B2)`, shape `(out, in)`."""
    return first.delta() * second.delta()


def khatri_rao(first: Factors, second: Factors) -> Factors:
    """The exact factors of `hadamard(first, second)`, of rank `r1 * r2`.

    `dW[o, i] = sum_a A1[o, a] B1[a, i] * sum_b A2[o, b] B2[b, i]`, so with the pair `(a, b)` as one index,
    `up[o, ab] = A1[o, a] A2[o, b]` (the row-wise Khatri-Rao product) and `down[ab, i] = B1[a, i] B2[b, i]`
    (the column-wise one).
    """
    up = first.up[:, :, None] * second.up[:, None, :]
    down = first.down[:, None, :] * second.down[None, :, :]
    return Factors(up.flatten(1), down.flatten(0, 1))


def factored_is_cheaper(kind: LayerKind, x: Tensor, rank: int) -> bool:
    """The cost rule: whether the Khatri-Rao factors take less time at this input than the dense change.

    Counted in multiplications, with `T` the places of the output and each pass over an element at `PASS`:

    - factored: `r^2 (in + out)` elements are built and read, and each is multiplied `T` times;
    - dense: `in out` elements take `2 r` multiplications to build, in three passes, and `T` to apply.

    Training takes about three times as much of each, so one rule serves both. With few places the building
    decides, and the factors nearly always win: they are smaller. With many, they win while
    `r^2 < in out / (in + out)`, which is half the width of a square layer. Dense are small layers with large
    ranks, and depthwise convolutions, where the factors would act on each group by itself.
    """
    squared = rank * rank
    sizes, area = kind.in_features + kind.out_features, kind.in_features * kind.out_features
    factored = kind.work(x, squared) + 2 * PASS * squared * sizes
    dense = kind.work(x) + (2 * rank + 3 * PASS) * area
    return factored < dense


def delta(kind: LayerKind, x: Tensor, first: Factors, second: Factors) -> Tensor:
    """What the change `hadamard(first, second)` of the layer's weight adds to its output, in the cheaper form."""
    if kind.lookup:
        return looked_up(kind, x, first, second)
    if factored_is_cheaper(kind, x, first.rank):
        return factored(kind, x, first, second)
    return dense(kind, x, first, second)


def looked_up(kind: LayerKind, x: Tensor, first: Factors, second: Factors) -> Tensor:
    """`delta` for row numbers: column `i` of the change is `(A1 B1[:, i]) * (A2 B2[:, i])`; only such are made."""
    rows = F.linear(kind.project(x, second.down), second.up)
    return kind.expand(kind.project(x, first.down), first.up) * rows


def factored(kind: LayerKind, x: Tensor, first: Factors, second: Factors) -> Tensor:
    """`delta` by the Khatri-Rao factors; no `(out, in)` tensor is made or kept."""
    if _has_backward() and kind.work(x) > SMALL and _features_last(kind, first):
        return _Factored.apply(x, *first[:2], *second[:2])  # type: ignore[no-untyped-call,no-any-return]
    return kind.apply(x, khatri_rao(first, second))


def dense(kind: LayerKind, x: Tensor, first: Factors, second: Factors) -> Tensor:
    """`delta` by the dense change, made once for the forward and, in larger layers, again for the backward."""
    if not _has_backward():
        return kind.apply_weight(x, hadamard(first, second))
    if kind.work(x) > SMALL and _features_last(kind, first):
        return _Dense.apply(x, *first[:2], *second[:2])  # type: ignore[no-untyped-call,no-any-return]
    return kind.apply_weight(x, _Hadamard.apply(*first[:2], *second[:2]))  # type: ignore[no-untyped-call]


def _has_backward() -> bool:
    """Whether a backward may follow; compiled, its compiler decides by itself what is made again."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def _features_last(kind: LayerKind, first: Factors) -> bool:
    return kind.spread(first.up[:, 0]).dim() == 1


class _Factored(torch.autograd.Function):
    """`x V^T U^T` with `U, V = khatri_rao(...)`. Keeps `x V^T`, `(tokens, r^2)`, and neither U nor V."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, up1: Tensor, down1: Tensor, up2: Tensor, down2: Tensor) -> Tensor:
        up, down, *_ = khatri_rao(Factors(up1, down1), Factors(up2, down2))
        hidden = F.linear(x.to(down.dtype), down)
        ctx.save_for_backward(x, hidden, up1, down1, up2, down2)
        return F.linear(hidden, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, hidden, *saved = ctx.saved_tensors
        up1, down1, up2, down2 = (t.to(grad.dtype) for t in saved)  # autocast: its dtype
        up, down, *_ = khatri_rao(Factors(up1, down1), Factors(up2, down2))
        through = grad @ up
        grads: list[Tensor | None] = [(through @ down).to(x.dtype) if ctx.needs_input_grad[0] else None]
        if not any(ctx.needs_input_grad[1:]):
            return (*grads, None, None, None, None)
        ranks = (up1.shape[1], up2.shape[1])
        for_up = (_rows(grad).t() @ _rows(hidden)).unflatten(1, ranks)
        for_down = (_rows(through).t() @ _rows(x).to(grad.dtype)).unflatten(0, ranks)
        return (
            *grads,
            (for_up @ up2[:, :, None])[..., 0],
            (for_down * down2).sum(1),
            (up1[:, None, :] @ for_up)[:, 0],
            (for_down * down1[:, None]).sum(0),
        )


class _Dense(torch.autograd.Function):
    """`x dW^T` with `dW = hadamard(...)`. Keeps no `(out, in)` tensor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, up1: Tensor, down1: Tensor, up2: Tensor, down2: Tensor) -> Tensor:
        ctx.save_for_backward(x, up1, down1, up2, down2)
        weight = hadamard(Factors(up1, down1), Factors(up2, down2))
        return F.linear(x.to(weight.dtype), weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *saved = ctx.saved_tensors
        first, second = _pair([t.to(grad.dtype) for t in saved])
        products = first.delta(), second.delta()
        for_x = (grad @ (products[0] * products[1])).to(x.dtype) if ctx.needs_input_grad[0] else None
        if not any(ctx.needs_input_grad[1:]):
            return for_x, None, None, None, None
        return for_x, *_backward(_rows(grad).t() @ _rows(x).to(grad.dtype), first, second, products)


class _Hadamard(torch.autograd.Function):
    """`hadamard` that keeps neither of its two products."""

    @staticmethod
    def forward(ctx: Any, up1: Tensor, down1: Tensor, up2: Tensor, down2: Tensor) -> Tensor:
        ctx.save_for_backward(up1, down1, up2, down2)
        return hadamard(Factors(up1, down1), Factors(up2, down2))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        first, second = _pair([t.to(grad.dtype) for t in ctx.saved_tensors])
        return _backward(grad, first, second, (first.delta(), second.delta()))


def _backward(grad: Tensor, first: Factors, second: Factors, products: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Gradients of A1, B1, A2, B2 from that of `dW`."""
    for_first, for_second = grad * products[1], grad * products[0]
    return (
        for_first @ first.down.t(),
        first.up.t() @ for_first,
        for_second @ second.down.t(),
        second.up.t() @ for_second,
    )


def _pair(tensors: list[Tensor]) -> tuple[Factors, Factors]:
    up1, down1, up2, down2 = tensors
    return Factors(up1, down1), Factors(up2, down2)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def kept_rows(rows: int, rank_dropout: float, module_dropout: float, like: Tensor) -> Tensor:
    """What training multiplies each row of the change by, `(rows,)`: zero where it is dropped.

    `rank_dropout` drops rows, and divides the others by the share that is left; `module_dropout` drops all.
    """
    keep = (torch.rand(rows, device=like.device) > rank_dropout).to(like.dtype)
    # Where nothing is left the share is 0, and 0 / 0 must be 0.
    keep = keep / keep.mean().clamp(min=0.5 / rows)
    return keep * (torch.rand(1, device=like.device) > module_dropout)


class LoHaLayer(AdapterLayer):
    """`dW = scaling * (A1 B1) * (A2 B2)`: A `(out, r)` is `hada_w*_a`, B `(r, in)` is `hada_w*_b`.

    An effective convolution has `hada_w*_a (r, out)`, `hada_w*_b (r, channels)` and a core `hada_t*
    (r, r, *kernel)`, with `B[i, (c, k)] = sum_j t[i, j, k] w_b[j, c]`.
    """

    r: int
    scaling: float
    rank_dropout: float
    module_dropout: float
    effective: bool
    hada_w1_a: nn.Parameter
    hada_w1_b: nn.Parameter
    hada_w2_a: nn.Parameter
    hada_w2_b: nn.Parameter
    hada_t1: nn.Parameter
    hada_t2: nn.Parameter

    def __init__(self, target: Target, r: int, scaling: float, config: LoHaConfig) -> None:
        out, down = target.out_features, target.kind.down_shape(r)
        kernel = down[2:]
        effective = config.use_effective_conv2d and math.prod(kernel) > 1
        super().__init__(target.kind, r=r, scaling=scaling, effective=effective)
        self.__dict__.update(rank_dropout=config.rank_dropout, module_dropout=config.module_dropout)
        sizes = ((r, out), (r, down[1])) if effective else ((out, r), (r, target.in_features))
        for name, size in zip(("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"), sizes * 2, strict=True):
            self._parameters[name] = target.empty(*size)
        if effective:
            core = (r, r, *kernel, 1) if len(kernel) == 1 else (r, r, *kernel)  # as PEFT's files have it
            self.hold(hada_t1=target.empty(*core), hada_t2=target.empty(*core))

    def pair(self) -> tuple[Factors, Factors]:
        """`(A1, B1)` and `(A2, B2)`, without the scaling."""
        if not self.effective:
            return Factors(self.hada_w1_a, self.hada_w1_b), Factors(self.hada_w2_a, self.hada_w2_b)
        first = Factors(self.hada_w1_a.t(), with_kernel(self.hada_t1, self.hada_w1_b))
        return first, Factors(self.hada_w2_a.t(), with_kernel(self.hada_t2, self.hada_w2_b))

    def delta(self, x: Tensor) -> Tensor:
        """See `AdapterLayer.delta`."""
        first, second = self.pair()
        up = first.up * self.scaling
        if self.training and (self.rank_dropout or self.module_dropout):
            up = up * kept_rows(self.kind.out_features, self.rank_dropout, self.module_dropout, up)[:, None]
        return delta(self.kind, x, Factors(up, first.down), second)

    def tile_adder(self, dtype: torch.dtype) -> Callable[[Tensor, slice, slice], object] | None:
        """See `AdapterLayer.tile_adder`: `(A1 B1) * (A2 B2)`, of which only a tile is made at a time."""
        if self.r <= MERGED_BY_FACTORS:
            return None
        up1, down1, up2, down2 = (t.to(dtype) for f in self.pair() for t in f[:2])
        up1 = up1 * self.scaling

        def add(block: Tensor, rows: slice, columns: slice) -> None:
            block.addcmul_(up1[rows] @ down1[:, columns], up2[rows] @ down2[:, columns])

        return add

    @classmethod
    def stacked(cls, layers: Sequence[LoHaLayer], slots: Tensor) -> FactorStack | None:
        """See `AdapterLayer.stacked`: by the Khatri-Rao factors, of rank `r * r`; not while a dropout acts."""
        if any(layer.training and (layer.rank_dropout or layer.module_dropout) for layer in layers):
            return None
        return FactorStack([layer.factors() for layer in layers], slots)

    def factors(self) -> Factors:
        """The exact `dW`, scaling included, of rank `r * r`."""
        first, second = self.pair()
        return khatri_rao(Factors(first.up * self.scaling, first.down), second)


def with_kernel(core: Tensor, channels: Tensor) -> Tensor:
    """`B (r, channels * kernel)` of an effective convolution: `core (r, r, *kernel)` times `channels (r, channels)`."""
    return torch.einsum("ijk,jc->ick", core.flatten(2), channels).flatten(1)


@torch.no_grad()
def initialise(layer: LoHaLayer, config: LoHaConfig) -> None:
    """Give a new layer the values that `config.init_weights` says."""
    for name, parameter in layer._parameters.items():
        if parameter is None or parameter.is_meta:
            continue
        if config.init_weights and name == "hada_w2_b":
            parameter.zero_()
        else:
            nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))
