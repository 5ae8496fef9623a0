"""Measure several ways to do one thing, in one process: check that their results are equal, then time them in turns."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks.check import same

Run = Callable[[], Any]
OURS, FLOOR = "adapterkit", "hand"


@dataclass(frozen=True)
class Way:
    """One way to do the work.

    Attributes:
        prepare: called anew before each measurement and not measured; returns what is.
        result: takes what that returned, and says as tensors and numbers what was done, for the check.
    """

    prepare: Callable[[], Run]
    result: Callable[[Any], Any] = lambda returned: returned


def repeated(run: Run, result: Callable[[Any], Any] = lambda returned: returned) -> Way:
    """A way that needs no preparation."""
    return Way(lambda: run, result)


@dataclass(frozen=True)
class Measure:
    """What is measured in a run: `of(run, calls)` gives a number in `unit`."""

    unit: str
    of: Callable[[Run, int], float]


def _milliseconds(run: Run, calls: int, clock: Callable[[], float] | None = None) -> float:
    if clock is None:  # what other processes do to the machine does not count; threads must not count twice
        clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    for _ in range(calls):
        run()
    return (clock() - start) / calls * 1e3


# The processor's time: on a machine of one's own it is the clock's. And the clock's, for what waits for a disk.
TIME = Measure("ms", _milliseconds)
WALL = Measure("ms", partial(_milliseconds, clock=time.perf_counter))
# For ways that return their own measurement.
SAID_MILLISECONDS = Measure("ms", lambda run, calls: run())
SAID_MEBIBYTES = Measure("MiB", lambda run, calls: run())


@dataclass(frozen=True)
class Goal:
    """At most `times` what `beside` takes, or at most `limit` in the unit of the row.

    `beside="hand"` is the best of the ways whose names begin so.
    """

    times: float | None = None
    beside: str = FLOOR
    limit: float | None = None

    def __str__(self) -> str:
        return f"{self.times:g} × {self.beside}" if self.limit is None else f"at most {self.limit:g}"


@dataclass(frozen=True)
class Case:
    """One row: an operation, and the ways to do it.

    Attributes:
        ways: by name; `"hand"` (or several that begin so) is the least raw torch that does the same work.
        goals: what adapterkit is to reach.
        check: is given every way's result, by name, and raises if they differ; `unchecked(reason)`: nothing to compare.
        rounds: at most so many measurements of each way, and at least three if there is no more time.
        calls: how many runs make one measurement.
        warm_up: whether a first round is thrown away (the check has run everything once).
        seconds: about how long the row may take.
        curve: for rows of a growth curve, what grows and how large it is here.
        why: for growth curves, why it can grow no slower.
        plotted: whether the row stands in the picture.
        note: for the reader, under the table.
    """

    operation: str
    ways: Mapping[str, Way]
    goals: tuple[Goal, ...] = ()
    check: Callable[[Mapping[str, Any]], None] = same
    measure: Measure = TIME
    rounds: int = 9
    calls: int = 1
    warm_up: bool = True
    seconds: float = 8.0
    curve: tuple[str, int] | None = None
    why: str = ""
    plotted: bool = False
    note: str = ""


@dataclass(frozen=True)
class Sample:
    """One way's measurements: the median and the quartiles of `count` of them."""

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: list[float]) -> Sample:
        """Of one measurement or more."""
        low, _, high = statistics.quantiles(values, method="inclusive") if len(values) > 1 else values * 3
        return cls(statistics.median(values), low, high, len(values))


@dataclass(frozen=True)
class Row:
    """What was measured of one case."""

    operation: str
    unit: str
    ways: Mapping[str, Sample]
    goals: tuple[Goal, ...] = ()
    curve: tuple[str, int] | None = None
    why: str = ""
    plotted: bool = False
    note: str = ""
    checked: bool = True

    def median(self, way: str) -> float | None:
        """The median of a way; of `"hand"`, the best of those whose names begin so."""
        if way == FLOOR:
            return min((s.median for name, s in self.ways.items() if name.startswith(FLOOR)), default=None)
        return self.ways[way].median if way in self.ways else None

    def ratio(self, way: str, beside: str) -> float | None:
        """The cost of `way` as a multiple of the cost of `beside`."""
        one, other = self.median(way), self.median(beside)
        return None if one is None or not other else one / other

    def reached(self, goal: Goal) -> bool | None:
        """Whether adapterkit reaches a goal; `None` if that was not measured."""
        if goal.limit is not None:
            own = self.median(OURS)
            return None if own is None else own <= goal.limit
        ratio = self.ratio(OURS, goal.beside)
        return None if ratio is None else ratio <= (goal.times or 0)


def run(case: Case, *, rounds: int | None = None) -> Row:
    """Check that all ways do the same, then measure each in turn.

    Args:
        rounds: instead of the case's own, and without a warm-up.

    Raises:
        Unequal: some way does something else; nothing was measured.
    """
    case.check({name: way.result(way.prepare()()) for name, way in case.ways.items()})
    values: dict[str, list[float]] = {name: [] for name in case.ways}
    wanted, end = rounds or case.rounds, time.perf_counter() + case.seconds
    if case.warm_up and rounds is None:
        _round(case, list(case.ways))
    for number in range(wanted):
        if number >= 3 and time.perf_counter() > end:
            break
        order = list(case.ways)[:: -1 if number % 2 else 1]  # none always runs after the same other
        for name, value in _round(case, order).items():
            values[name].append(value)
    return Row(
        case.operation,
        case.measure.unit,
        {name: Sample.of(found) for name, found in values.items()},
        case.goals,
        case.curve,
        case.why,
        case.plotted,
        case.note,
        checked=case.check.__name__ != "nothing",
    )


def _round(case: Case, order: list[str]) -> dict[str, float]:
    found = {}
    for name in order:
        prepared = case.ways[name].prepare()
        if case.calls == 1:
            gc.collect()  # what other ways have left is not this one's to clear away
        found[name] = case.measure.of(prepared, case.calls)
    return found
