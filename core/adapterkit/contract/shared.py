"""Shared: what an adapter has at the model itself, one for all its layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from adapterkit.contract.layers import AdapterLayer
from adapterkit.contract.target import Target
from adapterkit.errors import PluginError


class Shared(nn.Module):
    """What all layers of one adapter have in common: tensors, a term of the loss, a step of training.

    The layers have it as `self.shared` and read `self.shared.<name>` in each call, because `.to(...)` replaces tensors.
    It lives under `adapter_shared.<adapter>` at the model. A `Parameter` is trained and in the file. A persistent
    buffer is fixed and in the file, whose value wins. A buffer that is not persistent is made again by `setup` and is
    never in a file. Adapters whose shared tensors are all buffers, and equal, use one copy: change none in place.
    """

    config: Any

    def __init__(self, targets: Sequence[Target], config: Any, root: Target) -> None:
        super().__init__()
        self.__dict__["config"] = config
        self.setup(targets, config, root)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "forward" in vars(cls):
            raise PluginError(
                f"{cls.__name__}.forward: the model's own call cannot be replaced yet. Do the work in the layers."
            )

    def setup(self, targets: Sequence[Target], config: Any, root: Target) -> None:
        """Make what is shared, before any layer. Called once: when an adapter is added, loaded or combined.

        Args:
            targets: every layer that the adapter will change, with sizes, paths and weights.
            root: the model. `root.new(...)` makes parameters; `root.dtype` is the widest dtype of the targets and
                `root.device` their device; `root.file` has the file's shared tensors, at load.
        """

    def penalty(self, layers: Mapping[str, AdapterLayer]) -> Tensor | float:
        """A term of the loss, which `ak.penalty(model)` gives. `layers` has the adapter's layers by path."""
        return 0.0

    def step(self, number: int, layers: Mapping[str, AdapterLayer]) -> None:
        """Called by `adapters.step()`: after `optimizer.step()` and before `zero_grad()`, so the gradients are there.

        Args:
            number: how many steps the adapter has made, this one included.
        """

    def equals(self, other: nn.Module) -> bool:
        """Whether both have nothing but buffers, with the same names, values, dtypes and devices."""
        if type(self) is not type(other) or any(True for part in (self, other) for _ in part.parameters()):
            return False
        ours, theirs = dict(self.named_buffers()), dict(other.named_buffers())
        return ours.keys() == theirs.keys() and all(_same(tensor, theirs[name]) for name, tensor in ours.items())


def shared_tensors(shared: Shared | None) -> dict[str, Tensor]:
    """What a file holds of it: parameters and persistent buffers, by name."""
    return {} if shared is None else shared.state_dict(keep_vars=True)


def _same(one: Tensor, other: Tensor) -> bool:
    if one.is_meta or one.device != other.device or one.dtype != other.dtype:
        return False
    return torch.equal(one, other)
