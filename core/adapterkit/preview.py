"""What an adapter would be on a model, before there are weights of either: `ak.preview`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch
from torch import nn

from adapterkit.contract import AdapterConfig, default_registry
from adapterkit.disk import skeleton
from adapterkit.files import CONFIG_FILE, adapter_folder, local_path
from adapterkit.files import folder as files
from adapterkit.forward import Active
from adapterkit.kinds import LayerKind
from adapterkit.model import Adapter, BaseModules, LayerBuilder, Match, build_adapter, select_on
from adapterkit.results import columns

# A number that is a part of a path by itself, or a word.
_NUMBER = re.compile(r"\b(\d+)\b")


@dataclass(frozen=True)
class LayerGroup:
    """One layer, or several alike whose paths differ in numbers only.

    Attributes:
        path: its module path; of several layers with the numbers in braces, `"layers.{0-79}.mlp.up_proj"`.
        layers: how many there are.
        kind, out_features, in_features: what each is.
        rule: what in the config takes it.
        parameters: numbers that the adapter trains at each.
    """

    path: str
    layers: int
    kind: str
    out_features: int
    in_features: int
    rule: str
    parameters: int


@dataclass(frozen=True)
class Preview:
    """What adding an adapter would make. Prints as a table.

    Attributes:
        model: the model's class.
        method: the config's method.
        groups: the layers adapted, those alike as one.
        paths: the path of each.
        heads: modules trained in full, with their numbers of parameters.
        biases: numbers trained of the base's biases.
        total: numbers of the base model.
        skipped: layers that a rule named and another left out, and the reason; those alike as one.
        unmatched: entries of the config that match nothing.
        notes: other things worth knowing.
        shared: numbers trained of what all layers share.
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
        """All numbers that train."""
        own = self.biases + self.shared
        return sum(g.layers * g.parameters for g in self.groups) + sum(self.heads.values()) + own

    @property
    def share(self) -> float:
        """Trained numbers as a share of the base model's."""
        return self.parameters / self.total if self.total else 0.0

    def __str__(self) -> str:
        titles = ("layer", "count", "kind", "parameters", "rule")
        rows = [
            (g.path, str(g.layers), f"{g.kind}({g.in_features} -> {g.out_features})", f"{g.parameters:,}", g.rule)
            for g in self.groups
        ]
        lines = [columns([titles, *rows])]
        lines += [f"trained in full: {path}, {count:,} parameters" for path, count in self.heads.items()]
        lines += [f"trained biases: {self.biases:,} parameters"] if self.biases else []
        lines += [f"shared by all layers: {self.shared:,} parameters"] if self.shared else []
        lines += [f"left out: {path}: {reason}" for path, reason in self.skipped]
        lines += [f"matched nothing: {rule}" for rule in self.unmatched]
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join([*lines, self.summary()])

    def summary(self) -> str:
        """One sentence."""
        return (
            f"{self.method} on {self.model}: {len(self.paths):,} layers, {self.parameters:,} parameters, "
            f"{self.share:.3%} of the base model's {self.total:,}"
        )


def preview(model: nn.Module | str | Path, config: AdapterConfig) -> Preview:
    """What `ak.attach(model).add(name, config)` would make, worked out on the meta device. Changes nothing.

    Args:
        model: a module; or a model's folder or hub id, of which only the config is read (see `ak.skeleton`), so that it
            takes seconds for any size.

    Raises:
        SelectionError: nothing matched, or a layer was named that cannot be adapted.
        ConfigError: a malformed config.
        CheckpointError: no model there.
    """
    module = model if isinstance(model, nn.Module) else skeleton(model)
    method = default_registry.method_of(config)
    modules = BaseModules(module)
    selection = select_on(modules, config)
    builder, meta = LayerBuilder(method, config), torch.device("meta")
    adapter, notes = build_adapter(modules, "preview", builder, selection, Active(), {}, device=meta)
    return Preview(
        type(module).__name__,
        method.name,
        _groups(selection.targets, adapter),
        selection.paths,
        {path: _count(head) for path, head in adapter.heads.items()},
        sum(_count(bias) for bias in adapter.biases.values()),
        sum(p.numel() for p in module.parameters()),
        _skipped(selection.skipped),
        selection.unmatched,
        tuple(notes),
        0 if adapter.shared is None else _count(adapter.shared.module),
    )


def read_config(place: str | Path) -> AdapterConfig:
    """The config in an adapter's folder, or on the hub; or in an `adapter_config.json` that is alone.

    Raises:
        CheckpointError: there is none, or it is no JSON object.
        ConfigError, UnsupportedError, UnknownNameError: it is none of an installed method's.
    """
    path = local_path(place)
    folder = path.parent if path.name == CONFIG_FILE else adapter_folder(place)
    fields = files.read_config(folder)
    return default_registry.claim(fields, folder).config_type().from_dict({"modules_to_save": None, **fields})


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _groups(targets: Iterable[Match], adapter: Adapter) -> tuple[LayerGroup, ...]:
    """Layers that are equal but for numbers in their paths, in the order of the first of each."""
    found: dict[tuple[str, LayerKind, str, int], list[str]] = {}
    for match in targets:
        key = (_blank(match.path), match.kind, match.rule, _count(adapter.layers[match.path]))
        found.setdefault(key, []).append(match.path)
    return tuple(
        LayerGroup(_merged(paths), len(paths), kind.name, kind.out_features, kind.in_features, rule, parameters)
        for (_, kind, rule, parameters), paths in found.items()
    )


def _skipped(rows: Iterable[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    found: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for path, reason in rows:
        found.setdefault((_blank(path), _blank(reason)), []).append((path, reason))
    merged = [[_merged(texts) for texts in zip(*group, strict=True)] for group in found.values()]
    return tuple((path, reason) for path, reason in merged)


def _blank(text: str) -> str:
    return _NUMBER.sub("", text)


def _merged(texts: Sequence[str]) -> str:
    """What texts have in common that differ in numbers only, with those in braces: `layers.{0-3,5}.query`."""
    places = [list(dict.fromkeys(parts)) for parts in zip(*map(_NUMBER.split, texts), strict=True)]
    return "".join(parts[0] if len(parts) == 1 else f"{{{_ranges(sorted(map(int, parts)))}}}" for parts in places)


def _ranges(numbers: Sequence[int]) -> str:
    """`0-3,5` of 0, 1, 2, 3, 5."""
    runs = [[n for _, n in run] for _, run in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])]
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
