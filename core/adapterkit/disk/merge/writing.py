"""Writing the files of the output: copied by the kernel, merged in a buffer that is used again, hashed as they grow."""

from __future__ import annotations

import copy
import ctypes
import errno
import hashlib
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor, nn

from adapterkit.disk.merge.layout import Copy, FileLayout, Merge, Step
from adapterkit.files import as_bytes
from adapterkit.merging import merge_module

_READ_BYTES = 1 << 20
# So much is given to the disk at a time: what is dirty stays little, and the final fsync short.
_FLUSHED_BYTES = 1 << 25
_ALIGNMENT = 64
_NO_KERNEL_COPY = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM)

Finished = Callable[[str, int, str], None]
Progress = Callable[[int], None]


class GrowingFile:
    """A file of the output while it is written, in any order; what is whole from its start on is hashed meanwhile.

    A context; `finish` is called in it when all is written.
    """

    def __init__(self, path: Path, layout: FileLayout, finished: Finished) -> None:
        self.layout, self._finished = layout, finished
        self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
        self._written: dict[int, int] = {}
        self._whole, self._stop, self._closed = 0, False, False
        self._news = threading.Condition()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def wrote(self, extents: Iterable[tuple[int, int]]) -> None:
        """Say that these bytes are there."""
        with self._news:
            self._written.update(extents)
            while self._whole in self._written:
                self._whole = self._written.pop(self._whole)
            self._news.notify()

    @property
    def complete(self) -> bool:
        """Whether every byte is there."""
        return self._whole == self.layout.size

    def close(self, *, stop: bool) -> None:
        """Wait until it is hashed and on the disk; with `stop`, give up.

        Raises:
            OSError: it could not be written.
        """
        with self._news:
            self._stop = stop
            self._news.notify()
        self._thread.join()
        if not self._closed:
            self._closed = True
            os.close(self.descriptor)
        if self._error is not None and not stop:
            raise self._error

    def _run(self) -> None:
        try:
            found = self._hash()
            if found is not None:
                os.fsync(self.descriptor)
                self._finished(self.layout.name, self.layout.size, found)
        except BaseException as error:  # noqa: BLE001 - raised again by whoever waits
            self._error = error

    def _hash(self) -> str | None:
        found, buffer = hashlib.sha256(), bytearray(_READ_BYTES)
        done = flushed = 0
        while done < self.layout.size:
            with self._news:
                self._news.wait_for(lambda: self._stop or self._whole > done)  # noqa: B023 - called here
                if self._stop:
                    return None
                whole = self._whole
            while done < whole and not self._stop:
                count = os.preadv(self.descriptor, [memoryview(buffer)[: whole - done]], done)
                found.update(memoryview(buffer)[:count])
                done += count
                if done - flushed >= _FLUSHED_BYTES:
                    _start_writing(self.descriptor, flushed, done - flushed)
                    flushed = done
        return found.hexdigest()


def _start_writing(descriptor: int, start: int, count: int) -> None:
    """Have the kernel begin to write these pages, without waiting (Linux's `sync_file_range`); else nothing."""
    begin = 2
    with suppress(OSError, AttributeError):
        flush = ctypes.CDLL(None).sync_file_range
        flush.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
        flush(descriptor, start, count, begin)


class Inputs:
    """The files of the base, each opened once."""

    def __init__(self) -> None:
        self._opened: dict[Path, int] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for descriptor in self._opened.values():
            os.close(descriptor)

    def __getitem__(self, file: Path) -> int:
        with self._lock:
            if file not in self._opened:
                self._opened[file] = os.open(file, os.O_RDONLY)
            return self._opened[file]


class Worker(threading.local):
    """Does steps, with a buffer of its own for what it merges."""

    def __init__(self, inputs: Inputs, *, safe: bool, largest: int) -> None:
        self.inputs, self.safe = inputs, safe
        self._largest = largest
        self._buffer: Tensor | None = None

    def do(self, step: Step, file: GrowingFile) -> int:
        """Do one step; the bytes that it wrote."""
        if isinstance(step, Merge):
            self._merge(step, file)
            return step.nbytes
        if isinstance(step, Copy):
            copy_bytes(self.inputs[step.file], step.source, file.descriptor, step.start, step.nbytes)
        else:
            _write(file.descriptor, _bytes_of(step.content), step.start)
        file.wrote([(step.start, step.start + step.nbytes)] if step.nbytes else [])
        return step.nbytes

    def _merge(self, step: Merge, file: GrowingFile) -> None:
        change = step.module.change
        module = copy.copy(change.module)  # its own parameters are on the meta device, and other threads may need it
        module.__dict__["_parameters"] = {**module._parameters, **self._read(step)}
        merge_module(replace(change, module=module), safe=self.safe)
        for local, start in step.starts.items():
            parameter = module._parameters[local]
            assert parameter is not None
            _write(file.descriptor, as_bytes(parameter.detach()), start)
        file.wrote(extent for extent in step.extents if extent[0] < extent[1])

    def _read(self, step: Merge) -> dict[str, nn.Parameter]:
        if self._buffer is None:
            self._buffer = torch.empty(self._largest, dtype=torch.uint8)
        found, place = {}, 0
        for local, entry in step.module.inputs.items():
            raw = self._buffer[place : place + entry.nbytes]
            _read(self.inputs[entry.file], as_bytes(raw), entry.start)
            value = raw.view(entry.torch_dtype).view(entry.shape)
            found[local] = nn.Parameter(value, requires_grad=False)
            place += -(-entry.nbytes // _ALIGNMENT) * _ALIGNMENT
        return found


def buffer_size(layouts: Iterable[FileLayout]) -> int:
    """The bytes that the largest module needs while it is merged."""
    merges = [step.module for layout in layouts for step in layout.steps if isinstance(step, Merge)]
    return max((sum(e.nbytes + _ALIGNMENT for e in module.inputs.values()) for module in merges), default=0)


def _bytes_of(content: bytes | Tensor) -> memoryview:
    return memoryview(content) if isinstance(content, bytes) else as_bytes(content)


def _write(descriptor: int, content: memoryview, start: int) -> None:
    while content.nbytes:
        count = os.pwrite(descriptor, content, start)
        content, start = content[count:], start + count


def _read(descriptor: int, view: memoryview, start: int) -> None:
    while view.nbytes:
        count = os.preadv(descriptor, [view], start)
        if not count:
            raise OSError("a file of the base has become shorter")
        view, start = view[count:], start + count


def copy_bytes(source: int, offset: int, target: int, start: int, nbytes: int) -> None:
    """Copy a range from file to file, inside the kernel where it can."""
    while nbytes:
        count = _kernel_copy(source, offset, target, start, nbytes)
        if not count:
            part = os.pread(source, min(nbytes, _READ_BYTES), offset)
            if not part:
                raise OSError("a file of the base has become shorter")
            count = os.pwrite(target, part, start)
        offset, start, nbytes = offset + count, start + count, nbytes - count


def _kernel_copy(source: int, offset: int, target: int, start: int, nbytes: int) -> int:
    """The bytes that `copy_file_range` copied; 0 where there is none, or not between these file systems."""
    if not hasattr(os, "copy_file_range"):
        return 0
    try:
        return os.copy_file_range(source, target, nbytes, offset, start)
    except OSError as error:
        if error.errno in _NO_KERNEL_COPY:
            return 0
        raise


def write_files(
    layouts: Iterable[FileLayout],
    folder: Path,
    worker: Worker,
    *,
    workers: int,
    finished: Finished,
    progress: Progress,
) -> None:
    """Write the files; steps are done in their order, by so many threads at once.

    Args:
        finished: called with each file's name, size and hash when it is on the disk, in another thread.
        progress: called with the bytes that a step wrote, in this thread.

    Raises:
        OSError: reading or writing failed.
    """
    opened: list[GrowingFile] = []
    running: set[Future[int]] = set()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="merge")
    try:
        for layout in layouts:
            file = GrowingFile(folder / layout.name, layout, finished)
            opened.append(file)
            for step in layout.steps:
                running.add(pool.submit(worker.do, step, file))
                while len(running) > workers:  # no more than one waits: an error ends it soon
                    running = _gather(running, progress)
            opened = _close_complete(opened)
        while running:
            running = _gather(running, progress)
        for file in opened:
            file.close(stop=False)
        opened = []
    finally:
        pool.shutdown(cancel_futures=True)
        for file in opened:
            file.close(stop=True)


def _gather(running: set[Future[int]], progress: Progress) -> set[Future[int]]:
    done, rest = wait(running, return_when=FIRST_COMPLETED)
    for future in done:
        progress(future.result())
    return rest


def _close_complete(opened: list[GrowingFile]) -> list[GrowingFile]:
    """Close the files that are whole, but the last: its hash is made while the next is begun."""
    for file in opened[:-1]:
        if file.complete:
            file.close(stop=False)
    return [file for i, file in enumerate(opened) if i == len(opened) - 1 or not file.complete]
