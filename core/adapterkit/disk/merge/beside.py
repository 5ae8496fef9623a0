"""The files beside the weights: copied, and changed only where the merge makes them untrue."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from adapterkit.disk.checkpoint import Checkpoint
from adapterkit.disk.merge.layout import FileLayout
from adapterkit.disk.merge.staging import write_durably
from adapterkit.disk.skeletons import CONFIG
from adapterkit.errors import CheckpointError
from adapterkit.files import CONFIG_FILE
from adapterkit.merging import FLAG
from adapterkit.model import LabelSet

MANIFEST = "adapterkit_merge.json"
_WEIGHTS = (
    *(".safetensors", ".index.json", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx"),
    *(".onnx_data", ".ot", ".tflite", ".pkl", ".npz", ".mlmodel", ".mlpackage"),
)


def others(base: Path, checkpoint: Checkpoint) -> tuple[list[str], list[str]]:
    """The files of the base beside its weights that are copied, and those that are not, by their paths in it.

    Not copied are weights, of this and of other formats, adapters, hidden files, and folders behind links.
    """
    own = {*checkpoint.shards, *([checkpoint.index_file.name] if checkpoint.index_file else [])}
    copied: list[str] = []
    left: list[str] = []
    for path in sorted(_files(base)):
        name = path.relative_to(base).as_posix()
        if name in own or name == MANIFEST:
            continue
        (left if _is_left(path, name) else copied).append(name)
    return copied, left


def _is_left(path: Path, name: str) -> bool:
    if path.is_dir() or name.startswith(".") or "/." in name:
        return True
    return path.name.endswith(_WEIGHTS) or path.name == CONFIG_FILE


def _files(folder: Path) -> Iterator[Path]:
    for path in folder.iterdir():
        if path.is_dir():
            if path.is_symlink() or path.name.startswith(".") or (path / CONFIG_FILE).exists():
                yield path
            else:
                yield from _files(path)
        else:
            yield path


def copy_others(base: Path, names: list[str], folder: Path) -> None:
    """Copy the files; the content behind a link, not the link."""
    for name in names:
        place = folder / name
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(base / name, place)
        with place.open("rb") as file:
            os.fsync(file.fileno())


def write_config(
    folder: Path, *, architecture: str | None, labels: LabelSet | None, untied: Iterable[tuple[str, ...]]
) -> None:
    """Change the copied `config.json` where it would be untrue."""
    path = folder / CONFIG
    if not path.exists():
        return
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    before = json.dumps(config)
    if architecture is not None and config.get("architectures") != [architecture]:
        config["architectures"] = [architecture]
    for names in untied:
        place = config
        for name in names:
            place = place.setdefault(name, {})
        place[FLAG] = False
    if labels is not None:
        named = {str(i): name for i, name in labels.id2label.items()}
        reverse = {name: i for i, name in labels.id2label.items()}
        config["id2label"], config["label2id"] = named, dict(labels.label2id or reverse)
        config.pop("num_labels", None)  # follows from id2label
        if labels.problem_type is not None or "problem_type" in config:
            config["problem_type"] = labels.problem_type
    if json.dumps(config) != before:
        write_durably(path, (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode())


def write_index(checkpoint: Checkpoint, layouts: list[FileLayout], folder: Path) -> None:
    """The index: the base's, byte for byte, unless tensors were added or have other sizes."""
    if checkpoint.index_file is None or checkpoint.index is None:
        return
    places = {e.name: layout.name for layout in layouts for e in layout.entries}
    sizes = {e.name: e for layout in layouts for e in layout.entries}
    index = dict(checkpoint.index)
    changed = {n for n, e in sizes.items() if n not in checkpoint.entries or checkpoint.entries[n].shape != e.shape}
    content = checkpoint.index_file.read_bytes()
    if changed:
        index["weight_map"] = {**index["weight_map"], **{n: places[n] for n in changed}}
        index["metadata"] = _grown(index.get("metadata"), checkpoint, [sizes[n] for n in changed])
        content = (json.dumps(index, indent=2) + "\n").encode()
    write_durably(folder / checkpoint.index_file.name, content)


def _grown(metadata: object, checkpoint: Checkpoint, changed: list[Any]) -> object:
    if not isinstance(metadata, Mapping):
        return metadata
    grown = dict(metadata)
    for key, measure in (("total_size", "nbytes"), ("total_parameters", "numel")):
        if isinstance(grown.get(key), int):
            before = sum(getattr(checkpoint.entries[e.name], measure) for e in changed if e.name in checkpoint.entries)
            grown[key] += sum(getattr(e, measure) for e in changed) - before
    return grown


def check_config(base: Path) -> dict[str, Any]:
    """The base's `config.json`, or nothing where there is none.

    Raises:
        CheckpointError: it is no JSON object.
    """
    path = base / CONFIG
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is no valid JSON: {error}.") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not a {type(found).__name__}.")
    return found
