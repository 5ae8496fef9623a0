"""The door: files of others are checked here for their kind, their size and their shapes before they are used."""

from __future__ import annotations

import json
import math
import os
import re
import stat
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapterkit.errors import CheckpointError

# JSON files: an index with every tensor of a large model has a tenth of this.
_LARGEST_SMALL = 1 << 26
# torch counts elements and bytes in so many bits, and few of its operations take more dimensions.
_MOST_ELEMENTS, _MOST_DIMENSIONS = 1 << 62, 32
_LONGEST_NAME = 2000
# Adapters of the largest mixtures of experts, two tensors for each expert's matrices, have as many.
_MOST_TENSORS = 150_000
# A file's tensors may share memory, as tied ones do, up to this many times.
_MOST_SHARED = 4
_SLACK_BYTES = 1 << 20


def read_small(path: Path) -> bytes:
    """The bytes of a regular file of at most 64 MiB. A pipe or a device, which may have no end, is not read.

    Raises:
        CheckpointError: it is something else, or cannot be read.
    """
    check_regular(path)
    try:
        size = path.stat().st_size
        if size > _LARGEST_SMALL:
            raise CheckpointError(f"{path} has {size:,} bytes; the limit here is {_LARGEST_SMALL:,}.")
        return path.read_bytes()
    except (OSError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} cannot be read: {error}.") from error


def json_object(content: str | bytes, what: object) -> dict[str, Any]:
    """The JSON object in a text; `what` is what messages call it.

    Raises:
        CheckpointError: it is not valid JSON, or not an object.
    """
    try:
        found = json.loads(content)  # bytes: it knows byte order marks
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{what} is not valid JSON: {error}.") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{what} must hold a JSON object, not a {type(found).__name__}.")
    return found


def check_regular(path: Path) -> None:
    """Raise `CheckpointError` if this is there and not a regular file."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return
    if not stat.S_ISREG(mode):
        raise CheckpointError(f"{path} cannot be read: it is not a file, but a folder, a device or a pipe.")


def check_may_open(path: Path) -> Path:
    """The path; raise `CheckpointError` if it is a folder that this user may not look into."""
    try:
        os.scandir(path).close()
        os.stat(os.path.join(path, "."))  # noqa: PTH116, PTH118 - a Path has no dot at its end
    except PermissionError as error:
        raise CheckpointError(f"{path} cannot be read: you may not open this folder.") from error
    except (OSError, ValueError):  # no folder
        pass
    return path


def real_path(path: Path) -> Path:
    """The path behind all links. Links in a circle stay: `Path.resolve` raises `RuntimeError` for them before 3.13."""
    return Path(os.path.realpath(path))


def broken_link(path: Path) -> str:
    """A sentence about a link that leads nowhere, with a space before it; `""` for anything else."""
    if not os.path.islink(path) or path.exists():  # noqa: PTH114 - Path.is_symlink raises on names that are too long
        return ""
    return f" {path.name} is a link to {path.readlink()}, which is not there. Copy files, not links (cp -L)."


def own_file(path: Path, folder: Path) -> bool:
    """Whether this is a regular file of the folder's own: no device, and no link to elsewhere.

    A snapshot in the hub's cache holds links to the cache's blobs, which are its own.
    """
    found, home = real_path(path), real_path(folder)
    places = [home, *(above.parent / "blobs" for above in home.parents if above.name == "snapshots")]
    return found.is_file() and any(found.is_relative_to(place) for place in places)


def check_count(count: int, file: Path) -> None:
    """Raise `CheckpointError` if a file has more tensors than can be sorted in a reasonable time."""
    if count > _MOST_TENSORS:
        raise CheckpointError(f"{file} has {count:,} tensors; the limit here is {_MOST_TENSORS:,}.")


def check_entry(name: str, shape: Any, file: Path) -> None:
    """Raise `CheckpointError` unless a name of a file's header can be a tensor's, and torch can have its shape."""
    if len(name) > _LONGEST_NAME:
        raise CheckpointError(f"{file}: {name!r} has {len(name):,} characters; the limit here is {_LONGEST_NAME:,}.")
    sizes = shape if isinstance(shape, list) else [None]
    if len(sizes) > _MOST_DIMENSIONS:
        raise CheckpointError(f"{file}: {name!r} has {len(sizes):,} dimensions; the limit here is {_MOST_DIMENSIONS}.")
    if not all(type(size) is int and 0 <= size < _MOST_ELEMENTS for size in sizes) or (
        math.prod(size for size in sizes if size) >= _MOST_ELEMENTS
    ):
        raise CheckpointError(f"{file}: the shape of {name!r} is not one of a tensor.")


def read_pickle(path: Path) -> Any:
    """What `torch.load` reads of a file of tensors; no code is run, and no more memory taken than the file is large.

    Raises:
        CheckpointError: the file is damaged, compressed, or holds something that is not plain data.
    """
    _check_archive(path)
    try:
        with path.open("rb") as opened:  # by its path, torch would go by the suffix
            return torch.load(opened, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read as a file of tensors only: {_reason(error)}") from error


def _check_archive(path: Path) -> None:
    """Refuse a zip archive whose entries are larger than the file: `torch.save` compresses none."""
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError) as error:
        raise CheckpointError(f"{path} is a damaged archive: {error}.") from error
    packed = next((entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED), None)
    if packed is not None or sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise CheckpointError(f"{path} has compressed entries, such as {packed!r}, which torch.save never writes.")


def _reason(error: Exception) -> str:
    """Why torch does not read a file, without its advice on how to run the code in it."""
    text = " ".join(str(error).split())
    name = re.search(r"GLOBAL ([\w.]+)", text)
    if name is not None:
        return f"it holds {name[1]}, which is not data. Code of a file is not run here."
    text = re.split(r"(?i)\.? (?:please file an issue|in pytorch 2|re-running|\(1\)|do it only)|weights_only", text)[0]
    return f"{type(error).__name__}: {text}".rstrip(" :.") + "."


def check_tensors_of_file(tensors: dict[str, Tensor], path: Path) -> None:
    """Raise `CheckpointError` unless these are plain tensors with values, which take no more memory than the file.

    A tensor with a stride of 0 is small in its file and as large as its shape once it is copied.
    """
    check_count(len(tensors), path)
    size, total = path.stat().st_size, 0
    for key, tensor in tensors.items():
        if tensor.is_meta:
            raise CheckpointError(f"{path} holds no values of {key!r}: it was saved from the meta device.")
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested:
            raise CheckpointError(f"{path}: {key!r} is quantized, sparse or nested. Only plain tensors are read.")
        needed = tensor.numel() * tensor.element_size()
        total += needed
        if needed > tensor.untyped_storage().nbytes() or total > _MOST_SHARED * size + _SLACK_BYTES:
            raise CheckpointError(
                f"{path}: {key!r} of shape {tuple(tensor.shape)} is larger than what the file holds of it: its "
                "elements share memory. Save it again, after .contiguous()."
            )
