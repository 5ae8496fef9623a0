"""Tensors and files: a file read or mapped as a whole, results kept in a file until all are known, a file written."""

from __future__ import annotations

import math
import mmap
import tempfile
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

import torch
from torch import Tensor

from adapterkit.errors import CheckpointError, SaveError
from adapterkit.files.header import Entry, dtype_name, read_header, write_header
from adapterkit.kinds import Factors

# Tensors in the spool begin at multiples of this: of a cache line, as torch's own do.
_ALIGNMENT = 64
# Tensors smaller than this are gathered before they are written.
_WRITTEN_BYTES = 1 << 20


class Pages:
    """A file's bytes as memory: read when they are used, and not written back."""

    def __init__(self, descriptor: int) -> None:
        self._map = mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY)

    def tensor(self, start: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The bytes from `start` as a tensor; a copy only where they do not lie as the dtype needs."""
        size = dtype.itemsize * math.prod(shape)
        if not size:
            return torch.empty(shape, dtype=dtype)
        if start % dtype.itemsize:
            return (
                torch.frombuffer(self._map, dtype=torch.uint8, offset=start, count=size).clone().view(dtype).view(shape)
            )
        return torch.frombuffer(self._map, dtype=dtype, offset=start, count=size // dtype.itemsize).view(shape)

    def release(self) -> None:
        """Have no page of it in this process's memory; what is used again is read again."""
        with suppress(AttributeError, OSError):  # a system without such advice
            self._map.madvise(mmap.MADV_DONTNEED)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Every tensor of a safetensors file by name, each in memory of its own, and the metadata.

    Memory that torch allocated is aligned, so kernels round in it as they do elsewhere; and whatever is done to the
    file later neither changes these tensors nor stops the process, as it would through a map.

    Raises:
        CheckpointError: the file is damaged, cut off while it is read, or has a dtype that torch lacks.
    """
    shard, tensors = read_header(path), {}
    with path.open("rb") as file:
        file.seek(len(shard.header))
        for entry in sorted(shard.entries, key=lambda e: (e.start, e.end)):  # which leave no gaps
            raw = torch.empty(entry.nbytes, dtype=torch.uint8)
            if file.readinto(as_bytes(raw)) < entry.nbytes:
                raise CheckpointError(f"{path} was cut off while it was read.")
            tensors[entry.name] = raw.view(entry.torch_dtype).view(entry.shape)
    return {entry.name: tensors[entry.name] for entry in shard.entries}, dict(shard.metadata)


@dataclass
class MappedFiles:
    """Safetensors files that are mapped: `read` is what `adapterkit.files.folder.read` takes as its reader."""

    pages: list[Pages] = field(default_factory=list)

    def read(self, path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Tensors by name, and the metadata.

        Raises:
            CheckpointError: the file is damaged, or has a dtype that torch lacks.
        """
        shard = read_header(path)
        with path.open("rb") as file:
            pages = Pages(file.fileno())
        self.pages.append(pages)
        tensors = {e.name: pages.tensor(e.start, e.shape, e.torch_dtype) for e in shard.entries}
        return tensors, dict(shard.metadata)

    def release(self) -> None:
        """See `Pages.release`."""
        for pages in self.pages:
            pages.release()


@dataclass(frozen=True)
class _Place:
    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype


class FactorSpool(MutableMapping[str, Factors]):
    """Factors by path, in a temporary file without a name: it is gone when the process is, whatever ends that.

    A context that closes the file; what was taken from it stays.

    Args:
        folder: where the file is, on the disk that the result goes to.
        after: called after each item.
    """

    def __init__(self, folder: Path, after: Callable[[], None]) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - it lives as long as this object
        except OSError as error:
            raise SaveError(f"Nothing can be written in {folder}: {error}.") from error
        self._after = after
        self._places: dict[str, tuple[list[_Place | None], float]] = {}
        self._pages: Pages | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def __setitem__(self, path: str, factors: Factors) -> None:
        try:
            places = [None if t is None else self._write(t) for t in factors[:3]]
        except OSError as error:
            raise SaveError(f"The results cannot be kept until all are known: {error}.") from error
        self._places[path], self._pages = (places, factors.scale), None
        self._after()

    def _write(self, tensor: Tensor) -> _Place:
        start = self._file.seek(-(-self._file.tell() // _ALIGNMENT) * _ALIGNMENT)
        self._file.write(as_bytes(tensor))
        return _Place(start, tuple(tensor.shape), tensor.dtype)

    def __getitem__(self, path: str) -> Factors:
        places, scale = self._places[path]
        up, down, bias = (None if p is None else self._mapped().tensor(p.start, p.shape, p.dtype) for p in places)
        assert up is not None
        assert down is not None
        return Factors(up, down, bias, scale)

    def _mapped(self) -> Pages:
        if self._pages is None:
            self._file.flush()
            self._pages = Pages(self._file.fileno())
        return self._pages

    def __delitem__(self, path: str) -> None:
        del self._places[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def release(self) -> None:
        """See `Pages.release`."""
        if self._pages is not None:
            self._pages.release()


def as_bytes(tensor: Tensor) -> memoryview:
    """The tensor's bytes in its own order; a view, where it is contiguous and in the processor's memory."""
    raw: Any = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(raw)


def write_tensors(
    tensors: Mapping[str, Tensor],
    path: Path,
    metadata: Mapping[str, str],
    dtypes: Mapping[str, torch.dtype] = MappingProxyType({}),
    after: Callable[[], None] = lambda: None,
) -> None:
    """A safetensors file, one tensor after another: their order, and the file's bytes, are safetensors' own.

    With small tensors it takes three quarters of the time of `save_file`; and they may share memory, or be on any
    device, from which they come one at a time.

    Args:
        dtypes: of those that are to have another than their own.
        after: called after each tensor.

    Raises:
        SaveError: a dtype that the format lacks.
        OSError: it cannot be written.
    """
    wanted = {name: dtypes.get(name, tensor.dtype) for name, tensor in tensors.items()}
    names = {dtype: dtype_name(dtype) for dtype in set(wanted.values())}
    order = sorted(tensors, key=lambda name: (-wanted[name].itemsize, name))  # so each is aligned
    entries, start = [], 0
    for name in order:
        end = start + wanted[name].itemsize * tensors[name].numel()
        entries.append(Entry(name, names[wanted[name]], tuple(tensors[name].shape), path, start, end))
        start = end
    with path.open("wb", _WRITTEN_BYTES) as file:
        file.write(write_header(entries, metadata))
        for name in order:
            file.write(as_bytes(tensors[name].to(wanted[name])))
            after()
