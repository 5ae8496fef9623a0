"""Heat maps: tables of numbers whose cells are shaded by value. Every cell has its number: colour is no sole sign."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from adapterkit.report.grid import ITSELF, Grid

# Shades of a scale; the style sheet has as many for each: h0 to h9 from nothing to the largest, and n9 to n1, h0,
# p1 to p9 from -1 to 1.
_STEPS = 9

Scale = Literal["size", "signed"]


@dataclass(frozen=True)
class Cell:
    """One cell: what it reads, its shade's class, and more for who points at it."""

    text: str
    shade: str = ""
    title: str = ""


@dataclass(frozen=True)
class HeatMap:
    """A table: a label and cells for each row; columns have names. The last of either may be for all others."""

    caption: str
    corner: str
    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Cell]]]
    total_row: bool = False
    total_column: bool = False

    @property
    def tall(self) -> bool:
        """Whether it has so many rows that it scrolls in its own box."""
        return len(self.rows) > 40


def shade(value: float, most: float, scale: Scale = "size") -> str:
    """The class of the shade for a value between 0, or `-most`, and `most`."""
    if not most:
        return "h0"
    step = round(_STEPS * min(abs(value) / most, 1.0))
    if scale == "size" or step == 0:
        return f"h{step}"
    return f"{'n' if value < 0 else 'p'}{step}"


def layer_map(
    caption: str,
    grid: Grid,
    values: Mapping[str, Cell],
    totals: tuple[Callable[[Sequence[str]], Cell], str] | None = None,
) -> HeatMap:
    """The heat map of a value at each path, with the model's layers as rows and module names as columns.

    Args:
        totals: makes the cell for all paths of a row, of a column, or of both, and what that column is called.
    """
    columns = [c for c in grid.columns if any(grid.places[path][1] == c for path in values)]
    by_place = {grid.places[path]: path for path in values}
    rows: list[tuple[str, list[Cell]]] = []
    total, total_name = totals or (None, "")
    with_totals = total is not None and len(columns) > 1
    for row in grid.rows:
        paths = [by_place[row, c] for c in columns if (row, c) in by_place]
        if paths:
            cells = [values[by_place[row, c]] if (row, c) in by_place else Cell("") for c in columns]
            rows.append((grid.label(row), [*cells, *([total(paths)] if total and with_totals else [])]))
    with_row = total is not None and len(rows) > 1
    if total and with_row:
        in_columns = [[path for path in values if grid.places[path][1] == c] for c in columns]
        last = [total(paths) for paths in in_columns] + ([total(list(values))] if with_totals else [])
        rows.append((total_name, last))
    names = [c if c != ITSELF else "itself" for c in columns] + ([total_name] if with_totals else [])
    return HeatMap(caption, f"{grid.common}…" if grid.common else "layer", names, rows, with_row, with_totals)


def matrix(
    caption: str,
    names: Sequence[str],
    value: Callable[[int, int], float | None],
    shaded: Callable[[float], str],
    written: Callable[[float], str] | None = None,
) -> HeatMap:
    """A square table of a value for each ordered pair; `None` is a dash."""
    written = written or number
    rows = []
    for i, name in enumerate(names):
        found = [value(i, j) for j in range(len(names))]
        rows.append((name, [Cell("–") if v is None else Cell(written(v), shaded(v)) for v in found]))
    return HeatMap(caption, "", names, rows)


def number(value: float) -> str:
    """A number between -1 and 1 in two digits."""
    return "0" if abs(value) < 0.005 else f"{value:.2f}".replace("-", "−")


def percent(value: float) -> str:
    """A share in percent with two significant digits, without the sign for percent."""
    scaled = 100 * value
    if scaled == 0:
        return "0"
    if abs(scaled) < 0.01:
        return "<0.01"
    digits = max(0, 1 - math.floor(math.log10(abs(scaled))))
    return f"{scaled:.{digits}f}"
