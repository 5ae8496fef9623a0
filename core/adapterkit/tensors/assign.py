"""Giving modules other tensors: into parameters that are in use, all or none, or for the length of a block."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from adapterkit.errors import StateError
from adapterkit.tensors.distributed import whole
from adapterkit.tensors.interrupts import uninterrupted
from adapterkit.tensors.offload import is_hooked


@dataclass(slots=True)
class Slot:
    """The place of one parameter or persistent buffer. `key` is its name in messages."""

    owner: nn.Module
    name: str
    key: str = ""

    @property
    def tensor(self) -> Tensor:
        """What is there now."""
        found: Tensor | None = self.owner._parameters.get(self.name)
        if found is None:
            found = self.owner._buffers[self.name]
        assert found is not None
        return found

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


def module_slots(module: nn.Module) -> list[tuple[str, Slot]]:
    """Every parameter and persistent buffer of a module, by its name there; a shared module's by its first name."""
    found: list[tuple[str, Slot]] = []
    _add_slots(found, module, "", set())
    return found


def _add_slots(found: list[tuple[str, Slot]], owner: nn.Module, prefix: str, seen: set[nn.Module]) -> None:
    seen.add(owner)
    for name, parameter in owner._parameters.items():
        if parameter is not None:
            found.append((prefix + name, Slot(owner, name)))
    for name, buffer in owner._buffers.items():
        if buffer is not None and name not in owner._non_persistent_buffers_set:
            found.append((prefix + name, Slot(owner, name)))
    for name, child in owner._modules.items():
        if child is not None and child not in seen:
            _add_slots(found, child, f"{prefix}{name}.", seen)


def apart(value: Tensor, taken: set[int]) -> Tensor:
    """The tensor, or a copy of it if it is a part of other memory, or of memory that is taken.

    A file may hold one tensor under two keys, or a method read two of its tensors from one; training one of them must
    not change the other. And kernels round by where a tensor begins.
    """
    storage = value.untyped_storage()
    if storage.nbytes() > value.nbytes or storage.data_ptr() in taken:
        value = value.clone()
    taken.add(value.untyped_storage().data_ptr())
    return value


def put(values: Iterable[tuple[Slot, Tensor]]) -> None:
    """Copy tensors into parameters and buffers that are in use, all or none; one of another shape is replaced.

    Raises:
        StateError: one of them is offloaded by accelerate.
    """
    values = list(values)
    given = whole([tensor for _, tensor in values])
    values = [(slot, tensor) for (slot, _), tensor in zip(values, given, strict=True)]
    for slot, _ in values:
        if is_hooked(slot.owner) and slot.tensor.is_meta:
            raise StateError(
                f"{slot.key!r} is offloaded by accelerate, so nothing can be written there. Load the adapter first and "
                "offload the model then, or load it under another name."
            )
    undo: list[tuple[Slot, Tensor, Tensor | None]] = []
    taken: set[int] = set()
    with torch.no_grad(), uninterrupted():
        try:
            for slot, tensor in values:
                own = slot.tensor
                copied = own.shape == tensor.shape and not own.is_meta
                undo.append((slot, own, own.clone() if copied else None))
                if copied:
                    own.copy_(tensor)
                else:
                    device = tensor.device if own.is_meta else own.device
                    slot.assign(apart(tensor.to(device, own.dtype).contiguous(), taken))
        except BaseException:
            for slot, own, value in undo:
                slot.restore(own)
                if value is not None:
                    own.copy_(value)
            raise
