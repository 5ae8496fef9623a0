"""Checkpoint: a model's safetensors files, known by their headers; tensors are mapped one at a time."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from adapterkit.errors import CheckpointError, unknown
from adapterkit.files import Entry, MappedFiles, Shard, read_header

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_ADAPTER_CONFIG = "adapter_config.json"
_INDEX_SUFFIX = ".safetensors.index.json"
_OTHER_FORMATS = (".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".onnx")

__all__ = ["INDEX_FILE", "WEIGHTS_FILE", "Checkpoint", "Entry", "Shard", "has_weights"]


@dataclass(frozen=True)
class Checkpoint:
    """A safetensors checkpoint: one file, or several with an index. Only headers have been read.

    Attributes:
        folder: where its files are.
        shards: them by name, in the order of their names.
        entries: every tensor by name.
        index_file, index: the index as it stands in its file, or `None`.
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
            CheckpointError: nothing of the sort is there, or a header or the index is damaged.
        """
        path = Path(place)
        if path.is_dir():
            path = _weights_in(path)
        if path.name.endswith(_INDEX_SUFFIX):
            index = _read_index(path)
            names = sorted(set(index["weight_map"].values()))
            shards = {name: _shard(path.parent / name, path) for name in names}
            entries = _gathered(shards)
            _check_index(path, index["weight_map"], shards)
            return cls(path.parent, shards, entries, path, index)
        shard = read_header(path)
        return cls(path.parent, {path.name: shard}, {e.name: e for e in shard.entries})

    @property
    def nbytes(self) -> int:
        """Size of all its files but the index."""
        return sum(shard.size for shard in self.shards.values())

    @property
    def metadata(self) -> dict[str, str]:
        """What the headers' metadata say; of several files the first's word counts."""
        found: dict[str, str] = {}
        for shard in self.shards.values():
            found = {**shard.metadata, **found}
        return found

    def tensor(self, name: str) -> Tensor:
        """One tensor, mapped: pages are read when they are used, and go when it goes.

        Writing to it changes the tensor alone, not the file.

        Raises:
            UnknownNameError: there is none of that name.
            CheckpointError: torch has no such dtype.
        """
        entry = self.entries.get(name)
        if entry is None:
            raise unknown("tensor", name, self.entries)
        return MappedFiles().tensor(entry)


def has_weights(folder: Path) -> bool:
    """Whether there is a checkpoint in the folder, under its usual name; not whether it can be read."""
    return any((folder / name).is_file() for name in (WEIGHTS_FILE, INDEX_FILE))


def _weights_in(folder: Path) -> Path:
    for name in (WEIGHTS_FILE, INDEX_FILE):
        if (folder / name).is_file():
            return folder / name
    files = sorted(p.name for p in folder.iterdir())
    own = [n for n in files if n.endswith((".safetensors", _INDEX_SUFFIX))]
    others = [n for n in files if n.endswith(_OTHER_FORMATS)]
    if _ADAPTER_CONFIG in files:
        advice = "It is an adapter; give the model that it was trained on."
    elif own:
        advice = f"There is {', '.join(own)}: give the path of the one that is meant."
    elif others:
        advice = (
            f"There is {', '.join(others)}; only safetensors files are read. Convert it: load the model with "
            "transformers and call save_pretrained."
        )
    else:
        advice = f"It holds {', '.join(files[:8]) or 'nothing'}."
    raise CheckpointError(f"{folder} has neither {WEIGHTS_FILE} nor {INDEX_FILE}. {advice}")


def _read_index(path: Path) -> dict[str, Any]:
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is no valid JSON: {error}.") from error
    places = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(places, dict) or not places or not all(isinstance(v, str) for v in places.values()):
        raise CheckpointError(f"{path} is no index: it needs a 'weight_map' from tensor names to file names.")
    for tensor, file in places.items():
        # A link to elsewhere is how the hub's cache keeps files; a path to elsewhere is nothing an index may ask for.
        if file in ("", ".", "..") or any(c in file for c in "/\\\0") or not file.endswith(".safetensors"):
            raise CheckpointError(
                f"{path} places {tensor!r} in {file!r}; a shard is a .safetensors file beside the index, without a "
                "path."
            )
    found: dict[str, Any] = index
    return found


def _shard(file: Path, index: Path) -> Shard:
    if not file.is_file():
        raise CheckpointError(f"{index} names {file.name!r}, which is not there. Fetch it, and any other that lacks.")
    return read_header(file)


def _gathered(shards: Mapping[str, Shard]) -> dict[str, Entry]:
    found: dict[str, Entry] = {}
    for shard in shards.values():
        for entry in shard.entries:
            other = found.setdefault(entry.name, entry)
            if other is not entry:
                raise CheckpointError(f"{entry.name!r} is in {other.file} and in {entry.file}. Only one can be meant.")
    return found


def _check_index(path: Path, places: Mapping[str, str], shards: Mapping[str, Shard]) -> None:
    held = {name: {e.name for e in shard.entries} for name, shard in shards.items()}
    for tensor, file in places.items():
        if tensor not in held[file]:
            raise CheckpointError(f"{path} places {tensor!r} in {file!r}, which does not hold it.")
