"""`python -m benchmarks.plot`: draw the picture of `docs/performance.md` from the JSON of all benchmarks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.results import read_all
from benchmarks.runner import FLOOR, OURS, Row
from benchmarks.table import PEERS

PICTURE = Path(__file__).parents[1] / "docs" / "performance.svg"
# As far from white as from black, so that text and lines can be read on both.
GREY = "#767676"
COLOURS = {OURS: "#2f8fd0", "peft": "#d9822b", "lycoris": "#8f6fc9"}


def draw(rows: Sequence[Row], path: Path = PICTURE) -> None:
    """For each row a line of points: how many times the cost by hand each library takes, on a logarithmic scale."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    # Text stays text, and the same results give the same bytes.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "adapterkit", "font.size": 9, "text.color": GREY}):
        figure = Figure(figsize=(9, 1.3 + 0.27 * len(rows)), layout="constrained")
        axes = figure.add_subplot()
        places = range(len(rows))[::-1]
        for way in (*PEERS, OURS):
            points = [(row.ratio(way, FLOOR), place) for row, place in zip(rows, places, strict=True)]
            known = [(ratio, place) for ratio, place in points if ratio is not None]
            if known:
                axes.scatter(*zip(*known, strict=True), s=34, color=COLOURS[way], label=way, zorder=3)
        axes.axvline(1, color=GREY, linewidth=1.2)
        axes.set_xscale("log")
        axes.set_yticks(list(places), [row.operation for row in rows])
        axes.set_xlabel("times the cost of the same work by hand (the line); less is better", color=GREY)
        axes.tick_params(colors=GREY, which="both")
        axes.grid(axis="both", color=GREY, alpha=0.25, linewidth=0.6)
        axes.spines[:].set_visible(False)
        axes.legend(loc="lower right", frameon=False, labelcolor=GREY)
        figure.savefig(path, transparent=True, metadata={"Date": None, "Creator": None})


def plotted() -> list[Row]:
    """The rows of all results that stand in the picture."""
    rows = [row for results in read_all().values() for row in results.rows]
    return [row for row in rows if row.plotted and row.median(FLOOR) is not None]


if __name__ == "__main__":
    draw(plotted())
