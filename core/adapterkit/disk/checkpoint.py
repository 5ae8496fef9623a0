"""Checkpoint: the safetensors files of a model, known by their headers, and the model's names for their tensors."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from adapterkit.contract import empty_layer
from adapterkit.door import json_object, read_small
from adapterkit.errors import CheckpointError, unknown
from adapterkit.files import Entry, MappedFiles, Shard, read_header
from adapterkit.formats import CONFIG_FILE, in_order, renaming

# Names that transformers and diffusers give a model's weights.
_INDEX_SUFFIX = ".safetensors.index.json"
WEIGHTS_FILES = (
    *("model.safetensors", f"model{_INDEX_SUFFIX}"),
    *("diffusion_pytorch_model.safetensors", f"diffusion_pytorch_model{_INDEX_SUFFIX}"),
)
# The index of a whole pipeline of diffusers, whose models are in folders below.
PIPELINE = "model_index.json"
# What begins the names of the diffusion model in a file of a whole pipeline under its original names.
_ORIGINAL = "model.diffusion_model."
# Modules with a matrix that is a table of rows, by the last part of their path.
_TABLES = re.compile(r"(?:\w+_)?embeddings?(?:_table)?|embed_tokens|wte|wpe|shared")
# No model is deeper.
_DEEPEST = 64


@dataclass(frozen=True)
class Checkpoint:
    """A safetensors checkpoint: one file, or several with an index. Only headers have been read.

    Attributes:
        folder: where its files are.
        shards: the files by name, in the order of their names.
        entries: every tensor by name.
        index_file, index: the index and its content, or `None`.
    """

    folder: Path
    shards: Mapping[str, Shard]
    entries: Mapping[str, Entry]
    index_file: Path | None = None
    index: Mapping[str, Any] | None = None

    @classmethod
    def open(cls, place: str | Path) -> Self:
        """The checkpoint in a folder, of a `.safetensors` file, or of an index.

        Raises:
            CheckpointError: there is no checkpoint, or a header or the index is damaged.
        """
        path = Path(place)
        if path.is_dir():
            path = weights_in(path) or _refuse(path)
        if not path.name.endswith(_INDEX_SUFFIX):
            shard = read_header(path)
            return cls(path.parent, {path.name: shard}, {e.name: e for e in shard.entries})
        index = _read_index(path)
        shards: dict[str, Shard] = {}
        entries: dict[str, Entry] = {}
        for name in sorted(set(index["weight_map"].values())):
            file = path.parent / name
            if not file.is_file():
                raise CheckpointError(f"{path} names {name!r}, which is not there. Fetch all files of the model.")
            shards[name] = read_header(file)
            for entry in shards[name].entries:
                other = entries.setdefault(entry.name, entry)
                if other is not entry:
                    raise CheckpointError(
                        f"{entry.name!r} is in {other.file} and in {file}, so its values are not known. Fetch the "
                        "model again."
                    )
        for tensor, name in index["weight_map"].items():
            if tensor not in entries or entries[tensor].file.name != name:
                raise CheckpointError(f"{path} places {tensor!r} in {name!r}, which does not hold it.")
        return cls(path.parent, shards, entries, path, index)

    def tensor(self, name: str) -> Tensor:
        """One tensor, mapped: pages are read when they are used. Writing to it does not change the file.

        Raises:
            UnknownNameError: there is none of that name.
            CheckpointError: torch has no such dtype.
        """
        if name not in self.entries:
            raise unknown("tensor", name, self.entries)
        return MappedFiles().tensor(self.entries[name])


def weights_in(place: Path) -> Path | None:
    """The file of weights, or the index, that a folder has under a usual name, or alone; of a file, itself."""
    if place.is_file():
        return place
    for name in WEIGHTS_FILES:
        if (place / name).is_file():
            return place / name
    if (place / CONFIG_FILE).is_file() or (place / PIPELINE).is_file():
        return None
    for pattern in (f"*{_INDEX_SUFFIX}", "*.safetensors"):
        found = [path for path in place.glob(pattern) if not path.name.startswith(".")]
        if found:
            return found[0] if len(found) == 1 else None
    return None


def _refuse(folder: Path) -> Path:
    files = sorted(p.name for p in folder.iterdir())
    if CONFIG_FILE in files:
        advice = "It is an adapter; give the model that it was trained on."
    elif PIPELINE in files:
        parts = sorted(str(path.parent) for path in folder.glob("*/config.json"))
        advice = f"It is a whole pipeline. Give the folder of one of its models: {', '.join(parts) or 'none is there'}."
    elif others := [name for name in files if name.endswith((".safetensors", _INDEX_SUFFIX))]:
        advice = f"It holds {', '.join(others)}: give the path of the right one."
    else:
        advice = (
            f"It holds {', '.join(files[:8]) or 'nothing'}. Only safetensors files are read. To convert others, load "
            "the model with its library (transformers, diffusers) and call save_pretrained."
        )
    raise CheckpointError(f"{folder} has neither {' nor '.join(WEIGHTS_FILES[:2])}. {advice}")


def _read_index(path: Path) -> dict[str, Any]:
    index = read_object(path)
    places = index.get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(v, str) for v in places.values()):
        raise CheckpointError(f"{path} is not an index: it needs a 'weight_map' from tensor names to file names.")
    for tensor, file in places.items():
        # The hub's cache keeps files behind links. A path to elsewhere is never right.
        if any(c in file for c in "/\\\0") or not file.endswith(".safetensors"):
            raise CheckpointError(
                f"{path} places {tensor!r} in {file!r}; a shard is a .safetensors file beside the index, without a "
                "path."
            )
    return index


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file."""
    return json_object(read_small(path), path)


class PlainModel(nn.Module):
    """The modules of a checkpoint, made from the names and shapes of its tensors, on the meta device.

    A matrix is a linear layer (or an embedding, by its name), a tensor of three to five dimensions a convolution. It
    has all that adapters in files need to know of a model, but no forward.

    Attributes:
        prefix: what the names in the file have before the paths here.
    """

    prefix = ""

    @classmethod
    def of(cls, checkpoint: Checkpoint, name: str) -> PlainModel:
        """The model of a checkpoint; `name` is what messages call its class.

        Raises:
            CheckpointError: some matrices are stored `(in, out)`, as GPT-2 does, and nothing tells which.
        """
        model: PlainModel = type(name if name.isidentifier() else "Model", (cls,), {})()
        model.prefix = _ORIGINAL if any(key.startswith(_ORIGINAL) for key in checkpoint.entries) else ""
        layers: dict[str, dict[str, Entry]] = {}
        taken = frozenset(dir(nn.Module()))
        for key, entry in checkpoint.entries.items():
            path, _, local = key.removeprefix(model.prefix).rpartition(".")
            parts = path.split(".") if path else []
            usable = len(parts) < _DEEPEST and all((*parts, local)) and taken.isdisjoint((*parts, local))
            if key.startswith(model.prefix) and usable:
                layers.setdefault(path, {})[local] = entry
        for path, held in layers.items():
            weight, bias = held.get("weight"), held.get("bias")
            if weight and bias and len(weight.shape) == 2 and bias.shape == weight.shape[1:] != weight.shape[:1]:
                raise CheckpointError(
                    f"{checkpoint.folder}: '{path}.weight' is stored (in, out), and without a config.json nothing "
                    "tells which others are. Put the model's config.json beside its weights."
                )
        for path in sorted(layers, key=lambda path: path.count(".")):  # outer modules first
            *parts, last = path.split(".")
            outer: nn.Module = model
            for part in parts:
                outer = outer._modules.setdefault(part, nn.Module())  # type: ignore[assignment]
            module = outer._modules.setdefault(last, _layer(last, layers[path])) if path else model
            assert module is not None
            for local, entry in layers[path].items():
                empty = torch.empty(entry.shape, dtype=entry.torch_dtype, device="meta")
                module._parameters[local] = nn.Parameter(empty, requires_grad=False)
        model.eval()
        return model


def _layer(name: str, tensors: Mapping[str, Entry]) -> nn.Module:
    """The module, as a layer of its sort, that has these tensors."""
    shape = tensors["weight"].shape if "weight" in tensors else ()
    if len(shape) == 2 and "bias" not in tensors and _TABLES.fullmatch(name):
        return nn.Embedding(*shape, device="meta")
    if 2 <= len(shape) <= 5 and 0 not in shape:
        return empty_layer(*shape)
    return nn.Module()


def match_names(model: nn.Module, names: Iterable[str]) -> tuple[dict[str, str], dict[str, tuple[str, ...]]]:
    """Match a checkpoint's names with a model's as transformers does when it loads.

    Names may have been changed since (`gamma` for `weight`), may lack the base model's prefix (`"bert."`) or have it
    where the model does not, and several tensors may become one or one several.

    Returns:
        The checkpoint's name for each name in the model's state dict that is one tensor there. And the names of several
        tensors for each that transformers makes of several when it loads, such as stacked experts.
    """
    known = set(model.state_dict(keep_vars=True))
    if isinstance(model, PlainModel):
        return {key: model.prefix + key for key in known & {name.removeprefix(model.prefix) for name in names}}, {}
    rename = renaming(model, known)
    in_file: dict[str, str] = {}
    fused: dict[str, tuple[str, ...]] = {}
    for name in in_order(names):
        found, made = rename(name)
        fused |= {key: (*fused.get(key, ()), name) for key in made if key in known}
        if not made and found in known:
            in_file.setdefault(found, name)
    return in_file, fused
