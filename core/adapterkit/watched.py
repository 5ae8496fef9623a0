"""Watched: noticing that tensors have changed since something was made from them."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter, is_
from typing import Any

from torch import Tensor, nn

_version = attrgetter("_version")
_training = attrgetter("training")


class Watched:
    """The parameters and buffers of some modules, and whether these train, as they are now.

    A tensor changes by being written to (its version counter), by having its data replaced, as `.to(...)` does
    (its address), or by another being put in its place (its identity).
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.modules = modules
        groups = [g for top in modules for m in top.modules() for g in (m._parameters, m._buffers)]
        self.places: list[tuple[dict[str, Any], str]] = [(g, n) for g in groups for n, t in g.items() if t is not None]
        self.tensors: list[Tensor] = self._now()
        # Those made in `torch.inference_mode` do not count their changes.
        self.countable = not any(tensor.is_inference() for tensor in self.tensors)
        self.state = self._state() if self.countable else ()

    def unchanged(self) -> bool:
        """Whether all is as it was."""
        return self.countable and all(map(is_, self._now(), self.tensors)) and self._state() == self.state

    @property
    def learns(self) -> bool:
        """Whether one of the tensors is to get a gradient."""
        return any(tensor.requires_grad for tensor in self.tensors)

    def _now(self) -> list[Tensor]:
        return [group[name] for group, name in self.places]

    def _state(self) -> tuple[list[Any], ...]:
        return (
            list(map(_version, self.tensors)),
            list(map(Tensor.data_ptr, self.tensors)),
            list(map(_training, self.modules)),
        )
