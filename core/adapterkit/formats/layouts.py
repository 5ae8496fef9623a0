"""An adapter as its files hold it, and what its keys say before they are translated."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adapterkit.contract import DOTTED, FLAT, Method, default_registry
from adapterkit.errors import PluginError
from adapterkit.kinds import LayerKind
from adapterkit.model import BaseModules

CONFIG_FILE = "adapter_config.json"
PEFT = "PEFT"
# Programs by the form of their keys, for files without a config. The first form that matches a key counts.
_PROGRAMS = {
    "LyCORIS": re.compile(r"lycoris_"),
    "kohya-ss": re.compile(rf"(?:{'|'.join(FLAT)})_"),
    "diffusers, old names": re.compile(r".*(?:\.processor\.|_lora\.(?:down|up)\.|\.lora_linear_layer\.)"),
    "ComfyUI": re.compile(r"(?:diffusion_model|text_encoders)\."),
    "diffusers": re.compile(rf"(?:{'|'.join(DOTTED)})\."),
}


@dataclass(frozen=True)
class AdapterFiles:
    """What an adapter folder holds; or a file of another program, which has no config.

    Attributes:
        config: the fields of `adapter_config.json`.
        metadata: the header of the safetensors file.
        programs: the programs whose layouts the files had, as far as they were read.
    """

    folder: Path
    config: dict[str, Any] | None
    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    programs: tuple[str, ...] = ()

    def read_as(self, program: str, tensors: dict[str, Tensor]) -> AdapterFiles:
        """The same adapter with the tensors by other names, which this program's layout gave."""
        return dataclasses.replace(self, tensors=tensors, programs=(*self.programs, program))


def beginnings(key: str) -> list[str]:
    """The paths of modules that a key may begin with, the longest first."""
    parts = key.split(".")
    return [".".join(parts[:i]) for i in range(len(parts) - 1, 0, -1)]


def program_of(files: AdapterFiles) -> str:
    """The program whose names an adapter's files have, as far as they tell; `""` for a config that is not PEFT's."""
    if files.config is not None:
        return PEFT if "peft_type" in files.config else ""
    named = (name for name, form in _PROGRAMS.items() if any(map(form.match, files.tensors)))
    return next(named, "PEFT's names without a config")


def layers_of(modules: BaseModules) -> dict[str, LayerKind]:
    """Every layer of the model that can hold an adapter, by the path it is known by."""
    return kinds_of({paths[0]: module for module, paths in modules.paths_of.items()})


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same shapes and dtypes on the meta device, of those keys that can be a tensor's of some module."""
    may_be = [key for key in tensors if all(part and not hasattr(nn.Module, part) for part in key.split("."))]
    return {key: torch.empty_like(tensors[key], device="meta") for key in may_be}


def kinds_of(modules: Mapping[str, nn.Module] | None) -> dict[str, LayerKind]:
    """What each of these modules is, of those that can hold an adapter."""
    kinds = {path: default_registry.kind_of(module) for path, module in (modules or {}).items()}
    return {path: kind for path, kind in kinds.items() if kind is not None}


def layers_in_file(tensors: Mapping[str, Tensor]) -> dict[str, LayerKind]:
    """The layers of another program's file, of any method, by the names that their keys begin with."""
    shapes, found = shapes_of(tensors), dict[str, LayerKind]()
    for method in methods():
        found |= kinds_of(method.layers_in_file(shapes, None))
    return found


def methods() -> Iterator[Method]:
    """The installed methods; `recognise` tells of those that cannot be asked, if nobody else knows the file."""
    for name in default_registry.methods():
        with suppress(PluginError):
            yield default_registry.method(name)
