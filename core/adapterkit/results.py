"""What calls return: plain records that print as text, and that notebooks show as tables."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

# Longer values of a config are cut in text.
_LONGEST_VALUE = 200
# A model may have thousands of layers; a notebook shows at most this many rows of a table.
_MOST_ROWS = 200
_CELL = 'style="text-align:left;vertical-align:top"'


@dataclass(frozen=True)
class Table:
    """Rows with column names. A table without rows is not shown."""

    columns: Sequence[str]
    rows: Sequence[Sequence[object]]
    title: str = ""


class Shown(ABC):
    """A record that notebooks show as tables; elsewhere it prints as text."""

    @abstractmethod
    def _shown(self) -> tuple[str, Sequence[Table]]:
        """A sentence, and the tables below it."""

    def _repr_html_(self) -> str:
        sentence, tables = self._shown()
        return f"<p>{escape(sentence)}</p>" + "".join(_table(table) for table in tables if table.rows)


def _table(table: Table) -> str:
    title = f"<p><b>{escape(table.title)}</b></p>" if table.title else ""
    head = "".join(f"<th {_CELL}>{escape(name)}</th>" for name in table.columns)
    rows = "".join(
        "<tr>" + "".join(f"<td {_CELL}>{escape(str(value))}</td>" for value in row) + "</tr>"
        for row in table.rows[:_MOST_ROWS]
    )
    left = len(table.rows) - _MOST_ROWS
    more = f"<p>… and {left} more</p>" if left > 0 else ""
    return f"{title}<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>{more}"


# Truncation errors below this are rounding errors of float32.
_ROUNDING = 1e-6


@dataclass(frozen=True)
class AddReport(Shown):
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
        lines = [self._sentence()]
        lines += [f"  trained in full: {path}" for path in self.heads]
        lines += [f"  matched nothing: {rule}" for rule in self.unmatched]
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)

    def _sentence(self) -> str:
        return (
            f"adapter {self.name!r}: {len(self.targets)} layers, {self.parameters:,} parameters, "
            f"{self.share:.2%} of the base model's {self.total:,}"
        )

    def _shown(self) -> tuple[str, list[Table]]:
        rows = [(path, "adapted") for path in self.targets] + [(path, "trained in full") for path in self.heads]
        rows += [(rule, "matched nothing") for rule in self.unmatched] + [(note, "note") for note in self.notes]
        return self._sentence(), [Table(("", "what"), rows)]


@dataclass(frozen=True)
class Mismatch:
    """One tensor with another shape in the file than in the adapter."""

    key: str
    found: tuple[int, ...]
    expected: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.key}: {self.found} in the file, {self.expected} on this model"


@dataclass(frozen=True)
class LoadReport(Shown):
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
        lines = [self._sentence()]
        for title, rows in self._groups().items():
            if rows:
                shown = [f"    {row}" for row in rows[:5]] + ["    ..."] * (len(rows) > 5)
                lines += [f"  {title} ({len(rows)}):", *shown]
        return "\n".join(lines)

    def _sentence(self) -> str:
        return "every tensor of the adapter fits" if self.ok else "the tensors do not fit this adapter"

    def _groups(self) -> dict[str, tuple[object, ...]]:
        return {
            "missing": self.missing,
            "unexpected": self.unexpected,
            "mismatched": self.mismatched,
            "exempt": self.exempt,
            "ignored": self.ignored,
        }

    def _shown(self) -> tuple[str, list[Table]]:
        rows = [(title, row) for title, group in self._groups().items() for row in group]
        return self._sentence(), [Table(("", "tensor"), rows)]


@dataclass(frozen=True)
class SwapReport(Shown):
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
        return "\n".join([self._sentence(), *(f"  {what}: {path}" for what, path in self._rows())])

    def _sentence(self) -> str:
        return f"adapter {self.name!r}: new values in {len(self.targets)} layers"

    def _rows(self) -> list[tuple[str, str]]:
        groups = {"changes nothing now": self.cleared, "head": self.heads, "ignored": self.ignored}
        return [(what, path) for what, paths in groups.items() for path in paths]

    def _shown(self) -> tuple[str, list[Table]]:
        return self._sentence(), [Table(("", "path"), self._rows())]


@dataclass(frozen=True)
class CombineReport(Shown):
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
        worst = max(self.errors, key=self.errors.__getitem__)
        lines = [self._sentence()]
        if self.errors[worst] >= _ROUNDING:
            lines.append(f"  largest relative error of truncation: {self.errors[worst]:.2%} at {worst}")
        lines += [f"  clipped to rank {self.ranks[path]}: {path}" for path in self.clipped]
        lines += [f"  head: {path}" for path in self.heads]
        return "\n".join(lines)

    def _sentence(self) -> str:
        ranks = sorted(set(self.ranks.values()))
        span = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
        return f"adapter {self.name!r} ({self.method}): {len(self.ranks)} layers of rank {span}"

    def _shown(self) -> tuple[str, list[Table]]:
        errors = {path: f"{e:.2%}" if e >= _ROUNDING else "0" for path, e in self.errors.items()}
        rows = [(path, rank, errors[path]) for path, rank in self.ranks.items()]
        return self._sentence(), [
            Table(("layer", "rank", "error of truncation"), rows),
            Table(("layer",), [(path,) for path in self.clipped], "clipped to the largest rank they can have"),
            Table(("head",), [(path,) for path in self.heads]),
        ]


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
class Status(Shown):
    """The adapters of a model, one row for each. Prints as a table."""

    rows: tuple[AdapterStatus, ...]

    def __str__(self) -> str:
        if not self.rows:
            return "no adapters"
        return "\n".join([columns([_TITLES, *self._cells()]), *(f"{name}: {note}" for name, note in self._notes())])

    def _notes(self) -> list[tuple[str, str]]:
        return [(row.name, note) for row in self.rows for note in row.notes]

    def _cells(self) -> list[tuple[str, ...]]:
        table: list[tuple[str, ...]] = []
        for r in self.rows:
            active, trains, merged = ("yes" if flag else "no" for flag in (r.active, r.trainable, r.merged))
            if 0 < r.trainable_parameters < r.parameters:
                trains = f"{r.trainable_parameters:,}"
            heads = ", ".join(r.heads) or "-"
            dtypes, devices = ", ".join(r.dtypes), ", ".join(r.devices)
            table.append(
                (r.name, r.method, str(r.targets), heads, f"{r.parameters:,}", dtypes, devices, active, trains, merged)
            )
        return table

    def _shown(self) -> tuple[str, list[Table]]:
        count = len(self.rows)
        tables = [Table(_TITLES, self._cells()), Table(("adapter", "note"), self._notes())]
        return f"{count or 'no'} adapter{'s' * (count != 1)}", tables


def brief(value: object) -> str:
    """A value of a config as text, cut if it would fill the screen."""
    if isinstance(value, list | tuple) and len(str(value)) > _LONGEST_VALUE:
        return f"[{', '.join(map(repr, value[:3]))}, ... {len(value):,} in all]"
    text = "not set" if value is None else str(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}..."


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as lines; every column is as wide as its longest cell."""
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)
