"""The parameters and buffers of modules, and which of them share memory, even if they are different objects."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from adapterkit.kinds import is_special
from adapterkit.model import BaseModules


class Place(NamedTuple):
    """A parameter or buffer of a module."""

    module: nn.Module
    name: str


class Span(NamedTuple):
    """The bytes of a tensor: `start` to `end` of a device's memory, or of a storage without values."""

    memory: Any
    start: int
    end: int
    tensor: Tensor


def own(module: nn.Module, name: str) -> Tensor | None:
    """The module's own parameter or buffer of this name; `None` if the module computes it."""
    found: Tensor | None = module._parameters.get(name)
    return module._buffers.get(name) if found is None else found


def put(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Set the module's own parameter or buffer of this name."""
    held: dict[str, Any] = module._parameters if name in module._parameters else module._buffers
    held[name] = tensor


@torch.inference_mode(False)
def put_copy(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Set the module's parameter or buffer to a copy of this tensor in memory of its own; it may be trained later."""
    copy = tensor.detach().clone()
    put(module, name, nn.Parameter(copy, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copy)


def _span(tensor: Tensor) -> Span:
    if is_special(tensor) or tensor.layout is not torch.strided:
        return Span(id(tensor), 0, 1, tensor)
    if tensor.is_meta:
        memory: Any = tensor.untyped_storage()._cdata
        start = int(tensor.storage_offset()) * tensor.itemsize
    else:
        memory, start = tensor.device, tensor.data_ptr()
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    last = int(sum((size - 1) * stride for size, stride in steps)) if tensor.numel() else -1
    return Span(memory, start, start + (last + 1) * tensor.itemsize, tensor)


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same values in the same memory."""
    return one is other or (one.numel() > 0 and _span(one)[:3] == _span(other)[:3] and one.stride() == other.stride())


def overlaps(modules: BaseModules, places: Iterable[Place], heads: Mapping[nn.Module, str]) -> dict[Place, str]:
    """The places that share memory with another tensor, and its key; `"itself"` for expanded tensors.

    Args:
        heads: the adapters' own copies of modules, with their names in messages.
    """
    wanted = set(places)
    known = {**heads, modules.model: ""}
    known |= {module: paths[0] for module, paths in modules.paths_of.items()}
    spans, found = [], {}
    for module, path in known.items():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None or not tensor.numel():
                continue
            place, span = Place(module, name), _span(tensor)
            spans.append((span, place, f"{path}.{name}" if path else name))
            sizes = zip(tensor.shape, tensor.stride() if tensor.layout is torch.strided else (), strict=False)
            if place in wanted and any(size > 1 and not stride for size, stride in sizes):
                found[place] = "itself"
    spans.sort(key=lambda item: (str(item[0].memory), item[0].start))
    begun: list[tuple[Span, Place, str]] = []
    for span, place, key in spans:
        begun = [b for b in begun if b[0].memory == span.memory and b[0].end > span.start]
        for other_span, other, other_key in begun:
            if (place in wanted or other in wanted) and _share(span, other_span):
                found.setdefault(place, other_key)
                found.setdefault(other, key)
        begun.append((span, place, key))
    return {place: key for place, key in found.items() if place in wanted}


def _share(one: Span, two: Span) -> bool:
    """Whether two tensors with overlapping spans share an element. The elements of a span may leave gaps."""
    spans, tensors = (one, two), (one.tensor, two.tensor)
    if one[1:3] == two[1:3] or tensors[0].dtype != tensors[1].dtype:
        return True
    if all(span.tensor.nbytes == span.end - span.start for span in spans):
        return True
    first, size = min(one.start, two.start), tensors[0].itemsize
    taken = torch.zeros((max(one.end, two.end) - first) // size, dtype=torch.bool, device="cpu")
    views = [taken.as_strided(s.tensor.shape, s.tensor.stride(), (s.start - first) // size) for s in spans]
    views[0].fill_(True)
    return bool(views[1].any())
