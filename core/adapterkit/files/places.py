"""Slots: the places for tensors in an adapter's modules, each with its key in a file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from adapterkit.contract import LAYERS, AdapterLayer
from adapterkit.model import Adapter


@dataclass(slots=True)
class Slot:
    """One place for a tensor: a parameter or buffer of some module of an adapter."""

    key: str
    owner: nn.Module
    name: str
    layer: AdapterLayer | None = None

    @property
    def tensor(self) -> Tensor:
        """What is there now."""
        found: Tensor | None = self.owner._parameters.get(self.name)
        if found is None:
            found = self.owner._buffers[self.name]
        assert found is not None
        return found

    def takes(self, tensors: Mapping[str, Tensor], key: str) -> bool:
        """Whether the tensor under `key`, seen beside its layer's others, has a shape that can stand here."""
        if self.tensor.shape == tensors[key].shape:
            return True
        if self.layer is None:
            return False
        local = next(name for name, _ in module_slots(self.layer) if key.endswith("." + name))
        path = key.removesuffix(local)
        names = [name for name, _ in module_slots(self.layer) if path + name in tensors]
        return self.layer.accepts({name: tuple(tensors[path + name].shape) for name in names})

    def assign(self, value: Tensor) -> None:
        """Put `value` there as it is, without a copy."""
        if self.name in self.owner._parameters:
            self.owner._parameters[self.name] = nn.Parameter(value, requires_grad=self.tensor.requires_grad)
        else:
            self.owner._buffers[self.name] = value

    def restore(self, held: Tensor) -> None:
        """Put the very object back that was there before."""
        if isinstance(held, nn.Parameter):
            self.owner._parameters[self.name] = held
        else:
            self.owner._buffers[self.name] = held


def slots(adapter: Adapter) -> dict[str, Slot]:
    """Every tensor of the adapter by its key in a file, PEFT's prefix left out."""
    found: dict[str, Slot] = {}
    for container, path, module in adapter.parts():
        place = path
        if path in adapter.layers and container != LAYERS:
            place = f"{path}.base_layer"
        layer = module if isinstance(module, AdapterLayer) else None
        for local, slot in module_slots(module):
            slot.key, slot.layer = f"{place}.{local}", layer
            found[slot.key] = slot
    if adapter.shared is not None:
        for local, slot in module_slots(adapter.shared.module):
            slot.key = local
            found[local] = slot
    return found


def module_slots(module: nn.Module) -> list[tuple[str, Slot]]:
    """Every parameter and persistent buffer of a module, by its name there; a shared module's by its first name."""
    found: list[tuple[str, Slot]] = []
    _add_slots(found, module, "", set())
    return found


def _add_slots(found: list[tuple[str, Slot]], owner: nn.Module, prefix: str, seen: set[nn.Module]) -> None:
    seen.add(owner)
    for name, parameter in owner._parameters.items():
        if parameter is not None:
            found.append((prefix + name, Slot("", owner, name)))
    for name, buffer in owner._buffers.items():
        if buffer is not None and name not in owner._non_persistent_buffers_set:
            found.append((prefix + name, Slot("", owner, name)))
    for name, child in owner._modules.items():
        if child is not None and child not in seen:
            _add_slots(found, child, f"{prefix}{name}.", seen)


@contextmanager
def stand_ins(layer: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """While the block runs, a layer has other tensors in place of those that `change` changes."""
    held = [(slot, slot.tensor) for _, slot in module_slots(layer)]
    for slot, tensor in held:
        other = change(tensor.detach())
        if other.dtype != tensor.dtype or other.device != tensor.device:
            slot.assign(other)
    try:
        yield
    finally:
        for slot, tensor in held:
            slot.restore(tensor)


def widened(layer: nn.Module, dtype: torch.dtype) -> AbstractContextManager[None]:
    """A layer's parameters in this dtype where theirs has less: factors of half-precision ones would be rounded."""

    def wide(tensor: Tensor) -> Tensor:
        narrow = tensor.is_floating_point() and tensor.dtype.itemsize < dtype.itemsize
        return tensor.to(dtype) if narrow else tensor

    return stand_ins(layer, wide)
