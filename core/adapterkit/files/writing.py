"""Writing: a file or an adapter folder that appears under its name when it is complete, or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from adapterkit.errors import ConfigError, SaveError
from adapterkit.files.folder import NEW_CONFIG, PICKLE_FILE, REPLACED_CONFIG, WEIGHTS_FILE
from adapterkit.files.tensors import write_tensors
from adapterkit.formats import CONFIG_FILE

Writer = Callable[[dict[str, Tensor], Path, dict[str, str]], None]
# What tempfile adds to the beginning of a name.
_RANDOM = r"[a-z0-9_]{8}"


def write_folder(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    writer: Writer = write_tensors,
    weights: str = WEIGHTS_FILE,
) -> None:
    """Write an adapter folder so that whenever it is read, it is the old adapter whole or the new one whole.

    Both files are written beside their names first; one rename then decides. A new folder appears when both are in it.
    In a folder without weights the config gets its name first, and the weights make an adapter of it. Else the new
    weights replace the old ones, then the new config replaces the old one. If the configs differ, the weights hold the
    new one too, by which `read_config` knows a save that ended between the two.

    Args:
        writer: writes tensors and metadata to a safetensors file.
        weights: the name of that file.

    Raises:
        SaveError: it cannot be written there; nothing has changed.
    """
    try:
        text = json.dumps(config, indent=2) + "\n"  # unsorted: the first pattern that matches counts
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"The config cannot be written as JSON: {error}. Look at its field 'extra'.") from error
    try:
        folder = folder.resolve()  # behind a link is the folder that changes
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _one_at_a_time(folder):
            if folder.exists():
                _write_into(folder, weights, text, tensors, metadata, writer)
            else:
                place = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
                try:
                    _write_into(place, weights, text, tensors, metadata, writer)
                    # A parent's group holds for what is in it, if the parent says so.
                    place.chmod(0o777 & ~umask() | place.stat().st_mode & stat.S_ISGID)
                    place.rename(folder)
                except BaseException:
                    shutil.rmtree(place, ignore_errors=True)
                    raise
    except (OSError, RuntimeError) as error:
        raise SaveError(
            f"The adapter cannot be saved to {folder}: {error}. What was there before is untouched."
        ) from error


def _write_into(
    folder: Path, name: str, text: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], writer: Writer
) -> None:
    """Put both files into a folder that is there."""
    config, weights, pickle = (folder / file for file in (CONFIG_FILE, name, PICKLE_FILE))
    old = config.read_bytes() if config.is_file() or config.is_dir() else b""  # a folder there is an error, a pipe goes
    older_format = _identity(pickle)
    was_adapter = weights.exists() or older_format is not None
    last, first = (config, weights) if was_adapter else (weights, config)
    change = {}
    if was_adapter and old != text.encode():
        change = {NEW_CONFIG: text, REPLACED_CONFIG: hashlib.sha256(old).hexdigest()}
    with appearing(last) as fresh_last, appearing(first) as fresh_first:
        fresh = {last: fresh_last, first: fresh_first}
        fresh[config].write_text(text, encoding="utf-8")
        writer(dict(tensors), fresh[weights], {"format": "pt", **metadata, **change})
        _finish(fresh_last, last)  # both are on the disk before the first gets its name
    if older_format is not None and _identity(pickle) == older_format:  # not one that came meanwhile
        pickle.unlink()  # others would read the old format


def _identity(file: Path) -> tuple[int, int, int] | None:
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


@contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Let one process (or thread) at a time save to `folder`, or beside it, where the system has such locks.

    Every process of a training run may save to the same folder at the same moment. Who has the lock knows that what
    lies there half written is of a process that was killed.
    """
    try:
        import fcntl

        handle = os.open(folder.parent, os.O_RDONLY)
    except (ImportError, OSError):
        yield
        return
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
            _sweep(folder)
        yield
    finally:
        os.close(handle)


def _sweep(folder: Path) -> None:
    """Delete what killed saves to this folder left: folders beside it, and files in it."""
    new_folder = re.compile(rf"\.{re.escape(folder.name)}\.{_RANDOM}")
    for place in folder.parent.iterdir():
        if new_folder.fullmatch(place.name) and place.is_dir() and not place.is_symlink():
            held = {path.name for path in place.iterdir()}
            if all(_unfinished(name) or name in (CONFIG_FILE, WEIGHTS_FILE) for name in held):
                shutil.rmtree(place, ignore_errors=True)
    for file in folder.iterdir() if folder.is_dir() else ():
        if _unfinished(file.name):
            file.unlink(missing_ok=True)


def _unfinished(name: str) -> bool:
    return re.fullmatch(rf"\.({re.escape(CONFIG_FILE)}|{re.escape(WEIGHTS_FILE)})\.{_RANDOM}", name) is not None


@contextmanager
def appearing(path: Path, *, follow: bool = False) -> Iterator[Path]:
    """A file beside `path` to write to. It gets that name when the block ends, and goes if the block raises.

    It has the mode, and where this user may give it, the owner and the group, of the file that it replaces.

    Args:
        follow: for a place that a user named: replace the file behind a link, and write into a device or a pipe.
    """
    if follow and _takes_bytes(path):
        with tempfile.TemporaryDirectory() as folder:
            fresh = Path(folder) / "file"
            fresh.touch()
            yield fresh
            with fresh.open("rb") as written, path.open("wb") as device:
                shutil.copyfileobj(written, device)
        return
    path = path.resolve() if follow else path
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    fresh = Path(name)
    try:
        yield fresh
        _finish(fresh, path)
        fresh.replace(path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise


def _takes_bytes(path: Path) -> bool:
    """Whether this is a device, a pipe or a socket."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)


def _finish(file: Path, replaced: Path) -> None:
    """Give a file the usual mode, or that and the owner of the file that it replaces, and its bytes to the disk."""
    try:
        old = replaced.lstat()
    except OSError:
        old = None
    if old is None or not stat.S_ISREG(old.st_mode):
        file.chmod(0o666 & ~umask())
    else:
        with suppress(OSError, AttributeError):  # others' files may be replaced, but not made; Windows has no owners
            os.chown(file, old.st_uid, old.st_gid)
        file.chmod(old.st_mode & 0o777)
    with file.open("rb") as opened:
        os.fsync(opened.fileno())


def umask() -> int:
    """The process's mask for the modes of new files."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
