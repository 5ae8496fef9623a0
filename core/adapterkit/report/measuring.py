"""What a report measures: plain numbers for each adapter and each pair. No tensor of a layer is kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor

from adapterkit.combining import check_values, measures, rank_for_energy, svd, working
from adapterkit.contract import AdapterConfig
from adapterkit.errors import StateError
from adapterkit.kinds import Factors, numerical_rank
from adapterkit.tensors import default_modes

# Subspaces are compared by the leading directions with this share of the energy. The other directions, without which
# a change would lose 32 % of its norm, are often a remainder of the random initial values.
SUBSPACE_ENERGY = 0.9
# Sign conflicts are counted in up to this many entries of a layer; a larger layer is sampled in whole rows. The
# standard error of a share is then 0.1 % if the entries are independent.
MOST_ENTRIES = 1 << 18


@dataclass(frozen=True)
class LayerFinding:
    """One adapter at one target.

    Attributes:
        shape: `(out, in)` of the weight.
        rank: the inner size of the factors.
        base_norm: `|W|`, or `None` if the base's weight is not available.
        spectrum: the singular values of dW, descending, without those that are zero up to rounding.
        norm, effective_rank, rank_90, rank_99: see `measures.figures`.
    """

    shape: tuple[int, int]
    rank: int
    base_norm: float | None
    spectrum: Tensor
    norm: float
    effective_rank: float
    rank_90: int
    rank_99: int

    @property
    def relative(self) -> float | None:
        """`|dW| / |W|`."""
        return self.norm / self.base_norm if self.base_norm else None


@dataclass(frozen=True)
class AdapterFinding:
    """One adapter, on a model or in files, and what was measured.

    Attributes:
        kinds: the layer kind of each target, such as `"Linear"`, by path in the order of the model.
        factors: returns the change at a path, or `None` if the method has no low-rank form there.
        base_norm: returns the Frobenius norm of the base's weight at a path, or `None` if it is not available.
        parameters: how many numbers it trains; `in_layers` of them change the layers, the others are heads and biases.
        dtypes: of its parameters.
        heads: the paths of its heads; `labels`: the classes that they tell apart.
        place: where it was read from.
        layers: what was measured, at the targets that have factors; `measure` fills it.
    """

    name: str
    config: AdapterConfig
    kinds: Mapping[str, str]
    factors: Callable[[str], Factors | None]
    base_norm: Callable[[str], float | None]
    parameters: int
    in_layers: int
    dtypes: Sequence[str] = ()
    heads: Sequence[str] = ()
    labels: Sequence[str] = ()
    place: str = ""
    layers: dict[str, LayerFinding] = field(default_factory=dict)

    @property
    def without_factors(self) -> tuple[str, ...]:
        """Targets that cannot be measured."""
        return tuple(path for path in self.kinds if path not in self.layers)

    @property
    def norm(self) -> float:
        """The Frobenius norm of all its changes together."""
        return math.hypot(*(layer.norm for layer in self.layers.values()))

    @cached_property
    def has_base(self) -> bool:
        """Whether the norm of the base's weight is known at every target."""
        return bool(self.layers) and all(layer.base_norm for layer in self.layers.values())

    def sizes(self) -> dict[str, float]:
        """The size of each change: `|dW| / |W|` if the base's weights are known, else `|dW|`."""
        return {path: (layer.relative or 0.0) if self.has_base else layer.norm for path, layer in self.layers.items()}


@dataclass(frozen=True)
class Pair:
    """Two changes `f` and `g` of one shape.

    Attributes:
        inner: `sum of dW_f * dW_g`.
        norms: `|dW_f|` and `|dW_g|`.
        parts: the part of `g` that lies in the directions of `f`, `|P dW_g Q|` with P and Q the projections on f's
            column and row space; and the part of `f` in the directions of `g`.
        columns, rows: the overlap of their column spaces (outputs) and row spaces (inputs).
        opposed: the share of the entries with opposite signs; 1/2 for independent changes.
        entries: how many entries the changes have.
    """

    inner: float
    norms: tuple[float, float]
    parts: tuple[float, float]
    columns: measures.Overlap
    rows: measures.Overlap
    opposed: float
    entries: int

    @property
    def cosine(self) -> float:
        """The cosine of the two changes as vectors; 0 if one of them is zero."""
        return _ratio(self.inner, self.norms[0] * self.norms[1])

    @property
    def inside(self) -> tuple[float, float]:
        """What the other adds in the directions of each, relative to its size: `|P dW_g Q| / |dW_f|`, and back."""
        return _ratio(self.parts[0], self.norms[0]), _ratio(self.parts[1], self.norms[1])


@dataclass(frozen=True)
class PairFinding(Pair):
    """Two adapters as vectors of all their changes; a target that one of them lacks counts as zero there.

    Attributes:
        layers: the pair of changes at each target that both adapters change.
        other_shape: shared targets with weights of different shapes: the adapters have different base models.
    """

    layers: Mapping[str, Pair]
    other_shape: Sequence[str]


@dataclass(frozen=True)
class Findings:
    """Every number of a report: each adapter, and each pair of them by their positions."""

    adapters: tuple[AdapterFinding, ...]
    pairs: Mapping[tuple[int, int], PairFinding]


class _Change(NamedTuple):
    """A change at one target by its thin singular value decomposition; its `leading` directions are compared."""

    u: Tensor
    s: Tensor
    vh: Tensor
    leading: int

    @property
    def factors(self) -> Factors:
        """The change as factors again."""
        return Factors(self.u * self.s, self.vh)

    def inside(self, other: _Change) -> float:
        """`|u u^T dW v v^T|`: how much of this change lies in the other's leading directions."""
        u, v = other.u[:, : other.leading], other.vh[: other.leading].t()
        left = u.t() @ (self.u * self.s).to(u.dtype)
        return float(torch.linalg.vector_norm(left @ (self.vh.to(v.dtype) @ v)))


@default_modes()
@torch.no_grad()
def measure(adapters: Sequence[AdapterFinding]) -> Findings:
    """Measure every adapter and every pair of them. One layer of all adapters is in memory at a time.

    Raises:
        StateError: a change has values that are not finite, or has no values.
    """
    pairs: dict[tuple[int, int], dict[str, Pair]] = {pair: {} for pair in combinations(range(len(adapters)), 2)}
    other_shape: dict[tuple[int, int], list[str]] = {pair: [] for pair in pairs}
    for path in dict.fromkeys(path for adapter in adapters for path in adapter.kinds):
        changes: dict[int, _Change] = {}
        for i, adapter in enumerate(adapters):
            factors = adapter.factors(path) if path in adapter.kinds else None
            if factors is not None:
                changes[i], adapter.layers[path] = _measure_layer(adapter, path, factors)
        for i, j in combinations(changes, 2):
            if adapters[i].layers[path].shape != adapters[j].layers[path].shape:
                other_shape[i, j].append(path)
            else:
                pairs[i, j][path] = _measure_pair(changes[i], changes[j])
    norms = [adapter.norm for adapter in adapters]
    whole = {(i, j): _whole(pairs[i, j], (norms[i], norms[j]), other_shape[i, j]) for i, j in pairs}
    return Findings(tuple(adapters), whole)


def _measure_layer(adapter: AdapterFinding, path: str, factors: Factors) -> tuple[_Change, LayerFinding]:
    check_values(factors, adapter.name, path)
    try:
        u, s, vh = svd(factors)
    except StateError as error:
        dtype = torch.promote_types(factors.up.dtype, torch.float32)
        raise StateError(f"Adapter {adapter.name!r} has a change at {path!r} that is too large for {dtype}.") from error
    shape = u.shape[0], vh.shape[1]
    values = s[: numerical_rank(s, max(shape))]
    finding = LayerFinding(
        shape=shape,
        rank=factors.rank,
        base_norm=adapter.base_norm(path),
        spectrum=values.cpu(),
        **measures.figures(values),
    )
    return _Change(u, s, vh, rank_for_energy(values, SUBSPACE_ENERGY)), finding


def _measure_pair(f: _Change, g: _Change) -> Pair:
    return Pair(
        inner=measures.inner(f.factors, g.factors),
        norms=(measures.size(f.s), measures.size(g.s)),
        parts=(g.inside(f), f.inside(g)),
        columns=measures.overlap(f.u[:, : f.leading], g.u[:, : g.leading]),
        rows=measures.overlap(f.vh[: f.leading].t(), g.vh[: g.leading].t()),
        opposed=opposed_signs(f.factors, g.factors),
        entries=f.u.shape[0] * f.vh.shape[1],
    )


def _whole(layers: Mapping[str, Pair], norms: tuple[float, float], other_shape: Sequence[str]) -> PairFinding:
    """The pair of all changes, from the pairs at each target: overlaps are means over the targets."""
    found = list(layers.values())
    entries = sum(pair.entries for pair in found)

    def mean(overlaps: list[measures.Overlap]) -> measures.Overlap:
        similarity, chance = (_ratio(sum(values), len(found)) for values in zip(*overlaps, strict=True))
        return measures.Overlap(similarity, chance)

    return PairFinding(
        inner=sum(pair.inner for pair in found),
        norms=norms,
        parts=(math.hypot(*(pair.parts[0] for pair in found)), math.hypot(*(pair.parts[1] for pair in found))),
        columns=mean([pair.columns for pair in found] or [measures.Overlap(0.0, 0.0)]),
        rows=mean([pair.rows for pair in found] or [measures.Overlap(0.0, 0.0)]),
        opposed=_ratio(sum(pair.opposed * pair.entries for pair in found), entries),
        entries=entries,
        layers=layers,
        other_shape=other_shape,
    )


def opposed_signs(f: Factors, g: Factors, most: int = MOST_ENTRIES) -> float:
    """The share of the entries in which two changes of one shape have opposite signs.

    If the layer has more than `most` entries, `most // in` of its rows are drawn by a fixed seed.
    """
    out, inside = f.up.shape[0], f.down.shape[1]
    rows = torch.randperm(out, generator=torch.Generator().manual_seed(0), device="cpu")[: max(1, most // inside)]
    a, b = (working(change.up)[rows.to(change.up.device)] @ working(change.down) for change in (f, g))
    return float((a * b.to(a).sign() < 0).double().mean())  # a product of two small numbers may be zero


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
