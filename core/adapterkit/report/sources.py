"""The adapters that a report is about: on a model, or in files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from adapterkit.contract import AdapterConfig, default_registry
from adapterkit.disk import AdapterFile, Base
from adapterkit.errors import StateError
from adapterkit.kinds import Factors, dense
from adapterkit.merging import Merged, Place
from adapterkit.model import Adapter
from adapterkit.tensors import gathered


@dataclass(frozen=True)
class Source:
    """One adapter, as a report needs it.

    Attributes:
        name: its name in the report.
        config: its config.
        kinds: the layer kind of each target, such as `"Linear"`, by path in the order of the model.
        factors: returns the change at a path, or `None` if the method has no low-rank form. They are not kept.
        base_norm: returns the Frobenius norm of the base's weight at a path, or `None` if it is not available.
        parameters: everything that it trains, by name.
        in_layers: how many of these numbers change the layers; the others are heads and biases of the base.
        heads: its heads by path, with the shape of each of their tensors.
        labels: the classes that its heads tell apart.
        biases: how many biases of the base it trains.
        place: where it was read from.
    """

    name: str
    config: AdapterConfig
    kinds: Mapping[str, str]
    factors: Callable[[str], Factors | None]
    base_norm: Callable[[str], float | None]
    parameters: Mapping[str, Tensor]
    in_layers: int
    heads: Mapping[str, Mapping[str, tuple[int, ...]]] = field(default_factory=dict)
    labels: Sequence[str] = ()
    biases: int = 0
    place: str = ""

    @classmethod
    def of(cls, adapter: Adapter, base_norm: Callable[[str], float | None]) -> Source:
        """The source for an adapter on a model."""
        method = default_registry.method_of(adapter.config)

        def factors(path: str) -> Factors | None:
            return _checked(method.factors(adapter.layers[path]), adapter.name, path)

        parameters = dict(adapter.named_parameters())
        elsewhere = [p for part in (*adapter.heads.values(), *adapter.biases.values()) for p in part.parameters()]
        return cls(
            name=adapter.name,
            config=adapter.config,
            kinds={path: layer.kind.name for path, layer in adapter.layers.items()},
            factors=factors,
            base_norm=base_norm,
            parameters=parameters,
            in_layers=sum(p.numel() for p in parameters.values()) - sum(p.numel() for p in elsewhere),
            heads={p: {n: tuple(t.shape) for n, t in head.state_dict().items()} for p, head in adapter.heads.items()},
            labels=() if adapter.labels is None else tuple(adapter.labels.id2label.values()),
            biases=len(adapter.biases),
        )

    @classmethod
    def of_file(cls, opened: AdapterFile, base_norm: Callable[[str], float | None]) -> Source:
        """The source for an adapter in files."""
        layers = {f"{path}.{n}": p for path, layer in opened.built.items() for n, p in layer.named_parameters()}
        layers |= {name: p for name, p in opened.tensors.items() if isinstance(p, nn.Parameter)}
        heads = {f"{path}.{n}": t for path, head in opened.heads.items() for n, t in head.items()}
        labels = opened.labels
        return cls(
            name=opened.name,
            config=opened.config,
            kinds={path: kind.name for path, kind in opened.kinds.items()},
            factors=lambda path: _checked(opened.factors(path), opened.name, path),
            base_norm=base_norm,
            parameters=layers | heads | {f"{path}.bias": bias for path, bias in opened.biases.items()},
            in_layers=sum(p.numel() for p in layers.values()),
            heads={path: {n: tuple(t.shape) for n, t in head.items()} for path, head in opened.heads.items()},
            labels=() if labels is None else tuple(labels.id2label.values()),
            biases=len(opened.biases),
            place=str(opened.files.folder),
        )


def _checked(found: Factors | None, name: str, path: str) -> Factors | None:
    if found is None:
        return None
    if found.down.is_meta:
        raise StateError(f"Adapter {name!r} has no values at {path!r}: it is on the meta device.")
    if not all(bool(torch.isfinite(t).all()) for t in found[:3] if t is not None):
        raise StateError(f"Adapter {name!r} has values at {path!r} that are not finite.")
    return found


def live_sources(adapters: Iterable[Adapter], merged: Merged) -> list[Source]:
    """The sources for adapters on one model. The weights of layers with a merged adapter are those before the merge."""

    def norms_at(adapter: Adapter) -> Callable[[str], float | None]:
        def norm(path: str) -> float | None:
            module = adapter.heads.get(path, adapter.hosts[path])
            kept = merged.kept.get(Place(module, "weight"))
            with gathered(module, module.modules()):
                weight = adapter.layers[path].kind.read(module) if kept is None else kept.value
                weight = None if weight is None else dense(weight)
                return None if weight is None or weight.is_meta else _norm(weight)

        return norm

    return [Source.of(adapter, norms_at(adapter)) for adapter in adapters]


@torch.no_grad()
def stored_sources(
    places: Sequence[str | Path], names: Sequence[str], base: str | Path | nn.Module | None
) -> list[Source]:
    """The sources for adapters in files; see `write_report`."""
    known = Base.of(base)

    @cache  # adapters of one base ask for the same weights
    def norm(path: str) -> float | None:
        weight = None if known is None else known.parameter(path, "weight")
        return None if weight is None else _norm(weight)

    sources = []
    for place, name in zip(places, names, strict=True):
        opened = AdapterFile.open(place, known, name=name, keep_names=True)
        opened.check_fits()
        sources.append(Source.of_file(opened, norm))
    return sources


def _norm(weight: Tensor) -> float:
    """The Frobenius norm, summed in float32 (float64 for float64)."""
    return float(torch.linalg.vector_norm(weight.detach(), dtype=torch.promote_types(weight.dtype, torch.float32)))
