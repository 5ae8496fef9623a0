"""The arithmetic of additive layers: what their change adds to an output, in the form that costs least.

Nothing that depends on a parameter's value is kept from one forward to the next. What `factors`, `change` and `merged`
build is not kept for the backward either, where it is large: because they are pure, they are asked again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapterkit.contract import AdapterLayer, DenseLayer, twin
from adapterkit.kinds import Factors, LayerKind

# What writing or reading an element of a matrix costs, in multiplications inside a matrix product: the ratio of
# arithmetic to memory speed, which differs little between machines. Measured by benchmarks/loha_forms.py.
PASS = 25
# Tokens up to which `DenseLayer.few` is asked.
FEW = 4
# From this many multiplications in the layer's own product on, the backward builds matrices again to save memory.
REBUILT = 2**24
# Dtypes in which `W + dW` is rounded no worse than the sum of their products.
_EXACT = (torch.float32, torch.float64)
_TENSORS = (Tensor, nn.Parameter)

Form = Literal["factored", "dense", "whole"]


def add(layer: Any, out: Tensor, x: Tensor) -> Tensor:
    """`out` with what an additive layer adds for the input `x`, in the wider dtype and not in place."""
    kind: LayerKind = layer.kind
    drop = 0.0
    if layer.training:
        if layer.row_dropout or layer.module_dropout:
            return out + delta(layer, x)
        drop = layer.dropout
    if isinstance(layer, DenseLayer):
        found = _add_dense(layer, out, x, drop)
        if found is not None:
            return found
    hidden, up, bias, scale = _projected(kind, x, layer.factors(), drop)
    if not isinstance(scale, Tensor):
        return kind.expand_onto(out, hidden, up, bias, scale)
    # Each output has a scale: it goes into the smaller of B and the output.
    if bias is not None or torch.compiler.is_compiling() or (torch.is_grad_enabled() and out.numel() > up.numel()):
        return kind.expand_onto(out, hidden, scale[:, None] * up, None if bias is None else scale * bias)
    return torch.addcmul(out, kind.expand(hidden, up), scale)


def _add_dense(layer: DenseLayer, out: Tensor, x: Tensor, drop: float) -> Tensor | None:
    """The same for a `DenseLayer`; `None`: by its factors, like any other."""
    if layer.few is not None and not drop and _is_few(layer.kind, x):
        return out + _few(layer, x).view(out.shape)
    if _cheapest(layer, x, weight=False) == "dense":
        return out + _dense(layer, x, drop)
    if not drop and _rebuilds(layer, x):
        return _LowRank.apply(layer, out, x, *layer.parameters())  # type: ignore[no-untyped-call,no-any-return]
    return None


def delta(layer: Any, x: Tensor) -> Tensor:
    """What an additive layer adds for the input `x`, by itself."""
    kind, drop = layer.kind, layer.dropout if layer.training else 0.0
    if isinstance(layer, DenseLayer) and _cheapest(layer, x, weight=False) == "dense":
        change = _dense(layer, x, drop)
    else:
        hidden, up, bias, scale = _projected(kind, x, layer.factors(), drop)
        change = kind.expand(hidden, up, bias) * scale
    if layer.training and (layer.row_dropout or layer.module_dropout):
        change = change * kind.spread(kept_rows(layer, change))
    return change


def drops(layer: AdapterLayer) -> bool:
    """Whether a dropout acts in training."""
    return bool(layer.dropout or layer.row_dropout or layer.module_dropout)


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

    Plain: its own class's forward alone computes it, from a weight and a bias that are ordinary, frozen parameters.
    Quantised, parametrized, pruned, sharded and offloaded weights are not, nor is a forward that someone replaced.
    """
    if layer.training and drops(layer):
        return None
    if (layer.few is not None and _is_few(layer.kind, x)) or _cheapest(layer, x, weight=True) != "whole":
        return None
    if not layer.kind.is_plain_forward(base, module) or not _is_ordinary(layer, module, x):
        return None
    canonical, bias = layer.kind.read(module), module.bias
    if _rebuilds(layer, x):
        return _Dense.apply(layer, x, canonical, bias, *layer.parameters())  # type: ignore[no-untyped-call,no-any-return]
    return layer.kind.apply_weight(x, layer.merged(canonical, None)[0], bias)  # type: ignore[arg-type]


def _is_ordinary(layer: DenseLayer, module: nn.Module, x: Tensor) -> bool:
    """Whether the module's weight and bias are ordinary, frozen and in memory, and all has one exact dtype."""
    own = module._parameters
    weight, bias = own.get("weight"), own.get("bias")
    if "_hf_hook" in module.__dict__ or torch._C._are_functorch_transforms_active():
        return False
    if type(weight) is not nn.Parameter or weight.requires_grad or weight.dtype not in _EXACT:
        return False
    if "bias" not in own or (bias is not None and (type(bias) is not nn.Parameter or bias.requires_grad)):
        return False
    if type(x) not in _TENSORS or x.dtype != weight.dtype or torch.is_autocast_enabled(x.device.type):
        return False
    return all(p.dtype == x.dtype for p in layer.parameters())


def _projected(
    kind: LayerKind, x: Tensor, factors: Factors, drop: float
) -> tuple[Tensor, Tensor, Tensor | None, float | Tensor]:
    """The input through `down` and `mid`, and what is left to do: `up`, `bias` and `scale`."""
    up, down, bias, scale, mid = factors.flat()
    vector = mid if mid is not None else scale
    if isinstance(vector, Tensor) and kind.spread(vector).dim() > 1:  # the features are not last
        up, down, bias, scale, mid = factors.folded()
    hidden = kind.project(x, down, drop)
    return hidden if mid is None else hidden * mid, up, bias, scale


def _is_few(kind: LayerKind, x: Tensor) -> bool:
    few = not torch.compiler.is_compiling() and kind.is_plain and not kind.lookup
    return few and x.numel() <= FEW * x.shape[-1]


def _few(layer: DenseLayer, x: Tensor) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    dtype = next((p.dtype for p in layer._parameters.values() if p is not None), rows.dtype)
    found: Tensor = layer.few(rows if rows.dtype == dtype else rows.to(dtype))
    return found


def _dense(layer: DenseLayer, x: Tensor, drop: float) -> Tensor:
    if _rebuilds(layer, x):
        given = F.dropout(x, drop) if drop else x
        return _Dense.apply(layer, given, None, None, *layer.parameters())  # type: ignore[no-untyped-call,no-any-return]
    return layer.kind.apply_weight(x, layer.change(), None, drop)


def _cheapest(layer: DenseLayer, x: Tensor, *, weight: bool) -> Form:
    """The cost rule: which form takes the least time at this input, by counting.

    In multiplications, beside what the layer does without an adapter, with `T` the places of the output, `R` the rank
    of the exact factors and each pass over an element at `PASS`:

    - factored: `R (in + out)` elements are built and read, and each is multiplied `T` times;
    - dense: `in out` elements are built, in three passes and two thin products, and each is multiplied `T` times;
    - whole (`weight`: the layer's own weight can be used): the same building, but no product of its own;
    - what factored and dense give is added to the output, in a pass of `T out` elements.

    Training takes three times as much of each: two more products, for the gradients of the input and of the change,
    and the building again. Of the products, `whole` has the last only, so a third.
    """
    kind, rank = layer.kind, layer.rank
    if rank is None:
        return "whole" if weight else "dense"
    if kind.lookup:
        return "factored"
    product = kind.work(x)
    build = (2 * round(rank**0.5) + 3 * PASS) * kind.in_features * kind.out_features
    adding = PASS * product // kind.in_features
    factored = kind.work(x, rank) + 2 * PASS * rank * (kind.in_features + kind.out_features) + adding
    if not weight:
        return "factored" if factored < build + product + adding else "dense"
    trains = torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in layer.parameters()))
    return "factored" if factored < build + (product // 3 if trains else 0) else "whole"


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
    )


class _LowRank(torch.autograd.Function):
    """`out + scale * x down^T up^T`. Keeps x, `x down^T` and the parameters, and no matrix that `factors` built."""

    @staticmethod
    def forward(ctx: Any, layer: DenseLayer, out: Tensor, x: Tensor, *parameters: Tensor) -> Tensor:
        up, down, bias, *_ = layer.factors().folded()
        hidden = F.linear(x.to(down.dtype), down)
        ctx.layer, ctx.dtype, ctx.originals = _snapshot(layer), out.dtype, tuple(map(id, parameters))
        ctx.save_for_backward(x, hidden, *parameters)
        return layer.kind.expand_onto(out, hidden, up, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, hidden, *parameters = ctx.saved_tensors
        rebuilt = _Rebuilt(ctx, parameters)
        with torch.enable_grad():
            built = rebuilt.layer.factors().folded()
        up, down = (m.to(grad.dtype) if rebuilt.again else m.detach().to(grad.dtype) for m in built[:2])
        if rebuilt.again:  # what was kept has no graph
            hidden = F.linear(x.to(grad.dtype), down)
        rows, inputs = _rows(grad), _rows(x).to(grad.dtype)
        through = rows @ up
        for_x = (through @ down).view(x.shape).to(x.dtype) if ctx.needs_input_grad[2] else None
        grads: dict[Tensor, Tensor] = {}
        if built.up.requires_grad:
            grads[built.up] = rows.t() @ _rows(hidden).to(grad.dtype)
        if built.down.requires_grad:
            grads[built.down] = through.t() @ inputs
        if built.bias is not None and built.bias.requires_grad:
            grads[built.bias] = rows.sum(0)
        return None, grad.to(ctx.dtype), for_x, *rebuilt.gradients(grads)


class _Dense(torch.autograd.Function):
    """`x (W + dW)^T + bias`, or `x dW^T`. Keeps x, W and the parameters, and no matrix that the layer built."""

    @staticmethod
    def forward(
        ctx: Any, layer: DenseLayer, x: Tensor, weight: Tensor | None, bias: Tensor | None, *parameters: Tensor
    ) -> Tensor:
        ctx.layer, ctx.originals = _snapshot(layer), tuple(map(id, parameters))
        ctx.save_for_backward(x, weight, *parameters)
        matrix = _matrix(layer, weight)
        return F.linear(x.to(matrix.dtype), matrix, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *parameters = ctx.saved_tensors
        rebuilt = _Rebuilt(ctx, parameters)
        with torch.enable_grad():
            matrix = _matrix(rebuilt.layer, weight)
        own = (matrix if rebuilt.again else matrix.detach()).to(grad.dtype)
        for_x = (grad @ own).to(x.dtype) if ctx.needs_input_grad[1] else None
        grads = {matrix: _rows(grad).t() @ _rows(x).to(grad.dtype)} if matrix.requires_grad else {}
        return None, for_x, None, None, *rebuilt.gradients(grads)


class _Rebuilt:
    """The layer as it was in the forward, in a backward: with the very parameters, whatever the layer holds now.

    Attributes:
        again: this backward is differentiated again (`create_graph`).
    """

    def __init__(self, ctx: Any, parameters: list[Tensor]) -> None:
        self.again, self.parameters = torch.is_grad_enabled(), parameters
        # Leaves of this backward's own, so that nothing reaches the parameters but what it returns.
        self.used = parameters if self.again else [p.detach().requires_grad_(p.requires_grad) for p in parameters]
        places = dict(zip(ctx.originals, self.used, strict=True))
        self.layer = twin(ctx.layer, lambda tensor: places.get(id(tensor), tensor))

    def gradients(self, built: dict[Tensor, Tensor]) -> Iterator[Tensor | None]:
        """The parameters' gradients from those of what was built of them."""
        learn = [p for p in self.used if p.requires_grad]
        given = [grad.to(matrix.dtype) for matrix, grad in built.items()]
        found: Any = (
            torch.autograd.grad(list(built), learn, given, allow_unused=True, create_graph=self.again)
            if learn and built
            else [None] * len(learn)
        )
        each = iter(found)
        return (next(each) if p.requires_grad else None for p in self.used)


def _snapshot(layer: DenseLayer) -> Any:
    return twin(layer, lambda tensor: tensor)


def _matrix(layer: DenseLayer, weight: Tensor | None) -> Tensor:
    return layer.change() if weight is None else layer.merged(weight, None)[0]


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])
