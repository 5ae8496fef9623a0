"""What calls return: plain records that print as text, in notebooks too."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from adapterkit.errors import plain

# Longer values of a config are cut in text.
_LONGEST_VALUE = 200
# Truncation errors below this are rounding errors of float32.
_ROUNDING = 1e-6


class Printed:
    """A record that IPython and notebooks show as `print` does. Its text is made by `in_lines`."""

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(str(self))

    def _repr_html_(self) -> str:
        return f"<pre>{escape(str(self))}</pre>"  # without colors of its own, so it is readable in dark notebooks


@dataclass(frozen=True)
class AddReport(Printed):
    """What `Adapters.add` did.

    Attributes:
        name: the name of the adapter.
        targets: the paths of the adapted layers.
        heads: the paths of the modules that are trained in full with it.
        parameters: how many parameters it trains.
        total: how many parameters the base model has.
        unmatched: entries of the config that match nothing.
        notes: other remarks.
    """

    name: str
    targets: tuple[str, ...]
    heads: tuple[str, ...]
    parameters: int
    total: int
    unmatched: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def share(self) -> float:
        """Trained parameters as a share of the base model's."""
        return self.parameters / self.total if self.total else 0.0

    def __str__(self) -> str:
        lines = [
            f"adapter {self.name!r}: {len(self.targets)} layers, {self.parameters:,} parameters, "
            f"{self.share:.2%} of the base model's {self.total:,}"
        ]
        lines += [f"  trained in full: {path}" for path in self.heads]
        lines += [f"  matched nothing: {rule}" for rule in self.unmatched]
        return in_lines(lines + [f"  note: {note}" for note in self.notes])


@dataclass(frozen=True)
class Mismatch:
    """One tensor with another shape in the file than in the adapter."""

    key: str
    found: tuple[int, ...]
    expected: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.key}: {self.found} in the file, {self.expected} on this model"


@dataclass(frozen=True)
class LoadReport(Printed):
    """How the tensors of a file fit an adapter. Keys of the base model are not counted.

    Attributes:
        missing: tensors that the adapter needs and the file lacks.
        unexpected: tensors of the file that belong to nothing.
        mismatched: tensors with another shape than in the adapter.
        exempt: tensors that the file lacks and may lack, by the method's rule.
        ignored: tensors that were skipped: those of the base model, and of other models in a pipeline.
    """

    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[Mismatch, ...] = ()
    exempt: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether nothing is missing, unexpected or mismatched."""
        return not (self.missing or self.unexpected or self.mismatched)

    def __str__(self) -> str:
        lines = ["every tensor of the adapter fits" if self.ok else "the tensors do not fit this adapter"]
        for title, rows in vars(self).items():
            if rows:
                shown = [f"    {row}" for row in rows[:5]] + ["    ..."] * (len(rows) > 5)
                lines += [f"  {title} ({len(rows)}):", *shown]
        return in_lines(lines)


@dataclass(frozen=True)
class SwapReport(Printed):
    """What `Adapters.swap` wrote into an adapter.

    Attributes:
        name: the adapter.
        targets: the paths of the layers with new values.
        cleared: the paths of its other layers, which now change nothing.
        heads: the paths of the heads with new values.
        ignored: tensors of the file that were skipped.
    """

    name: str
    targets: tuple[str, ...]
    cleared: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"adapter {self.name!r}: new values in {len(self.targets)} layers"]
        lines += [f"  changes nothing now: {path}" for path in self.cleared]
        lines += [f"  head: {path}" for path in self.heads]
        return in_lines(lines + [f"  ignored: {key}" for key in self.ignored])


@dataclass(frozen=True)
class CombineReport(Printed):
    """What `Adapters.combine`, `convert` or `extract` made.

    Attributes:
        name: the new adapter.
        method: its method.
        ranks: the rank of its change at each target.
        errors: the relative error of truncation at each target, `|dW - result| / |dW|`.
        heads: the paths of its heads.
        clipped: targets that are too small for the requested rank. They get their largest possible rank and are exact.
    """

    name: str
    method: str
    ranks: Mapping[str, int]
    errors: Mapping[str, float]
    heads: tuple[str, ...] = ()
    clipped: tuple[str, ...] = ()

    def __str__(self) -> str:
        ranks = sorted(set(self.ranks.values()))
        span = " to ".join(map(str, dict.fromkeys([ranks[0], ranks[-1]])))
        lines = [f"adapter {self.name!r} ({self.method}): {len(self.ranks)} layers of rank {span}"]
        worst = max(self.errors, key=self.errors.__getitem__)
        if self.errors[worst] >= _ROUNDING:
            lines.append(f"  largest relative error of truncation: {self.errors[worst]:.2%} at {worst}")
        lines += [f"  clipped to rank {self.ranks[path]}: {path}" for path in self.clipped]
        return in_lines(lines + [f"  head: {path}" for path in self.heads])


@dataclass(frozen=True)
class AdapterStatus:
    """One adapter's row in `Status`.

    Attributes:
        active: whether it is active here (inside a `with` block: in this thread's block).
        trainable: whether any of its parameters requires gradients.
        trainable_parameters: how many of its parameters require gradients.
        notes: its problems.
    """

    name: str
    method: str
    targets: int
    heads: tuple[str, ...]
    parameters: int
    dtypes: tuple[str, ...]
    devices: tuple[str, ...]
    active: bool
    trainable: bool
    merged: bool = False
    notes: tuple[str, ...] = ()
    trainable_parameters: int = 0


_TITLES = ("adapter", "method", "layers", "heads", "parameters", "dtype", "device", "active", "trainable", "merged")


@dataclass(frozen=True)
class Status(Printed):
    """The adapters of a model, one row for each. Prints as a table."""

    rows: tuple[AdapterStatus, ...]

    def __str__(self) -> str:
        if not self.rows:
            return "no adapters"
        table: list[tuple[str, ...]] = [_TITLES]
        for r in self.rows:
            active, trains, merged = ("yes" if flag else "no" for flag in (r.active, r.trainable, r.merged))
            if 0 < r.trainable_parameters < r.parameters:
                trains = f"{r.trainable_parameters:,}"
            places = ", ".join(r.heads) or "-", f"{r.parameters:,}", ", ".join(r.dtypes), ", ".join(r.devices)
            table.append((r.name, r.method, str(r.targets), *places, active, trains, merged))
        return in_lines([*columns(table), *(f"{row.name}: {note}" for row in self.rows for note in row.notes)])


def brief(value: object) -> str:
    """A value of a config as text, cut if it would fill the screen."""
    if isinstance(value, list | tuple) and len(str(value)) > _LONGEST_VALUE:
        return f"[{', '.join(map(repr, value[:3]))}, ... {len(value):,} in all]"
    text = "not set" if value is None else str(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}..."


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells as lines; every column is as wide as its longest cell."""
    rows = [[plain(cell) for cell in row] for row in rows]
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    return ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]


def in_lines(lines: Iterable[str]) -> str:
    """Lines as the text of a report, each of them plain: no name in a file can begin a line of its own."""
    return "\n".join(map(plain, lines))
