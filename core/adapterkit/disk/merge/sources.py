"""What goes into a merge: the base's files, a skeleton that agrees with them, and the adapters."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from adapterkit.contract import FILE_PREFIX
from adapterkit.disk.checkpoint import Checkpoint, mapped
from adapterkit.disk.names import Names
from adapterkit.errors import ConfigError
from adapterkit.files import AdapterFiles, Entry, adapter_folder, load_adapter, read
from adapterkit.forward import Active
from adapterkit.model import Adapter, BaseModules, base_parameters

Sources = Mapping[str | Path, float] | Sequence[str | Path] | str | Path
_BASE_LAYER = "base_layer."


@dataclass(frozen=True)
class Source:
    """One adapter to be merged.

    Attributes:
        given: how the caller named it.
        name: what it is called in messages and in the report.
    """

    given: str
    name: str
    weight: float
    place: Path

    def identity(self) -> dict[str, Any]:
        """What tells its files from others, for the journal and for the manifest."""
        files = [self.place] if self.place.is_file() else sorted(self.place.glob("adapter_*"))
        return {
            "source": self.given,
            "weight": self.weight,
            "files": {f.name: {"size": f.stat().st_size, "sha256": sha256(f)} for f in files if f.is_file()},
        }


def sha256(file: Path) -> str:
    """The hash of a file."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def checked_sources(adapters: Sources) -> list[Source]:
    """The adapters that a caller named, found, and each with a name of its own.

    Raises:
        ConfigError: none, or a weight that is no number.
        CheckpointError: one that is not there.
    """
    if isinstance(adapters, str | Path):
        adapters = [adapters]
    weights = dict(adapters) if isinstance(adapters, Mapping) else dict.fromkeys(adapters, 1.0)
    if not weights or len(weights) < len(adapters):
        raise ConfigError(f"merge_checkpoint needs adapters, each once, not {adapters!r}.")
    found: list[Source] = []
    for given, weight in weights.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not abs(weight) < float("inf"):
            raise ConfigError(f"The weight of {str(given)!r} must be a finite number, not {weight!r}.")
        place = adapter_folder(given)
        twice = next((s for s in found if s.place.resolve() == place.resolve()), None)
        if twice is not None:
            raise ConfigError(
                f"{twice.given!r} and {str(given)!r} are one adapter; give it once, with the sum of its weights."
            )
        name = _free_name(place.stem if place.is_file() else place.resolve().name, [s.name for s in found])
        found.append(Source(str(given), name, float(weight), place))
    return found


def _free_name(wanted: str, taken: Sequence[str]) -> str:
    name = base = re.sub(r"[^\w-]", "_", wanted) or "adapter"
    number = 1
    while name in taken:
        number += 1
        name = f"{base}_{number}"
    return name


def load(source: Source, model: nn.Module, component: str | None, checkpoint: Checkpoint, names: Names) -> Adapter:
    """The adapter's layers, heads and biases for the skeleton, with their values; nothing is installed there.

    Raises:
        CheckpointError: it does not fit the model.
    """
    files = _without_base(read(source.place), checkpoint, names)
    cpu = torch.device("cpu")
    adapter, _ = load_adapter(
        model, source.name, files, Active(), strict=True, dtype=None, component=component, device=cpu
    )
    return adapter


def _without_base(files: AdapterFiles, checkpoint: Checkpoint, names: Names) -> AdapterFiles:
    """The files without weights of adapted layers that are the base's: PEFT writes embeddings with every adapter."""
    same = set()
    for key, tensor in files.tensors.items():
        if key.endswith(f"{_BASE_LAYER}weight"):
            place = key.removeprefix(FILE_PREFIX).replace(_BASE_LAYER, "")
            entry = checkpoint.entries.get(names.in_file.get(place, ""))
            if entry is not None and entry.shape == tuple(tensor.shape):
                own = mapped(entry).to(tensor.dtype)
                same |= {key} if torch.equal(own, tensor) else set()
    return dataclasses.replace(files, tensors={k: v for k, v in files.tensors.items() if k not in same})


def give_dtypes(model: nn.Module, checkpoint: Checkpoint, names: Names) -> None:
    """Give a skeleton's parameters the dtypes that the files have, ties kept: adapters and heads follow them."""
    places: dict[nn.Parameter, nn.Parameter] = {}
    for key, parameter in base_parameters(model):
        entry = checkpoint.entries.get(names.in_file.get(key, ""))
        if entry is not None and entry.dtype in _FLOATING and entry.torch_dtype != parameter.dtype:
            fresh = torch.empty_like(parameter, dtype=entry.torch_dtype)
            places.setdefault(parameter, nn.Parameter(fresh, requires_grad=parameter.requires_grad))
    for module in (model, *BaseModules(model).paths_of):
        for name, own in module._parameters.items():
            if own is not None and own in places:
                module._parameters[name] = places[own]


def untie_unequal(model: nn.Module, checkpoint: Checkpoint, names: Names) -> None:
    """Take apart what the config ties and the files hold twice, with other values: transformers loads both as well."""
    groups: dict[nn.Parameter, list[str]] = {}
    for key, parameter in base_parameters(model):
        if key in names.in_file:
            groups.setdefault(parameter, []).append(key)
    for parameter, (first, *others) in groups.items():
        for key in others:
            one, other = (checkpoint.tensor(names.in_file[k]) for k in (first, key))
            if not torch.equal(one, other):
                path, _, local = key.rpartition(".")
                own = nn.Parameter(torch.empty_like(parameter), requires_grad=parameter.requires_grad)
                model.get_submodule(path)._parameters[local] = own


_FLOATING = ("F16", "BF16", "F32", "F64")


def can_be_merged(entry: Entry) -> bool:
    """Whether the tensor holds plain floating numbers, and not a quantised weight."""
    return entry.dtype in _FLOATING
