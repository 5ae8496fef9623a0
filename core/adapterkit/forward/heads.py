"""How an adapter's heads and trained biases compute: their dtypes, and biases that add up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from adapterkit.errors import UsageError
from adapterkit.kinds import LayerKind


def trained_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype to train in, as in PEFT: float32 if `dtype` is half precision or less, which is too coarse."""
    return torch.float32 if dtype.itemsize < 4 else dtype


def check_trained_dtype(dtype: object, *words: str) -> None:
    """Raise `UsageError` unless an adapter's tensors can have this dtype. `None` and the words are allowed too."""
    known = isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize >= 2
    if dtype not in (None, *words) and not known:
        listed = "".join(f"{word!r}, " for word in words)
        raise UsageError(f"dtype = {dtype!r} must be a floating torch.dtype of 16 bits or more, {listed}or None.")


def give_dtypes_back(head: nn.Module, module: nn.Module) -> None:
    """Give a head that replaces `module` for good the dtypes of `module`."""
    known = {name: t.dtype for name, t in (*module.named_parameters(), *module.named_buffers())}
    for name, tensor in (*head.named_parameters(), *head.named_buffers()):
        tensor.data = tensor.data.to(known.get(name, tensor.dtype))


def callable_head(head: nn.Module, module: nn.Module) -> Any:
    """What to call in place of `module`: the head, with casts around it if the two differ in dtype.

    Inputs get the head's dtype, and outputs the dtype that the module's would have. Autocast does the same itself,
    except for a module without floating inputs: an embedding.
    """
    if _narrowest_dtype(head) == _narrowest_dtype(module):
        return head

    def call(*args: Any, **kwargs: Any) -> Any:
        own = _narrowest_dtype(head)
        given = [x.dtype for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.is_floating_point()]
        outside = next((dtype for dtype in given if dtype != own), None) if given else _narrowest_dtype(module)
        device = next(head.parameters()).device.type
        autocast = bool(given) and device != "meta" and torch.is_autocast_enabled(device)
        if own is None or outside is None or autocast:
            return head(*args, **kwargs)

        def cast(value: Any, before: torch.dtype, after: torch.dtype) -> Any:
            return value.to(after) if isinstance(value, Tensor) and value.dtype == before else value

        args, kwargs = tree_map(lambda x: cast(x, outside, own), (args, kwargs))
        return tree_map(lambda x: cast(x, own, outside), head(*args, **kwargs))

    return call


def _narrowest_dtype(module: nn.Module) -> torch.dtype | None:
    """The floating dtype with the fewest bits among the parameters of `module`; `None` without such parameters."""
    # The replicas of DataParallel keep their parameters in an attribute of their own.
    held = (m.__dict__.get("_former_parameters", m._parameters) for m in module.modules())
    found = [p.dtype for parameters in held for p in parameters.values() if p is not None and p.is_floating_point()]
    return min(found, key=lambda dtype: dtype.itemsize, default=None)


class BiasLayer(nn.Module):
    """One adapter's own bias of one module. It adds `own - base` to the output, so those of several adapters add up.

    Args:
        base: the module's bias, and the initial value. A copy is kept, because a merge changes the
            module's bias. On the meta device it has no value yet: the copy is made by `keep_base`.
        trailing: how many dimensions of the output come after the bias's; `-1`: all after the first two.
    """

    base: Tensor | None

    def __init__(self, base: Tensor, trailing: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(base.clone())
        self.register_buffer("base", None if base.is_meta else base.clone(), persistent=False)
        self.trailing = trailing

    def shift(self, bias: Tensor) -> Tensor:
        """`own - base`; `bias` is the module's, which is the base as long as no copy is kept."""
        return self.bias - (bias if self.base is None else self.base)

    def keep_base(self, bias: Tensor) -> None:
        """Keep the module's `bias`, which is about to change, as the base, unless a copy is kept already."""
        if self.base is None:
            self.base = bias.detach().clone()

    def change(self, bias: Tensor, out: Tensor) -> Tensor:
        """`own - base` in a shape that broadcasts over `out`."""
        trailing = out.dim() - 2 if self.trailing < 0 else self.trailing
        shift = self.shift(bias)
        return shift.view(*shift.shape, *(1,) * trailing)


# How many dimensions come after the bias's, for layers without a kind. Exact types: a subclass may lay out otherwise.
_TRAILING: Mapping[type[nn.Module], int] = {
    **dict.fromkeys((nn.Linear, nn.Bilinear, nn.LayerNorm), 0),
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.GroupNorm), -1),
    **dict.fromkeys((nn.ConvTranspose1d, nn.InstanceNorm1d), 1),
    **dict.fromkeys((nn.ConvTranspose2d, nn.InstanceNorm2d), 2),
    **dict.fromkeys((nn.ConvTranspose3d, nn.InstanceNorm3d), 3),
}


def bias_place(cls: type[nn.Module], kind: LayerKind | None) -> int | None:
    """How many dimensions of a layer's output come after its bias's (`BiasLayer.trailing`); `None`: unknown."""
    if kind is not None:
        return kind.spread(torch.empty(kind.out_features, device="meta")).dim() - 1
    return _TRAILING.get(cls)
