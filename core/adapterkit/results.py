"""What calls return: plain records that print as text, in notebooks too."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any, TypeVar

from adapterkit.errors import plain

T = TypeVar("T")

# Longer values of a config are cut in text.
_LONGEST_VALUE = 200
# A number that is a whole part of a path, or a whole word.
NUMBER = re.compile(r"\b(\d+)\b")
# Texts name so many paths of one sort.
_LISTED = 10
# Truncation errors below this are rounding errors of float32.
_ROUNDING = 1e-6


class Printed:
    """A record that Python's prompt, IPython and notebooks show as `print` does. Its text is made by `in_lines`."""

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        cls.__repr__ = Printed.__repr__  # type: ignore[method-assign]  # `dataclass` makes none where there is one

    def __repr__(self) -> str:
        return str(self)

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(str(self))

    def _repr_html_(self) -> str:
        return in_html(str(self))


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
            f"adapter {self.name!r}: {counted(len(self.targets), 'layer')}, {counted(self.parameters, 'parameter')}, "
            f"{self.share:.2%} of the base model's {self.total:,}"
        ]
        lines += listed("trained in full", self.heads) + listed("matched nothing", self.unmatched)
        return in_lines(lines + listed("note", self.notes))


@dataclass(frozen=True)
class Mismatch:
    """One tensor with another shape in the file than in the adapter."""

    key: str
    found: tuple[int, ...]
    expected: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.key}: {self.found} in the file, {self.expected} on this model"


@dataclass(frozen=True)
class AdapterStatus:
    """One adapter's row in `Status`.

    Attributes:
        targets: how many layers it adapts.
        ranks: the ranks of its layers, each once; empty for a method without ranks.
        memory: the bytes of its parameters.
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
    ranks: tuple[int, ...] = ()
    memory: int = 0

    def __str__(self) -> str:
        """`adapter 'mood': lora, 4 layers of rank 8, head classifier, 1,058 parameters`."""
        parts = [self.method, counted(self.targets, "layer")]
        if self.ranks:
            parts[-1] += f" of rank {span(self.ranks)}"
        parts += [f"head {path}" for path in self.heads[:3]]
        parts += [f"{len(self.heads) - 3} more heads"] if len(self.heads) > 3 else []
        return f"adapter {self.name!r}: {', '.join(parts)}, {counted(self.parameters, 'parameter')}"


@dataclass(frozen=True)
class LoadReport(Printed):
    """How the tensors of a file fit an adapter. Keys of the base model are not counted.

    Attributes:
        missing: tensors that the adapter needs and the file lacks.
        unexpected: tensors of the file that belong to nothing.
        mismatched: tensors with another shape than in the adapter.
        exempt: tensors that the file lacks and may lack, by the method's rule.
        ignored: tensors that were skipped: those of the base model, and of other models in a pipeline.
        adapter: what `Adapters.load` added.
    """

    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[Mismatch, ...] = ()
    exempt: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    adapter: AdapterStatus | None = field(default=None, compare=False)

    @property
    def ok(self) -> bool:
        """Whether nothing is missing, unexpected or mismatched."""
        return not (self.missing or self.unexpected or self.mismatched)

    def __str__(self) -> str:
        lines = ["every tensor of the adapter fits" if self.ok else "the tensors do not fit this adapter"]
        if self.adapter is not None:
            acts = "acts" if self.adapter.active else "does not act yet"
            train = f"does not train: adapters.activate({self.adapter.name!r}) lets it act and train"
            lines = [str(self.adapter), f"  it {acts}, and {'trains' if self.adapter.trainable else train}", *lines]
        for title, rows in vars(self).items():
            if rows and title != "adapter":
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
        lines = [f"adapter {self.name!r}: new values in {counted(len(self.targets), 'layer')}"]
        lines += listed("changes nothing now", self.cleared) + listed("head", self.heads)
        return in_lines(lines + listed("ignored", self.ignored))


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
        unchanged: layers at which `extract` found no difference; the adapter does not have them.
    """

    name: str
    method: str
    ranks: Mapping[str, int]
    errors: Mapping[str, float]
    heads: tuple[str, ...] = ()
    clipped: tuple[str, ...] = ()
    unchanged: tuple[str, ...] = ()

    def __str__(self) -> str:
        layers = counted(len(self.ranks), "layer")
        lines = [f"adapter {self.name!r} ({self.method}): {layers} of rank {span(self.ranks.values())}"]
        worst = max(self.errors, key=self.errors.__getitem__)
        if self.errors[worst] >= _ROUNDING:
            lines.append(f"  largest relative error of truncation: {self.errors[worst]:.2%} at {worst}")
        if self.unchanged:
            lines.append(f"  left out, because the models are the same there: {counted(len(self.unchanged), 'layer')}")
        lines += [f"  clipped to rank {self.ranks[path]}: {path}" for path in self.clipped[:_LISTED]]
        return in_lines(lines + listed("head", self.heads))


_TITLES = ("adapter", "method", "layers", "heads", "parameters", "dtype", "device", "active", "trainable", "merged")


@dataclass(frozen=True)
class Status(Printed):
    """The adapters of a model, one row for each. Prints as a table.

    Attributes:
        trainable_parameters: how many parameters of the whole model require gradients.
        base_parameters: how many parameters the base model has.
    """

    rows: tuple[AdapterStatus, ...]
    trainable_parameters: int = 0
    base_parameters: int = 0

    @property
    def memory(self) -> int:
        """The bytes of all adapters' parameters."""
        return sum(row.memory for row in self.rows)

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
        lines = columns(table)
        if self.base_parameters:
            lines.append(
                f"trainable: {counted(self.trainable_parameters, 'parameter')}, "
                f"{self.trainable_parameters / self.base_parameters:.2%} of the base model's {self.base_parameters:,}; "
                f"the adapters take {_size(self.memory)}"
            )
        if self.base_parameters and not self.trainable_parameters:
            any_merged = any(row.merged for row in self.rows)
            how = "merged adapters train only after unmerge()" if any_merged else "activate(name) lets an adapter train"
            lines.append(f"nothing trains: {how}")
        lines += [f"{row.name}: {note}" for row in self.rows for note in row.notes]
        return in_lines(lines)


def in_html(text: str) -> str:
    """Text for a notebook. It has no colors of its own, so that dark notebooks show it as well."""
    style = "border-left: 3px solid #8888; padding-left: 0.8em; max-height: 40em; overflow: auto"
    return f'<div style="{style}"><pre>{escape(text)}</pre></div>'


def listed(what: str, entries: Sequence[str]) -> list[str]:
    """A line for each of the first entries, and one that counts the others."""
    lines = [f"  {what}: {entry}" for entry in entries[:_LISTED]]
    return lines + [f"  {what}: {len(entries) - _LISTED:,} more"] * (len(entries) > _LISTED)


def merged_paths(texts: Sequence[str]) -> str:
    """One text for texts that differ only in numbers, with the numbers in braces: `layers.{0-3,5}.query`."""
    merged = ""
    for parts in zip(*map(NUMBER.split, texts), strict=True):
        if len(set(parts)) == 1:
            merged += parts[0]
            continue
        runs: list[list[int]] = []
        for number in sorted({*map(int, parts)}):
            if runs and number == runs[-1][-1] + 1:
                runs[-1].append(number)
            else:
                runs.append([number])
        merged += "{" + ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs) + "}"
    return merged


def in_groups(items: Iterable[T], key: Callable[[T], Hashable]) -> list[list[T]]:
    """The items with equal keys together, in the order of the first of each group."""
    found: dict[Hashable, list[T]] = {}
    for item in items:
        found.setdefault(key(item), []).append(item)
    return list(found.values())


def grouped(rows: Iterable[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Rows whose first and last texts differ only in numbers as one row each, in the order of the first ones."""
    groups = in_groups(rows, lambda row: (NUMBER.sub("", row[0]), *row[1:-1], NUMBER.sub("", row[-1])))
    return [tuple(merged_paths(texts) for texts in zip(*group, strict=True)) for group in groups]


def counted(number: int, what: str) -> str:
    """`1 layer`, `1,058 layers`."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _size(bytes_: int) -> str:
    return f"{bytes_ / 2**20:,.2f} MiB" if bytes_ >= 2**20 else f"{bytes_ / 2**10:,.1f} KiB"


def span(numbers: Iterable[float], form: str = "") -> str:
    """`8`, or `4 to 16`; each as this format specification has it."""
    given = [*numbers]
    return " to ".join(dict.fromkeys(f"{number:{form}}" for number in (min(given), max(given))))


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
