"""Where results go: checked before any work is done, written tensor by tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from adapterkit.contract import file_key
from adapterkit.errors import ConfigError, SaveError
from adapterkit.files import (
    CONFIG_FILE,
    PICKLE_FILE,
    WEIGHTS_FILE,
    FactorSpool,
    MappedFiles,
    appearing,
    local_path,
    save_adapter,
    write_tensors,
)
from adapterkit.model import Adapter
from adapterkit.tensors import module_slots


def output_place(out: str | Path, inputs: Sequence[Path], *, overwrite: bool) -> Path:
    """The path of the output.

    Raises:
        ConfigError: it is no path, or one of the inputs.
        SaveError: there is an adapter or a file already, and it is not to be overwritten.
    """
    place = local_path(out)
    if any(place.resolve() == path.resolve() for path in inputs):
        raise ConfigError(f"{place} is an input; give the output another place.")
    held = [place / name for name in (CONFIG_FILE, WEIGHTS_FILE, PICKLE_FILE) if (place / name).exists()]
    held += [place] if place.is_file() else []
    if held and not overwrite:
        raise SaveError(f"{held[0]} exists already. Say overwrite=True to replace it, or choose another place.")
    return place


def file_place(out: str | Path, inputs: Sequence[Path], *, overwrite: bool) -> Path:
    """As `output_place`, for a single file.

    Raises:
        ConfigError, SaveError: as there, or its name does not end in `.safetensors`.
    """
    place = output_place(out, inputs, overwrite=overwrite)
    if place.suffix != ".safetensors" or place.is_dir():
        raise ConfigError(f"{place}: other programs' form is one file; give it a name that ends in .safetensors.")
    return place


def check_dtype(dtype: object) -> None:
    """Raise `ConfigError` unless it is a floating dtype or `None`."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ConfigError(f"dtype = {dtype!r} must be a floating torch.dtype or None.")


def write_adapter(
    adapter: Adapter,
    model: nn.Module,
    place: Path,
    *,
    dtype: torch.dtype | None,
    mapped: Sequence[MappedFiles | FactorSpool],
) -> None:
    """Save an adapter whose tensors are mapped; see `save_adapter`.

    Args:
        dtype: what all but the heads is written in; `None`: in its own.
        mapped: has its pages released after each tensor.
    """
    heads = {file_key(path, local) for path, head in adapter.heads.items() for local, _ in module_slots(head)}

    def write(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        floating = [key for key, tensor in tensors.items() if key not in heads and tensor.is_floating_point()]
        dtypes = {} if dtype is None else dict.fromkeys(floating, dtype)
        write_tensors(tensors, path, metadata, dtypes, lambda: _release(mapped))

    save_adapter(adapter, model, place, writer=write)


def write_file(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    place: Path,
    dtypes: Mapping[str, torch.dtype],
    mapped: Sequence[MappedFiles | FactorSpool],
) -> None:
    """A safetensors file that appears under its name when it is complete.

    Raises:
        SaveError: it cannot be written there; what was there is untouched.
    """
    try:
        place = place.resolve()
        with appearing(place) as fresh:
            write_tensors(tensors, fresh, {"format": "pt", **metadata}, dtypes, lambda: _release(mapped))
    except OSError as error:
        raise SaveError(f"{place} cannot be written: {error}. What was there before is untouched.") from error


def _release(mapped: Sequence[MappedFiles | FactorSpool]) -> None:
    for pages in mapped:
        pages.release()
