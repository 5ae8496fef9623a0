"""Shared tensors: what all targets of one adapter use, in one copy.

Adapters that have equal ones use one copy, if nothing in it is trained: what trains is its adapter's own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Self

import torch
from torch import Tensor, nn


class SharedTensors(nn.Module):
    """The one copy; `.to(...)` moves it with the model."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            if isinstance(tensor, nn.Parameter):
                self.register_parameter(name, tensor)
            else:
                self.register_buffer(name, tensor)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name."""
        return {name: t for name, t in (*self._parameters.items(), *self._buffers.items()) if t is not None}

    def equals(self, other: Self) -> bool:
        """Whether both are fixed, with the same names, and the same values, dtypes and devices under them."""
        if self._parameters or other._parameters:
            return False
        ours, theirs = self.tensors(), other.tensors()
        return ours.keys() == theirs.keys() and all(_same(tensor, theirs[name]) for name, tensor in ours.items())


class SharedView(Mapping[str, Tensor]):
    """What a method's layers hold of the shared tensors: names, looked up anew each time.

    Attributes:
        module: the tensors themselves; adapters whose tensors are equal have one.
    """

    def __init__(self, module: SharedTensors) -> None:
        self.module = module

    def __getitem__(self, name: str) -> Tensor:
        held = self.module._parameters
        tensor = held[name] if name in held else self.module._buffers[name]
        assert tensor is not None
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.module.tensors())

    def __len__(self) -> int:
        return len(self.module.tensors())

    def part(self) -> None:
        """Have a copy of one's own from now on, to be written to."""
        self.module = SharedTensors({name: tensor.clone() for name, tensor in self.module.tensors().items()})

    def join(self, others: Iterable[SharedTensors]) -> None:
        """Use one of the others instead, if it is equal."""
        self.module = next((other for other in others if other.equals(self.module)), self.module)


def _same(one: Tensor, other: Tensor) -> bool:
    if one.is_meta or one.device != other.device or one.dtype != other.dtype:
        return False
    return torch.equal(one, other)
