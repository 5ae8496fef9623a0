"""The page: one self-contained HTML file made from the findings."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from adapterkit.contract import AdapterConfig
from adapterkit.errors import plain
from adapterkit.report import plots
from adapterkit.report.heatmaps import Cell, HeatMap, Places, layer_map, number, percent, shade
from adapterkit.report.measuring import MOST_ENTRIES, AdapterFinding, Findings, LayerFinding, Pair, PairFinding
from adapterkit.report.verdicts import DISTURBED, UNDISTURBED, Verdict
from adapterkit.results import counted

if TYPE_CHECKING:
    from markupsafe import Markup

# What the page shows at most: verdicts on pairs that are not folded away, pairs layer by layer, plots of spectra, and
# values of a list.
_PAIRS_ON_TOP, _PAIRS_BY_LAYER, _MOST_SPECTRA, _MOST_VALUES = 6, 6, 16, 12

# How to read each kind of figure.
_HOW = {
    "layers": "How to read: rows are the layers of the model, columns their modules; a cell is the size of "
    "its change. Strong colour shows where the adapter works. You can try to leave out faint rows and columns.",
    "spectra": "How to read: each plot has the layers of one module name: all layers (light), the middle half (dark), "
    "and the median layer (line). The faster a curve falls, the fewer directions its layer uses. Vertical lines show "
    "where the median layer has 90 % (dotted) and 99 % (dashed) of its energy. A curve that stays high to the right "
    "end uses all of its rank.",
    "overall": "How to read: each table compares every two adapters over all their targets. Disturbance is what the "
    "adapter of the column adds in the directions of the adapter of the row, in percent of the row's size: below 2 % a "
    "sum keeps both. Blue agrees, orange opposes; faint cells are close to chance, or small.",
    "pair": "How to read: in faint cells the two hardly interact. In the cosine, blue layers pull in the same "
    "direction and orange layers in opposite directions. A sum does harm where the disturbance is strong and the "
    "cosine is not blue. Shared input directions may come from equal random initial values; shared output directions "
    "are learned.",
}


def render(findings: Findings, verdicts: Sequence[Verdict], places: Places, title: str) -> str:
    """The HTML of the page. Names that come from files are escaped."""
    import jinja2
    from markupsafe import Markup

    here = files("adapterkit.report")
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined, finalize=_shown
    )
    environment.filters["broken"] = _broken
    template = environment.from_string(here.joinpath("page.html").read_text(encoding="utf-8"))
    about = dict.fromkeys(verdict.about for verdict in verdicts)
    groups = [(" and ".join(names), [v for v in verdicts if v.about == names]) for names in about]
    on_top = len(findings.adapters) + _PAIRS_ON_TOP
    return template.render(
        title=title,
        subtitle=f"{counted(len(findings.adapters), 'adapter')}, {counted(len(places), 'target')}",
        style=Markup(here.joinpath("page.css").read_text(encoding="utf-8")),
        groups=groups[:on_top],
        more=groups[on_top:],
        rules=list(dict.fromkeys(verdict.rule for verdict in verdicts)),
        adapters=[_adapter(adapter, places) for adapter in findings.adapters],
        comparison=_comparison(findings, places) if findings.pairs else None,
        how=_HOW,
        version=version("adapterkit"),
        sampled=f"{MOST_ENTRIES:,}",
    )


def _shown(value: object) -> object:
    """Text of the page, in which names come from files; markup is ours."""
    return plain(value) if type(value) is str else value


def _broken(text: str) -> Markup:
    """Escaped, with places to break a long path, and no break between a number and its percent sign."""
    from markupsafe import Markup, escape

    return Markup(re.sub(r"([./_])(?=[^\W\d])", r"\1<wbr>", str(escape(plain(text))).replace(" %", "&nbsp;%")))


def _adapter(adapter: AdapterFinding, places: Places) -> dict[str, Any]:
    """What the page shows of one adapter."""
    lacking = adapter.without_factors
    shown: dict[str, Any] = {"name": adapter.name, "facts": _facts(adapter), "sizes": None, "without": ""}
    if lacking:
        shown["without"] = (
            f"{len(lacking)} targets are not shown, for example {lacking[0]}: the method "
            f"{adapter.config.method} has no low-rank form of its change there."
        )
    if not adapter.norm:
        return shown | {"without": shown["without"] or "Every change is zero."}
    moved = {path: layer for path, layer in adapter.layers.items() if layer.norm}
    modules: dict[str, list[LayerFinding]] = {}
    for path, layer in moved.items():
        modules.setdefault(places[path][1] or "single layers", []).append(layer)
    largest = sorted(modules, key=lambda name: -len(modules[name]))[:_MOST_SPECTRA]
    most = max(layer.rank_99 for layer in moved.values())
    cells = {
        path: Cell(str(layer.rank_99), shade(layer.rank_99, most), f"90 %: {layer.rank_90}")
        for path, layer in adapter.layers.items()
    }
    return shown | {
        "sizes": _size_map(adapter, places),
        "spectra": [_spectra(adapter.name, name, modules[name]) for name in modules if name in largest],
        "modules": len(modules),
        "ranks": layer_map(
            "The rank that keeps 99 % of the energy, for each target (point at a cell for 90 %)",
            places,
            cells,
            low="1",
            high=str(most),
        ),
    }


def _facts(adapter: AdapterFinding) -> list[tuple[str, str]]:
    """Name and value of each fact about an adapter."""
    config = adapter.config
    common = {field.name for field in dataclasses.fields(AdapterConfig)}
    own = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name not in common}
    settings = [f"{k} = {_short(v)}" for k, v in own.items() if v not in (None, False, {}, (), "none", 0.0)]
    ranks = sorted({layer.rank for layer in adapter.layers.values()})
    kinds = list(adapter.kinds.values())
    found = [
        ("method", config.method),
        ("settings", ", ".join(settings)),
        ("rank", " to ".join(map(str, dict.fromkeys([*ranks[:1], *ranks[-1:]])))),
        ("targets", ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))),
        ("target_modules", _short(config.target_modules or "")),
        ("parameters", f"{adapter.parameters:,}"),
        ("dtype", ", ".join(adapter.dtypes)),
        ("base", _name(config.base_model_name_or_path or "not named")),
        ("task", config.task_type or ""),
        ("heads", ", ".join(adapter.heads)),
        ("labels", f"{len(adapter.labels)}: {_short(adapter.labels)}" if adapter.labels else ""),
        ("size of dW", f"{adapter.norm:.4g} (Frobenius, all targets)" if adapter.layers else ""),
        ("read from", _name(adapter.place)),
    ]
    return [(name, value) for name, value in found if value]


def _name(place: str) -> str:
    """The last name of a path: a page is for others, whom the folders of this machine do not concern."""
    return Path(place).name if Path(place).is_absolute() or Path(place).exists() else place


def _short(value: object) -> str:
    if isinstance(value, Mapping):
        return f"{len(value)} patterns"
    if isinstance(value, tuple | list):
        more = f" and {len(value) - _MOST_VALUES} more" if len(value) > _MOST_VALUES else ""
        return ", ".join(map(str, value[:_MOST_VALUES])) + more
    return str(value)


def _size_map(adapter: AdapterFinding, places: Places) -> HeatMap:
    """Where the change is large."""
    sizes = adapter.sizes()
    most = max(sizes.values())
    cells = {}
    for path, layer in adapter.layers.items():
        relative = "" if layer.relative is None else f", |dW|/|W| {percent(layer.relative)} %"
        ranks = f"rank for 90 % {layer.rank_90}, 99 % {layer.rank_99} of {layer.rank}"
        text = percent(sizes[path] if adapter.has_base else sizes[path] / most)
        cells[path] = Cell(text, shade(sizes[path], most), f"|dW| {layer.norm:.3g}{relative}, {ranks}")
    unit = "|dW| in percent of the largest, because the base's weights are not available"
    if adapter.has_base:
        unit = "|dW| / |W| in percent: how far training moved the weight of the layer"
    high = f"{percent(most)} %" if adapter.has_base else f"100 % = {most:.3g}"
    return layer_map(unit, places, cells, high=high)


def _spectra(adapter: str, module: str, layers: Sequence[LayerFinding]) -> dict[str, Any]:
    """The plot of the spectra of the layers of one module name, with its name and a note."""
    from markupsafe import Markup

    at90, at99 = (math.ceil(median(getattr(layer, rank) for layer in layers)) for rank in ("rank_90", "rank_99"))
    svg = plots.spectra(f"{adapter}, {module}", [layer.spectrum for layer in layers], (at90, at99))
    note = f"{counted(len(layers), 'layer')}, 90 % at {at90}, 99 % at {at99}"
    return {"name": module, "note": note, "svg": Markup(svg)}


def _comparison(findings: Findings, places: Places) -> dict[str, Any]:
    """What the page shows of several adapters together."""
    names = [adapter.name for adapter in findings.adapters]
    shared = [pair for pair, found in findings.pairs.items() if found.layers]
    shown = sorted(shared, key=lambda pair: -max(findings.pairs[pair].inside))[:_PAIRS_BY_LAYER]
    pairs = [{"name": f"{names[i]} and {names[j]}", "maps": _pair_maps(findings.pairs[i, j], places)} for i, j in shown]
    return {"matrices": _matrices(names, findings.pairs), "pairs": pairs, "sharing": len(shared)}


def _matrices(names: Sequence[str], pairs: Mapping[tuple[int, int], PairFinding]) -> list[HeatMap]:
    """What every two adapters have in common, over all layers."""

    def table(
        title: str, note: str, value: Callable[[PairFinding, int], float], most: float = 1.0, signed: bool = False
    ) -> HeatMap:
        """Args: value: of a pair, for its first (0) or its second (1) adapter."""
        rows = []
        for i, name in enumerate(names):
            cells = []
            for j in range(len(names)):
                pair = pairs.get((min(i, j), max(i, j)))
                found = value(pair, int(i > j)) if pair and pair.layers else None
                written = f"{percent(found or 0.0)} %" if title == "Disturbance" else number(found or 0.0)
                cells.append(Cell("–") if found is None else Cell(written, shade(found, most, signed)))
            rows.append((name, cells))
        return HeatMap(title, names, rows, note)

    outputs = max(pair.columns.chance for pair in pairs.values())
    inputs = max(pair.rows.chance for pair in pairs.values())
    by = "of the row's adapter by the column's"
    return [
        table("Cosine", "1 same, 0 unrelated, −1 opposite", lambda pair, _: pair.cosine, signed=True),
        table("Disturbance", by, lambda pair, i: pair.inside[i], 5 * UNDISTURBED),
        table("Shared output directions", f"random: {number(outputs)}", lambda pair, _: pair.columns.similarity),
        table("Shared input directions", f"random: {number(inputs)}", lambda pair, _: pair.rows.similarity),
        table("Sign conflicts", "share of the entries; 0.50 is chance", lambda pair, _: pair.opposed),
    ]


def _pair_maps(pair: PairFinding, places: Places) -> list[HeatMap]:
    """One pair, layer by layer."""

    def panel(
        title: str,
        note: str,
        value: Callable[[Pair], float],
        least: float,
        written: Callable[[float], str] = number,
        signed: bool = False,
    ) -> HeatMap:
        """The scale ends at the largest value, but not below `least`, so that noise stays faint."""
        values = {path: value(layer) for path, layer in pair.layers.items()}
        most = max(least, *map(abs, values.values()))
        cells = {path: Cell(written(v), shade(v, most, signed), details[path]) for path, v in values.items()}
        ends = {"low": written(-most), "middle": written(0.0)} if signed else {}
        return layer_map(title, places, cells, note=note, high=written(most), **ends)

    details = {
        path: f"outputs {number(layer.columns.similarity)} (chance {number(layer.columns.chance)}), inputs "
        f"{number(layer.rows.similarity)} ({number(layer.rows.chance)}), signs {percent(layer.opposed)} %"
        for path, layer in pair.layers.items()
    }
    return [
        panel("Cosine", "blue agrees, orange opposes", lambda layer: layer.cosine, 0.1, signed=True),
        panel(
            "Disturbance", "percent of the size of the more disturbed one", lambda x: max(x.inside), DISTURBED, percent
        ),
        panel(
            "Shared directions",
            "outputs or inputs, the larger",
            lambda layer: max(layer.columns.similarity, layer.rows.similarity),
            0.1,
        ),
    ]
