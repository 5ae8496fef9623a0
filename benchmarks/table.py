"""Results as tables, with the same cells in the terminal and on the page."""

from __future__ import annotations

import math
from collections.abc import Sequence

from benchmarks.runner import FLOOR, OURS, Row

PEERS = ("peft", "lycoris")


def header(rows: Sequence[Row]) -> list[str]:
    """The operation, each way, our ratio to hand and to each peer, and the goal."""
    return ["operation", *ways(rows), *(f"× {way}" for way in _beside(rows)), "goal"]


def cells(row: Row, rows: Sequence[Row]) -> list[str]:
    """One row under that header."""
    values = [number(row.ways[way].median) if way in row.ways else "" for way in ways(rows)]
    ratios = [row.ratio(OURS, way) for way in _beside(rows)]
    goals = "; ".join(f"{goal} {_sign(row.reached(goal))}" for goal in row.goals)
    return [f"{row.operation}, {row.unit}", *values, *("" if r is None else f"{r:.2f}" for r in ratios), goals]


def spread(row: Row) -> str:
    """The widest range between quartiles, as a share of its median: the noise of the measurement."""
    widest = max((s.high - s.low) / s.median for s in row.ways.values() if s.median)
    return f"± {50 * widest:.0f} %"


def ways(rows: Sequence[Row]) -> list[str]:
    """Every way of these rows: by hand, ours, the peers', others."""
    found = dict.fromkeys(way for row in rows for way in row.ways)
    order = [*(w for w in found if w.startswith(FLOOR)), OURS, *PEERS]
    return [*(w for w in order if w in found), *(w for w in found if w not in order)]


def slopes(rows: Sequence[Row]) -> dict[str, float]:
    """Each way's growth along a curve: the slope of the line through log size and log cost."""
    found = {}
    for way in ways(rows):
        points = [(math.log(row.curve[1]), math.log(row.ways[way].median)) for row in rows if row.curve]
        found[way] = _slope(points)
    return found


def curves(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    """Rows of growth curves by operation and by what grows, each in the order of its sizes."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.curve is not None:
            found.setdefault((row.operation, row.curve[0]), []).append(row)
    return {key: sorted(group, key=lambda row: row.curve[1] if row.curve else 0) for key, group in found.items()}


def number(value: float) -> str:
    """Three digits."""
    digits = 2 - math.floor(math.log10(abs(value))) if value else 0
    return f"{value:,.{max(digits, 0)}f}"


def _slope(points: list[tuple[float, float]]) -> float:
    x, y = (sum(values) / len(points) for values in zip(*points, strict=True))
    return sum((a - x) * (b - y) for a, b in points) / sum((a - x) ** 2 for a, _ in points)


def _beside(rows: Sequence[Row]) -> list[str]:
    present = ways(rows)
    return [w for w in (FLOOR, *PEERS) if w in present or (w == FLOOR and any(p.startswith(w) for p in present))]


def _sign(reached: bool | None) -> str:
    return "" if reached is None else "✓" if reached else "✗"
