"""Grid: where each target stands in a table with the model's layers as rows and module names as columns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile

# Stands in the column's place where the row is a whole path.
ITSELF = ""


@dataclass(frozen=True)
class Grid:
    """The table's frame.

    Attributes:
        rows: in the order of the model, numbers within a stack ascending.
        columns: in the order of the model.
        places: `(row, column)` of each path; no two paths share one.
        common: what all rows begin with, a dotted prefix; `label` leaves it out, but for its last name (`layer.3`).
    """

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    places: dict[str, tuple[str, str]]
    common: str

    @classmethod
    def of(cls, paths: Iterable[str]) -> Grid:
        """The grid for these paths.

        A path is cut behind a layer number. Which one, where a path has several, is what makes the table smallest:
        the first (`decoder.block.0 | layer.1.SelfAttention.q`) or the last that has a name behind it
        (`layers.2.blocks.17 | attn.qkv`). A path without a number is a row of its own.
        """
        ordered = list(dict.fromkeys(paths))
        choices = [{path: cut(path) for path in ordered} for cut in (_behind_first, _behind_last)]
        places = min(choices, key=_size)
        rows = sorted(dict.fromkeys(row for row, _ in places.values()), key=_order([r for r, _ in places.values()]))
        columns = dict.fromkeys(column for _, column in places.values())
        return cls(tuple(rows), tuple(columns), places, _common(rows))

    def label(self, row: str) -> str:
        """The row without what all rows begin with."""
        return row.removeprefix(self.common)


def _parts(path: str) -> tuple[list[str], list[int]]:
    """The parts of a path, and where among them are layer numbers with a part behind."""
    parts = path.split(".")
    return parts, [i for i, part in enumerate(parts[:-1]) if part.isdecimal() and part.isascii()]


def _cut(path: str, choose: Callable[[list[str], list[int]], int | None]) -> tuple[str, str]:
    parts, numbers = _parts(path)
    at = choose(parts, numbers)
    return (path, ITSELF) if at is None else (".".join(parts[: at + 1]), ".".join(parts[at + 1 :]))


def _behind_first(path: str) -> tuple[str, str]:
    return _cut(path, lambda parts, numbers: numbers[0] if numbers else None)


def _behind_last(path: str) -> tuple[str, str]:
    return _cut(path, lambda parts, numbers: numbers[-1] if numbers else None)


def _size(places: dict[str, tuple[str, str]]) -> tuple[int, int]:
    rows, columns = ({place[i] for place in places.values()} for i in (0, 1))
    return len(rows) * len(columns), len(columns)


def _order(rows: Sequence[str]) -> Callable[[str], tuple[int, list[int]]]:
    """Stacks in the order they appear, layers of a stack by number: files list `layers.10` before `layers.2`."""
    stacks: dict[str, int] = {}
    for row in rows:
        stacks.setdefault(_stack(row), len(stacks))
    return lambda row: (stacks[_stack(row)], [int(p) for p in row.split(".") if p.isdecimal() and p.isascii()])


def _stack(row: str) -> str:
    return ".".join("#" if part.isdecimal() and part.isascii() else part for part in row.split("."))


def _common(rows: Sequence[str]) -> str:
    """The longest dotted prefix of all rows that leaves each a name, which is not a number alone."""
    parts = [row.split(".")[:-1] for row in rows]
    shared = [p[0] for p in takewhile(lambda p: len(set(p)) == 1, zip(*parts, strict=False))]
    while shared and any(row.split(".")[len(shared)].isdecimal() for row in rows):
        shared.pop()
    return "".join(f"{part}." for part in shared)
