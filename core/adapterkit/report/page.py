"""The page: one self-contained HTML file out of the findings."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from adapterkit.report import pictures
from adapterkit.report.facts import facts, head_note, target_table
from adapterkit.report.findings import AdapterFinding, Findings
from adapterkit.report.grid import Grid
from adapterkit.report.heat import percent
from adapterkit.report.signs import MOST_ENTRIES
from adapterkit.report.verdict import Verdict, sizes

if TYPE_CHECKING:
    from markupsafe import Markup

# Verdicts on so many pairs stand beside those on the adapters; the others are folded away.
_PAIRS_ON_TOP = 6

# One short sentence or two for each picture: how to read it.
_HOW = {
    "enough": "How to read: go up from a rank to the solid curve; it says in how many percent of the targets that rank "
    "keeps 99 % of the change. Where the curve reaches the line at 95 %, a larger rank buys next to nothing.",
    "spectra": "How to read: each drawing has one module name; a curve falls as fast as its layers concentrate on few "
    "directions. Vertical lines: where the middle layer has 90 % (dotted) and 99 % (dashed) of its energy. A curve "
    "that stays high to the right end uses all of its rank.",
    "bands": "Bands: all layers (light), the middle half (dark), the middle layer (line).",
    "overall": "How to read: each table compares every two adapters over all their targets. Disturbance is what the "
    "column's adapter adds in the directions the row's uses, in percent of the row's size: below 2 % a sum keeps both. "
    "Blue agrees and orange opposes; faint cells are what chance gives, or little.",
    "pair": "How to read: faint cells are layers where the two hardly meet. In the cosine, blue layers pull the same "
    "way and orange ones apart. A sum hurts where the disturbance is strong and the cosine is not blue. Shared input "
    "directions may stem from equal random initial values; shared output directions are learnt.",
}


def render(findings: Findings, verdicts: Sequence[Verdict], grid: Grid, title: str) -> str:
    """The page's HTML. Names that come from files are escaped."""
    import jinja2
    from markupsafe import Markup

    here = files("adapterkit.report")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    environment.filters["broken"] = _broken
    template = environment.from_string(here.joinpath("page.html").read_text(encoding="utf-8"))
    groups = _groups(verdicts)
    pairs = len(findings.adapters) > 1
    return template.render(
        title=title,
        subtitle=_subtitle(findings),
        style=Markup(here.joinpath("page.css").read_text(encoding="utf-8")),
        groups=groups[: len(findings.adapters) + _PAIRS_ON_TOP],
        more=groups[len(findings.adapters) + _PAIRS_ON_TOP :],
        rules=list(dict.fromkeys(verdict.rule for verdict in verdicts)),
        adapters=[_adapter(adapter, grid) for adapter in findings.adapters],
        comparison=_comparison(findings, grid) if pairs else None,
        how={**_HOW, "layers": _how_layers(findings), "targets": head_note(findings.adapters)},
        notes=_notes(findings),
    )


def _groups(found: Sequence[Verdict]) -> list[tuple[str, list[Verdict]]]:
    """The verdicts by what they are about, each adapter's together."""
    names = list(dict.fromkeys(verdict.about for verdict in found))
    return [(" and ".join(about), [verdict for verdict in found if verdict.about == about]) for about in names]


def _broken(text: str) -> Markup:
    """Escaped, with places to break a long path, and none between a number and its percent sign."""
    from markupsafe import Markup, escape

    return Markup(re.sub(r"([./_])(?=[^\W\d])", r"\1<wbr>", str(escape(text)).replace(" %", "&nbsp;%")))


def _subtitle(findings: Findings) -> str:
    count = len(findings.adapters)
    targets = len(findings.paths)
    with_base = [a.has_base for a in findings.adapters if a.layers]
    if with_base and all(with_base):
        sizes_are = "sizes are relative to the base's weights"
    elif any(with_base):
        sizes_are = "sizes are relative to the base's weights where these are at hand"
    else:
        sizes_are = "the base's weights are not at hand: sizes are relative to the adapter's largest change"
    return f"{count} adapter{'s' if count != 1 else ''}, {targets} target{'s' if targets != 1 else ''}; {sizes_are}"


def _how_layers(findings: Findings) -> str:
    with_base = {adapter.has_base for adapter in findings.adapters if adapter.layers}
    relative = "|dW| / |W| in percent, how far training moved the layer's weight"
    own = "|dW| in percent of the adapter's largest, because the base's weights are not at hand"
    what = relative if with_base == {True} else own if with_base != {True, False} else f"{relative}, or else {own}"
    return (
        f"How to read: rows are the model's layers, columns its modules; a cell is {what}. Strong colour is "
        "where the adapter works; faint rows and columns could be left out at a try."
    )


def _adapter(adapter: AdapterFinding, grid: Grid) -> dict[str, Any]:
    from markupsafe import Markup

    moved = any(layer.norm for layer in adapter.layers.values())
    drawn = pictures.spectra(adapter, grid) if moved else []
    modules = {grid.places[path][1] for path, layer in adapter.layers.items() if layer.norm}
    largest = max(sizes(adapter).values(), default=0.0)
    return {
        "name": adapter.name,
        "facts": facts(adapter),
        "without": _without(adapter),
        "sizes": pictures.size_map(adapter, grid) if moved else None,
        "largest": f"{percent(largest)} %" if adapter.has_base else f"100 % = {largest:.3g}",
        "enough": Markup(pictures.enough(adapter)) if moved else "",
        "spectra": [{"name": s.name, "note": s.note, "svg": Markup(s.svg)} for s in drawn],
        "bands": any(sum(grid.places[p][1] == m for p in adapter.layers) > 12 for m in modules),
        "spectra_left_out": f"Drawn: the {len(drawn)} module names with the most layers of {len(modules)}."
        if len(drawn) < len(modules)
        else "",
        "ranks": pictures.rank_map(adapter, grid) if moved else None,
        "largest_rank": max((layer.rank99 for layer in adapter.layers.values()), default=0),
    }


def _without(adapter: AdapterFinding) -> str:
    if not adapter.without_factors:
        return "" if any(layer.norm for layer in adapter.layers.values()) else "Every change is zero."
    return (
        f"{len(adapter.without_factors)} targets are not shown, for example {adapter.without_factors[0]}: the method "
        f"{adapter.source.config.method} has no low-rank form of its change there."
    )


def _comparison(findings: Findings, grid: Grid) -> dict[str, Any]:
    shown = pictures.pairs_to_show(findings)
    names = [adapter.name for adapter in findings.adapters]
    columns, rows = target_table(findings.adapters)
    sharing = sum(bool(pair.layers) for pair in findings.pairs.values())
    return {
        "matrices": pictures.matrices(findings),
        "targets": {"columns": columns, "rows": rows},
        "pairs": [
            {"name": f"{names[i]} and {names[j]}", "maps": pictures.pair_maps(findings.pairs[i, j], grid)}
            for i, j in shown
        ],
        "left_out": f"Shown: the {len(shown)} pairs of {sharing} that disturb each other most."
        if len(shown) < sharing
        else "",
    }


def _notes(findings: Findings) -> list[str]:
    from adapterkit import __version__

    notes = [
        f"Made by adapterkit {__version__}. Norms are Frobenius norms of dW = up @ down, biases left out; energy is "
        "the sum of squared singular values; all from the factors, never from a dense matrix.",
    ]
    if findings.pairs:
        notes.append(
            "Shared directions: the mean squared cosine of the principal angles between the leading singular vectors "
            "that hold 90 % of each change's energy (Hu et al. 2021, section 7.2). Disturbance: "
            "|P dW Q| with the projections on those of the other, over the other's norm. Sign conflicts: entries of "
            "opposite sign, and the smaller magnitude of each as a share of all magnitude, which is what TIES (Yadav "
            "et al. 2023) drops."
        )
        sampled = sum(
            layer.signs.seen < layer.signs.entries for pair in findings.pairs.values() for layer in pair.layers.values()
        )
        if sampled:
            notes.append(
                f"Sign conflicts of {sampled} layers with more than {MOST_ENTRIES:,} entries are from whole rows with "
                "about that many, drawn at random by a fixed seed."
            )
    return notes
