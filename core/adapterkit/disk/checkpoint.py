"""Checkpoint: the safetensors files of a model, known by their headers, and which of its tensors each holds."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from torch import Tensor, nn

from adapterkit.errors import CheckpointError, unknown
from adapterkit.files import Entry, MappedFiles, Shard, read_header

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_ADAPTER_CONFIG = "adapter_config.json"
_INDEX_SUFFIX = ".safetensors.index.json"
_OTHER_FORMATS = (".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".onnx")

__all__ = ["INDEX_FILE", "WEIGHTS_FILE", "Checkpoint", "Entry", "Names", "Shard", "has_weights", "match_names"]


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


@dataclass(frozen=True)
class Names:
    """The names of a checkpoint's tensors, beside those of the model that it is loaded into.

    Attributes:
        of_model: for each name in the checkpoint the name in the model's state dict, where it is one tensor there.
        in_file: the reverse.
        fused: tensors of the model that are made at loading from others, such as experts that are stacked, with the
            names of those in the checkpoint.
        ignored: names in the checkpoint that belong to nothing in the model.
    """

    of_model: Mapping[str, str]
    in_file: Mapping[str, str]
    fused: Mapping[str, tuple[str, ...]]
    ignored: tuple[str, ...]


def match_names(model: nn.Module, names: Iterable[str]) -> Names:
    """Match a checkpoint's names with a model's as transformers does when it loads.

    Names may have been changed since (`gamma` for `weight`), may lack the base model's prefix (`"bert."`) or have it
    where the model does not, and several tensors may become one or one several.
    """
    known = set(model.state_dict(keep_vars=True))
    rename = _renaming(model, known)
    of_model: dict[str, str] = {}
    in_file: dict[str, str] = {}
    fused: dict[str, list[str]] = {}
    ignored = []
    for name in _in_loading_order(names):
        found, made = rename(name)
        for key in made:
            if key in known:
                fused.setdefault(key, []).append(name)
        if made:
            continue
        if found not in known or found in in_file:
            ignored.append(name)
        else:
            of_model[name], in_file[found] = found, name
    return Names(of_model, in_file, {k: tuple(v) for k, v in fused.items()}, tuple(ignored))


def _in_loading_order(names: Iterable[str]) -> list[str]:
    """As transformers sorts them: some of its renamings depend on what came before."""
    try:
        return sorted(names, key=importlib.import_module("transformers.core_model_loading").dot_natural_key)
    except (ModuleNotFoundError, AttributeError):
        return sorted(names)


# From a name in the checkpoint to one in the model, and to those in the model that it is converted into.
Renaming = Callable[[str], tuple[str, list[str]]]


def _renaming(model: nn.Module, known: set[str]) -> Renaming:
    prefix = getattr(model, "base_model_prefix", "")
    try:
        loading = importlib.import_module("transformers.core_model_loading")
        mapping = importlib.import_module("transformers.conversion_mapping")
    except ModuleNotFoundError:  # before transformers 5
        return lambda name: (_with_prefix(_old_renamed(model, name), prefix, known), [])
    if not hasattr(model, "config"):
        return lambda name: (name, [])
    conversions = mapping.get_model_conversion_mapping(model)
    renamings = [c for c in conversions if isinstance(c, loading.WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, loading.WeightConverter)]
    by_source = {source: c for c in converters for source in c.source_patterns}

    def rename(name: str) -> tuple[str, list[str]]:
        found, source = loading.rename_source_key(name, renamings, [], None, None)
        found, source = loading.rename_source_key(found, [], converters, None, None)
        if source is not None:
            first, *others = by_source[source].target_patterns
            made = [found, *(found.replace(first, other) for other in others)]
            placed = [_with_prefix(key, prefix, known) for key in made]
            if any(key in known for key in placed):
                return found, placed
        found = _with_prefix(found, prefix, known)
        return (found if found in known else _with_prefix(name, prefix, known)), []

    return rename


def _with_prefix(name: str, prefix: str, known: set[str]) -> str:
    """The name with the base model's prefix added or removed, if that is what the model has."""
    if not prefix or name in known:
        return name
    short = name.removeprefix(f"{prefix}.")
    return next((n for n in (short, f"{prefix}.{name}") if n in known), name)


def _old_renamed(model: Any, name: str) -> str:
    for ending, new in ((".gamma", ".weight"), (".beta", ".bias")):
        if name.endswith(f"LayerNorm{ending}"):
            name = name.removesuffix(ending) + new
    for pattern, new in (getattr(model, "_checkpoint_conversion_mapping", None) or {}).items():
        name, count = re.subn(pattern, new, name)
        if count:
            break
    return name
