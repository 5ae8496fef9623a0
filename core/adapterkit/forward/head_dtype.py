"""A head of another dtype than its module: it trains in float32 on a half-precision model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map


def trained_dtype(dtype: torch.dtype) -> torch.dtype:
    """PEFT's rule: half precision, and less, is too coarse to train small numbers in."""
    return torch.float32 if dtype.itemsize < 4 else dtype


def widen(head: nn.Module) -> None:
    """Give a head's parameters and buffers the dtypes they are trained in."""
    head._apply(lambda t: t.to(trained_dtype(t.dtype)) if t.is_floating_point() else t)


def give_dtypes_back(head: nn.Module, module: nn.Module) -> None:
    """Give a head, which becomes the model's own module, the dtypes that the module has."""
    known = {name: t.dtype for name, t in (*module.named_parameters(), *module.named_buffers())}
    for name, tensor in (*head.named_parameters(), *head.named_buffers()):
        tensor.data = tensor.data.to(known.get(name, tensor.dtype))


def callable_head(head: nn.Module, module: nn.Module) -> Any:
    """What is called in place of `module`: the head itself, with casts around it if it has another dtype."""
    same = narrowest(head) == narrowest(module)
    return head if same else CastHead(head, module)


def narrowest(module: nn.Module) -> torch.dtype | None:
    """The floating dtype with the fewest bits among the parameters of `module`, if there is one."""
    found = [p.dtype for m in module.modules() for p in _parameters(m) if p is not None and p.is_floating_point()]
    return min(found, key=lambda dtype: dtype.itemsize, default=None)


def _parameters(module: nn.Module) -> Any:
    # The replicas of DataParallel keep theirs elsewhere.
    held = module.__dict__.get("_former_parameters", module._parameters)
    return held.values()


class CastHead:
    """Calls a head with its inputs in its own dtype, and gives its outputs the dtype that the module's would have.

    Under autocast, which does that itself, only where the module has no floating input: an embedding.
    """

    def __init__(self, head: nn.Module, module: nn.Module) -> None:
        self.head, self.module = head, module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The head's output."""
        own = narrowest(self.head)
        given = [x.dtype for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.is_floating_point()]
        outside = next((dtype for dtype in given if dtype != own), None) if given else narrowest(self.module)
        if own is None or outside is None or (given and _is_autocast(self.head)):
            return self.head(*args, **kwargs)
        args, kwargs = tree_map(lambda x: _cast(x, outside, own), (args, kwargs))
        return tree_map(lambda x: _cast(x, own, outside), self.head(*args, **kwargs))


def _cast(value: Any, before: torch.dtype, after: torch.dtype) -> Any:
    return value.to(after) if isinstance(value, Tensor) and value.dtype == before else value


def _is_autocast(head: nn.Module) -> bool:
    device = next(iter(head.parameters())).device.type
    return device != "meta" and torch.is_autocast_enabled(device)
