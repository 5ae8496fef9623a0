"""The places of tensors in modules, and giving them other tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from adapterkit.errors import StateError
from adapterkit.tensors.distributed import whole
from adapterkit.tensors.interrupts import uninterrupted
from adapterkit.tensors.offload import is_hooked


@dataclass(slots=True)
class Slot:
    """The place of one parameter or buffer. `key` is its name in messages."""

    owner: nn.Module
    name: str
    key: str = ""

    @property
    def tensor(self) -> Tensor:
        """What is there now."""
        found: Tensor | None = {**self.owner._buffers, **self.owner._parameters}[self.name]
        assert found is not None
        return found

    def assign(self, value: Tensor) -> None:
        """Put `value` there without a copy. In the place of a parameter it becomes one, unless it is one already."""
        if self.name not in self.owner._parameters:
            self.owner._buffers[self.name] = value
        elif isinstance(value, nn.Parameter):
            self.owner._parameters[self.name] = value
        else:
            self.owner._parameters[self.name] = nn.Parameter(value, requires_grad=self.tensor.requires_grad)


def module_slots(module: nn.Module, *, non_persistent: bool = False) -> list[tuple[str, Slot]]:
    """Every parameter and persistent buffer of a module, by its name there; a shared module's by its first name.

    Args:
        non_persistent: the other buffers too.
    """
    found: list[tuple[str, Slot]] = []
    for path, owner in module.named_modules():
        prefix = f"{path}." if path else ""
        own = {**owner._parameters, **owner._buffers}
        gone = () if non_persistent else owner._non_persistent_buffers_set
        found += [(prefix + n, Slot(owner, n)) for n, tensor in own.items() if tensor is not None and n not in gone]
    return found


def apart(value: Tensor, taken: set[int]) -> Tensor:
    """The tensor, or a copy of it if it is a part of other memory, or of memory that is taken.

    A file may hold one tensor under two keys, or a method read two of its tensors from one; training one of them must
    not change the other. Kernels also round differently if a tensor is not aligned.
    """
    storage = value.untyped_storage()
    if storage.nbytes() > value.nbytes or storage.data_ptr() in taken:
        value = value.clone()
    taken.add(value.untyped_storage().data_ptr())
    return value


def put(values: Sequence[tuple[Slot, Tensor]]) -> None:
    """Copy tensors into parameters and buffers of their shapes that are in use, all or none.

    Raises:
        StateError: one of them is offloaded by accelerate. Nothing is written then.
    """
    taken: set[int] = set()
    ready: list[tuple[Slot, Tensor]] = []  # what may fail, as memory may be full, comes before any write
    for (slot, _), tensor in zip(values, whole([tensor for _, tensor in values]), strict=True):
        own = slot.tensor
        if own.is_meta and is_hooked(slot.owner):
            raise StateError(
                f"{slot.key!r} is offloaded by accelerate, so nothing can be written there. Load the adapter first and "
                "offload the model then, or load it under another name."
            )
        ready.append((slot, apart(tensor.to(own.dtype).contiguous(), taken) if own.is_meta else tensor.to(own)))
    with torch.no_grad(), uninterrupted():
        for slot, tensor in ready:
            if slot.tensor.is_meta:
                slot.assign(tensor)
            else:
                slot.tensor.copy_(tensor)
