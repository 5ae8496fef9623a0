"""Inspecting an adapter by its files alone: `ak.inspect_adapter`."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adapterkit.combining import all_finite, measures
from adapterkit.contract import LowRankLayer, without_values
from adapterkit.disk.adapter_file import AdapterFile, natural
from adapterkit.disk.model import Base
from adapterkit.errors import StateError, UsageError, usage
from adapterkit.files import WEIGHTS_FILES
from adapterkit.model import LabelSet
from adapterkit.results import NUMBER, Printed, brief, columns, counted, in_groups, in_lines, listed, merged_paths, span
from adapterkit.tensors import default_modes

Shape = tuple[int, ...]
# Fields of a config that its line leaves out: they have a line of their own, or say nothing.
_NOT_SHOWN = ("base_model_name_or_path", "inference_mode", "peft_type")
_COLUMNS = ("layer", "kind", "shape", "rank", "scaling", "norm", "effective rank", "for 90 %", "for 99 %")
_NUMBERS = ("rank", "scaling", "norm", "effective_rank", "rank_90", "rank_99")
_ORDERS = ("path", "norm", "effective_rank", "rank", "parameters")
# More layers than these share rows.
_MOST_ALONE = 24


@dataclass(frozen=True)
class LayerInspection:
    """What an adapter has at one layer.

    Attributes:
        kind: what the layer is, `shape` its `(out, in)`; `None` where the files do not tell.
        rank: of the exact factors of the change, which may be more than its effective rank; `None`: it has none.
        scaling: what the parameters' product is multiplied by.
        tensors: shapes by their names in the layer, `parameters` their entries.
        norm: the Frobenius norm of the change.
        effective_rank: `exp` of the entropy of the singular values, each as a share of their sum (Roy and Vetterli
            2007).
        rank_90, rank_99: how few singular values have 90 and 99 % of the sum of their squares.
    """

    path: str
    kind: str | None
    shape: tuple[int, int] | None
    rank: int | None
    scaling: float | None
    tensors: Mapping[str, Shape]
    parameters: int
    norm: float | None = None
    effective_rank: float | None = None
    rank_90: int | None = None
    rank_99: int | None = None


@dataclass(frozen=True)
class AdapterInspection(Printed):
    """What an adapter's files hold. Prints as a table; `to_dict` is for JSON.

    Attributes:
        source: the folder or the file; `weights` its file of tensors, of `size` bytes.
        layout: the program whose layout the files have (`"PEFT"`, `"kohya-ss"`, `"mlx-lm"`), and what else they are.
        method: its name, `provider` the package that has it.
        base: the base model that its config names.
        config: its fields as `adapter_config.json` has them; what they would be, for another program's file.
        layers: the layers that it changes, or the first of them in the order that was asked for; `total`: how many
            there are.
        heads: shapes of the tensors of each module that it holds in full, by path; `biases`: trained biases.
        shared: shapes of tensors that all layers use.
        labels: the classes that its head tells apart.
        parameters: entries of all its tensors; `dtypes`: how many tensors have each.
        norm: of all changes together, `sqrt(sum of norm^2)`.
        unknown: keys that belong to nobody; `missing`: keys that it should have.
        mismatched: tensors of a shape that does not go with the others, or with the config.
        notes: what could not be told, and why.
    """

    source: str
    weights: str
    size: int
    layout: str
    method: str
    provider: str
    base: str | None
    config: Mapping[str, Any]
    layers: tuple[LayerInspection, ...]
    heads: Mapping[str, Mapping[str, Shape]]
    biases: tuple[str, ...]
    shared: Mapping[str, Shape]
    labels: Mapping[int, str] | None
    parameters: int
    dtypes: Mapping[str, int]
    norm: float | None
    unknown: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    mismatched: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    sort: str = "path"
    total: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        return in_lines(_lines(self))


@usage()
@default_modes()
@torch.no_grad()
def inspect_adapter(
    source: str | Path,
    *,
    values: bool = True,
    base: str | Path | nn.Module | None = None,
    component: str | None = None,
    sort: str = "path",
    top: int | None = None,
) -> AdapterInspection:
    """What an adapter's files hold: its config, layers, ranks, sizes, heads, and how large its changes are.

    The base is never loaded. Norms and singular values are worked out from the factors, layer by layer.

    Args:
        source: an adapter folder, a hub id, or a file of another program, whose layers are called what it calls them.
        values: `False` reads headers alone: no norms and no effective ranks.
        base: where the tensors do not tell the layers' sizes, and for real paths in another program's file: the base
            model's folder or hub id (only its `config.json` is read), or the model itself.
        component: of a file for a whole pipeline, the part to look at.
        sort: the order of the layers: `"path"`; or `"norm"`, `"effective_rank"`, `"rank"` or `"parameters"`, the
            largest first.
        top: so many layers, the first in that order. `None`: all.

    Raises:
        ConfigError: another order.
        CheckpointError: it is not an adapter, or it is damaged.
        UnknownNameError: no plugin provides its method.
    """
    if sort not in _ORDERS or not (top is None or top >= 1):
        raise UsageError(f"sort = {sort!r} must be one of {', '.join(map(repr, _ORDERS))}, and top at least 1.")
    opened = AdapterFile.open(source, Base.of(base), component=component, keep_names=True)
    files = opened.files
    paths = opened.kinds or sorted(opened.layers, key=natural)
    layers = [inspect_layer(opened, path, values=values) for path in paths]
    odd = [row.path for row in layers if row.rank is not None and row.norm is None and row.path not in opened.broken]
    norms = [row.norm for row in layers if row.rank is not None or row.norm is not None]
    if sort != "path":  # layers without a number are last
        layers.sort(key=lambda row: -math.inf if (n := getattr(row, sort)) is None else n, reverse=True)
    place = files.folder
    if place.is_dir():
        place = next(place / name for name in WEIGHTS_FILES if (place / name).is_file())
    labels = LabelSet.from_metadata(files.metadata)
    dtypes = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in files.tensors.values())
    return AdapterInspection(
        source=str(files.folder),
        weights=str(place),
        size=place.stat().st_size,
        layout=opened.layout,
        method=opened.method.name,
        provider=opened.method.provider,
        base=opened.config.base_model_name_or_path,
        config=files.config or {},
        layers=tuple(layers[:top]),
        sort=sort,
        total=len(layers),
        # A file has the bias of a head before its weight; modules have it behind.
        heads={
            path: _shapes(dict(sorted(head.items(), key=lambda item: not item[0].endswith("weight"))))
            for path, head in opened.heads.items()
        },
        biases=tuple(opened.biases),
        shared=_shapes(opened.shared),
        labels=None if labels is None else dict(labels.id2label),
        parameters=sum(t.numel() for t in files.tensors.values()),
        dtypes=dict(dtypes.most_common()),
        # The sum of some norms would look like the sum of all.
        norm=None if not norms or None in norms else math.hypot(*norms),  # type: ignore[arg-type]
        unknown=opened.report.unexpected,
        missing=opened.report.missing,
        mismatched=tuple(map(str, opened.report.mismatched)),
        notes=(*opened.notes, *(f"{path} has values that are not finite" for path in odd if values)),
    )


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, Shape]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def inspect_layer(opened: AdapterFile, path: str, *, values: bool = True) -> LayerInspection:
    """Describe a layer of an adapter. Numbers that need values are left out if these are broken or not wanted."""
    shapes = _shapes(opened.layers.get(path, {}))
    size = sum(math.prod(shape) for shape in shapes.values())
    if path not in opened.built:
        return LayerInspection(path, None, None, None, None, shapes, size)
    kind, layer, values = opened.kinds[path], opened.built[path], values and path not in opened.broken
    asked: Any = layer if values else without_values(layer)
    factors = opened.method.factors(asked)
    scaling = getattr(layer, "scaling", asked.factors().scale if isinstance(layer, LowRankLayer) else 1.0)
    found = LayerInspection(
        path,
        kind.name,
        (kind.out_features, kind.in_features) if kind.has_weight else None,
        None if factors is None else factors.rank,
        scaling if isinstance(scaling, float | int) else None,
        shapes,
        size,
    )
    if values and factors is not None and all_finite(*factors[:3]):
        with suppress(StateError):  # they overflow: there is no norm either
            found = dataclasses.replace(found, **measures.figures(measures.spectrum(factors)))
    opened.mapped.release()
    return found


def _lines(found: AdapterInspection) -> Iterator[str]:
    yield f"{found.source}: {found.method} ({found.provider}), base {found.base or 'not named'}"
    yield f"  layout: {found.layout}"
    unset: tuple[object, ...] = (None, False, "", [], {}, "none")
    fields = [f"{k}={brief(v)}" for k, v in found.config.items() if k not in _NOT_SHOWN and v not in unset]
    yield f"  config: {', '.join(fields)}"
    dtypes = ", ".join(f"{name} x {count}" for name, count in found.dtypes.items())
    shown = f", {len(found.layers)} of them shown" if len(found.layers) < found.total else ""
    layers = f"{counted(found.total or len(found.layers), 'layer')}{shown}"
    yield f"  {layers}, {counted(found.parameters, 'parameter')}, {found.size:,} bytes ({dtypes})"
    if found.norm is not None:
        yield f"  norm of all changes: {found.norm:.4g}"
    rows: list[tuple[str, ...]] = [_COLUMNS] if found.layers else []
    alone = found.sort != "path" or len(found.layers) <= _MOST_ALONE
    for group in in_groups(
        found.layers, lambda row: (row.path if alone else NUMBER.sub("", row.path), row.kind, row.shape)
    ):
        first = group[0]
        shape = "?" if first.shape is None else f"{first.shape[0]} x {first.shape[1]}"
        given = [[n for row in group if (n := getattr(row, name)) is not None] for name in _NUMBERS]
        numbers = (span(held, ".4g") if held else "-" for held in given)
        rows.append((merged_paths([row.path for row in group]), first.kind or "?", shape, *numbers))
    yield from (f"  {line}" for line in columns(rows))
    for path, tensors in found.heads.items():
        yield f"  head {path}: {', '.join(f'{n} {s}' for n, s in tensors.items())}"
    if found.labels is not None:
        yield f"  labels: {brief(', '.join(found.labels.values()))}"
    for title, entries in (
        ("trained bias", found.biases),
        ("shared", [f"{name} {shape}" for name, shape in found.shared.items()]),
        ("unknown", found.unknown),
        ("missing", found.missing),
        ("mismatched", found.mismatched),
        ("note", found.notes),
    ):
        yield from listed(title, entries)
