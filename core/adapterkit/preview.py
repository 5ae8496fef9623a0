"""`ak.preview`: what an adapter would change on a model, without the weights of either."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from adapterkit.contract import ATTRIBUTE, AdapterConfig, default_registry
from adapterkit.disk import skeleton
from adapterkit.errors import usage
from adapterkit.files import MappedFiles, adapter_folder, local_path
from adapterkit.files import folder as files
from adapterkit.formats import CONFIG_FILE, translate
from adapterkit.forward import Active
from adapterkit.kinds import LayerKind
from adapterkit.model import Adapter, BaseModules, LayerBuilder, Match, build_adapter, select_on
from adapterkit.results import NUMBER, Printed, columns, grouped, in_lines, merged_paths
from adapterkit.tensors import size_of


@dataclass(frozen=True)
class LayerGroup:
    """One layer, or several equal layers with paths that differ only in numbers.

    Attributes:
        path: the module path; for several layers with the numbers in braces, `"layers.{0-79}.mlp.up_proj"`.
        layers: how many layers these are.
        kind, out_features, in_features: the kind and sizes of each.
        rule: the entry of the config that selects them.
        parameters: how many parameters the adapter trains at each.
    """

    path: str
    layers: int
    kind: str
    out_features: int
    in_features: int
    rule: str
    parameters: int

    @property
    def sizes(self) -> str:
        """`"(in -> out)"`; nothing for a module without a weight."""
        return f"({self.in_features} -> {self.out_features})" if self.out_features else ""


@dataclass(frozen=True)
class Preview(Printed):
    """What an adapter would change. Prints as a table.

    Attributes:
        model: the class of the model.
        method: the method of the config.
        groups: the layers to adapt, with equal layers in one group.
        paths: the path of every layer to adapt.
        heads: the modules to train in full, with the number of their parameters.
        biases: the number of trained entries in biases of the base.
        total: the number of parameters of the base model.
        skipped: layers that one rule selects and another leaves out, with the reason; equal layers are one entry.
        unmatched: entries of the config that match nothing.
        notes: other remarks.
        shared: the number of trained parameters that all layers share.
    """

    model: str
    method: str
    groups: tuple[LayerGroup, ...]
    paths: tuple[str, ...]
    heads: Mapping[str, int]
    biases: int
    total: int
    skipped: tuple[tuple[str, str], ...] = ()
    unmatched: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    shared: int = 0

    @property
    def parameters(self) -> int:
        """The number of all trained parameters."""
        layers = sum(group.layers * group.parameters for group in self.groups)
        return layers + sum(self.heads.values()) + self.biases + self.shared

    @property
    def share(self) -> float:
        """Trained parameters as a share of the base model's."""
        return self.parameters / self.total if self.total else 0.0

    def __str__(self) -> str:
        titles = ("layer", "count", "kind", "parameters", "rule")
        rows = [(g.path, str(g.layers), g.kind + g.sizes, f"{g.parameters:,}", g.rule) for g in self.groups]
        lines = columns([titles, *rows])
        lines += [f"trained in full: {path}, {count:,} parameters" for path, count in self.heads.items()]
        lines += [f"trained biases: {self.biases:,} parameters"] if self.biases else []
        lines += [f"shared by all layers: {self.shared:,} parameters"] if self.shared else []
        lines += [f"left out: {path}: {reason}" for path, reason in self.skipped]
        lines += [f"matched nothing: {rule}" for rule in self.unmatched]
        lines += [f"note: {note}" for note in self.notes]
        lines.append(
            f"{self.method} on {self.model}: {len(self.paths):,} layers, {self.parameters:,} parameters, "
            f"{self.share:.3%} of the base model's {self.total:,}"
        )
        return in_lines(lines)


@usage()
def preview(model: nn.Module | str | Path, config: AdapterConfig) -> Preview:
    """What `ak.attach(model).add(name, config)` would change, computed on the meta device. The model is not changed.

    Args:
        model: a module; or a model's folder or hub id. For these only `config.json` is read (see `ak.skeleton`), which
            takes seconds for any size.

    Raises:
        SelectionError: nothing matches, or the config names a layer that cannot be adapted.
        ConfigError: the config is malformed.
        CheckpointError: there is no model at that place.
    """
    method = default_registry.method_of(config)
    module = model if isinstance(model, nn.Module) else skeleton(model)
    modules = BaseModules(module)
    selection = select_on(modules, config)
    builder, meta = LayerBuilder(method, config), torch.device("meta")
    own: Any = module.__dict__.get(ATTRIBUTE)  # its adapters, which the new one would be beside
    active, size = (own._active, own._model.size) if own else (Active(), size_of(module.parameters()))
    adapter, notes = build_adapter(modules, "preview", builder, selection, active, {}, device=meta)
    return Preview(
        type(module).__name__,
        method.name,
        _groups(selection.targets, adapter),
        selection.paths,
        {path: size_of(head.parameters()) for path, head in adapter.heads.items()},
        sum(size_of(bias.parameters()) for bias in adapter.biases.values()),
        size,
        tuple((path, why) for path, why in grouped(selection.skipped)),
        selection.unmatched,
        tuple(notes),
        0 if adapter.shared is None else size_of(adapter.shared.parameters()),
    )


@usage()
def read_config(place: str | Path) -> AdapterConfig:
    """The config of an adapter: from its folder, from the hub, or from an `adapter_config.json` alone.

    Raises:
        CheckpointError: there is no config, or it is not a JSON object.
        ConfigError, UnsupportedError, UnknownNameError: no installed method can use the config.
    """
    path = local_path(place)
    folder = path.parent if path.name == CONFIG_FILE else adapter_folder(place)
    fields = files.read_config(folder)
    weights = files.standing(folder)[1]
    if "peft_type" not in fields and weights is not None and path.name != CONFIG_FILE:  # another program's
        return translate(files.read(folder, MappedFiles().read), None).config
    return default_registry.read_config(fields, folder)[1]


def _groups(targets: Iterable[Match], adapter: Adapter) -> tuple[LayerGroup, ...]:
    """The layers, grouped if they differ only in the numbers of their paths; in the order of the model."""
    found: dict[tuple[str, LayerKind, str, int], list[str]] = {}
    for match in targets:
        key = (NUMBER.sub("", match.path), match.kind, match.rule, size_of(adapter.layers[match.path].parameters()))
        found.setdefault(key, []).append(match.path)
    return tuple(
        LayerGroup(merged_paths(paths), len(paths), kind.name, kind.out_features, kind.in_features, rule, parameters)
        for (_, kind, rule, parameters), paths in found.items()
    )
