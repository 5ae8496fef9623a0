"""Findings: every number of a report. Plain values, measured once, layer by layer; no tensor of a layer is kept."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from adapterkit.combining import measures, svd
from adapterkit.errors import StateError
from adapterkit.kinds import Factors, numerical_rank
from adapterkit.report.signs import NONE, Conflict, sign_conflicts
from adapterkit.report.sources import Source

# Directions that count when subspaces are compared: the leading ones with this share of the energy. The rest, which
# a change could lose for 32 % of its norm, is often what is left of the random initial values.
SUBSPACE_ENERGY = 0.9


@dataclass(frozen=True)
class LayerFinding:
    """One adapter at one target.

    Attributes:
        kind: the layer kind's name.
        shape: `(out, in)` of the weight.
        rank: the inner size of the factors.
        norm: `|dW|`, Frobenius.
        base_norm: `|W|`, or `None` where the base's weights are not at hand.
        spectrum: singular values of dW, descending, without those that are rounding.
        effective_rank: see `measures.effective_rank`.
        rank90, rank99: singular values that hold 90 % and 99 % of the energy.
    """

    kind: str
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

    def to_dict(self) -> dict[str, Any]:
        """See `Findings.to_dict`."""
        names = ("kind", "rank", "norm", "relative", "effective_rank", "rank90", "rank99")
        return {"shape": list(self.shape), **{name: getattr(self, name) for name in names}}


@dataclass(frozen=True)
class AdapterFinding:
    """One adapter: its source and, by path, what was found at the targets that have factors.

    Attributes:
        without_factors: targets where the method has no low-rank form, which nothing is measured of.
    """

    source: Source
    layers: Mapping[str, LayerFinding]
    without_factors: tuple[str, ...]

    @property
    def name(self) -> str:
        """What the report calls it."""
        return self.source.name

    def to_dict(self) -> dict[str, Any]:
        """See `Findings.to_dict`."""
        layers = {path: layer.to_dict() for path, layer in self.layers.items()}
        return {"norm": self.norm, "layers": layers, "without_factors": list(self.without_factors)}

    @cached_property
    def norm(self) -> float:
        """The Frobenius norm of all its changes together."""
        return math.hypot(*(layer.norm for layer in self.layers.values()))

    @cached_property
    def has_base(self) -> bool:
        """Whether the size of the base's weights is known at every target."""
        return bool(self.layers) and all(layer.base_norm for layer in self.layers.values())


@dataclass(frozen=True)
class PairLayer:
    """Two changes, `f` and `g`, at one target.

    Attributes:
        inner: `sum of dW_f * dW_g`.
        norms: `|dW_f|` and `|dW_g|`.
        columns, rows: see `measures.Subspaces`; of the directions with `SUBSPACE_ENERGY`.
        inside: how much of `g` lies where `f` works, `|P dW_g Q|` with P and Q the projections on f's column and row
            space, and how much of `f` lies where `g` works.
        signs: see `Conflict`.
    """

    inner: float
    norms: tuple[float, float]
    columns: measures.Overlap
    rows: measures.Overlap
    inside: tuple[float, float]
    signs: Conflict

    @property
    def cosine(self) -> float | None:
        """Of the two changes as vectors; `None` where one of them is zero."""
        return _ratio(self.inner, self.norms[0] * self.norms[1])

    @property
    def disturbance(self) -> float:
        """What one adds where the other works, relative to that one's size; of the one that is disturbed more."""
        return max(_ratio(part, norm) or 0.0 for part, norm in zip(self.inside, self.norms, strict=True))

    def to_dict(self) -> dict[str, Any]:
        """See `Findings.to_dict`."""
        return {
            "cosine": self.cosine,
            "disturbance": self.disturbance,
            "columns": self.columns.similarity,
            "rows": self.rows.similarity,
            "sign_conflicts": self.signs.share,
            "sign_conflicts_weighted": self.signs.mass,
        }


@dataclass(frozen=True)
class PairFinding:
    """Two adapters, at the targets that both change and that have one shape in both.

    Attributes:
        norms: `|dW|` of each over all of its targets, shared or not.
        other_shape: targets of both whose weights have different shapes: adapters of different bases.
    """

    layers: Mapping[str, PairLayer]
    norms: tuple[float, float]
    other_shape: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """See `Findings.to_dict`; `disturbance` is `inside`."""
        return {
            "cosine": self.cosine,
            "disturbance": list(self.inside),
            "columns": self.columns,
            "rows": self.rows,
            "chance": list(self.chance),
            "sign_conflicts": self.signs.share,
            "sign_conflicts_weighted": self.signs.mass,
            "layers": {path: layer.to_dict() for path, layer in self.layers.items()},
            "other_shape": list(self.other_shape),
        }

    @cached_property
    def cosine(self) -> float | None:
        """Of the two adapters as vectors of all their changes; a target that one lacks counts as zero there."""
        return _ratio(sum(layer.inner for layer in self.layers.values()), self.norms[0] * self.norms[1])

    @cached_property
    def columns(self) -> float:
        """Mean similarity of the column spaces."""
        return _mean(layer.columns.similarity for layer in self.layers.values())

    @cached_property
    def rows(self) -> float:
        """Mean similarity of the row spaces."""
        return _mean(layer.rows.similarity for layer in self.layers.values())

    @cached_property
    def chance(self) -> tuple[float, float]:
        """What the two similarities are on average for random directions."""
        layers = self.layers.values()
        return _mean(layer.columns.chance for layer in layers), _mean(layer.rows.chance for layer in layers)

    @cached_property
    def inside(self) -> tuple[float, float]:
        """What the other adds where each works, relative to its own size: `|P dW_g Q| / |dW_f|`, and the reverse."""
        sizes = (math.hypot(*(layer.inside[i] for layer in self.layers.values())) for i in (0, 1))
        first, second = (_ratio(size, norm) or 0.0 for size, norm in zip(sizes, self.norms, strict=True))
        return first, second

    @cached_property
    def signs(self) -> Conflict:
        """Over all shared targets."""
        return sum((layer.signs for layer in self.layers.values()), NONE)


@dataclass(frozen=True)
class Findings:
    """Everything a report says in numbers: each adapter, and each pair of them by their positions."""

    adapters: tuple[AdapterFinding, ...]
    pairs: Mapping[tuple[int, int], PairFinding]

    @property
    def paths(self) -> tuple[str, ...]:
        """Every target of any adapter, those of the first first."""
        return tuple(dict.fromkeys(path for adapter in self.adapters for path in adapter.layers))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; without the spectra."""
        names = [adapter.name for adapter in self.adapters]
        return {
            "adapters": {adapter.name: adapter.to_dict() for adapter in self.adapters},
            "pairs": [{"adapters": [names[i], names[j]], **pair.to_dict()} for (i, j), pair in self.pairs.items()],
        }


@dataclass(frozen=True)
class _Decomposed:
    """A change at one target by its thin singular value decomposition."""

    u: Tensor
    s: Tensor
    vh: Tensor
    count: int

    @property
    def shape(self) -> tuple[int, int]:
        """`(out, in)`."""
        return self.u.shape[0], self.vh.shape[1]

    @property
    def factors(self) -> Factors:
        """The change as factors again."""
        return Factors(self.u * self.s, self.vh)

    @property
    def leading(self) -> tuple[Tensor, Tensor]:
        """Bases of the column space and of the row space, `(out, k)` and `(in, k)`."""
        return self.u[:, : self.count], self.vh[: self.count].t()


@torch.no_grad()
def measure(sources: Sequence[Source]) -> Findings:
    """Measure every adapter, and every pair where there are several. One layer of all adapters is in memory at once."""
    layers: list[dict[str, LayerFinding]] = [{} for _ in sources]
    without: list[list[str]] = [[] for _ in sources]
    met: dict[tuple[int, int], dict[str, PairLayer]] = {p: {} for p in combinations(range(len(sources)), 2)}
    strange: dict[tuple[int, int], list[str]] = {pair: [] for pair in met}
    for path in dict.fromkeys(path for source in sources for path in source.kinds):
        changes: dict[int, _Decomposed] = {}
        for i, source in enumerate(sources):
            factors = source.factors(path) if path in source.kinds else None
            if factors is not None:
                changes[i], layers[i][path] = _layer(source, path, factors)
            elif path in source.kinds:
                without[i].append(path)
        for pair, found in _pairs(changes).items():
            if found is None:
                strange[pair].append(path)
            else:
                met[pair][path] = found
    adapters = tuple(
        AdapterFinding(source, found, tuple(lacking))
        for source, found, lacking in zip(sources, layers, without, strict=True)
    )
    norms = [adapter.norm for adapter in adapters]
    pairs = {(i, j): PairFinding(met[i, j], (norms[i], norms[j]), tuple(strange[i, j])) for i, j in met}
    return Findings(adapters, pairs)


def _layer(source: Source, path: str, factors: Factors) -> tuple[_Decomposed, LayerFinding]:
    u, s, vh = svd(factors)
    if not bool(torch.isfinite(s).all()):
        raise StateError(f"Adapter {source.name!r} has a change at {path!r} that is too large for {s.dtype}.")
    shape = u.shape[0], vh.shape[1]
    values = s[: numerical_rank(s, max(shape))]
    rank90, rank99 = (measures.rank_for_energy(values, share) for share in (0.9, 0.99))
    finding = LayerFinding(
        kind=source.kinds[path],
        shape=shape,
        rank=factors.rank,
        norm=measures.size(values),
        base_norm=source.base_norm(path),
        spectrum=values.cpu(),
        effective_rank=measures.effective_rank(values),
        rank90=rank90,
        rank99=rank99,
    )
    return _Decomposed(u, s, vh, measures.rank_for_energy(values, SUBSPACE_ENERGY)), finding


def _pairs(changes: Mapping[int, _Decomposed]) -> dict[tuple[int, int], PairLayer | None]:
    """Every pair of these changes of one target; `None` for two that have not one shape."""
    pairs: dict[tuple[int, int], PairLayer | None] = dict.fromkeys(combinations(changes, 2))
    for shape in dict.fromkeys(change.shape for change in changes.values()):
        alike = [i for i, change in changes.items() if change.shape == shape]
        signs = sign_conflicts([changes[i].factors for i in alike]) if len(alike) > 1 else {}
        for (a, b), conflict in signs.items():
            i, j = alike[a], alike[b]
            pairs[i, j] = _pair(changes[i], changes[j], conflict)
    return pairs


def _pair(f: _Decomposed, g: _Decomposed, signs: Conflict) -> PairLayer:
    (uf, vf), (ug, vg) = f.leading, g.leading
    return PairLayer(
        inner=measures.inner(f.factors, g.factors),
        norms=(measures.size(f.s), measures.size(g.s)),
        columns=measures.overlap(uf, ug),
        rows=measures.overlap(vf, vg),
        inside=(_inside(uf, g, vf), _inside(ug, f, vg)),
        signs=signs,
    )


def _inside(u: Tensor, change: _Decomposed, v: Tensor) -> float:
    """`|u u^T dW v v^T|` for orthonormal columns u and v."""
    left = u.t() @ (change.u * change.s).to(u.dtype)
    return float(torch.linalg.vector_norm(left @ (change.vh.to(v.dtype) @ v)))


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed) if listed else 0.0
