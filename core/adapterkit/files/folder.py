"""Adapter folders: `adapter_config.json` beside `adapter_model.safetensors`, read as one version."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from adapterkit.door import broken_link, check_tensors_of_file, json_object, read_pickle, read_small
from adapterkit.errors import CheckpointError, ConfigError
from adapterkit.files.tensors import read_tensors
from adapterkit.formats import (
    CONFIG_FILE,
    MLX_WEIGHTS,
    AdapterFiles,
    check_beginning,
    check_config,
    check_content,
    tensors_in,
    what_else,
)

WEIGHTS_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"
# Names of a folder's weights: PEFT's, PEFT's until 0.5, and mlx-lm's. The first that exists counts.
WEIGHTS_FILES = (WEIGHTS_FILE, PICKLE_FILE, MLX_WEIGHTS)
# A save takes longer than a reading: it can come between more than a few of them only by chance.
_READ_ATTEMPTS = 20

Reader = Callable[[Path], tuple[dict[str, Tensor], dict[str, str]]]


def local_path(source: object) -> Path:
    """The path that a caller means, `~` expanded.

    Raises:
        ConfigError: not text or a path, empty, or the home of an unknown user.
    """
    if not isinstance(source, str | os.PathLike) or not str(source):
        shown = f"A {type(source).__name__}" if isinstance(source, nn.Module) else repr(source)
        raise ConfigError(f"{shown} is not a folder: give its path, as text or as a pathlib.Path.")
    try:
        return Path(source).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"{source!r} is not a folder: {error}") from error


def read(place: Path, reader: Reader = read_tensors) -> AdapterFiles:
    """Read an adapter folder, or a bare file of tensors as other programs write them.

    Another process may save to a folder meanwhile. Then the weights are another file afterwards, and both files are
    read again: what comes back is of one version.

    Args:
        reader: reads safetensors files; the default gives each tensor memory of its own.

    Raises:
        CheckpointError: a file is missing, damaged, of another layout or of another format.
    """
    if place.is_file():
        if place.name in (CONFIG_FILE, WEIGHTS_FILE, PICKLE_FILE) and (place.parent / CONFIG_FILE).is_file():
            raise CheckpointError(f"{place} is a file; give the folder that holds {CONFIG_FILE} and {WEIGHTS_FILE}.")
        return AdapterFiles(place, None, *_read_tensors(place, reader))
    for _ in range(_READ_ATTEMPTS):
        before = _version(place)
        try:
            found = _read_folder(place, reader)
        except CheckpointError:
            if _version(place) == before:
                raise
        else:
            if _version(place) == before:
                return found
    raise CheckpointError(f"{place} is being written again and again; load it when that is over.")


def aside(name: str) -> str:
    """The name of a file of an adapter while a save replaces it."""
    return f".{name}.adapterkit-before"


def standing(folder: Path) -> tuple[Path, Path | None]:
    """The config and the weights of the adapter in a folder; `None` if it has no weights.

    Without weights, the files that a save has set aside count: the save has not ended, or was killed.
    """
    for config in (folder / CONFIG_FILE, folder / aside(CONFIG_FILE)):
        names = WEIGHTS_FILES if config.name == CONFIG_FILE else map(aside, WEIGHTS_FILES)
        weights = next((folder / name for name in names if (folder / name).is_file()), None)
        if weights is not None and (config.name == CONFIG_FILE or config.is_file()):
            return config, weights
    return folder / CONFIG_FILE, None


def identity(file: Path) -> tuple[int, int, int] | None:
    """Inode, time and size, which differ between a file and a later one of its name; `None` if no file is there."""
    try:
        found = file.stat()
    except OSError:
        return None
    return (found.st_ino, found.st_mtime_ns, found.st_size) if stat.S_ISREG(found.st_mode) else None


def _version(folder: Path) -> list[tuple[str, object]]:
    """The identities of an adapter's files, which every save changes."""
    return [(file.name, identity(file)) for file in standing(folder) if file is not None]


def _read_folder(folder: Path, reader: Reader) -> AdapterFiles:
    weights = standing(folder)[1]
    if weights is not None:
        tensors, metadata = _read_tensors(weights, reader)
        return AdapterFiles(folder, read_config(folder), tensors, metadata)
    check_config(read_config(folder), folder)
    names = sorted(path.name for path in folder.iterdir())
    others = [n for n in names if n.endswith((".safetensors", ".bin", ".pt", ".pth", ".index.json"))]
    lost = "".join(broken_link(folder / name) for name in names)
    if lost:
        advice = lost.strip()
    elif any(".index." in n or "-of-" in n for n in others):
        advice = "It is sharded, which no adapter format is: join the shards into one file."
    elif others:
        advice = f"Rename the adapter's weights to {WEIGHTS_FILE} if one of these holds them."
    else:
        advice = "Only its config is there."
    raise CheckpointError(f"{folder} has no {WEIGHTS_FILE} (nor {PICKLE_FILE}). Found: {', '.join(names)}. {advice}")


def read_config(folder: Path) -> dict[str, Any]:
    """The JSON object in `adapter_config.json`, or in the file that `standing` finds.

    Raises:
        CheckpointError: it is missing or no JSON object.
    """
    path = standing(folder)[0]
    if not path.exists():
        if not folder.is_dir():
            found = "There is no such folder."
        else:
            names = sorted(p.name for p in folder.iterdir())[:8]
            more = "".join(broken_link(folder / name) for name in names) or what_else(folder)
            found = f"It holds {', '.join(names)}.{more}" if names else "It is empty."
        raise CheckpointError(f"{folder} is not an adapter: it has no {CONFIG_FILE}. {found}")
    content = read_small(path)
    check_beginning(content[:64], path)
    config = json_object(content, path)
    try:
        json.dumps(config, ensure_ascii=False).encode()  # half of a surrogate pair could be neither printed nor saved
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}.") from error
    return config


def _read_tensors(file: Path, reader: Reader) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file, whatever it is called, and its metadata."""
    if not check_content(file):
        return reader(file)
    tensors = tensors_in(read_pickle(file), file)
    check_tensors_of_file(tensors, file)
    return tensors, {}
