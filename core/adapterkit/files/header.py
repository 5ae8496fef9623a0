"""The header of a safetensors file, read and checked without its data."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from adapterkit.errors import CheckpointError, SaveError

LENGTH_BYTES = 8
METADATA = "__metadata__"
# The format's own limit: a damaged length is not to make us read gigabytes.
_LARGEST = 100_000_000
# Every dtype of the format: the bits of one element, and its name in torch, which lacks some or had them later.
_DTYPES = {
    "BOOL": (8, "bool"),
    "U8": (8, "uint8"),
    "I8": (8, "int8"),
    "U16": (16, "uint16"),
    "I16": (16, "int16"),
    "U32": (32, "uint32"),
    "I32": (32, "int32"),
    "U64": (64, "uint64"),
    "I64": (64, "int64"),
    "F16": (16, "float16"),
    "BF16": (16, "bfloat16"),
    "F32": (32, "float32"),
    "F64": (64, "float64"),
    "C64": (64, "complex64"),
    "F8_E4M3": (8, "float8_e4m3fn"),
    "F8_E5M2": (8, "float8_e5m2"),
    "F8_E8M0": (8, "float8_e8m0fnu"),
    "F8_E4M3FNUZ": (8, "float8_e4m3fnuz"),
    "F8_E5M2FNUZ": (8, "float8_e5m2fnuz"),
    "F6_E2M3": (6, ""),
    "F6_E3M2": (6, ""),
    "F4": (4, ""),
}


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
        return torch_dtype(self.dtype, self.file, self.name)


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


def torch_dtype(name: str, file: Path, tensor: str = "a tensor") -> torch.dtype:
    """The torch dtype of one that the format names.

    Raises:
        CheckpointError: torch has none for it.
    """
    found = getattr(torch, _DTYPES[name][1], None) if name in _DTYPES else None
    if not isinstance(found, torch.dtype):
        raise CheckpointError(f"{file}: {tensor!r} has dtype {name}, which torch {torch.__version__} lacks.")
    return found


def dtype_name(dtype: torch.dtype) -> str:
    """The format's name of a torch dtype.

    Raises:
        SaveError: it has none.
    """
    for name, (_, attribute) in _DTYPES.items():
        if getattr(torch, attribute, None) is dtype:
            return name
    raise SaveError(f"safetensors files have no {dtype}. Convert the adapter's tensors to another dtype first.")


def read_header(file: Path) -> Shard:
    """Read a safetensors file's header, and check that its tensors fill the file, without gaps or overlaps.

    Raises:
        CheckpointError: the file cannot be read, or its header contradicts itself or the file's size.
    """
    try:
        with file.open("rb") as opened:
            size = opened.seek(0, 2)
            opened.seek(0)
            header = _header_bytes(file, opened, size)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error}.") from error
    table = _parsed(file, header[LENGTH_BYTES:])
    metadata = _metadata(file, table.pop(METADATA, {}))
    entries = tuple(_entry(file, name, described, len(header)) for name, described in table.items())
    _check_extents(file, entries, len(header), size)
    return Shard(file, header, entries, metadata, size)


def write_header(entries: Sequence[Entry], metadata: Mapping[str, str]) -> bytes:
    """The header of a file with these tensors; their bytes are laid out by the caller, from 0 at the header's end."""
    table: dict[str, Any] = {METADATA: dict(metadata)} if metadata else {}
    for e in entries:
        table[e.name] = {"dtype": e.dtype, "shape": list(e.shape), "data_offsets": [e.start, e.end]}
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text = text.ljust(-(-len(text) // 8) * 8)  # data that begins at a multiple of 8 can be mapped as it is
    return len(text).to_bytes(LENGTH_BYTES, "little") + text


def _header_bytes(file: Path, opened: BinaryIO, size: int) -> bytes:
    first = opened.read(LENGTH_BYTES)
    length = int.from_bytes(first, "little")
    if len(first) < LENGTH_BYTES or length > size - LENGTH_BYTES:
        raise CheckpointError(
            f"{file} ({size:,} bytes) is no safetensors file, or is cut off: its header should have {length:,} bytes. "
            "Fetch or save it again."
        )
    if length > _LARGEST:
        raise CheckpointError(f"{file}: a header of {length:,} bytes; the format allows {_LARGEST:,}.")
    return first + opened.read(length)


def _parsed(file: Path, header: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) < len(pairs):
            raise ValueError("a name stands twice")
        return table

    try:
        text = header.decode()
        table = json.loads(text, object_pairs_hook=unique)
        if "\\u" in text:  # half of a surrogate pair can be escaped, but is no text that could be written again
            json.dumps(table, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is no safetensors file: its header is no JSON ({error}).") from error
    if not isinstance(table, dict):
        raise CheckpointError(f"{file} is no safetensors file: its header is a {type(table).__name__}, no object.")
    return table


def _metadata(file: Path, found: object) -> dict[str, str]:
    if not isinstance(found, dict) or not all(isinstance(v, str) for v in found.values()):
        raise CheckpointError(f"{file}: its {METADATA} must map text to text.")
    return found


def _entry(file: Path, name: str, described: object, data: int) -> Entry:
    if not isinstance(described, dict):
        raise CheckpointError(f"{file}: {name!r} is described by a {type(described).__name__}, no object.")
    fields: dict[str, Any] = described
    dtype, shape, offsets = (fields.get(field, "missing") for field in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise CheckpointError(f"{file}: {name!r} has the dtype {dtype!r}. Known are: {', '.join(_DTYPES)}.")
    if not _are_sizes(shape):
        raise CheckpointError(f"{file}: {name!r} has the shape {shape!r}; it must be a list of sizes.")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{file}: {name!r} has the data_offsets {offsets!r}; they must be [begin, end].")
    bits = math.prod(shape) * _DTYPES[dtype][0]
    if bits != 8 * (offsets[1] - offsets[0]):
        raise CheckpointError(
            f"{file}: {name!r} is {dtype} of shape {tuple(shape)}, {bits // 8:,} bytes, but its offsets hold "
            f"{offsets[1] - offsets[0]:,}."
        )
    return Entry(name, dtype, tuple(shape), file, data + offsets[0], data + offsets[1])


def _are_sizes(found: Any) -> bool:
    return isinstance(found, list) and all(type(n) is int and n >= 0 for n in found)


def _check_extents(file: Path, entries: Sequence[Entry], start: int, size: int) -> None:
    for entry in sorted(entries, key=lambda e: (e.start, e.end)):
        if entry.start != start:
            what = "overlaps the tensor before it" if entry.start < start else "leaves a gap before it"
            raise CheckpointError(f"{file}: {entry.name!r} {what}. The file is damaged; fetch or save it again.")
        start = entry.end
    if start != size:
        raise CheckpointError(
            f"{file} has {size:,} bytes, and its header describes {start:,}. It is cut off or damaged; fetch it again."
        )
