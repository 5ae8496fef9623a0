"""What the command prints: reports on stdout, as text or JSON; messages and progress on stderr."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from typing import IO, Any

from rich.console import Console
from rich.text import Text


def say(kind: str, message: str, style: str) -> None:
    """Print `kind: message` on stderr."""
    text = Text.assemble((f"{kind}:", f"bold {style}"), " ", shown(message))
    Console(file=sys.stderr, highlight=False, markup=False, emoji=False).print(text, soft_wrap=True)


# Spaces and joiners that are part of words in some languages.
_UNPRINTED = "\n\xa0\u200c\u200d\u3000"


def shown(text: str) -> str:
    """Text for a terminal. Reports and errors of the library are plain already; the messages of others may not be."""
    return "".join(c if c.isprintable() or c in _UNPRINTED else ascii(c)[1:-1] for c in text)


def print_text(text: str, stream: IO[str]) -> None:
    """Print a report. Only on a terminal, lines that are too long for it are wrapped and indented."""
    width = shutil.get_terminal_size().columns if stream.isatty() else None
    for line in shown(text).split("\n"):
        if width is None or len(line) <= width:
            print(line, file=stream)
            continue
        indent = " " * (4 + len(line) - len(line.lstrip()))
        print(textwrap.fill(line, width, subsequent_indent=indent, break_on_hyphens=False), file=stream)


def print_json(value: object, stream: IO[str]) -> None:
    """Print `value` as JSON; the keys of a report are its attributes."""
    print(json.dumps(jsonable(value), indent=2).replace("\x7f", "\\u007f"), file=stream)


def jsonable(value: Any) -> Any:
    """`value` in the types of JSON: reports as their attributes, infinite numbers and NaN as `null`, others as text."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [field.name for field in dataclasses.fields(value)]
        parts = [part for cls in reversed(type(value).__mro__) for part in vars(cls).items()]
        properties = [name for name, part in parts if type(part) is property]
        names = [name for name in dict.fromkeys((*fields, *properties)) if not name.startswith("_")]
        return {name: jsonable(getattr(value, name)) for name in names}
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, Sequence | Set) and not isinstance(value, str):
        return [jsonable(item) for item in (sorted(value) if isinstance(value, Set) else value)]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, str | int | float) else str(value).removeprefix("torch.")


@contextmanager
def bytes_bar(what: str) -> Iterator[Callable[[int, int], None] | None]:
    """A progress bar with bytes, speed and time left. Call it with `(done, all)`; `None` if stderr is not a tty."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = (what, BarColumn(bar_width=None), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
