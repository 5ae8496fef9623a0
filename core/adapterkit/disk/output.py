"""Where results go: checked before any work is done, written tensor by tensor."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from adapterkit.combining import Changes, check_given, to_method
from adapterkit.contract import AdapterConfig, Method, Target, beside, file_key, shared_tensors
from adapterkit.errors import ConfigError, SaveError
from adapterkit.files import (
    CONFIG_FILE,
    PICKLE_FILE,
    WEIGHTS_FILE,
    FactorSpool,
    MappedFiles,
    appearing,
    file_config,
    file_tensors,
    local_path,
    write_folder,
    write_tensors,
)
from adapterkit.kinds import LayerKind
from adapterkit.model import LabelSet, LayerBuilder, by_layer
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


@dataclass(frozen=True)
class Result:
    """An adapter that is to be written.

    Attributes:
        kinds: what each layer is that it changes, by path.
        tensors: those of the layers and shared ones, by key.
        heads: the tensors of each head; `tables` those that are embeddings.
        biases: trained biases, by the path of their module.
        paths: of the model's modules, as far as they are known.
        metadata: for the header, beside the labels.
    """

    config: AdapterConfig
    method: Method
    kinds: Mapping[str, LayerKind]
    tensors: Mapping[str, Tensor]
    heads: Mapping[str, Mapping[str, Tensor]]
    tables: Collection[str]
    biases: Mapping[str, Tensor]
    labels: LabelSet | None
    paths: Collection[str] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    @torch.no_grad()
    def of(cls, changes: Changes, method: Method, dtype: torch.dtype) -> Result:
        """The adapter of this method that makes these changes; its layers are of this dtype.

        Raises:
            UnsupportedError: the method cannot express some of the changes.
        """
        config, tensors = to_method(changes, method)
        builder, cpu = LayerBuilder(method, config), torch.device("cpu")
        given, _ = by_layer(tensors, builder.rule, {path: path for path in changes.factors})
        targets = [Target(p, None, changes.kinds[p], dtype, cpu, given.get(p, {})) for p in changes.factors]
        shared = builder.shared(targets, {})
        layers = {target.path: builder.layer(target, shared) for target in targets}
        check_given(tensors, layers, builder)
        own = {f"{path}.{local}": s.tensor for path, layer in layers.items() for local, s in module_slots(layer)}
        kinds = {path: changes.kinds[path] for path in layers}
        wide = {path: bias.to(dtype if path in layers else bias.dtype) for path, bias in changes.biases.items()}
        heads, tables, labels = changes.heads, changes.tables, changes.labels
        return cls(config, method, kinds, own | shared_tensors(shared), heads, tables, wide, labels)

    def in_file(self) -> tuple[AdapterConfig, dict[str, Tensor]]:
        """The config, and all tensors by the keys of PEFT's format."""
        parts = [*self.heads.items(), *((path, {"bias": bias}) for path, bias in self.biases.items())]
        rest = {f"{beside(path, self.kinds)}.{local}": t for path, held in parts for local, t in held.items()}
        return file_tensors(self.method, self.config, self.tensors, rest)

    def write(self, place: Path, dtype: torch.dtype | None, mapped: Sequence[MappedFiles | FactorSpool]) -> None:
        """Write its folder, tensor by tensor.

        Args:
            dtype: what all but the heads is written in; `None`: in its own.
            mapped: has its pages released after each tensor.

        Raises:
            SaveError: it cannot be written there; what was there is untouched.
        """
        heads = {file_key(beside(path, self.kinds), local) for path, held in self.heads.items() for local in held}

        def write(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
            floating = [key for key, tensor in tensors.items() if key not in heads and tensor.is_floating_point()]
            dtypes = {} if dtype is None else dict.fromkeys(floating, dtype)
            write_tensors(tensors, path, metadata, dtypes, lambda: _release(mapped))

        heads_alone = [path for path in self.heads if path not in self.tables]
        config, tensors = self.in_file()
        config = file_config(config, self.kinds, heads_alone, self.paths)
        labels = self.labels.to_metadata() if self.labels is not None and self.heads else {}
        write_folder(place, config.to_dict(), tensors, {**labels, **self.metadata}, write)


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
