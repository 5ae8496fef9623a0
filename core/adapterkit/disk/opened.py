"""Adapters opened by their files alone: what they are, and what each is on a stand-in of the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adapterkit.contract import AdapterConfig, KeyRule, Method, default_registry, exactly, strip_file_prefix
from adapterkit.disk.base import Base
from adapterkit.disk.contents import other_modules, split_key, without_values
from adapterkit.disk.standin import assemble
from adapterkit.disk.translation import translated
from adapterkit.errors import CheckpointError, ConfigError
from adapterkit.files import (
    AdapterFiles,
    MappedFiles,
    adapter_folder,
    layers_of,
    load_adapter,
    read,
)
from adapterkit.forward import Active
from adapterkit.model import Adapter, BaseModules, LabelSet
from adapterkit.results import LoadReport

_CPU = torch.device("cpu")
_CLASSIFIERS = ("SEQ_CLS", "TOKEN_CLS")


@dataclass
class Opened:
    """One adapter's files.

    Attributes:
        files: the config, the mapped tensors and the metadata.
        layers: the layers that it changes, by path, on the meta device; empty if its files do not tell and there is
            no base.
        others: its heads, modules with trained biases and embeddings.
        mapped: what keeps its pages.
    """

    name: str
    files: AdapterFiles
    method: Method
    config: AdapterConfig
    layers: dict[str, nn.Module]
    others: dict[str, nn.Module] = field(default_factory=dict)
    mapped: MappedFiles = field(default_factory=MappedFiles)
    base: Base | None = None

    @property
    def rule(self) -> KeyRule:
        """What its keys are called."""
        return self.method.key_rule(self.config)

    def check_layers(self) -> None:
        """Raise `CheckpointError` if its files do not tell the sizes of its layers."""
        if not self.layers:
            raise CheckpointError(
                f"{self.files.folder}: the tensors of a {self.method.name!r} adapter do not tell the sizes of the "
                "layers that it changes. Give base=, the folder of the model that it was trained on, of which only "
                "config.json is read."
            )

    def adapter(self, model: nn.Module, *, strict: bool | None = True) -> tuple[Adapter, LoadReport]:
        """Its adapter on a stand-in that has its layers: the tensors as they are mapped, in the file's dtypes.

        Raises:
            CheckpointError: with `strict`, tensors that are missing, or that belong to nothing.
        """
        self.check_layers()
        files = self.files
        if files.config is not None:
            chosen = {"target_modules": exactly(self.layers, BaseModules(model).all_paths), "exclude_modules": None}
            chosen |= {"layers_to_transform": None, "layers_pattern": None}
            files = dataclasses.replace(files, config={**files.config, **chosen})
        adapter, report = load_adapter(model, self.name, files, Active(), strict=strict, dtype="file", device=_CPU)
        adapter.labels = self._labels(adapter)
        return adapter, report

    def _labels(self, adapter: Adapter) -> LabelSet | None:
        """The label set in the file; else the base's, if that has as many classes; else numbered classes."""
        own = LabelSet.from_metadata(self.files.metadata)
        rows = [m.out_features for head in adapter.heads.values() for m in head.modules() if isinstance(m, nn.Linear)]
        if own is not None or not rows:
            return own if adapter.heads else None
        base = None if self.base is None else LabelSet.of(self.base.model)
        if base is not None and len(base.id2label) in rows:
            return base
        return LabelSet.numbered(rows[-1]) if base is not None or self.config.task_type in _CLASSIFIERS else None


def open_adapter(
    source: str | Path,
    name: str = "",
    *,
    base: Base | None = None,
    component: str | None = None,
    keep_names: bool = False,
) -> Opened:
    """The adapter of a folder, a hub id or another program's file, as far as its files tell.

    Args:
        base: the model, for what they do not tell.
        component, keep_names: of another program's file; see `translated`.

    Raises:
        CheckpointError: it is no adapter, or damaged.
        UnknownNameError: no plugin provides its method.
    """
    mapped = MappedFiles()
    files = read(adapter_folder(source), mapped.read)
    known = None
    if files.config is None:
        files, known = translated(files, base, component, keep_names=keep_names)
    assert files.config is not None
    method = default_registry.claim(files.config, files.folder)
    config = method.config_type().from_dict({"modules_to_save": None, **files.config})
    tensors = without_values(strip_file_prefix(files.tensors))
    if known is None and base is None:
        known = dict(method.layers_in_file(tensors, config) or {})
        base = None if known else Base.recorded(config)
    layers = known or ({} if base is None else _layers_of_base(files, tensors, method, config, base))
    opened = Opened(name or files.folder.name, files, method, config, layers, {}, mapped, base)
    opened.others = other_modules(tensors, layers, config, opened.rule)
    return opened


def _layers_of_base(
    files: AdapterFiles, tensors: Mapping[str, Tensor], method: Method, config: AdapterConfig, base: Base
) -> dict[str, nn.Module]:
    """The base's layers that the keys name; keys that the method renames in files are renamed back first."""
    rule = method.key_rule(config)
    keys: Iterable[str] = tensors
    if not any(split_key(key, rule) for key in keys):
        keys = method.from_file(config, strip_file_prefix(files.tensors), layers_of(BaseModules(base.model)))
    paths = dict.fromkeys(split[0] for split in (split_key(key, rule) for key in keys) if split is not None)
    return {path: base.layer(path) for path in paths}


def stand_in(adapters: Sequence[Opened], dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model that all these adapters are on, as far as their files tell; its layers are of this dtype.

    Raises:
        CheckpointError: they are not of one base model.
    """
    known: dict[str, tuple[Opened, Any]] = {}
    for adapter in adapters:
        adapter.check_layers()
        for path, module in adapter.layers.items():
            kind = default_registry.kind_of(module.to(dtype))
            other, own = known.setdefault(path, (adapter, kind))
            if not _agree(_size(own), _size(kind)):
                raise CheckpointError(
                    f"{other.name!r} and {adapter.name!r} are not of one base model: at {path!r} one is for a layer of "
                    f"shape {_size(own)}, the other for {_size(kind)}."
                )
    for adapter in adapters:
        _give_values(adapter)
    return assemble(group for adapter in adapters for group in (adapter.layers, adapter.others))


def _give_values(adapter: Opened) -> None:
    """The base's values, where they are known, for the biases that the adapter trains and the embeddings that it holds.

    Trained biases start from them; and embeddings that equal them are none of the adapter's own.
    """
    for path, module in (adapter.layers | adapter.others).items():
        name = "weight" if isinstance(module, nn.Embedding) else "bias"
        own = module._parameters.get(name)
        wanted = isinstance(module, nn.Embedding) or adapter.config.trained_biases != "none"
        base = None if adapter.base is None or own is None or not wanted else adapter.base.parameter(path, name)
        if own is not None and base is not None and own.shape == base.shape:
            module._parameters[name] = nn.Parameter(base.to(own.dtype), requires_grad=False)


def _size(kind: Any) -> tuple[int, ...]:
    return () if kind is None else (kind.out_features, kind.in_features)


def _agree(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Whether two layers may be one; a size of 1 may be one that is not known, because its tensor is missing."""
    return len(one) == len(other) and all(a == b or 1 in (a, b) for a, b in zip(one, other, strict=True))


def working_dtype(adapters: Sequence[Opened]) -> torch.dtype:
    """float64 if one of them has such tensors, else float32, which adapters have on a model of less."""
    dtypes = {t.dtype for adapter in adapters for t in adapter.files.tensors.values()}
    return torch.float64 if torch.float64 in dtypes else torch.float32


def names_of(places: Sequence[str | Path]) -> list[str]:
    """What adapters are called by the places of their files: the folders' names, else the places in full.

    Raises:
        ConfigError: one stands twice.
    """
    full = [str(place) for place in places]
    if len(set(full)) < len(full):
        raise ConfigError(f"An adapter is named twice: {', '.join(map(repr, full))}.")
    short = [Path(place).name for place in full]
    return short if len(set(short)) == len(short) and all(short) else full
