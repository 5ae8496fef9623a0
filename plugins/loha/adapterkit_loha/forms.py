"""LoHa's mathematics as pure functions: the forms in which the change acts, and which is the cheapest where.

A *pair* is the two low-rank products whose elementwise product the change is: `first = (A1, B1)` and
`second = (A2, B2)`, each with an up factor `(out, r)` and a down factor `(r, in)`.

The forms with a backward of their own can be differentiated again: a backward that records gradients (`create_graph`)
uses nothing but the inputs, and writes over nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from adapterkit import Factors, LayerKind

Form = Literal["factored", "dense", "whole"]

# What writing or reading an element of a matrix costs, counted in multiplications inside a matrix product: the
# ratio of arithmetic to memory speed, which differs little between machines. Measured by benchmarks/loha_forms.py.
PASS = 25
# Multiplications in the layer's own product below which a `Function` costs more time than the memory it saves is worth.
SMALL = 2**24


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


def cheapest(kind: LayerKind, x: Tensor, rank: int, *, trains: bool, weight: bool) -> Form:
    """The cost rule: which form takes the least time at this input, by counting.

    In multiplications, beside what the layer does without an adapter, with `T` the places of the output and
    each pass over an element at `PASS`:

    - factored: `r^2 (in + out)` elements are built and read, and each is multiplied `T` times;
    - dense: `in out` elements take `2 r` multiplications to build, in three passes, and `T` to apply;
    - whole (`weight`: the layer's own weight can be used): the same building, but no product of its own;
    - what factored and dense give is added to the output, in a pass of `T out` elements.

    Training takes three times as much of each: two more products, for the gradients of the input and of the
    change, and the building again. Of the products, `whole` has the last only, so a third.

    So with few places the building decides and `factored` nearly always wins: it is smaller. With many, in a
    square layer of width `h`, it wins over `dense` while `r^2 < h / 2`; over `whole` while `r^2 < h / 6` in
    training, and in inference while `T r^2 < h (r + 1.5 PASS)`. Depthwise convolutions, where the factors would act
    on each group by itself, are never factored. `benchmarks/loha_forms.py` measures where the forms cross.
    """
    squared, area = rank * rank, kind.in_features * kind.out_features
    product = kind.work(x)
    build, adding = (2 * rank + 3 * PASS) * area, PASS * product // kind.in_features
    factored = kind.work(x, squared) + 2 * PASS * squared * (kind.in_features + kind.out_features) + adding
    changed = build + (product // 3 if trains else 0) if weight else build + product + adding
    if factored < changed:
        return "factored"
    return "whole" if weight else "dense"


def delta(kind: LayerKind, x: Tensor, first: Factors, second: Factors) -> Tensor:
    """What the change `hadamard(first, second)` of the layer's weight adds to its output, in the cheaper form."""
    if kind.lookup:
        return looked_up(kind, x, first, second)
    # Both take three times as much in training.
    if cheapest(kind, x, first.rank, trains=False, weight=False) == "factored":
        return factored(kind, x, first, second)
    return dense(kind, x, first, second)


def whole(
    kind: LayerKind, x: Tensor, weight: Tensor, bias: Tensor | None, pair: tuple[Factors, Factors], scale: float
) -> Tensor:
    """The output of a layer with frozen weight and bias, changed by `scale * hadamard(*pair)`: one product.

    `W + dW` is not kept for the backward, but made again.
    """
    first, second = pair
    if _has_backward():
        if _features_last(kind, first):
            return _Whole.apply(x, weight, bias, scale, *first[:2], *second[:2])  # type: ignore[no-untyped-call,no-any-return]
        change = _Hadamard.apply(*first[:2], *second[:2])  # type: ignore[no-untyped-call]
        return kind.apply_weight(x, torch.add(weight, change, alpha=scale), bias)
    return kind.apply_weight(x, changed_weight(weight, first.delta(), second.delta(), scale), bias)


def changed_weight(weight: Tensor, one: Tensor, other: Tensor, scale: float) -> Tensor:
    """`W + scale * one * other`, written over `one` if no gradients are recorded."""
    return torch.addcmul(weight, one, other, value=scale, out=None if torch.is_grad_enabled() else one)


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
    return (
        torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
    )


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
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, hidden, *saved = ctx.saved_tensors
        up1, down1, up2, down2 = (t.to(grad.dtype) for t in saved)  # autocast: its dtype
        up, down, *_ = khatri_rao(Factors(up1, down1), Factors(up2, down2))
        if torch.is_grad_enabled():  # what was kept has no graph
            hidden = F.linear(x.to(grad.dtype), down)
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
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *saved = ctx.saved_tensors
        first, second = _pair([t.to(grad.dtype) for t in saved])
        products = first.delta(), second.delta()
        for_x = (grad @ (products[0] * products[1])).to(x.dtype) if ctx.needs_input_grad[0] else None
        if not any(ctx.needs_input_grad[1:]):
            return for_x, None, None, None, None
        return for_x, *_backward(_rows(grad).t() @ _rows(x).to(grad.dtype), first, second, products)


class _Whole(torch.autograd.Function):
    """`x (W + scale dW)^T + bias` with `dW = hadamard(...)`, W and the bias frozen. Keeps no `(out, in)` tensor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, scale: float, *pair: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, *pair)
        ctx.scale = scale
        first, second = _pair(pair)
        return F.linear(x, changed_weight(weight, first.delta(), second.delta(), scale), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *saved = ctx.saved_tensors
        first, second = _pair(saved)
        products, grads = (first.delta(), second.delta()), (None,) * 4
        if any(ctx.needs_input_grad[4:]):
            for_change = _rows(grad).t() @ _rows(x)
            grads = tuple(g * ctx.scale for g in _backward(for_change, first, second, products))
        for_x = grad @ changed_weight(weight, *products, ctx.scale) if ctx.needs_input_grad[0] else None
        return for_x, None, None, None, *grads


class _Hadamard(torch.autograd.Function):
    """`hadamard` that keeps neither of its two products."""

    @staticmethod
    def forward(ctx: Any, up1: Tensor, down1: Tensor, up2: Tensor, down2: Tensor) -> Tensor:
        ctx.save_for_backward(up1, down1, up2, down2)
        return hadamard(Factors(up1, down1), Factors(up2, down2))

    @staticmethod
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


def _pair(tensors: Sequence[Tensor]) -> tuple[Factors, Factors]:
    up1, down1, up2, down2 = tensors
    return Factors(up1, down1), Factors(up2, down2)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])
