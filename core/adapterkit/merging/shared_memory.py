"""Which tensors of a model share memory, even if they are different objects."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from adapterkit.merging.obstacles import own
from adapterkit.model import BaseModules


class Place(NamedTuple):
    """A parameter or buffer of a module."""

    module: nn.Module
    name: str


class _Span(NamedTuple):
    """The bytes of a tensor: `start` to `end` of a device's memory, or of a storage without values."""

    memory: Any
    start: int
    end: int
    tensor: Tensor

    @classmethod
    def of(cls, tensor: Tensor) -> _Span:
        if type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__ or tensor.layout is not torch.strided:
            return cls(id(tensor), 0, 1, tensor)
        if tensor.is_meta:
            memory: Any = tensor.untyped_storage()._cdata
            start = int(tensor.storage_offset()) * tensor.itemsize
        else:
            memory, start = tensor.device, tensor.data_ptr()
        steps = zip(tensor.shape, tensor.stride(), strict=True)
        last = int(sum((size - 1) * stride for size, stride in steps)) if tensor.numel() else -1
        return cls(memory, start, start + (last + 1) * tensor.itemsize, tensor)

    def overlaps(self, other: _Span) -> bool:
        """Whether two tensors with overlapping spans share an element. The elements of a span may leave gaps."""
        one, two = self.tensor, other.tensor
        if (self.start, self.end) == (other.start, other.end) or one.dtype != two.dtype:
            return True
        if all(span.tensor.nbytes == span.end - span.start for span in (self, other)):
            return True
        first = min(self.start, other.start)
        taken = torch.zeros((max(self.end, other.end) - first) // one.itemsize, dtype=torch.bool)
        views = [
            taken.as_strided(span.tensor.shape, span.tensor.stride(), (span.start - first) // one.itemsize)
            for span in (self, other)
        ]
        views[0].fill_(True)
        return bool(views[1].any())


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same values in the same memory."""
    if one is other:
        return True
    spans = _Span.of(one), _Span.of(other)
    return one.numel() > 0 and spans[0][:3] == spans[1][:3] and one.stride() == other.stride()


def overlaps(modules: BaseModules, places: Iterable[Place]) -> dict[Place, str]:
    """The places that share memory with another tensor of the model, and its key; `"itself"` for expanded tensors."""
    wanted = set(places)
    found = {place: "itself" for place in wanted if _is_expanded(own(*place))}
    spans = sorted(_spans(modules, wanted), key=lambda span: (str(span[0].memory), span[0].start))
    begun: list[tuple[_Span, Place, str]] = []
    for span, place, key in spans:
        begun = [b for b in begun if b[0].memory == span.memory and b[0].end > span.start]
        for other_span, other, other_key in begun:
            if (place in wanted or other in wanted) and span.overlaps(other_span):
                found.setdefault(place, other_key)
                found.setdefault(other, key)
        begun.append((span, place, key))
    return {place: key for place, key in found.items() if place in wanted}


def _spans(modules: BaseModules, wanted: Iterable[Place]) -> Iterator[tuple[_Span, Place, str]]:
    known = {place.module: "its own copy" for place in wanted}  # of modules that are not the model's: heads
    known |= {modules.model: "", **{module: paths[0] for module, paths in modules.paths_of.items()}}
    for module, path in known.items():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and tensor.numel():
                yield _Span.of(tensor), Place(module, name), f"{path}.{name}" if path else name


def _is_expanded(tensor: Tensor | None) -> bool:
    return (
        tensor is not None
        and tensor.layout is torch.strided
        and any(size > 1 and not stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    )
