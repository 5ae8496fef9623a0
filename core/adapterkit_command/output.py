"""What the command prints: reports on stdout, as tables or as JSON; everything else on stderr."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from typing import IO, Any

from rich.console import Console, ConsoleOptions, JustifyMethod, RenderableType
from rich.table import Table
from rich.text import Text


def console(stream: IO[str]) -> Console:
    """A console that wraps for a terminal, and for nothing else: what is piped has one row a line."""
    width = None if stream.isatty() else 100_000
    return Console(file=stream, highlight=False, markup=False, emoji=False, width=width)


@dataclasses.dataclass(frozen=True)
class Columns:
    """A table without lines. Where it is wider than the terminal, each row's first cell has a line of its own.

    Attributes:
        wide: titles of the columns that may be folded.
        right: titles of the columns of numbers.
    """

    titles: Sequence[str]
    rows: Sequence[Sequence[str]]
    wide: Sequence[str] = ()
    right: Sequence[str] = ()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        """See rich's protocol."""
        lines = [self.titles, *self.rows]
        widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
        if sum(widths) + 2 * (len(widths) - 1) <= options.max_width or self.titles[0] not in self.wide:
            yield self._table()
            return
        for number, cells in enumerate(lines):
            rest = [
                cell.rjust(width) if title in self.right else cell.ljust(width)
                for title, cell, width in zip(self.titles[1:], cells[1:], widths[1:], strict=True)
            ]
            yield Text(f"{cells[0]}\n  {'  '.join(rest).rstrip()}", style="" if number else "bold")

    def _table(self) -> Table:
        made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
        for title in self.titles:
            side: JustifyMethod = "right" if title in self.right else "left"
            made.add_column(title, overflow="fold", justify=side, no_wrap=title not in self.wide)
        for row in self.rows:
            made.add_row(*map(Text, row))
        return made


def hanging(label: str, text: str, style: str = "") -> Table:
    """`label: text`, the text indented where it is wrapped."""
    made = Table.grid(padding=(0, 1, 0, 0))
    made.add_column(no_wrap=True)
    made.add_column(overflow="fold")
    made.add_row(Text(f"{label}:", style=style), Text(text))
    return made


def say(kind: str, message: str, style: str) -> None:
    """A message to the user, on stderr: `kind: message`."""
    text = Text.assemble((f"{kind}:", f"bold {style}"), " ", message)
    console(sys.stderr).print(text, soft_wrap=True)


def print_json(value: object, stream: IO[str]) -> None:
    """`value` as JSON; a report's keys are its attributes."""
    print(json.dumps(jsonable(value), indent=2), file=stream)


def print_text(parts: Iterable[RenderableType], stream: IO[str]) -> None:
    """The parts of a report, one below the other."""
    out = console(stream)
    if out.is_terminal:
        for part in parts:
            out.print(part)
    else:
        with out.capture() as captured:
            for part in parts:
                out.print(part)
        print(*(line.rstrip() for line in captured.get().splitlines()), sep="\n", file=stream)


def jsonable(value: Any) -> Any:
    """`value` in JSON's types: a report as its attributes, what is not finite as `null`, the rest as its text."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {name: jsonable(getattr(value, name)) for name in _attributes(value)}
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, Sequence | Set) and not isinstance(value, str):
        return [jsonable(item) for item in (sorted(value) if isinstance(value, Set) else value)]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, str | int | float) else str(value).removeprefix("torch.")


def _attributes(report: Any) -> list[str]:
    """Names of a report's fields and properties, in the order in which its class has them."""
    fields = [field.name for field in dataclasses.fields(report)]
    own = [name for cls in reversed(type(report).__mro__) for name, part in vars(cls).items() if type(part) is property]
    return [name for name in dict.fromkeys((*fields, *own)) if not name.startswith("_")]
