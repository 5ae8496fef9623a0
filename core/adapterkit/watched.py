"""Watched: noticing that tensors have changed since something was made from them."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter, is_
from typing import Any

from torch import Tensor, nn

from adapterkit.shared import SharedView

_version = attrgetter("_version")


class Watched:
    """Some modules' own attributes (`training`, a scaling), and the parameters, buffers and modules in them, as of now.

    The tensors that they share with others count as theirs.

    A tensor changes by being written to (its version counter), by having its data replaced, as `.to(...)` does
    (its address), or by another being put in its place (its identity). Not seen is what torch itself does not count:
    a write through `.data` or a numpy view.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.modules = modules
        views = {id(v): v for m in modules for v in vars(m).values() if isinstance(v, SharedView)}.values()
        held = [m for top in (*modules, *(view.module for view in views)) for m in top.modules()]
        groups = [*map(vars, views), *(g for m in held for g in (m._parameters, m._buffers, m._modules))]
        self.places: list[tuple[dict[str, Any], str]] = [(g, n) for g in groups for n in g]
        self.parts = self._now()
        self.tensors: list[Tensor] = [part for part in self.parts if isinstance(part, Tensor)]
        # As long as these hold the memory, no other tensor can have its address.
        self.memory = [tensor.untyped_storage() for tensor in self.tensors]
        # Those made in `torch.inference_mode` do not count their changes.
        self.countable = not any(tensor.is_inference() for tensor in self.tensors)
        self.attributes = self._attributes()
        self.state = self._state() if self.countable else None

    def unchanged(self) -> bool:
        """Whether all is as it was."""
        if not self.countable or not all(map(is_, self._now(), self.parts)) or self._state() != self.state:
            return False
        attributes = self._attributes()
        return len(attributes) == len(self.attributes) and all(map(is_, attributes, self.attributes))

    @property
    def learns(self) -> bool:
        """Whether one of the tensors is to get a gradient."""
        return any(tensor.requires_grad for tensor in self.tensors)

    def _now(self) -> list[Any]:
        return [group.get(name) for group, name in self.places]

    def _attributes(self) -> list[Any]:
        return [value for module in self.modules for value in vars(module).values()]

    def _state(self) -> tuple[list[int], list[int]]:
        return list(map(_version, self.tensors)), list(map(Tensor.data_ptr, self.tensors))
