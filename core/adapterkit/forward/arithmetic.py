"""The arithmetic of additive layers: what their change adds to an output, in the form that costs least.

Nothing that depends on a parameter's value is kept from one forward to the next. Large matrices that `factors`,
`change` and `merged` build are not kept for the backward either: these functions are pure, so it calls them again.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from adapterkit.contract import AdapterLayer, DenseLayer, twin
from adapterkit.kinds import LayerKind, plus

# What writing or reading an element of a matrix costs, in multiplications inside a matrix product: the ratio of
# arithmetic to memory speed, which differs little between machines. Measured by benchmarks/loha_forms.py.
PASS = 25
# Up to this many tokens `DenseLayer.few` computes the change.
FEW = 4
# From this many multiplications in the layer's own product on, the backward builds matrices again to save memory.
REBUILT = 2**24

Form = Literal["factored", "dense", "whole"]


def add(layer: Any, out: Tensor, x: Tensor, strength: float = 1.0) -> Tensor:
    """`out` with `strength` times what an additive layer adds for `x`, in the wider dtype and not in place."""
    kind: LayerKind = layer.kind
    if drops_rows(layer):
        return plus(out, delta(layer, x), strength)
    drop = layer.dropout if layer.training else 0.0
    if isinstance(layer, DenseLayer):
        found = _dense(layer, x, drop)
        if found is not None:
            return plus(out, found, strength)
    hidden, up, bias, scale = _projected(layer, x, drop)
    scale = scale if strength == 1.0 else scale * strength
    if not isinstance(scale, Tensor):
        return kind.expand_onto(out, hidden, up, bias, scale)
    # Each output has a scale: it goes into the smaller of B and the output.
    if bias is not None or torch.compiler.is_compiling() or (torch.is_grad_enabled() and out.numel() > up.numel()):
        return kind.expand_onto(out, hidden, scale[:, None] * up, None if bias is None else scale * bias)
    return torch.addcmul(out, kind.expand(hidden, up), scale)


def delta(layer: Any, x: Tensor) -> Tensor:
    """What an additive layer adds for the input `x`, by itself."""
    kind, drop = layer.kind, layer.dropout if layer.training else 0.0
    change = _dense(layer, x, drop) if isinstance(layer, DenseLayer) else None
    if change is None:
        hidden, up, bias, scale = _projected(layer, x, drop)
        change = kind.expand(hidden, up, bias) * scale
    if drops_rows(layer):
        change = change * kind.spread(kept_rows(layer, change))
    return change


def drops(layer: AdapterLayer) -> bool:
    """Whether any of the layer's dropouts acts now."""
    return drops_rows(layer) or (layer.training and layer.dropout > 0)


def drops_rows(layer: AdapterLayer) -> bool:
    """Whether rows of the change, or the whole change, may be left out now."""
    return layer.training and (layer.row_dropout > 0 or layer.module_dropout > 0)


def kept_rows(layer: AdapterLayer, like: Tensor) -> Tensor:
    """What training multiplies each row of the change by, `(out,)`: zero where it is dropped."""
    rows = layer.kind.out_features
    keep = (torch.rand(rows, device=like.device) >= layer.row_dropout).to(like.dtype)
    if layer.row_dropout_rescales:
        # Where nothing is left the share is 0, and 0 / 0 must be 0.
        keep = keep / keep.mean().clamp(min=0.5 / rows)
    return keep * (torch.rand(1, device=like.device) >= layer.module_dropout)


def with_weight(layer: DenseLayer, module: nn.Module, base: Any, x: Tensor) -> Tensor | None:
    """The output from one product with `W + dW`; `None` where that is not the cheapest, or `module` is not plain.

    Plain: its own class's forward alone computes it, from a weight and a bias that are ordinary, frozen parameters of
    one exact dtype. Quantised, parametrized, pruned, sharded and offloaded weights are not, nor is a forward that
    someone replaced.
    """
    if drops(layer) or (layer.few is not None and _is_few(layer.kind, x)):
        return None
    if _cheapest(layer, x, weight=True) != "whole" or not layer.kind.computes_plainly(base, module):
        return None
    weight, bias = (module._parameters.get(name) for name in ("weight", "bias"))
    if weight is None or "bias" not in module._parameters or "_hf_hook" in module.__dict__:
        return None
    ordinary = all(p is None or (type(p) is nn.Parameter and not p.requires_grad) for p in (weight, bias))
    # In lower precision `W + dW` is rounded worse than the sum of their products.
    autocast = not x.is_meta and torch.is_autocast_enabled(x.device.type)  # the meta device has no autocast
    exact = x.dtype in (torch.float32, torch.float64) and not autocast
    same = type(x) in (Tensor, nn.Parameter) and all(p.dtype == x.dtype for p in (weight, *layer.parameters()))
    if not (ordinary and exact and same) or torch._C._are_functorch_transforms_active():
        return None
    return _through(layer, x, "whole", 0.0, layer.kind.read(module), bias)


def _projected(layer: Any, x: Tensor, drop: float) -> tuple[Tensor, Tensor, Tensor | None, float | Tensor]:
    """The input through `down` and `mid`, and what is left to do: `up`, `bias` and `scale`."""
    kind, factors = layer.kind, layer.factors()
    up, down, bias, scale, mid = factors.flat()
    vector = mid if mid is not None else scale
    if isinstance(vector, Tensor) and kind.spread(vector).dim() > 1:  # the features are not last
        up, down, bias, scale, mid = factors.folded()
    hidden = kind.project(x, down, drop)
    return hidden if mid is None else hidden * mid, up, bias, scale


def _dense(layer: DenseLayer, x: Tensor, drop: float) -> Tensor | None:
    """What a `DenseLayer` adds; `None`: its factors give that at the least cost, as any other layer's do."""
    if layer.few is not None and not drop and _is_few(layer.kind, x):
        dtype = next((p.dtype for p in layer._parameters.values() if p is not None), x.dtype)
        found: Tensor = layer.few(_rows(x).to(dtype))
        return found.view(*x.shape[:-1], found.shape[-1])
    form = _cheapest(layer, x, weight=False)
    return _through(layer, x, form, drop) if form == "dense" or _rebuilds(layer, x) else None


def _is_few(kind: LayerKind, x: Tensor) -> bool:
    few = not torch.compiler.is_compiling() and kind.is_plain and not kind.lookup
    return few and x.numel() <= FEW * x.shape[-1]


def _cheapest(layer: DenseLayer, x: Tensor, *, weight: bool) -> Form:
    """The cost rule: which form takes the least time at this input, by counting.

    In multiplications beside the layer's own, with `T` places of the output, exact factors of rank `R`, and `PASS` for
    each pass over an element:

    - factored: `R (in + out)` elements are built and read, and each is multiplied `T` times;
    - dense: `in out` elements are built, in three passes and two thin products, and each is multiplied `T` times;
    - whole (`weight`: the layer's own weight can be used): the same building, but no product of its own;
    - what factored and dense give is added to the output, in a pass of `T out` elements.

    Training takes three times as much: the product, its two gradients (of the input and of the change), and the
    building again. `whole` shares the first two with the layer itself, so it saves two of these three products.
    """
    kind, rank = layer.kind, layer.rank
    if rank is None:
        return "whole" if weight else "dense"
    if kind.lookup:
        return "factored"
    if torch.compiler.is_compiling():  # for many tokens; a rule that asks for the input's size would be guarded
        sizes = kind.out_features, kind.in_features
        return "factored" if rank * sum(sizes) < math.prod(sizes) else "dense"
    product = kind.work(x)
    build = (2 * round(rank**0.5) + 3 * PASS) * kind.in_features * kind.out_features
    adding = PASS * product // kind.in_features
    factored = kind.work(x, rank) + 2 * PASS * rank * (kind.in_features + kind.out_features) + adding
    if not weight:
        return "factored" if factored < build + product + adding else "dense"
    trains = torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in layer.parameters()))
    return "factored" if factored < build + (product // 3 if trains else 0) else "whole"


# Matrices that the backward builds again


def _through(
    layer: DenseLayer, x: Tensor, form: Form, drop: float, weight: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """`x` through what the layer builds in this form, and `+ bias`."""
    if _rebuilds(layer, x):
        given = F.dropout(x, drop) if drop else x
        return _Rebuilt.apply(layer, form, given, weight, bias, *layer.parameters())  # type: ignore[no-untyped-call,no-any-return]
    (matrix,) = _built(layer, form, weight)
    return layer.kind.apply_weight(x, matrix, bias, drop)


def _built(layer: DenseLayer, form: Form, weight: Tensor | None) -> tuple[Tensor, ...]:
    """The matrices `(out, in)` that the input goes through, one after the other."""
    if form == "factored":
        up, down, *_ = layer.factors().folded()
        return down, up
    return (layer.change() if weight is None else layer.merged(weight, None)[0],)


def _rebuilds(layer: DenseLayer, x: Tensor) -> bool:
    """Whether what is built is built again in the backward: a large product in training, with the features last."""
    return (
        torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and layer.kind.is_plain
        and not layer.kind.lookup
        and layer.kind.work(x) > REBUILT
        and layer.shared is None  # its parameters are not the layer's
        and "_is_replica" not in layer.__dict__  # DataParallel's have no parameters
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0  # `_Rebuilt` has no forward-mode derivative
    )


class _Rebuilt(torch.autograd.Function):
    """See `_through`. Keeps x, W, `x down^T` and the parameters, and no matrix that the layer built."""

    @staticmethod
    def forward(
        ctx: Any, layer: Any, form: Form, x: Tensor, weight: Tensor | None, bias: Tensor | None, *parameters: Tensor
    ) -> Tensor:
        *first, last = _built(layer, form, weight)
        hidden: list[Any] = [F.linear(x.to(matrix.dtype), matrix) for matrix in first]
        # A snapshot: the backward needs the very parameters, whatever the layer holds by then.
        ctx.layer, ctx.form, ctx.originals = twin(layer, lambda t: t), form, tuple(map(id, parameters))
        ctx.save_for_backward(weight, x, *(hidden or [None]), *parameters)
        return F.linear((hidden[-1] if hidden else x).to(last.dtype), last, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, x, hidden, *parameters = ctx.saved_tensors
        again = torch.is_grad_enabled()  # this backward is differentiated too (`create_graph`)
        # Leaves of this backward's own, so that nothing reaches the parameters but what it returns.
        used = parameters if again else [p.detach().requires_grad_(p.requires_grad) for p in parameters]
        places = dict(zip(ctx.originals, used, strict=True))
        with torch.enable_grad():
            built = _built(twin(ctx.layer, lambda t: places.get(id(t), t)), ctx.form, weight)
        matrices = [(m if again else m.detach()).to(grad.dtype) for m in built]
        inputs = [x.to(grad.dtype)]
        if hidden is not None:  # what was kept has no graph
            inputs.append(F.linear(inputs[0], matrices[0]) if again else hidden.to(grad.dtype))
        of_matrices, needs_x = {}, ctx.needs_input_grad[2]
        for i in reversed(range(len(built))):
            if built[i].requires_grad:
                product = _rows(grad).t() @ _rows(inputs[i])
                of_matrices[built[i]] = product.to(built[i].dtype)
            grad = grad @ matrices[i] if i or needs_x else grad
        learn = [p for p in used if p.requires_grad] if of_matrices else []
        found = iter(
            torch.autograd.grad(
                list(of_matrices), learn, list(of_matrices.values()), allow_unused=True, create_graph=again
            )
            if learn
            else ()
        )
        for_parameters = [next(found, None) if p.requires_grad else None for p in used]
        return None, None, grad.to(x.dtype) if needs_x else None, None, None, *for_parameters


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])
