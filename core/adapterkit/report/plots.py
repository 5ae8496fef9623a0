"""Plots of spectra and ranks as inline SVG, drawn by matplotlib in the colours of the page."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# matplotlib writes colours as numbers. These numbers stand for the page's colours, which follow its light or dark mode.
_INK, _QUIET, _LINE, _SECOND = "#010203", "#010204", "#010205", "#010206"
_ON_PAGE = {_INK: "var(--ink)", _QUIET: "var(--quiet)", _LINE: "var(--line)", _SECOND: "var(--second)"}


def spectra(name: str, values: Sequence[Tensor], ranks: tuple[int, int]) -> str:
    """Normalised singular values `s_i / s_1` over `i`: the range of all layers, the middle half, and the median.

    Args:
        name: the adapter and the module, for screen readers.
        values: the singular values of each layer, descending.
        ranks: where the median layer reaches 90 % and 99 % of the energy; marked by vertical lines.
    """
    figure, axes = _figure(2.5, 1.7)
    longest = max(map(len, values))
    curves = torch.stack([torch.nn.functional.pad(v.double() / v[0], (0, longest - len(v))) for v in values])
    low, quarter, median, three_quarters, high = (
        curves.quantile(q, dim=0).tolist() for q in (0.0, 0.25, 0.5, 0.75, 1.0)
    )
    x = range(1, longest + 1)
    axes.fill_between(x, low, high, color=_LINE, alpha=0.18, lw=0)
    axes.fill_between(x, quarter, three_quarters, color=_LINE, alpha=0.35, lw=0)
    axes.plot(x, median, color=_LINE, lw=1.4)
    for rank, style in zip(ranks, (":", "--"), strict=True):
        axes.axvline(rank, color=_SECOND, lw=1, ls=style)
    axes.set_xlim(1 if longest > 1 else 0.5, max(longest, 1.5))
    axes.set_ylim(0, 1.03)
    axes.set_yticks([0, 0.5, 1])
    label = f"{name}: normalised singular values of {len(curves)} layers; 90 % of the energy at {ranks[0]}, 99 % at"
    return _svg(figure, f"{label} {ranks[1]} in the median layer")


def enough(name: str, ranks90: Sequence[int], ranks99: Sequence[int], trained: int) -> str:
    """For each rank the share of targets in which it keeps 90 % and 99 % of the energy.

    Args:
        name: the adapter, for screen readers.
        ranks90, ranks99: the ranks that each target needs.
        trained: the largest rank of the factors.
    """
    figure, axes = _figure(5.2, 2.0)
    most = max([*ranks99, trained, 2])
    steps = list(range(most + 1))
    for found, style, label in ((ranks90, ":", "90 %"), (ranks99, "-", "99 %")):
        shares = [100 * sum(r <= step for r in found) / len(found) for step in steps]
        axes.step(steps, shares, where="post", color=_LINE, lw=1.6, ls=style, label=f"{label} kept")
    axes.axhline(95, color=_QUIET, lw=0.6)
    axes.set_xlim(0, most + 0.5)
    axes.set_ylim(0, 103)
    axes.set_xlabel("rank")
    axes.set_ylabel("% of the targets")
    axes.legend(frameon=False, fontsize=8, labelcolor=_INK, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return _svg(figure, f"{name}: for each rank, the share of targets in which it keeps 90 % and 99 % of the energy")


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_QUIET)
    axes.tick_params(colors=_QUIET, labelcolor=_INK, labelsize=8, width=0.6, length=3)
    axes.xaxis.label.set(color=_INK, size=9)
    axes.yaxis.label.set(color=_INK, size=9)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True, min_n_ticks=1))
    return figure, axes


def _svg(figure: Figure, label: str) -> str:
    """The figure as an `<svg>` element without XML head or metadata, with ids of its own and the page's colours."""
    import matplotlib as mpl

    buffer = io.StringIO()
    quiet = {"Date": None, "Creator": None, "Format": None, "Type": None}
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": label}):
        figure.savefig(buffer, format="svg", transparent=True, metadata=quiet)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<(metadata|style).*?</\1>", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->\s*", "", text, flags=re.DOTALL)
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font: \1px var(--font)", text)
    for colour, name in _ON_PAGE.items():
        text = text.replace(colour, name)
    return text.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1).strip()
