"""Plots of spectra as inline SVG, drawn by matplotlib in the colours of the page."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from adapterkit.errors import plain

if TYPE_CHECKING:
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
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    longest = max(map(len, values))
    curves = torch.stack([torch.nn.functional.pad(v.double() / v[0], (0, longest - len(v))) for v in values])
    low, quarter, median, three_quarters, high = (curves.quantile(q, 0).tolist() for q in (0.0, 0.25, 0.5, 0.75, 1.0))
    figure = Figure(figsize=(2.5, 1.7), layout="constrained")
    axes = figure.add_subplot()
    x = range(1, longest + 1)
    axes.fill_between(x, low, high, color=_LINE, alpha=0.18, lw=0)
    axes.fill_between(x, quarter, three_quarters, color=_LINE, alpha=0.35, lw=0)
    axes.plot(x, median, color=_LINE, lw=1.4)
    for rank, style in zip(ranks, (":", "--"), strict=True):
        axes.axvline(rank, color=_SECOND, lw=1, ls=style)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_QUIET)
    axes.tick_params(colors=_QUIET, labelcolor=_INK, labelsize=8, width=0.6, length=3)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True, min_n_ticks=1))
    axes.set(xlim=(1 if longest > 1 else 0.5, max(longest, 1.5)), ylim=(0, 1.03), yticks=[0, 0.5, 1])
    label = f"{name}: normalised singular values of {len(curves)} layers; 90 % of the energy at {ranks[0]}, 99 % at"
    return _svg(figure, f"{label} {ranks[1]} in the median layer")


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
    return text.replace("<svg", f'<svg role="img" aria-label="{escape(plain(label))}"', 1).strip()
