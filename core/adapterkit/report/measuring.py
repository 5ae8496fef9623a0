"""What a report measures: plain numbers for each adapter and each pair. No tensor of a layer is kept."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass
from functools import cached_property
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor

from adapterkit.combining import measures, rank_for_energy, svd, working
from adapterkit.errors import StateError
from adapterkit.kinds import Factors, numerical_rank
from adapterkit.report.sources import Source

# Subspaces are compared by the leading directions with this share of the energy. The other directions, without which
# a change would lose 32 % of its norm, are often a remainder of the random initial values.
SUBSPACE_ENERGY = 0.9
# Sign conflicts are counted in up to this many entries of a layer; a larger layer is sampled in whole rows. The
# standard error of a share is then 0.1 % if the entries are independent.
MOST_ENTRIES = 1 << 18
# Entries of each change that are in memory at once.
_BLOCK = 1 << 20
_NO_OVERLAP = measures.Overlap(0.0, 0.0)


@dataclass(frozen=True)
class LayerFinding:
    """One adapter at one target.

    Attributes:
        shape: `(out, in)` of the weight.
        rank: the inner size of the factors.
        norm: `|dW|`, Frobenius.
        base_norm: `|W|`, or `None` if the base's weight is not available.
        spectrum: the singular values of dW, descending, without those that are zero up to rounding.
        effective_rank: see `measures.effective_rank`.
        rank90, rank99: how many singular values hold 90 % and 99 % of the energy.
    """

    shape: tuple[int, int]
    rank: int
    norm: float
    base_norm: float | None
    spectrum: Tensor
    effective_rank: float
    rank90: int
    rank99: int

    @property
    def relative(self) -> float | None:
        """`|dW| / |W|`."""
        return self.norm / self.base_norm if self.base_norm else None


@dataclass(frozen=True)
class AdapterFinding:
    """One adapter: its source and, by path, what was measured at the targets that have factors."""

    source: Source
    layers: Mapping[str, LayerFinding]

    @property
    def name(self) -> str:
        """Its name in the report."""
        return self.source.name

    @property
    def without_factors(self) -> tuple[str, ...]:
        """Targets that cannot be measured, because the method has no low-rank form of its change there."""
        return tuple(path for path in self.source.kinds if path not in self.layers)

    @cached_property
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
class Conflict:
    """How two changes of one shape disagree in sign, entry by entry.

    Attributes:
        entries: entries of the layer.
        opposed: how many entries have opposite signs.
        total: `sum of |a| + |b|` over the layer.
        lost: `sum of min(|a|, |b|)` over the opposed entries: what TIES drops, and what the two cancel in a sum.
    """

    entries: int = 0
    opposed: float = 0.0
    total: float = 0.0
    lost: float = 0.0

    @property
    def share(self) -> float:
        """The share of the entries with opposite signs; 1/2 for independent changes."""
        return self.opposed / self.entries if self.entries else 0.0

    @property
    def weighted(self) -> float:
        """`lost / total`, 0 to 1/2; about 0.15 for independent Gaussian entries of one size."""
        return self.lost / self.total if self.total else 0.0

    def __add__(self, other: Conflict) -> Conflict:
        return Conflict(*(own + its for own, its in zip(astuple(self), astuple(other), strict=True)))


@dataclass(frozen=True)
class PairLayer:
    """Two changes, `f` and `g`, at one target.

    Attributes:
        inner: `sum of dW_f * dW_g`.
        norms: `|dW_f|` and `|dW_g|`.
        columns, rows: the overlap of their column spaces (outputs) and row spaces (inputs).
        inside: the part of `g` that lies in the directions of `f`, `|P dW_g Q|` with P and Q the projections on f's
            column and row space; and the part of `f` in the directions of `g`.
        signs: see `Conflict`.
    """

    inner: float
    norms: tuple[float, float]
    columns: measures.Overlap
    rows: measures.Overlap
    inside: tuple[float, float]
    signs: Conflict

    @property
    def cosine(self) -> float:
        """The cosine of the two changes as vectors; 0 if one of them is zero."""
        return _ratio(self.inner, self.norms[0] * self.norms[1])

    @property
    def disturbance(self) -> float:
        """What one adds in the directions of the other, relative to the other's size; the larger of the two."""
        return max(_ratio(part, norm) for part, norm in zip(self.inside, self.norms, strict=True))


@dataclass(frozen=True)
class PairFinding:
    """Two adapters, at the targets that both change and that have one shape in both.

    Attributes:
        norms: `|dW|` of each over all of its targets, shared or not.
        other_shape: shared targets with weights of different shapes: the adapters have different base models.
    """

    layers: Mapping[str, PairLayer]
    norms: tuple[float, float]
    other_shape: tuple[str, ...]

    @cached_property
    def inner(self) -> float:
        """The inner product of all their changes."""
        return sum(layer.inner for layer in self.layers.values())

    @property
    def cosine(self) -> float:
        """The cosine of the adapters as vectors of all their changes; a target that one lacks counts as zero there."""
        return _ratio(self.inner, self.norms[0] * self.norms[1])

    @cached_property
    def columns(self) -> measures.Overlap:
        """The mean overlap of the column spaces (outputs)."""
        return _mean(layer.columns for layer in self.layers.values())

    @cached_property
    def rows(self) -> measures.Overlap:
        """The mean overlap of the row spaces (inputs)."""
        return _mean(layer.rows for layer in self.layers.values())

    @cached_property
    def inside(self) -> tuple[float, float]:
        """What the other adds in the directions of each, relative to its size: `|P dW_g Q| / |dW_f|`, and back."""
        parts = (math.hypot(*(layer.inside[i] for layer in self.layers.values())) for i in (0, 1))
        first, second = (_ratio(part, norm) for part, norm in zip(parts, self.norms, strict=True))
        return first, second

    @cached_property
    def signs(self) -> Conflict:
        """The sign conflicts over all shared targets."""
        return sum((layer.signs for layer in self.layers.values()), Conflict())


@dataclass(frozen=True)
class Findings:
    """Every number of a report: each adapter, and each pair of them by their positions."""

    adapters: tuple[AdapterFinding, ...]
    pairs: Mapping[tuple[int, int], PairFinding]

    @property
    def paths(self) -> tuple[str, ...]:
        """Every measured target of any adapter, those of the first adapter first."""
        return tuple(dict.fromkeys(path for adapter in self.adapters for path in adapter.layers))


@torch.no_grad()
def measure(sources: Sequence[Source]) -> Findings:
    """Measure every adapter, and every pair if there are several. One layer of all adapters is in memory at a time.

    Raises:
        StateError: a change has values that are not finite, or has no values.
    """
    layers: list[dict[str, LayerFinding]] = [{} for _ in sources]
    pairs: dict[tuple[int, int], dict[str, PairLayer]] = {p: {} for p in combinations(range(len(sources)), 2)}
    other_shape: dict[tuple[int, int], list[str]] = {pair: [] for pair in pairs}
    for path in dict.fromkeys(path for source in sources for path in source.kinds):
        changes: dict[int, _Decomposed] = {}
        for i, source in enumerate(sources):
            factors = source.factors(path) if path in source.kinds else None
            if factors is not None:
                changes[i], layers[i][path] = _measure_layer(source, path, factors)
        for pair, found in _measure_pairs(changes).items():
            if found is None:
                other_shape[pair].append(path)
            else:
                pairs[pair][path] = found
    adapters = tuple(AdapterFinding(source, found) for source, found in zip(sources, layers, strict=True))
    norms = [adapter.norm for adapter in adapters]
    met = {(i, j): PairFinding(pairs[i, j], (norms[i], norms[j]), tuple(other_shape[i, j])) for i, j in pairs}
    return Findings(adapters, met)


class _Decomposed(NamedTuple):
    """A change at one target by its thin singular value decomposition; its `leading` directions are compared."""

    u: Tensor
    s: Tensor
    vh: Tensor
    leading: int

    @property
    def shape(self) -> tuple[int, int]:
        """`(out, in)`."""
        return self.u.shape[0], self.vh.shape[1]

    @property
    def factors(self) -> Factors:
        """The change as factors again."""
        return Factors(self.u * self.s, self.vh)

    def part_inside(self, other: _Decomposed) -> float:
        """`|u u^T dW v v^T|`: how much of this change lies in the other's leading directions."""
        u, v = other.u[:, : other.leading], other.vh[: other.leading].t()
        left = u.t() @ (self.u * self.s).to(u.dtype)
        return float(torch.linalg.vector_norm(left @ (self.vh.to(v.dtype) @ v)))


def _measure_layer(source: Source, path: str, factors: Factors) -> tuple[_Decomposed, LayerFinding]:
    u, s, vh = svd(factors)
    if not bool(torch.isfinite(s).all()):
        raise StateError(f"Adapter {source.name!r} has a change at {path!r} that is too large for {s.dtype}.")
    shape = u.shape[0], vh.shape[1]
    values = s[: numerical_rank(s, max(shape))]
    finding = LayerFinding(
        shape=shape,
        rank=factors.rank,
        norm=measures.size(values),
        base_norm=source.base_norm(path),
        spectrum=values.cpu(),
        effective_rank=measures.effective_rank(values),
        rank90=rank_for_energy(values, 0.9),
        rank99=rank_for_energy(values, 0.99),
    )
    return _Decomposed(u, s, vh, rank_for_energy(values, SUBSPACE_ENERGY)), finding


def _measure_pairs(changes: Mapping[int, _Decomposed]) -> dict[tuple[int, int], PairLayer | None]:
    """Every pair of these changes at one target; `None` for two changes of different shapes."""
    pairs: dict[tuple[int, int], PairLayer | None] = dict.fromkeys(combinations(changes, 2))
    for shape in dict.fromkeys(change.shape for change in changes.values()):
        alike = {i: change for i, change in changes.items() if change.shape == shape}
        signs = sign_conflicts([change.factors for change in alike.values()]) if len(alike) > 1 else {}
        for (i, j), conflict in zip(combinations(alike, 2), signs.values(), strict=True):
            f, g = alike[i], alike[j]
            pairs[i, j] = PairLayer(
                inner=measures.inner(f.factors, g.factors),
                norms=(measures.size(f.s), measures.size(g.s)),
                columns=measures.overlap(f.u[:, : f.leading], g.u[:, : g.leading]),
                rows=measures.overlap(f.vh[: f.leading].t(), g.vh[: g.leading].t()),
                inside=(g.part_inside(f), f.part_inside(g)),
                signs=conflict,
            )
    return pairs


def sign_conflicts(sources: Sequence[Factors], most: int = MOST_ENTRIES) -> dict[tuple[int, int], Conflict]:
    """The sign conflicts of every pair of these changes of one shape, in the order of `combinations`.

    For `a` and `b` these are the entries with `a b < 0`: their number, and `sum of min(|a|, |b|)` over them. Rows are
    made from the factors, a block at a time. If the layer has more than `most` entries, `most // in` rows are drawn
    without replacement by a fixed seed, and the sums are scaled up.
    """
    out, inside = sources[0].up.shape[0], sources[0].down.shape[1]
    rows = torch.arange(out)
    if (count := max(1, most // inside)) < out:
        rows = torch.randperm(out, generator=torch.Generator().manual_seed(0))[:count].sort().values
    sums = {pair: torch.zeros(3, dtype=torch.float64) for pair in combinations(range(len(sources)), 2)}
    for chunk in rows.split(max(1, _BLOCK // inside)):
        block = [working(f.up)[chunk.to(f.up.device)] @ working(f.down) for f in sources]
        for i, j in sums:
            a, b = block[i], block[j].to(block[i])
            opposed = (a * b.sign()) < 0  # the product of two small numbers may be zero
            lost = torch.minimum(a.abs(), b.abs())[opposed]
            found = [n.sum().to(a.dtype) for n in (opposed, a.abs() + b.abs(), lost)]
            sums[i, j] += torch.stack(found).cpu().double()
    return {pair: Conflict(out * inside, *(values * (out / len(rows))).tolist()) for pair, values in sums.items()}


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _mean(overlaps: Iterable[measures.Overlap]) -> measures.Overlap:
    listed = list(overlaps)
    return measures.Overlap(*(sum(part) / len(listed) for part in zip(*listed, strict=True))) if listed else _NO_OVERLAP
