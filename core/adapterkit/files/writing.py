"""Writing: a file or an adapter folder that appears under its name when it is complete, or not at all."""

from __future__ import annotations

import json
import os
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from adapterkit.door import real_path
from adapterkit.errors import ConfigError, SaveError, warn
from adapterkit.files.folder import WEIGHTS_FILE, WEIGHTS_FILES, aside, identity
from adapterkit.files.tensors import write_tensors
from adapterkit.formats import CONFIG_FILE

# The names of files and folders that are not complete yet end so. Those of killed processes stay.
_UNFINISHED = ".adapterkit-unfinished"
# How long a save waits for those of other processes, in seconds, and how long it sleeps in between.
_PATIENCE, _PAUSE = 120, 0.01

Writer = Callable[[dict[str, Tensor], Path, dict[str, str]], None]


def write_folder(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    writer: Writer = write_tensors,
    weights: str = WEIGHTS_FILE,
) -> None:
    """Write an adapter folder so that whenever it is read, it is the old adapter whole or the new one whole.

    A new folder is filled beside its place, and one rename makes it appear. In a folder that is there, both files are
    written under other names first; then one rename, of the weights, decides:

        step                                    the folder shows              adapterkit reads
        1. copy the old config aside            old config, old weights       old
        2. rename the old weights aside         old config                    old, from aside
        3. rename the new config to its name    new config                    old, from aside
        4. rename the new weights to theirs     new config, new weights       new
        5. delete what is aside                 new config, new weights       new

    Other programs refuse a folder without weights, so none of them takes the weights of one version with the config of
    the other, wherever the process is killed. Only steps 3 and 4 are needed where the config stays as it is, or where
    no weights are there before: then other programs, too, see the old version or the new one.

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
        folder = real_path(folder)  # behind a link is the folder that changes
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _one_at_a_time(folder):
            if not folder.exists():
                try:
                    with new_folder(folder) as place:
                        _write_into(place, weights, text, tensors, metadata, writer)
                    return
                except OSError:
                    made = folder / CONFIG_FILE  # without locks, by another process that saves the same meanwhile
                    if not made.is_file() or made.read_text("utf-8", "replace") != text:
                        raise
            while _write_into(folder, weights, text, tensors, metadata, writer):
                pass
    except (OSError, RuntimeError, ValueError) as error:  # ValueError: a path with NUL
        raise SaveError(
            f"The adapter cannot be saved to {folder}: {error}. What was there before is untouched."
        ) from error


def _write_into(
    folder: Path, name: str, text: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], writer: Writer
) -> bool:
    """Put both files into a folder that is there, in the steps of `write_folder`.

    Returns:
        Whether the weights now stand beside the config of another adapter, which another process wrote between the two
        renames, and have to be written again. That happens only without locks.
    """
    config, weights = folder / CONFIG_FILE, folder / name
    old = config.read_bytes() if config.is_file() or config.is_dir() else b""  # a folder there is an error, a pipe goes
    before = {file: identity(folder / file) for file in WEIGHTS_FILES}
    try:
        with _fresh(config) as new_config, _fresh(weights) as new_weights:
            new_config.write_text(text, encoding="utf-8")
            writer(dict(tensors), new_weights, {"format": "pt", **metadata})
            _set_mode_and_sync(new_config, config)
            _set_mode_and_sync(new_weights, weights)
            # The older formats that were there go as well, but not a file that another process wrote meanwhile.
            replaced = [f for f, found in before.items() if found and (f == name or identity(folder / f) == found)]
            if old != text.encode() or replaced not in ([], [name]):
                _set_aside(folder, replaced)
            own = identity(new_weights)
            new_config.replace(config)
            new_weights.replace(weights)
    except BaseException:
        _give_back(folder, had_config=bool(old))
        raise
    _delete_aside(folder)
    return identity(weights) == own and config.read_bytes() != text.encode()


def _set_aside(folder: Path, weights: Sequence[str]) -> None:
    """Rename these weights, with a copy of the config beside them, so that `standing` finds both."""
    if weights:
        _delete_aside(folder)  # of a save that was killed in its last step
    if (folder / CONFIG_FILE).is_file() and not any(map(identity, _aside(folder))):
        _copy(folder / CONFIG_FILE, folder / aside(CONFIG_FILE))
    for file in reversed(weights):  # the one that counts is the last to go
        with suppress(FileNotFoundError):  # without locks, another process may have done so
            (folder / file).replace(folder / aside(file))


def _give_back(folder: Path, *, had_config: bool) -> None:
    """Undo `_set_aside`, and take a new config away, if the new weights are not there."""
    if not any(identity(folder / file) for file in WEIGHTS_FILES):
        if (folder / aside(CONFIG_FILE)).is_file():
            _copy(folder / aside(CONFIG_FILE), folder / CONFIG_FILE)
        elif not had_config:
            (folder / CONFIG_FILE).unlink(missing_ok=True)
        for file in filter(lambda name: identity(folder / aside(name)), WEIGHTS_FILES):
            (folder / aside(file)).replace(folder / file)
    _delete_aside(folder)


def _delete_aside(folder: Path) -> None:
    for file in _aside(folder):
        file.unlink(missing_ok=True)


def _aside(folder: Path) -> list[Path]:
    return [folder / aside(name) for name in (CONFIG_FILE, *WEIGHTS_FILES)]


def _copy(file: Path, place: Path) -> None:
    """Copy a file with its mode and owner, in one step."""
    with _fresh(place) as fresh:
        fresh.write_bytes(file.read_bytes())
        _set_mode_and_sync(fresh, file)
        fresh.replace(place)


@contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Let one process (or thread) at a time save to `folder`, or beside it, where the system has such locks.

    Every process of a training run may save to the same folder at the same moment. What killed ones left goes.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(_locked(folder.parent, wait=_PATIENCE))
        except BlockingIOError:
            warn(
                f"Another process has locked {folder.parent} for {_PATIENCE} seconds: it saves there, or hangs. This "
                "adapter is saved without waiting any longer."
            )
        except OSError:
            pass  # no locks
        for left in (folder.parent / f".{folder.name}{_UNFINISHED}", *folder.glob(f".*{_UNFINISHED}")):
            _sweep(left)
        yield


def _sweep(left: Path) -> None:
    """Delete a file or a folder that a killed process left."""
    with suppress(OSError), _taken(left):
        shutil.rmtree(left) if left.is_dir() else left.unlink()


@contextmanager
def _locked(path: Path, flags: int = os.O_RDONLY, *, wait: float = 0) -> Iterator[int]:
    """A file or a folder, opened and locked; the system unlocks it when this process ends, whatever ends it.

    Args:
        wait: for so many seconds, while another process (or thread) holds the lock.

    Raises:
        BlockingIOError: it still does.
        OSError: it is not there, is a link, or the system has no such locks.
    """
    if sys.platform == "win32":
        raise OSError
    import fcntl

    handle, end = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600), time.monotonic() + wait
    try:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= end:
                    raise
                time.sleep(_PAUSE)
        yield handle
    finally:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_UN)  # also for a process that was forked meanwhile
        os.close(handle)


@contextmanager
def _taken(path: Path, flags: int = os.O_RDONLY) -> Iterator[int]:
    """An unfinished file or folder of this user's, locked, which no process that lives is writing.

    Raises:
        OSError: there is none, or the system has no locks.
    """
    with _locked(path, flags) as handle:
        found = os.fstat(handle)
        ours = stat.S_ISDIR(found.st_mode) or (stat.S_ISREG(found.st_mode) and found.st_nlink == 1)
        if not ours or found.st_uid != os.geteuid() or not os.path.samestat(found, path.lstat()):
            raise BlockingIOError(f"{path} is of another user, or was renamed")
        yield handle


# Files and folders that are not complete yet


@contextmanager
def appearing(path: Path, *, follow: bool = False) -> Iterator[Path]:
    """A file beside `path` to write to. It gets that name when the block ends, and goes if the block raises.

    It has the mode, and where this user may give it, the owner and the group, of the file that it replaces.

    Args:
        follow: for a place that a user named: replace the file behind a link, and write into a device or a pipe.
    """
    if follow and path.exists() and not path.is_file() and not path.is_dir():
        with tempfile.TemporaryDirectory() as folder:
            fresh = Path(folder) / "file"
            fresh.touch()
            yield fresh
            with fresh.open("rb") as written, path.open("wb") as device:
                shutil.copyfileobj(written, device)
        return
    path = real_path(path) if follow else path
    path.parent.mkdir(parents=True, exist_ok=True)
    with _fresh(path) as fresh:
        yield fresh
        _set_mode_and_sync(fresh, path)
        fresh.replace(path)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder beside `folder` to fill. It gets that name when the block ends, and goes if the block raises."""
    place = folder.with_name(f".{folder.name}{_UNFINISHED}")
    _sweep(place)
    try:
        place.mkdir(0o700)
    except FileExistsError:
        place = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    with ExitStack() as stack:
        with suppress(OSError):
            stack.enter_context(_locked(place, wait=_PATIENCE))
        try:
            yield place
            # A parent's group holds for what is in it, if the parent says so.
            place.chmod(0o777 & ~umask() | place.stat().st_mode & stat.S_ISGID)
            place.rename(folder)
        except BaseException:
            shutil.rmtree(place, ignore_errors=True)
            raise


@contextmanager
def _fresh(path: Path) -> Iterator[Path]:
    """An empty file beside `path`. It goes if the block raises.

    Its name is always the same, so that it takes the place of one that a killed process left. The name is random where
    another process is writing that file, and where the system has no locks.
    """
    fresh = path.with_name(f".{path.name}{_UNFINISHED}")
    with ExitStack() as stack:
        try:
            handle = stack.enter_context(_taken(fresh, os.O_CREAT | os.O_RDWR))
            os.fchmod(handle, 0o600)
            os.truncate(handle, 0)
        except OSError as error:
            if not isinstance(error, BlockingIOError):
                with suppress(OSError):
                    fresh.unlink()  # nobody uses this name where there are no locks
            handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
            os.close(handle)
            fresh = Path(name)
        try:
            yield fresh
        except BaseException:
            fresh.unlink(missing_ok=True)
            raise


def _set_mode_and_sync(file: Path, replaced: Path) -> None:
    """Give a file the usual mode, or that and the owner of the file that it replaces, and wait for the disk."""
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
    mask = os.umask(0o077)  # a moment in which files of other threads are closed, not open to all
    os.umask(mask)
    return mask
