"""Streaming: writing one tensor to a safetensors file row by row."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import torch
from torch import Tensor

from adapterkit.disk.mapping import as_bytes
from adapterkit.errors import ConfigError, SaveError
from adapterkit.files import umask

# The header stands before the data and holds the final size. The format allows blanks behind its JSON, so room is
# left for it and it is written last.
_HEADER_BYTES = 248
_DTYPES = {torch.float32: "F32", torch.float64: "F64"}


class TensorWriter:
    """A safetensors file with one tensor, whose number of rows is not known before the end.

    A context: the file appears under its name when the block ends, and not at all if it raises.
    """

    def __init__(self, path: Path, key: str) -> None:
        self.path, self.key = path, key
        self._rows, self._dtype = 0, torch.float32
        self._shape: tuple[int, ...] | None = None
        self._file: BinaryIO | None = None

    def __enter__(self) -> Self:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=self.path.parent, prefix=f".{self.path.name}.")
        except OSError as error:
            raise SaveError(f"{self.path} cannot be written: {error}.") from error
        self._file, self._temporary = os.fdopen(handle, "wb"), Path(name)
        self._file.write(b" " * (8 + _HEADER_BYTES))
        return self

    def append(self, part: Tensor) -> None:
        """Write the next rows, `(rows, ...)`.

        Raises:
            ConfigError: rows of another shape than those before.
            SaveError: they cannot be written.
        """
        assert self._file is not None
        shape = tuple(part.shape[1:])
        if self._shape is None:
            self._shape, self._dtype = shape, part.dtype
        if shape != self._shape:
            raise ConfigError(
                f"Streaming needs rows of one shape; there are {self._shape} and {shape}. Pad every batch to one "
                "length (padding='max_length'), or pool."
            )
        try:
            self._file.write(as_bytes(part))
        except OSError as error:
            raise SaveError(f"{self.path} cannot be written: {error}.") from error
        self._rows += len(part)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._file is not None
        try:
            if kind is None:
                self._finish(self._file)
        except OSError as problem:
            raise SaveError(f"{self.path} cannot be written: {problem}.") from problem
        finally:
            self._file.close()
            with contextlib.suppress(FileNotFoundError):  # it has its name now
                self._temporary.unlink()

    def _finish(self, file: BinaryIO) -> None:
        if self._shape is None:
            raise ConfigError("There are no batches. A generator can be read only once.")
        end = file.tell() - 8 - _HEADER_BYTES
        entry = {"dtype": _DTYPES[self._dtype], "shape": [self._rows, *self._shape], "data_offsets": [0, end]}
        header = json.dumps({"__metadata__": {"format": "pt"}, self.key: entry}).encode()
        file.seek(0)
        file.write(_HEADER_BYTES.to_bytes(8, "little") + header.ljust(_HEADER_BYTES))
        file.flush()
        os.fsync(file.fileno())
        self._temporary.chmod(0o666 & ~umask())
        self._temporary.replace(self.path)
