"""Staging: a folder beside the output that holds what is finished so far, and becomes the output at the end."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from adapterkit.disk.merge.sources import sha256
from adapterkit.errors import SaveError, StateError

JOURNAL, LOCK = ".journal.json", ".lock"


class Staging:
    """The unfinished output.

    Attributes:
        folder: where it is, beside `out`.
        done: size and hash of every file that is finished.
        begun: whether there is something to go on from.
    """

    def __init__(self, out: Path, request: Mapping[str, Any]) -> None:
        self.out, self.request = out, dict(request)
        self.folder = out.with_name(f".{out.name}.partial")
        self.done: dict[str, dict[str, Any]] = {}
        self.begun = False
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder, made if need be, for this process alone.

        Raises:
            StateError: another process merges into the same output.
            SaveError: something else is there.
        """
        if self.folder.is_symlink() or (self.folder.exists() and not self._is_ours()):
            raise SaveError(f"{self.folder} is in the way: it is no unfinished merge. Move it.")
        descriptor = self._take_lock()
        try:
            yield
        finally:
            os.close(descriptor)

    def _is_ours(self) -> bool:
        return self.folder.is_dir() and ((self.folder / LOCK).is_file() or not any(self.folder.iterdir()))

    def _take_lock(self) -> int:
        while True:
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                descriptor = os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
            except FileNotFoundError:  # another run has just become the output
                continue
            try:
                _hold(descriptor)
            except OSError as error:
                os.close(descriptor)
                raise StateError(f"Another process is merging into {self.out}. Wait for it.") from error
            with contextlib.suppress(OSError):
                if os.path.samestat(os.fstat(descriptor), (self.folder / LOCK).stat()):
                    return descriptor
            os.close(descriptor)  # it was moved away with the folder meanwhile

    def begin(self, *, resume: bool) -> None:
        """Empty the folder, or with `resume` keep what is finished and whole.

        Raises:
            StateError: it was begun with other inputs or arguments.
        """
        if resume and (self.folder / JOURNAL).is_file():
            self.done = self._resumed(self.folder / JOURNAL)
        for path in self.folder.iterdir():
            if path.name != LOCK and path.name not in self.done:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        self._write_journal()
        self.begun = True

    def _resumed(self, journal: Path) -> dict[str, dict[str, Any]]:
        try:
            held = json.loads(journal.read_text(encoding="utf-8"))
            request, done = held["request"], held["done"]
            recorded = {str(name): {"size": int(d["size"]), "sha256": str(d["sha256"])} for name, d in done.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise StateError(
                f"{journal} is damaged, so it is not known what is finished. Merge with resume=False to begin anew."
            ) from error
        if request != json.loads(json.dumps(self.request)):
            keys = sorted(k for k in {*request, *self.request} if request.get(k) != self._plain(k))
            raise StateError(
                f"{self.folder} was begun with other inputs or arguments ({', '.join(keys)} differ). Repeat the call "
                "that began it, or merge with resume=False to begin anew."
            )
        return {name: d for name, d in recorded.items() if self._is_whole(name, d)}

    def _plain(self, key: str) -> Any:
        return json.loads(json.dumps(self.request.get(key)))

    def _is_whole(self, name: str, recorded: Mapping[str, Any]) -> bool:
        file = self.folder / name
        if Path(name).name != name or file.is_symlink() or not file.is_file():
            return False
        return bool(file.stat().st_size == recorded["size"] and sha256(file) == recorded["sha256"])

    def finished(self, name: str, size: int, digest: str) -> None:
        """Record that a file is on the disk. May be called by any thread."""
        with self._lock:
            self.done[name] = {"size": size, "sha256": digest}
            self._write_journal()

    def _write_journal(self) -> None:
        text = json.dumps({"request": self.request, "done": self.done}, indent=1)
        write_durably(self.folder / JOURNAL, text.encode())

    def discard(self) -> None:
        """Delete all that was written."""
        shutil.rmtree(self.folder)

    def publish(self, *, overwrite: bool) -> None:
        """Give the folder the output's name, in one step.

        Raises:
            SaveError: there is something of that name now.
        """
        (self.folder / JOURNAL).unlink()
        sync_folder(self.folder)
        if not self.out.exists():
            self.folder.rename(self.out)
        elif not overwrite:
            try:
                self.folder.rename(self.out)  # an empty folder may be replaced
            except OSError as error:
                raise SaveError(f"{self.out} has been made meanwhile. The merged model is in {self.folder}.") from error
        else:
            self._exchange()
        (self.out / LOCK).unlink()  # not before: another run would find the folder free
        shutil.rmtree(self.folder, ignore_errors=True)  # where it changed places: the old output
        sync_folder(self.out.parent)

    def _exchange(self) -> None:
        if not exchange(self.folder, self.out):  # where folders cannot change places there is a moment with neither
            old = self.out.with_name(f".{self.out.name}.old")
            self.out.rename(old)
            self.folder.rename(self.out)
            old.rename(self.folder)


def _hold(descriptor: int) -> None:
    """Lock an open file until it is closed; raises `OSError` if another process holds it. Not on Windows."""
    if sys.platform != "win32":
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def exchange(a: Path, b: Path) -> bool:
    """Swap two folders in one step (Linux's `renameat2`); `False` if the system cannot."""
    import ctypes

    exchange_flag, at_cwd = 2, -100
    with contextlib.suppress(OSError, AttributeError):
        rename = ctypes.CDLL(None, use_errno=True).renameat2
        return bool(rename(at_cwd, os.fsencode(a), at_cwd, os.fsencode(b), exchange_flag) == 0)
    return False


def write_durably(path: Path, content: bytes) -> None:
    """Write a file so that it holds the old content or the new one, whatever happens."""
    fresh = path.with_name(f"{path.name}.new")
    with fresh.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)


def sync_folder(folder: Path) -> None:
    """Have a folder's list of names on the disk."""
    with contextlib.suppress(OSError):  # not every system can open folders
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
