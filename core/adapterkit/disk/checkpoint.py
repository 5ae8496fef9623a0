"""Checkpoint: the safetensors files of a model, known by their headers, and the model's names for their tensors."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from torch import Tensor, nn

from adapterkit.errors import CheckpointError, unknown
from adapterkit.files import Entry, MappedFiles, Shard, read_header
from adapterkit.formats import CONFIG_FILE, in_order, renaming

WEIGHTS_FILES = ("model.safetensors", "model.safetensors.index.json")
_INDEX_SUFFIX = ".safetensors.index.json"


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


def weights_in(folder: Path) -> Path | None:
    """The file of weights, or the index, that a folder has under the usual name."""
    return next((folder / name for name in WEIGHTS_FILES if (folder / name).is_file()), None)


def _refuse(folder: Path) -> Path:
    files = sorted(p.name for p in folder.iterdir())
    if CONFIG_FILE in files:
        advice = "It is an adapter; give the model that it was trained on."
    elif others := [name for name in files if name.endswith((".safetensors", _INDEX_SUFFIX))]:
        advice = f"It holds {', '.join(others)}: give the path of the right one."
    else:
        advice = (
            f"It holds {', '.join(files[:8]) or 'nothing'}. Only safetensors files are read. To convert others, load "
            "the model with transformers and call save_pretrained."
        )
    raise CheckpointError(f"{folder} has neither {' nor '.join(WEIGHTS_FILES)}. {advice}")


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
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not a {type(found).__name__}.")
    return found


def match_names(model: nn.Module, names: Iterable[str]) -> tuple[dict[str, str], dict[str, tuple[str, ...]]]:
    """Match a checkpoint's names with a model's as transformers does when it loads.

    Names may have been changed since (`gamma` for `weight`), may lack the base model's prefix (`"bert."`) or have it
    where the model does not, and several tensors may become one or one several.

    Returns:
        The checkpoint's name for each name in the model's state dict that is one tensor there. And the names of several
        tensors for each that transformers makes of several when it loads, such as stacked experts.
    """
    known = set(model.state_dict(keep_vars=True))
    rename = renaming(model, known)
    in_file: dict[str, str] = {}
    fused: dict[str, tuple[str, ...]] = {}
    for name in in_order(names):
        found, made = rename(name)
        fused |= {key: (*fused.get(key, ()), name) for key in made if key in known}
        if not made and found in known:
            in_file.setdefault(found, name)
    return in_file, fused
