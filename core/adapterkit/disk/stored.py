"""Stored models: the tensors of a checkpoint as modules of a skeleton, one at a time."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import Tensor, nn

from adapterkit.disk.checkpoint import Checkpoint
from adapterkit.disk.names import match_names
from adapterkit.errors import CheckpointError, UnsupportedError


class StoredModel:
    """A checkpoint's values for the modules of a model that is on the meta device.

    The checkpoint may be of the model without its task's head, or with another one.
    """

    def __init__(self, model: nn.Module, folder: Path) -> None:
        self.folder, self.model = folder, model
        self._checkpoint = Checkpoint.open(folder)
        self._names = match_names(model, self._checkpoint.entries)
        self._parameters = dict(model.named_parameters(remove_duplicate=False))
        self._tied: dict[nn.Parameter, list[str]] = {}  # a checkpoint has one of them
        for name, parameter in self._parameters.items():
            self._tied.setdefault(parameter, []).append(name)

    @property
    def dtypes(self) -> set[torch.dtype]:
        """Those of its tensors."""
        return {entry.torch_dtype for entry in self._checkpoint.entries.values()}

    def module(self, path: str) -> nn.Module:
        """A copy of a module with the checkpoint's values, mapped; they go when it goes.

        Raises:
            CheckpointError: the checkpoint lacks some of them.
            UnsupportedError: they are made of several of its tensors when the model is loaded.
        """
        module = copy.deepcopy(self.model.get_submodule(path))
        for local, part in module.named_modules():
            place = f"{path}.{local}" if local else path
            for name, parameter in part._parameters.items():
                if parameter is not None:
                    part._parameters[name] = nn.Parameter(self._tensor(f"{place}.{name}"), requires_grad=False)
            for name, buffer in part._buffers.items():
                if buffer is not None and name not in part._non_persistent_buffers_set:
                    part._buffers[name] = self._tensor(f"{place}.{name}")
        return module

    def _tensor(self, name: str) -> Tensor:
        parameter = self._parameters.get(name)
        tied = [] if parameter is None else self._tied[parameter]
        held = next((self._names.in_file[n] for n in (name, *tied) if n in self._names.in_file), None)
        if held is not None:
            return self._checkpoint.tensor(held)
        if name in self._names.fused:
            raise UnsupportedError(
                f"{self.folder}: {name!r} is made of {len(self._names.fused[name])} tensors of the checkpoint when the "
                "model is loaded. Load both models, and use ak.extract."
            )
        raise CheckpointError(f"{self.folder} has no tensor for {name!r} of a {type(self.model).__name__}.")
