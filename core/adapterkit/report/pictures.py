"""Pictures: the heat maps and curves of a report, made from its findings."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from adapterkit.report import curves
from adapterkit.report.findings import AdapterFinding, Findings, LayerFinding, PairFinding, PairLayer
from adapterkit.report.grid import Grid
from adapterkit.report.heat import Cell, HeatMap, layer_map, matrix, number, percent, shade
from adapterkit.report.verdict import DISTURBED, UNDISTURBED, middle, sizes

# Spectra are drawn for the module names with the most layers, at most so many.
_MOST_SPECTRA = 16
# Pairs whose layers are shown one by one: those with the most to see.
_MOST_PAIRS = 6


@dataclass(frozen=True)
class Curve:
    """One small drawing with its name and a note."""

    name: str
    note: str
    svg: str


@dataclass(frozen=True)
class Panel:
    """A heat map with its note and the ends of its scale."""

    caption: str
    note: str
    map: HeatMap
    low: str = "0"
    high: str = "1"
    signed: bool = False
    middle: str = "0"


def size_map(adapter: AdapterFinding, grid: Grid) -> HeatMap:
    """Where the change is large."""
    values = sizes(adapter)
    most = max(values.values(), default=0.0)
    unit = "relative size in percent" if adapter.has_base else "size as a share of the largest in percent"

    def cell(path: str) -> Cell:
        shown = values[path] if adapter.has_base else (values[path] / most if most else 0.0)
        return Cell(percent(shown), shade(values[path], most), _title(adapter.layers[path]))

    def total(paths: Sequence[str]) -> Cell:
        found = [adapter.layers[path] for path in paths]
        change = math.hypot(*(layer.norm for layer in found))
        if adapter.has_base:
            whole = math.hypot(*(layer.base_norm or 0.0 for layer in found))
            return Cell(percent(change / whole), shade(change / whole, most))
        mean = change / math.sqrt(len(found))
        return Cell(percent(mean / most if most else 0.0), shade(mean, most))

    cells = {path: cell(path) for path in adapter.layers}
    return layer_map(f"{adapter.name}: {unit}", grid, cells, (total, "all"))


def _title(layer: LayerFinding) -> str:
    relative = "" if layer.relative is None else f", |dW|/|W| {percent(layer.relative)} %"
    return f"|dW| {layer.norm:.3g}{relative}, rank for 90 % {layer.rank90}, 99 % {layer.rank99} of {layer.rank}"


def rank_map(adapter: AdapterFinding, grid: Grid) -> HeatMap:
    """The rank that keeps 99 % at each target."""
    most = max((layer.rank99 for layer in adapter.layers.values()), default=0)
    cells = {
        path: Cell(str(layer.rank99), shade(layer.rank99, most), f"90 %: {layer.rank90}")
        for path, layer in adapter.layers.items()
    }
    return layer_map(f"{adapter.name}: rank that keeps 99 % of the energy", grid, cells)


def enough(adapter: AdapterFinding) -> str:
    """How many targets each rank serves."""
    layers = [layer for layer in adapter.layers.values() if layer.norm]
    trained = max(layer.rank for layer in adapter.layers.values())
    if not layers:
        return ""
    return curves.enough(adapter.name, [layer.rank90 for layer in layers], [layer.rank99 for layer in layers], trained)


def spectra(adapter: AdapterFinding, grid: Grid) -> list[Curve]:
    """The spectra of each module name's layers."""
    groups: dict[str, list[LayerFinding]] = {}
    for path, layer in adapter.layers.items():
        if layer.norm:
            groups.setdefault(grid.places[path][1], []).append(layer)
    chosen = sorted(groups, key=lambda name: -len(groups[name]))[:_MOST_SPECTRA]
    return [_curve(adapter.name, name or "single layers", groups[name]) for name in groups if name in chosen]


def _curve(adapter: str, name: str, layers: Sequence[LayerFinding]) -> Curve:
    ranks = middle([layer.rank90 for layer in layers]), middle([layer.rank99 for layer in layers])
    count = f"{len(layers)} layer{'s' if len(layers) > 1 else ''}"
    drawn = curves.spectra(f"{adapter}, {name}", [layer.spectrum for layer in layers], ranks)
    return Curve(name, f"{count}, 90 % at {ranks[0]}, 99 % at {ranks[1]}", drawn)


def matrices(findings: Findings) -> list[Panel]:
    """What every two adapters have in common, over all layers."""
    names = [adapter.name for adapter in findings.adapters]

    def of_pair(value: Callable[[PairFinding], float | None], own: float | None) -> Callable[[int, int], float | None]:
        def found(i: int, j: int) -> float | None:
            return own if i == j else value(findings.pairs[min(i, j), max(i, j)])

        return found

    def size(caption: str, note: str, value: Callable[[PairFinding], float | None], most: float = 1.0) -> Panel:
        own = None if most < 1.0 else 1.0
        return Panel(caption, note, matrix(caption, names, of_pair(value, own), lambda v: shade(v, most)))

    chance = [pair.chance for pair in findings.pairs.values() if pair.layers]
    outputs, inputs = (f"random: {number(max((c[i] for c in chance), default=0.0))}" for i in (0, 1))
    cosine = matrix("cosine", names, of_pair(lambda p: p.cosine, 1.0), lambda v: shade(v, 1.0, "signed"))
    signs = matrix(
        "sign conflicts",
        names,
        of_pair(lambda p: p.signs.share if p.layers else None, None),
        lambda v: shade(1 - 2 * v, 1.0, "signed"),
    )
    return [
        Panel("Cosine", "1 same, 0 unrelated, −1 opposite", cosine),
        _disturbance(findings, names),
        size("Shared output directions", outputs, lambda p: p.columns if p.layers else None),
        size("Shared input directions", inputs, lambda p: p.rows if p.layers else None),
        Panel("Sign conflicts", "share of the entries; 0.50 is chance", signs),
        size(
            "Sign conflicts, weighted",
            "share of the magnitude, 0 to 0.50",
            lambda p: p.signs.mass if p.layers else None,
            0.5,
        ),
    ]


def _disturbance(findings: Findings, names: Sequence[str]) -> Panel:
    def found(i: int, j: int) -> float | None:
        pair = findings.pairs.get((min(i, j), max(i, j)))
        return pair.inside[0 if i < j else 1] if pair is not None and pair.layers else None

    map = matrix("disturbance", names, found, lambda v: shade(v, 5 * UNDISTURBED), lambda v: f"{percent(v)} %")
    return Panel("Disturbance", "of the row's adapter by the column's", map)


def pair_maps(pair: PairFinding, grid: Grid) -> list[Panel]:
    """One pair, layer by layer. Each scale reaches to the largest value, and at least so far that noise stays faint."""
    layers = pair.layers
    cosines = {path: layer.cosine or 0.0 for path, layer in layers.items()}
    most = _most(cosines, 0.1)
    titled = {p: Cell(number(c), shade(c, most, "signed"), _met(layers[p])) for p, c in cosines.items()}
    disturbed = {path: layer.disturbance for path, layer in layers.items()}
    shared = {path: max(layer.columns.similarity, layer.rows.similarity) for path, layer in layers.items()}
    opposed = {path: layer.signs.share for path, layer in layers.items()}
    away = _most({path: share - 0.5 for path, share in opposed.items()}, 0.05)
    signs = {path: Cell(number(s), shade((0.5 - s) / away, 1.0, "signed")) for path, s in opposed.items()}
    return [
        Panel(
            "Cosine",
            "blue agrees, orange opposes",
            layer_map("cosine", grid, titled),
            number(-most),
            number(most),
            signed=True,
        ),
        Panel(
            "Disturbance",
            "percent of the more disturbed one's size",
            _plain_map("disturbance", grid, disturbed, DISTURBED, percent),
            high=f"{percent(_most(disturbed, DISTURBED))} %",
        ),
        Panel(
            "Shared directions",
            "outputs or inputs, the larger",
            _plain_map("shared directions", grid, shared, 0.1, number),
            high=number(_most(shared, 0.1)),
        ),
        Panel(
            "Sign conflicts",
            "share of the entries; orange: more than chance",
            layer_map("sign conflicts", grid, signs),
            number(0.5 + away),
            number(0.5 - away),
            signed=True,
            middle="0.50",
        ),
    ]


def _most(values: Mapping[str, float], least: float) -> float:
    """The end of a scale: the largest magnitude, and at least this."""
    return max(least, *map(abs, values.values()))


def _plain_map(
    caption: str, grid: Grid, values: Mapping[str, float], least: float, written: Callable[[float], str]
) -> HeatMap:
    most = _most(values, least)
    return layer_map(caption, grid, {path: Cell(written(v), shade(v, most)) for path, v in values.items()})


def _met(layer: PairLayer) -> str:
    return (
        f"outputs {number(layer.columns.similarity)} (chance {number(layer.columns.chance)}), "
        f"inputs {number(layer.rows.similarity)} ({number(layer.rows.chance)}), signs {percent(layer.signs.share)} %"
    )


def pairs_to_show(findings: Findings) -> list[tuple[int, int]]:
    """The pairs with shared targets, those that disturb each other most first."""
    shared = [pair for pair, found in findings.pairs.items() if found.layers]
    return sorted(shared, key=lambda pair: -max(findings.pairs[pair].inside))[:_MOST_PAIRS]
