"""The page: one self-contained HTML file made from the findings."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from importlib.resources import files
from statistics import median
from typing import TYPE_CHECKING, Any

from adapterkit.contract import AdapterConfig
from adapterkit.report import plots
from adapterkit.report.heatmaps import Cell, Grid, HeatMap, layer_map, number, percent, shade
from adapterkit.report.measuring import MOST_ENTRIES, AdapterFinding, Findings, LayerFinding, PairFinding
from adapterkit.report.verdicts import DISTURBED, UNDISTURBED, Verdict, count

if TYPE_CHECKING:
    from markupsafe import Markup

# What the page shows at most: verdicts on pairs that are not folded away, pairs layer by layer, plots of spectra, and
# values of a list.
_PAIRS_ON_TOP, _PAIRS_BY_LAYER, _MOST_SPECTRA, _MOST_VALUES = 6, 6, 16, 12

_RELATIVE = "|dW| / |W| in percent: how far training moved the weight of the layer"
_OWN = "|dW| in percent of the adapter's largest, because the base's weights are not available"
# How to read each kind of figure.
_HOW = {
    "layers": "How to read: rows are the layers of the model, columns their modules; a cell is {size}. Strong colour "
    "shows where the adapter works. You can try to leave out faint rows and columns.",
    "enough": "How to read: the solid curve gives, for each rank, the percentage of targets in which that rank keeps "
    "99 % of the change. To the right of the point where it crosses the line at 95 %, a larger rank adds little.",
    "spectra": "How to read: each plot has the layers of one module name. The faster a curve falls, the fewer "
    "directions its layer uses. Vertical lines show where the median layer has 90 % (dotted) and 99 % (dashed) of its "
    "energy. A curve that stays high to the right end uses all of its rank. Bands stand for many layers: all layers "
    "(light), the middle half (dark), the median layer (line).",
    "overall": "How to read: each table compares every two adapters over all their targets. Disturbance is what the "
    "adapter of the column adds in the directions of the adapter of the row, in percent of the row's size: below 2 % a "
    "sum keeps both. Blue agrees, orange opposes; faint cells are close to chance, or small.",
    "pair": "How to read: in faint cells the two hardly interact. In the cosine, blue layers pull in the same "
    "direction and orange layers in opposite directions. A sum does harm where the disturbance is strong and the "
    "cosine is not blue. Shared input directions may come from equal random initial values; shared output directions "
    "are learned.",
}


def render(findings: Findings, verdicts: Sequence[Verdict], grid: Grid, title: str) -> str:
    """The HTML of the page. Names that come from files are escaped."""
    import jinja2
    from markupsafe import Markup

    here = files("adapterkit.report")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    environment.filters["broken"] = _broken
    template = environment.from_string(here.joinpath("page.html").read_text(encoding="utf-8"))
    about = dict.fromkeys(verdict.about for verdict in verdicts)
    groups = [(" and ".join(names), [v for v in verdicts if v.about == names]) for names in about]
    on_top = len(findings.adapters) + _PAIRS_ON_TOP
    based = {adapter.has_base for adapter in findings.adapters if adapter.layers}
    size = _RELATIVE if based == {True} else _OWN if True not in based else f"{_RELATIVE}; or else {_OWN}"
    return template.render(
        title=title,
        subtitle=f"{count(len(findings.adapters), 'adapter')}, {count(len(findings.paths), 'target')}",
        style=Markup(here.joinpath("page.css").read_text(encoding="utf-8")),
        groups=groups[:on_top],
        more=groups[on_top:],
        rules=list(dict.fromkeys(verdict.rule for verdict in verdicts)),
        adapters=[_adapter(adapter, grid) for adapter in findings.adapters],
        comparison=_comparison(findings, grid) if findings.pairs else None,
        how={**_HOW, "layers": _HOW["layers"].format(size=size)},
        version=version("adapterkit"),
        sampled=f"{MOST_ENTRIES:,}",
    )


def _broken(text: str) -> Markup:
    """Escaped, with places to break a long path, and no break between a number and its percent sign."""
    from markupsafe import Markup, escape

    return Markup(re.sub(r"([./_])(?=[^\W\d])", r"\1<wbr>", str(escape(text)).replace(" %", "&nbsp;%")))


def _adapter(adapter: AdapterFinding, grid: Grid) -> dict[str, Any]:
    """What the page shows of one adapter."""
    from markupsafe import Markup

    lacking = adapter.without_factors
    shown: dict[str, Any] = {"name": adapter.name, "facts": _facts(adapter), "sizes": None, "without": ""}
    if lacking:
        shown["without"] = (
            f"{len(lacking)} targets are not shown, for example {lacking[0]}: the method "
            f"{adapter.source.config.method} has no low-rank form of its change there."
        )
    if not adapter.norm:
        return shown | {"without": shown["without"] or "Every change is zero."}
    moved = {path: layer for path, layer in adapter.layers.items() if layer.norm}
    groups: dict[str, list[LayerFinding]] = {}
    for path, layer in moved.items():
        groups.setdefault(grid.places[path][1], []).append(layer)
    largest = sorted(groups, key=lambda name: -len(groups[name]))[:_MOST_SPECTRA]
    ranks = [layer.rank90 for layer in moved.values()], [layer.rank99 for layer in moved.values()]
    trained = max(layer.rank for layer in adapter.layers.values())
    return shown | {
        "sizes": _size_map(adapter, grid),
        "enough": Markup(plots.enough(adapter.name, *ranks, trained)),
        "spectra": [
            _spectra(adapter.name, name or "single layers", groups[name]) for name in groups if name in largest
        ],
        "modules": len(groups),
        "ranks": _rank_map(adapter, grid),
    }


def _facts(adapter: AdapterFinding) -> list[tuple[str, str]]:
    """Name and value of each fact about an adapter."""
    source = adapter.source
    config = source.config
    common = {field.name for field in dataclasses.fields(AdapterConfig)}
    own = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name not in common}
    own = {name: value for name, value in own.items() if value not in (None, False, {}, (), "none", 0.0)}
    ranks = sorted({layer.rank for layer in adapter.layers.values()})
    tensors = source.parameters.values()
    kinds = list(source.kinds.values())
    heads = [
        f"{path} {', '.join('×'.join(map(str, shape)) for shape in shapes.values() if len(shape) > 1) or 'no matrix'}"
        for path, shapes in source.heads.items()
    ]
    labels = f"{len(source.labels)}: {_short(source.labels)}" if source.labels else ""
    found = [
        ("method", config.method),
        ("settings", ", ".join(f"{name} = {_short(value)}" for name, value in own.items())),
        ("rank", " to ".join(map(str, dict.fromkeys([*ranks[:1], *ranks[-1:]])))),
        ("targets", ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))),
        ("target_modules", _short(config.target_modules or "")),
        ("parameters", f"{sum(t.numel() for t in tensors):,}"),
        ("size", f"{sum(t.numel() * t.element_size() for t in tensors) / 1e6:.3g} MB"),
        ("dtype", ", ".join(sorted({str(t.dtype).removeprefix("torch.") for t in tensors}))),
        ("base", config.base_model_name_or_path or "not named"),
        ("task", config.task_type or ""),
        ("heads", "; ".join(heads)),
        ("labels", labels),
        ("biases", f"{source.biases} trained" if source.biases else ""),
        ("size of dW", f"{adapter.norm:.4g} (Frobenius, all targets)" if adapter.layers else ""),
        ("read from", source.place),
    ]
    return [(name, value) for name, value in found if value]


def _short(value: object) -> str:
    if isinstance(value, Mapping):
        return f"{len(value)} patterns"
    if isinstance(value, tuple | list):
        return ", ".join(map(str, value[:_MOST_VALUES])) + (
            f" and {len(value) - _MOST_VALUES} more" if len(value) > _MOST_VALUES else ""
        )
    return str(value)


def _size_map(adapter: AdapterFinding, grid: Grid) -> HeatMap:
    """Where the change is large."""
    sizes = adapter.sizes()
    most = max(sizes.values())

    def cell(paths: Sequence[str]) -> Cell:
        """The size at one path, or of several together: relative to their weights, or the mean for the largest."""
        found = [adapter.layers[path] for path in paths]
        size = math.hypot(*(layer.norm for layer in found))
        if adapter.has_base:
            size /= math.hypot(*(layer.base_norm or 0.0 for layer in found))
        else:
            size /= math.sqrt(len(found))
        return Cell(percent(size if adapter.has_base else size / most), shade(size, most))

    def titled(path: str) -> Cell:
        layer = adapter.layers[path]
        relative = "" if layer.relative is None else f", |dW|/|W| {percent(layer.relative)} %"
        ranks = f"rank for 90 % {layer.rank90}, 99 % {layer.rank99} of {layer.rank}"
        return dataclasses.replace(cell([path]), title=f"|dW| {layer.norm:.3g}{relative}, {ranks}")

    unit = "relative size in percent" if adapter.has_base else "size as a share of the largest in percent"
    high = f"{percent(most)} %" if adapter.has_base else f"100 % = {most:.3g}"
    return layer_map(f"{adapter.name}: {unit}", grid, {p: titled(p) for p in adapter.layers}, cell, high=high)


def _rank_map(adapter: AdapterFinding, grid: Grid) -> HeatMap:
    """The rank that keeps 99 % at each target."""
    most = max(layer.rank99 for layer in adapter.layers.values())
    cells = {
        path: Cell(str(layer.rank99), shade(layer.rank99, most), f"90 %: {layer.rank90}")
        for path, layer in adapter.layers.items()
    }
    return layer_map(f"{adapter.name}: rank that keeps 99 % of the energy", grid, cells, low="1", high=str(most))


def _spectra(adapter: str, module: str, layers: Sequence[LayerFinding]) -> dict[str, Any]:
    """The plot of the spectra of the layers of one module name, with its name and a note."""
    from markupsafe import Markup

    at90, at99 = (math.ceil(median(getattr(layer, rank) for layer in layers)) for rank in ("rank90", "rank99"))
    svg = plots.spectra(f"{adapter}, {module}", [layer.spectrum for layer in layers], (at90, at99))
    count = f"{len(layers)} layer{'s' if len(layers) > 1 else ''}"
    return {"name": module, "note": f"{count}, 90 % at {at90}, 99 % at {at99}", "svg": Markup(svg)}


def _comparison(findings: Findings, grid: Grid) -> dict[str, Any]:
    """What the page shows of several adapters together."""
    adapters = findings.adapters
    names = [adapter.name for adapter in adapters]
    shared = [pair for pair, found in findings.pairs.items() if found.layers]
    shown = sorted(shared, key=lambda pair: -max(findings.pairs[pair].inside))[:_PAIRS_BY_LAYER]
    return {
        "matrices": _matrices(findings),
        "heads": _about_heads(adapters),
        "pairs": [
            {"name": f"{names[i]} and {names[j]}", "maps": _pair_maps(findings.pairs[i, j], grid)} for i, j in shown
        ],
        "sharing": len(shared),
    }


def _about_heads(adapters: Sequence[AdapterFinding]) -> str:
    """What can become of the heads in a combination."""
    owners = [adapter for adapter in adapters if adapter.source.heads]
    shapes = {tuple(sizes.items()) for adapter in owners for sizes in adapter.source.heads.values()}
    paths = {path for adapter in owners for path in adapter.source.heads}
    if not owners:
        return "No adapter has a head of its own."
    if len(owners) == 1:
        return f"Only {owners[0].name} has a head: keep it with heads={owners[0].name!r}, or drop it with heads='drop'."
    if len(shapes) > len(paths):
        return "Their heads have different sizes: choose one, or put the labels side by side with heads='concat'."
    return "Their heads have the same sizes: choose one, average them, or put the labels side by side with 'concat'."


def _matrices(findings: Findings) -> list[HeatMap]:
    """What every two adapters have in common, over all layers."""
    names = [adapter.name for adapter in findings.adapters]
    pairs = findings.pairs.values()
    outputs = f"random: {number(max(pair.columns.chance for pair in pairs))}"
    inputs = f"random: {number(max(pair.rows.chance for pair in pairs))}"
    tables: list[tuple[str, str, Callable[[PairFinding, int], float], float, bool]] = [
        ("Cosine", "1 same, 0 unrelated, −1 opposite", lambda pair, _: pair.cosine, 1.0, True),
        ("Disturbance", "of the row's adapter by the column's", lambda pair, i: pair.inside[i], 5 * UNDISTURBED, False),
        ("Shared output directions", outputs, lambda pair, _: pair.columns.similarity, 1.0, False),
        ("Shared input directions", inputs, lambda pair, _: pair.rows.similarity, 1.0, False),
        ("Sign conflicts", "share of the entries; 0.50 is chance", lambda pair, _: pair.signs.share, 1.0, False),
    ]
    maps = []
    for title, note, value, most, signed in tables:
        rows = []
        for i, name in enumerate(names):
            cells = []
            for j in range(len(names)):
                pair = findings.pairs.get((min(i, j), max(i, j)))
                found = value(pair, int(i > j)) if pair and pair.layers else None
                written = f"{percent(found or 0.0)} %" if title == "Disturbance" else number(found or 0.0)
                cells.append(Cell("–") if found is None else Cell(written, shade(found, most, signed)))
            rows.append((name, cells))
        maps.append(HeatMap(title, names, rows, note=note))
    return maps


def _pair_maps(pair: PairFinding, grid: Grid) -> list[HeatMap]:
    """One pair, layer by layer."""
    layers = pair.layers

    def panel(
        title: str,
        note: str,
        values: Mapping[str, float],
        least: float,
        written: Callable[[float], str] = number,
        signed: bool = False,
        titles: Mapping[str, str] | None = None,
    ) -> HeatMap:
        """The scale ends at the largest value, but not below `least`, so that noise stays faint."""
        most = max(least, *map(abs, values.values()))
        cells = {
            path: Cell(written(v), shade(v, most, signed), (titles or {}).get(path, "")) for path, v in values.items()
        }
        ends: dict[str, Any] = {"low": written(-most), "middle": written(0.0)} if signed else {}
        return layer_map(title, grid, cells, note=note, high=written(most), **ends)

    met = {
        path: f"outputs {number(layer.columns.similarity)} (chance {number(layer.columns.chance)}), inputs "
        f"{number(layer.rows.similarity)} ({number(layer.rows.chance)}), signs {percent(layer.signs.share)} %"
        for path, layer in layers.items()
    }
    cosine = {path: layer.cosine for path, layer in layers.items()}
    disturbance = {path: layer.disturbance for path, layer in layers.items()}
    shared = {path: max(layer.columns.similarity, layer.rows.similarity) for path, layer in layers.items()}
    opposed = {path: 0.5 - layer.signs.share for path, layer in layers.items()}
    return [
        panel("Cosine", "blue agrees, orange opposes", cosine, 0.1, signed=True, titles=met),
        panel("Disturbance", "percent of the size of the more disturbed one", disturbance, DISTURBED, percent),
        panel("Shared directions", "outputs or inputs, the larger", shared, 0.1),
        panel(
            "Sign conflicts",
            "share of the entries; orange: more than chance",
            opposed,
            0.05,
            lambda value: number(0.5 - value),
            signed=True,
        ),
    ]
