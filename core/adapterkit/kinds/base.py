"""What a layer kind is: all that the library knows of one sort of layer, whatever the adapter method."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapterkit.kinds.factors import Factors
from adapterkit.tensors import shape_of

# Outputs with at least so many numbers use one fused `addmm`; for smaller ones the reshaping costs more than it saves.
WIDE = 2**16


@dataclass(frozen=True)
class LayerKind(ABC):
    """The kind and the sizes of one layer, without its weights: plain values, so it is copied, pickled and compiled.

    Every kind presents its layer as a linear map with a canonical weight of shape
    `(out_features, in_features)`; methods work on that and never ask what the layer is.

    Attributes:
        name: what users read, such as `"Linear"`.
        module_type: a class of torch's whose forward computes `apply_weight`, `None` where there is none.
        has_weight: whether there is a canonical weight at all: `AnyModule` has none.
        transposed: the layer keeps its weight as `(in, out)`.
        lookup: the input is row numbers, which stand for one-hot vectors (embeddings).
        all_linear: whether `target_modules="all-linear"` takes layers of this kind.
        sample_dims: dimensions of one sample's smallest input, without the batch's.
        vouches: a merge may trust `read` and `write` for every module that `of` takes. Without it a merge proves first
            that the module computes `apply_weight(x, read(module), module.bias)` from a weight and a bias that are its
            own plain parameters or buffers, and is refused where it does not: for weights that are computed, and for
            classes with a `forward` of their own that does something else. A kind for such layers says `True`.
        out_features, in_features: sizes of the canonical weight.
    """

    name: ClassVar[str]
    module_type: ClassVar[type[nn.Module] | None] = None
    has_weight: ClassVar[bool] = True
    transposed: ClassVar[bool] = False
    lookup: ClassVar[bool] = False
    all_linear: ClassVar[bool] = False
    sample_dims: ClassVar[int] = 1
    vouches: ClassVar[bool] = False

    out_features: int
    in_features: int

    @classmethod
    @abstractmethod
    def of(cls, module: nn.Module) -> Self | None:
        """The kind of `module` if it is of this sort, else `None`. Reads shapes, never values."""

    def __str__(self) -> str:
        return f"{self.name}({self.in_features} -> {self.out_features})"

    def fits(self, weight: Tensor) -> bool:
        """Whether a weight, in the layer's own layout, has the size for which this kind was made."""
        return weight.numel() == self.out_features * self.in_features

    def up_shape(self, rank: int) -> tuple[int, ...]:
        """Shape of an up factor as files hold it; it flattens to `(out_features, rank)`."""
        return (self.out_features, rank)

    def down_shape(self, rank: int) -> tuple[int, ...]:
        """Shape of a down factor as files hold it; it flattens to `(rank, in_features)`."""
        return (rank, self.in_features)

    def is_ungrouped(self, down: Tensor) -> bool:
        """Whether this down factor acts across groups, so that no `dW` of the layer's own shape equals its product.

        PEFT's files have such factors for convolutions with groups: they act, but cannot be merged.
        """
        return False

    def ungrouped_shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        """Shapes of the up and the down factor in that form; `None` if the layer has no groups."""
        return None

    def changed(self, module: nn.Module) -> str | None:
        """How the module differs from when this kind was made, to end a sentence `"'path' has ..."`, or `None`.

        A kind that keeps more of a module than sizes overrides this; it is asked in each forward, so it must be fast.
        """
        return None

    def held(self, module: nn.Module) -> tuple[str, ...]:
        """Names of the module's own parameters and buffers that `write` writes to."""
        return ("weight",)

    def read(self, module: nn.Module) -> Tensor:
        """The layer's weight as `(out, in)`: a view where the layout allows one, else a copy."""
        return self.canonical(_own_weight(module).detach())

    def write(self, module: nn.Module, weight: Tensor) -> None:
        """Set the layer's weight from a canonical `(out, in)` tensor, cast to the layer's dtype, in place."""
        own = _own_weight(module)
        own.detach().copy_(self.laid_out(weight, own))

    def canonical(self, weight: Tensor) -> Tensor:
        """A weight in the layer's own layout as `(out, in)`, with gradients: a view where that is possible."""
        return weight.t() if self.transposed else weight

    def laid_out(self, weight: Tensor, own: Tensor) -> Tensor:
        """The reverse of `canonical`: a weight `(out, in)` in the layout of the layer's `own`, with gradients."""
        return weight.t() if self.transposed else weight

    def apply(self, x: Tensor, factors: Factors, dropout: float = 0.0) -> Tensor:
        """What the layer would add to its output if the change that `factors` stand for were added to its weight.

        Never forms `dW`. `x` is the layer's input; `dropout` is the probability of dropping each of its
        entries (the rest is scaled by `1 / (1 - p)`). The result has the factors' dtype, or autocast's.
        """
        up, down, bias, *_ = factors.folded()
        return self.expand(self.project(x, down, dropout), up, bias)

    def project(self, x: Tensor, down: Tensor, dropout: float = 0.0) -> Tensor:
        """The first half of `apply`: the input through a down factor `(r, in)`.

        The result is shaped as the layer's output, with `r` features.
        """
        return F.linear(dropped(x, down.dtype, dropout), down)

    def expand(self, hidden: Tensor, up: Tensor, bias: Tensor | None = None) -> Tensor:
        """The second half of `apply`: what `project` gave through an up factor `(out, r)`."""
        return F.linear(hidden, up, bias)

    def expand_onto(
        self, out: Tensor, hidden: Tensor, up: Tensor, bias: Tensor | None = None, scale: float = 1.0
    ) -> Tensor:
        """`out + scale * expand(hidden, up, bias)`, for an `out` in the shape of the layer's output.

        Small outputs take a product and a scaled sum. Larger ones, where a further tensor of the output's size
        costs more than the views, take one `addmm`, if the dtypes are one and the features are last.
        """
        small = torch.compiler.is_compiling() or out.numel() < WIDE  # in this order: compiled, a size would be guarded
        if small or bias is not None or out.dtype != hidden.dtype or type(self).expand is not LayerKind.expand:
            return plus(out, self.expand(hidden, up, bias), scale)
        rows = out.reshape(-1, out.shape[-1])
        return torch.addmm(rows, hidden.reshape(-1, hidden.shape[-1]), up.t(), alpha=scale).view(out.shape)

    def apply_weight(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, dropout: float = 0.0) -> Tensor:
        """`apply` for a dense change `(out, in)` of the weight, where that is cheaper than its factors."""
        return F.linear(dropped(x, weight.dtype, dropout), weight, bias)

    def computes_plainly(self, forward: Callable[..., Any], module: nn.Module) -> bool:
        """Whether `forward`, the module's or a function of a class, is known to compute `apply_weight`.

        That is `apply_weight(x, read(module), module.bias)`, as the module is now. Where it is not known, a merge runs
        the forward to prove it, which costs a product with a second weight of that size.
        """
        return self.module_type is not None and is_original(forward, self.module_type, "forward")

    def work(self, x: Tensor, rank: int | None = None) -> int:
        """Multiplications that `apply` does for the input `x` with factors of this rank; `None`: `apply_weight`."""
        places = x.numel() // self.in_features
        if rank is None:
            return places * self.out_features * self.in_features
        return places * rank * (self.out_features + self.in_features)

    @property
    def is_plain(self) -> bool:
        """Whether factors act as matrices on the last dimension of the input, as they do in a linear layer."""
        cls = type(self)
        return (cls.apply, cls.project, cls.expand) == (LayerKind.apply, LayerKind.project, LayerKind.expand)

    def spread(self, bias: Tensor) -> Tensor:
        """A `(out,)` bias in the shape that broadcasts over the layer's output."""
        return bias


def dropped(x: Tensor, dtype: torch.dtype, dropout: float) -> Tensor:
    """An input in this dtype, with dropout."""
    x = x if x.dtype == dtype else x.to(dtype)  # this is in every forward, and a call of `to` takes its time
    return F.dropout(x, dropout) if dropout > 0.0 else x


def is_original(function: Any, cls: type, name: str) -> bool:
    """Whether a function or bound method is the method `name` of `cls` that the class was defined with.

    Programs replace methods of torch's classes: `nn.Linear.forward = ...`. Such a function is another module's.
    """
    own = getattr(cls, name)
    same = getattr(function, "__func__", function) is own
    return same and getattr(own, "__globals__", {}).get("__name__") == cls.__module__


def plus(out: Tensor, change: Tensor, scale: float) -> Tensor:
    """`out + scale * change`. Compiled without `alpha`: inductor makes an `addmm` of it and drops the factor."""
    return out + scale * change if torch.compiler.is_compiling() else torch.add(out, change, alpha=scale)


def _own_weight(module: Any) -> Tensor:
    """The module's own weight, also where a property of its class gives another one, such as a trained copy's."""
    try:
        return nn.Module.__getattr__(module, "weight")  # type: ignore[return-value]
    except AttributeError:  # a parametrization's
        return module.weight  # type: ignore[no-any-return]


def is_floating_weight(module: nn.Module, dim: int) -> bool:
    """Whether `module.weight` is a plain floating tensor of `dim` dimensions (quantised ones are not)."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or isinstance(weight, nn.UninitializedParameter | nn.UninitializedBuffer):
        return False
    return weight.is_floating_point() and len(shape_of(weight)) == dim


def is_special(tensor: Tensor) -> bool:
    """Whether the tensor's class defines how it computes, as quantised and sharded tensors do."""
    return type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__


def dense(tensor: Tensor) -> Tensor | None:
    """The tensor itself, or the values of a quantised tensor; `None` if its class does not give them."""
    if not is_special(tensor):
        return tensor
    try:
        found: Tensor = tensor.dequantize()
    except Exception:  # noqa: BLE001 - a stranger's class
        return None
    return None if is_special(found) else found


def runs_forward_of(module: nn.Module, cls: type[nn.Module]) -> bool:
    """Whether `module` computes as `cls` does: a subclass with a `forward` of its own may pad or look up otherwise."""
    own = getattr(type(module), "_adapted_from", type(module))
    return bool(own.forward is cls.forward)
