"""Safetensors files: their headers, tensors read or mapped, and files that are written one tensor at a time.

The library `safetensors` decides whether a file is whole. What it cannot do is here: tell where a tensor's bytes are,
give each tensor memory of its own, free the pages of a mapped file, and write a file without holding all its tensors.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from adapterkit.door import check_count, check_entry, check_regular
from adapterkit.errors import CheckpointError, SaveError
from adapterkit.kinds import Factors

# A file begins with the length of its header, in so many bytes.
_LENGTH_BYTES = 8
_METADATA = "__metadata__"
# Tensors in the spool begin at multiples of this: of a cache line, as torch's own do.
_ALIGNMENT = 64
# Tensors smaller than this are gathered before they are written.
_WRITTEN_BYTES = 1 << 20
# Linux's MAP_NORESERVE, which Python knows from 3.12 on.
_NO_RESERVE = 0x4000
# The format's names of dtypes, and torch's. Some are not in every version of torch.
_NAMES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "U32": "uint32",
    "I32": "int32",
    "U64": "uint64",
    "I64": "int64",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
}
_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, own) for name, own in _NAMES.items() if hasattr(torch, own)}


@dataclass(frozen=True)
class Entry:
    """One tensor of a file.

    Attributes:
        dtype: the format's name of it, such as `"BF16"`.
        start, end: its bytes in the file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        """How many bytes it takes."""
        return self.end - self.start

    @property
    def numel(self) -> int:
        """How many elements it has."""
        return math.prod(self.shape)

    @property
    def torch_dtype(self) -> torch.dtype:
        """Its dtype in torch.

        Raises:
            CheckpointError: torch has none for it.
        """
        if self.dtype not in _DTYPES:
            raise CheckpointError(
                f"{self.file}: {self.name!r} has dtype {self.dtype}, which torch {torch.__version__} lacks."
            )
        return _DTYPES[self.dtype]


@dataclass(frozen=True)
class Shard:
    """One safetensors file, as its header describes it.

    Attributes:
        header: its first bytes, up to the data.
        entries: its tensors in the order of the header.
        size: of the whole file in bytes.
    """

    file: Path
    header: bytes
    entries: tuple[Entry, ...]
    metadata: Mapping[str, str]
    size: int


def read_header(file: Path) -> Shard:
    """Read a safetensors file's header; the library checks that its tensors fill the file, without gaps or overlaps.

    Raises:
        CheckpointError: the file cannot be read, or its header contradicts itself or the file's size.
    """

    def each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) < len(pairs):
            raise ValueError("a name stands twice in its header")
        return table

    check_regular(file)
    try:
        with safe_open(file, "np"), file.open("rb") as opened:
            size = os.fstat(opened.fileno()).st_size
            length = opened.read(_LENGTH_BYTES)
            header = length + opened.read(int.from_bytes(length, "little"))
        table = json.loads(header[_LENGTH_BYTES:], object_pairs_hook=each_once)
        metadata = table.pop(_METADATA, None) or {}
        for name, entry in table.items():
            check_entry(name, entry["shape"], file)
        entries = tuple(
            Entry(name, e["dtype"], tuple(e["shape"]), file, *(len(header) + place for place in e["data_offsets"]))
            for name, e in table.items()
        )
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error}.") from error
    except (SafetensorError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{file} is not a safetensors file, or it is damaged or cut off: {error}. Fetch or save it again."
        ) from error
    check_count(len(entries), file)
    return Shard(file, header, entries, metadata, size)


def write_header(entries: Sequence[Entry], metadata: Mapping[str, str], size: int = 0) -> bytes:
    """The header of a file with these tensors; their bytes are laid out by the caller, from 0 at the header's end.

    Args:
        size: fill it with spaces to this size, a multiple of 8.
    """
    table: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
    for e in entries:
        table[e.name] = {"dtype": e.dtype, "shape": list(e.shape), "data_offsets": [e.start, e.end]}
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    # Data that begins at a multiple of 8 can be mapped as it is.
    text = text.ljust(max(-(-len(text) // 8) * 8, size - _LENGTH_BYTES))
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text


def dtype_name(dtype: torch.dtype) -> str:
    """The format's name of a torch dtype.

    Raises:
        SaveError: it has none.
    """
    if dtype not in _DTYPES.values():
        raise SaveError(f"safetensors files have no {dtype}. Convert the adapter's tensors to another dtype first.")
    return next(name for name, known in _DTYPES.items() if known is dtype)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Every tensor of a safetensors file by name, each in memory of its own, and the metadata.

    Memory that torch allocated is aligned, so kernels round in it as they do elsewhere. Nothing that is done to the
    file later changes these tensors or stops the process, as it would through a map.

    Raises:
        CheckpointError: the file is damaged, cut off while it is read, or has a dtype that torch lacks.
    """
    shard = read_header(path)
    tensors = dict.fromkeys((entry.name for entry in shard.entries), torch.empty(0))
    try:
        with path.open("rb") as file:
            for entry in sorted(shard.entries, key=lambda e: e.start):
                tensors[entry.name] = read_entry(entry, file)
    except (OSError, RuntimeError) as error:  # RuntimeError: sizes beyond torch's
        raise CheckpointError(f"{path} cannot be read: {error}. Fetch or save it again.") from error
    return tensors, dict(shard.metadata)


def read_entry(entry: Entry, file: Any) -> Tensor:
    """One tensor of an open file, in memory of its own.

    Raises:
        CheckpointError: the file has become shorter, or the dtype is not one of torch's.
    """
    raw = torch.empty(entry.nbytes, dtype=torch.uint8, device="cpu")
    file.seek(entry.start)
    if file.readinto(as_bytes(raw)) < entry.nbytes:
        raise CheckpointError(f"{entry.file} was cut off while it was read.")
    return raw.view(entry.torch_dtype).view(entry.shape)


class Pages:
    """A file's bytes as memory: read when they are used, and not written back."""

    def __init__(self, descriptor: int) -> None:
        if sys.platform == "linux":  # without this flag it refuses to map files larger than its memory
            self._map = mmap.mmap(descriptor, 0, flags=mmap.MAP_PRIVATE | _NO_RESERVE)
        else:
            self._map = mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY)

    def tensor(self, start: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The bytes from `start` as a tensor; a copy only where they do not lie as the dtype needs."""
        size = dtype.itemsize * math.prod(shape)
        if not size:
            return torch.empty(shape, dtype=dtype, device="cpu")
        raw = torch.frombuffer(self._map, dtype=torch.uint8, offset=start, count=size)
        return (raw.clone() if start % dtype.itemsize else raw).view(dtype).view(shape)

    def release(self) -> None:
        """Have no page of it in this process's memory; what is used again is read again."""
        with suppress(AttributeError, OSError):  # the system cannot drop pages
            self._map.madvise(mmap.MADV_DONTNEED)


class MappedFiles:
    """Safetensors files that are mapped, each once: `read` is what `adapterkit.files.read` takes as its reader."""

    def __init__(self) -> None:
        self._pages: dict[Path, Pages] = {}

    def read(self, path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Tensors by name, and the metadata.

        Raises:
            CheckpointError: the file is damaged, or has a dtype that torch lacks.
        """
        shard = read_header(path)
        self._pages.pop(path, None)  # of a file that was there before
        return {entry.name: self.tensor(entry) for entry in shard.entries}, dict(shard.metadata)

    def tensor(self, entry: Entry) -> Tensor:
        """One tensor.

        Raises:
            CheckpointError: torch has no such dtype.
        """
        if entry.file not in self._pages:
            with entry.file.open("rb") as file:
                self._pages[entry.file] = Pages(file.fileno())
        return self._pages[entry.file].tensor(entry.start, entry.shape, entry.torch_dtype)

    def release(self) -> None:
        """See `Pages.release`."""
        for pages in self._pages.values():
            pages.release()


class FactorSpool(MutableMapping[str, Factors]):
    """Factors by path, in a temporary file without a name: it is gone when the process is, whatever ends that.

    A context that closes the file; what was taken from it stays.

    Args:
        folder: where the file is, on the disk that the result goes to.
        after: called after each item, and by `release`; frees what the items are made from.
    """

    def __init__(self, folder: Path, after: Callable[[], None]) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - it lives as long as this object
        except OSError as error:
            raise SaveError(f"Nothing can be written in {folder}: {error}.") from error
        self._after = after
        self._places: dict[str, tuple[list[tuple[int, torch.Size, torch.dtype] | None], float]] = {}
        self._pages: Pages | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def __setitem__(self, path: str, factors: Factors) -> None:
        places: list[tuple[int, torch.Size, torch.dtype] | None] = []
        try:
            for tensor in factors[:3]:
                start = self._file.seek(-(-self._file.tell() // _ALIGNMENT) * _ALIGNMENT)
                places.append(None if tensor is None else (start, tensor.shape, tensor.dtype))
                self._file.write(b"" if tensor is None else as_bytes(tensor))
            self._file.flush()
        except OSError as error:
            raise SaveError(f"The results cannot be kept until all are known: {error}.") from error
        self._places[path], self._pages = (places, float(factors.scale)), None
        self._after()

    def __getitem__(self, path: str) -> Factors:
        places, scale = self._places[path]
        if self._pages is None:
            self._pages = Pages(self._file.fileno())
        up, down, bias = (None if place is None else self._pages.tensor(*place) for place in places)
        assert up is not None
        assert down is not None
        return Factors(up, down, bias, scale)

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
        self._after()


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

    The tensors may share memory, or be on any device, from which they come one at a time.

    Args:
        dtypes: the dtype of each tensor that is written in another than its own.
        after: called after each tensor.

    Raises:
        SaveError: a dtype that the format lacks, or values that are too large for the dtype.
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
            own, written = tensors[name], tensors[name].to(wanted[name])
            if written.dtype != own.dtype and not written.isfinite().all() and own.isfinite().all():
                raise SaveError(f"{name!r} has values that are too large for {written.dtype}. Choose another dtype.")
            file.write(as_bytes(written))
            del own, written  # or it stays in memory beside the next one
            after()
