"""Heat maps: tables of numbers, shaded by value, with the model's layers as rows and its modules as columns.

Every cell shows its number, so that nothing is told by colour alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

# Shades of a scale. The style sheet has as many: h0 to h9 from nothing to the largest, and n9 to n1, h0, p1 to p9 for
# values from -1 to 1.
_STEPS = 9


@dataclass(frozen=True)
class Grid:
    """Where the targets stand in a table.

    Attributes:
        rows: in the order of the model; the layers of a stack by their number.
        columns: in the order of the model; `""` for rows that are a whole path.
        places: `(row, column)` of each path; no two paths share one.
        common: the dotted prefix of all rows, which `label` leaves out, but not the last name (`layer.3`).
    """

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    places: dict[str, tuple[str, str]]
    common: str

    @classmethod
    def of(cls, paths: Iterable[str]) -> Grid:
        """The grid for these paths.

        A path is cut after a layer number. If paths have several, either the first or the last number is used for all
        of them, whichever makes the table smaller: the first for `decoder.block.0 | layer.1.SelfAttention.q`, the last
        for `layers.2.blocks.17 | attn.qkv`. A path without a number is a row of its own.
        """
        ordered = list(dict.fromkeys(paths))

        def size(places: dict[str, tuple[str, str]]) -> tuple[int, int]:
            rows, columns = ({place[i] for place in places.values()} for i in (0, 1))
            return len(rows) * len(columns), len(columns)

        places = min(({path: _cut(path, number) for path in ordered} for number in (0, -1)), key=size)
        rows = list(dict.fromkeys(row for row, _ in places.values()))
        # Files list `layers.10` before `layers.2`: rows are sorted by stack, and by number within a stack.
        stacks = list(dict.fromkeys(map(_stack, rows)))
        rows.sort(key=lambda row: (stacks.index(_stack(row)), [int(p) for p in row.split(".") if _is_number(p)]))
        columns = dict.fromkeys(column for _, column in places.values())
        return cls(tuple(rows), tuple(columns), places, _common(rows))

    def label(self, row: str) -> str:
        """The row without the prefix that all rows have."""
        return row.removeprefix(self.common)


def _is_number(part: str) -> bool:
    return part.isdecimal() and part.isascii()


def _stack(row: str) -> str:
    return ".".join("#" if _is_number(part) else part for part in row.split("."))


def _cut(path: str, number: int) -> tuple[str, str]:
    """Row and column of a path that is cut after its first (0) or last (-1) layer number that has a name after it."""
    parts = path.split(".")
    numbers = [i for i, part in enumerate(parts[:-1]) if _is_number(part)]
    if not numbers:
        return path, ""
    at = numbers[number] + 1
    return ".".join(parts[:at]), ".".join(parts[at:])


def _common(rows: Sequence[str]) -> str:
    """The longest dotted prefix of all rows that leaves each a name, which is not a number alone."""
    parts = [row.split(".")[:-1] for row in rows]
    shared = [p[0] for p in takewhile(lambda p: len(set(p)) == 1, zip(*parts, strict=False))]
    while shared and any(row.split(".")[len(shared)].isdecimal() for row in rows):
        shared.pop()
    return "".join(f"{part}." for part in shared)


@dataclass(frozen=True)
class Cell:
    """One cell: its text, the class of its shade, and what it shows under the pointer."""

    text: str
    shade: str = ""
    title: str = ""


@dataclass(frozen=True)
class HeatMap:
    """A table of shaded cells, with its colour scale.

    Attributes:
        title: what the cells are.
        columns: the titles of the columns.
        rows: the label and the cells of each row.
        corner: the title of the column of labels.
        note: how to read it.
        low, middle, high: the numbers at the colour scale; a scale with a middle has two colours.
        totals: whether the last row and the last column sum up the others.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Cell]]]
    corner: str = ""
    note: str = ""
    low: str = "0"
    middle: str = ""
    high: str = "1"
    totals: tuple[bool, bool] = (False, False)

    @property
    def tall(self) -> bool:
        """Whether it has so many rows that it scrolls in a box of its own."""
        return len(self.rows) > 40


def shade(value: float, most: float, signed: bool = False) -> str:
    """The class of the shade for a value from 0, or from `-most` if `signed`, to `most`."""
    step = round(_STEPS * min(abs(value) / most, 1.0)) if most else 0
    if step == 0 or not signed:
        return f"h{step}"
    return f"{'n' if value < 0 else 'p'}{step}"


def layer_map(
    title: str,
    grid: Grid,
    cells: Mapping[str, Cell],
    total: Callable[[Sequence[str]], Cell] | None = None,
    **scale: Any,
) -> HeatMap:
    """The heat map with the cell of each path.

    Args:
        total: makes the cell that sums up the paths of a row, of a column, or of the whole map.
        scale: the note and the colour scale; see `HeatMap`.
    """
    columns = [c for c in grid.columns if any(grid.places[path][1] == c for path in cells)]
    at = {grid.places[path]: path for path in cells}
    with_column = total is not None and len(columns) > 1
    rows: list[tuple[str, list[Cell]]] = []
    for row in grid.rows:
        paths = [at[row, c] for c in columns if (row, c) in at]
        if paths:
            shown = [cells[at[row, c]] if (row, c) in at else Cell("") for c in columns]
            rows.append((grid.label(row), [*shown, *([total(paths)] if total and with_column else [])]))
    with_row = total is not None and len(rows) > 1
    if total and with_row:
        last = [total([path for path in cells if grid.places[path][1] == c]) for c in columns]
        rows.append(("all", [*last, *([total(list(cells))] if with_column else [])]))
    titles = [c or "itself" for c in columns] + ["all"] * with_column
    corner = f"{grid.common}…" if grid.common else "layer"
    return HeatMap(title, titles, rows, corner, totals=(with_row, with_column), **scale)


def number(value: float) -> str:
    """A number between -1 and 1 in two digits."""
    return "0" if abs(value) < 0.005 else f"{value:.2f}".replace("-", "−")


def percent(value: float) -> str:
    """A share in percent with two significant digits, without the percent sign."""
    scaled = 100 * value
    if scaled == 0:
        return "0"
    if abs(scaled) < 0.01:
        return "<0.01"
    digits = max(0, 1 - math.floor(math.log10(abs(scaled))))
    return f"{scaled:.{digits}f}"
