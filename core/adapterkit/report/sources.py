"""The adapters that a report is about: on a model, or in files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from adapterkit.contract import AdapterLayer, default_registry
from adapterkit.disk import AdapterFile, Base
from adapterkit.errors import UnsupportedError
from adapterkit.kinds import dense
from adapterkit.merging import Merged, Place
from adapterkit.model import Adapter
from adapterkit.report.measuring import AdapterFinding
from adapterkit.tensors import gathered


def live_sources(adapters: Iterable[Adapter], merged: Merged) -> list[AdapterFinding]:
    """Adapters on one model. The weights of layers with a merged adapter are those before the merge."""

    def found(adapter: Adapter) -> AdapterFinding:
        def base_norm(path: str) -> float | None:
            module = adapter.heads.get(path, adapter.hosts[path])
            kept = merged.kept.get(Place(module, "weight"))
            with gathered(module, module.modules()), suppress(UnsupportedError):  # it does not say its numbers
                weight = adapter.layers[path].kind.read(module) if kept is None else kept.value
                return _norm(None if weight is None else dense(weight))
            return None

        shared = [] if adapter.shared is None else adapter.shared.parameters()
        rest = [p for part in (*adapter.heads.values(), *adapter.biases.values()) for p in part.parameters()]
        return _finding(adapter, adapter.layers, shared, rest, base_norm)

    return [found(adapter) for adapter in adapters]


@torch.no_grad()
def stored_sources(
    places: Sequence[str | Path], names: Sequence[str], base: str | Path | nn.Module | None
) -> list[AdapterFinding]:
    """Adapters in files; see `write_report`."""
    known = Base.of(base)

    @cache  # adapters of one base ask for the same weights
    def base_norm(path: str) -> float | None:
        return None if known is None else _norm(known.parameter(path, "weight"))

    sources = []
    for place, name in zip(places, names, strict=True):
        opened = AdapterFile.open(place, known, name=name, keep_names=True)
        opened.check_fits()
        rest = [*opened.biases.values(), *(t for head in opened.heads.values() for t in head.values())]
        shared = (t for t in opened.tensors.values() if isinstance(t, nn.Parameter))
        sources.append(_finding(opened, opened.built, shared, rest, base_norm, str(opened.files.folder)))
    return sources


def _finding(
    adapter: Adapter | AdapterFile,
    layers: Mapping[str, AdapterLayer],
    shared: Iterable[Tensor],
    rest: Sequence[Tensor],
    base_norm: Callable[[str], float | None],
    place: str = "",
) -> AdapterFinding:
    """The adapter before it is measured; `rest` are the tensors of its heads and biases."""
    method = default_registry.method_of(adapter.config)
    inside = {id(p): p for p in (*shared, *(p for layer in layers.values() for p in layer.parameters()))}
    in_layers = sum(p.numel() for p in inside.values())
    return AdapterFinding(
        name=adapter.name,
        config=adapter.config,
        kinds={path: layer.kind.name for path, layer in layers.items()},
        factors=lambda path: method.factors(layers[path]),
        base_norm=base_norm,
        parameters=in_layers + sum(t.numel() for t in rest),
        in_layers=in_layers,
        dtypes=sorted({str(t.dtype).removeprefix("torch.") for t in (*inside.values(), *rest)}),
        heads=tuple(adapter.heads),
        labels=() if adapter.labels is None else tuple(adapter.labels.id2label.values()),
        place=place,
    )


def _norm(weight: Tensor | None) -> float | None:
    """The Frobenius norm, summed in float32 (float64 for float64); `None` if there are no values."""
    if weight is None or weight.is_meta:
        return None
    return float(torch.linalg.vector_norm(weight.detach(), dtype=torch.promote_types(weight.dtype, torch.float32)))
