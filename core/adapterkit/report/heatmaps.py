"""Heat maps: tables of numbers, shaded by value, with the model's layers as rows and its modules as columns.

Every cell shows its number, so nothing depends on colour alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import NamedTuple

from adapterkit.results import NUMBER

# Shades of a scale. The style sheet has as many: h0 to h9 from nothing to the largest, and n9 to n1, h0, p1 to p9 for
# values from -1 to 1.
_STEPS = 9
# Row and column of each path, in the order of the rows. No two paths share a place.
Places = Mapping[str, tuple[str, str]]


class Cell(NamedTuple):
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
        note: how to read it.
        low, middle, high: the numbers at the colour scale; a scale with a middle has two colours.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Cell]]]
    note: str = ""
    low: str = "0"
    middle: str = ""
    high: str = "1"


def places_of(paths: Iterable[str]) -> Places:
    """Where paths stand in a table of layers and modules.

    A path is cut after its last layer number that has a name after it: `layers.2.blocks.17 | attn.qkv`. A path without
    a number is a row of its own. The dotted prefix that all rows share is left out, but not the last name (`layer.3`).
    """
    rows: dict[str, list[str]] = {}
    for path in paths:
        parts = path.split(".")
        cut = max((i + 1 for i, part in enumerate(parts[:-1]) if part.isdecimal()), default=len(parts))
        rows[path] = parts[:cut]
    # Files list `layers.10` before `layers.2`: rows are sorted by stack, and by number within a stack.
    stacks = {path: NUMBER.sub("#", ".".join(row)) for path, row in rows.items()}
    first = list(dict.fromkeys(stacks.values()))
    order = sorted(
        rows, key=lambda path: (first.index(stacks[path]), [int(part) for part in rows[path] if part.isdecimal()])
    )
    shared = [*takewhile(lambda names: len(set(names)) == 1, zip(*(row[:-1] for row in rows.values()), strict=False))]
    common = len(shared)
    while common and any(row[common].isdecimal() for row in rows.values()):
        common -= 1
    return {path: (".".join(rows[path][common:]), ".".join(path.split(".")[len(rows[path]) :])) for path in order}


def layer_map(title: str, places: Places, cells: Mapping[str, Cell], **scale: str) -> HeatMap:
    """The heat map with the cell of each path; `scale` is the note and the colour scale of `HeatMap`."""
    at = {place: cells[path] for path, place in places.items() if path in cells}
    columns = list(dict.fromkeys(column for _, column in at))
    rows = dict.fromkeys(row for row, _ in at)
    shown = [(row, [at.get((row, column), Cell("")) for column in columns]) for row in rows]
    return HeatMap(title, [column or "itself" for column in columns], shown, **scale)


def shade(value: float, most: float, signed: bool = False) -> str:
    """The class of the shade for a value from 0, or from `-most` if `signed`, to `most`."""
    step = round(_STEPS * min(abs(value) / most, 1.0)) if most else 0
    if step == 0 or not signed:
        return f"h{step}"
    return f"{'n' if value < 0 else 'p'}{step}"


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
