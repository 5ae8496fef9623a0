"""Sources: the adapters that a report is about, wherever they come from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adapterkit.contract import AdapterConfig, default_registry
from adapterkit.errors import StateError
from adapterkit.kinds import Factors
from adapterkit.model import Adapter


@dataclass(frozen=True)
class Head:
    """A module trained in full with the adapter: its path and the shape of each of its tensors."""

    path: str
    shapes: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Source:
    """One adapter, as a report needs it.

    Attributes:
        name: what the report calls it.
        config: its config.
        kinds: each target's layer kind, such as `"Linear"`, by path in the order of the model.
        factors: the change at a path, made when asked for and not kept; `None` where the method has no such form.
        base_norm: the Frobenius norm of the base's weight at a path, or `None` where that is not at hand.
        parameters: what it trains, by name.
        heads, labels: its heads, and the classes these tell apart.
        biases: paths whose bias it trains.
        place: where it was read from, for the reader.
    """

    name: str
    config: AdapterConfig
    kinds: Mapping[str, str]
    factors: Callable[[str], Factors | None]
    base_norm: Callable[[str], float | None]
    parameters: Mapping[str, Tensor]
    heads: Sequence[Head] = ()
    labels: Sequence[str] = ()
    biases: Sequence[str] = ()
    place: str | None = None

    @property
    def settings(self) -> dict[str, object]:
        """The fields that the method's own config has beside those of all methods, where they say something."""
        common = {f.name for f in dataclasses.fields(AdapterConfig)}
        own = {f.name: getattr(self.config, f.name) for f in dataclasses.fields(self.config) if f.name not in common}
        return {name: value for name, value in own.items() if value not in (None, False, {}, (), "none", 0.0)}


def of_adapter(adapter: Adapter, base_norm: Callable[[str], float | None], place: str | None = None) -> Source:
    """The source that an adapter on a model is; for `base_norm` and `place` see `Source`."""
    method = default_registry.method_of(adapter.config)

    def factors(path: str) -> Factors | None:
        found = method.factors(adapter.layers[path])
        return None if found is None else _checked(found, adapter.name, path)

    return Source(
        name=adapter.name,
        config=adapter.config,
        kinds={path: layer.kind.name for path, layer in adapter.layers.items()},
        factors=factors,
        base_norm=base_norm,
        parameters=dict(adapter.named_parameters()),
        heads=[Head(path, _shapes(head.state_dict())) for path, head in adapter.heads.items()],
        labels=() if adapter.labels is None else tuple(adapter.labels.id2label.values()),
        biases=tuple(adapter.biases),
        place=place,
    )


def _checked(factors: Factors, name: str, path: str) -> Factors:
    if factors.down.is_meta:
        raise StateError(f"Adapter {name!r} has no values at {path!r}: it is on the meta device.")
    if not all(bool(torch.isfinite(t).all()) for t in factors[:3] if t is not None):
        raise StateError(f"Adapter {name!r} has values at {path!r} that are not finite.")
    return factors


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}
