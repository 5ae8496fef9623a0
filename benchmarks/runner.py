"""Timing several ways to do one thing, in turns, in one process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

Setup = Callable[[], Callable[[], object]]


@dataclass(frozen=True)
class Row:
    """One operation: the median time of each way to do it, in milliseconds."""

    operation: str
    milliseconds: Mapping[str, float]

    def __str__(self) -> str:
        hand = self.milliseconds.get("hand")
        cells = [f"{self.operation:<44}"]
        for way, value in self.milliseconds.items():
            ratio = "" if hand is None or way == "hand" else f" ({value / hand:.2f} x)"
            cells.append(f"{way} {value:.3f}{ratio}".ljust(28))
        return "  ".join(cells)


def compare(operation: str, ways: Mapping[str, Setup], *, rounds: int = 7, calls: int = 1) -> Row:
    """Time each way in turn, `rounds` times, and keep the medians.

    Args:
        ways: for each name a function that prepares (untimed, once a round) and returns what is timed.
        calls: how often that is called in one measurement.
    """
    times: dict[str, list[float]] = {name: [] for name in ways}
    for round_number in range(rounds + 1):
        for name, setup in ways.items():
            run = setup()
            start = time.perf_counter()
            for _ in range(calls):
                run()
            if round_number:  # the first round warms up
                times[name].append((time.perf_counter() - start) / calls * 1e3)
    return Row(operation, {name: statistics.median(values) for name, values in times.items()})
