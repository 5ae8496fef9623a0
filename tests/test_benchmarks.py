"""The benchmarks' own machinery: what it refuses, what it computes, and that every benchmark runs."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path

import pytest
import torch
from benchmarks import NAMES, page, plot, results, table
from benchmarks.__main__ import load, question
from benchmarks.check import Unequal, same, unchecked, within
from benchmarks.memory import peak, peak_rss, saved
from benchmarks.runner import SAID_MEBIBYTES, Case, Goal, Row, Sample, Way, repeated, run

KEYS = {"benchmark", "question", "date", "threads", "machine", "rows"}
ROW_KEYS = {"operation", "unit", "ways", "goals", "curve", "why", "plotted", "note", "checked"}


def said(**ways: float) -> Row:
    return run(Case("said", {n: repeated(lambda v=v: v) for n, v in ways.items()}, check=unchecked("numbers"),
                    measure=SAID_MEBIBYTES), rounds=1)  # fmt: skip


def test_a_way_that_does_something_else_is_refused_before_anything_is_measured() -> None:
    calls: list[str] = []

    def way(name: str, value: float) -> Way:
        return repeated(lambda: calls.append(name), lambda _: torch.tensor([1.0, value]))

    with pytest.raises(Unequal, match=r"'hand' and 'adapterkit' differ by up to 0\.5"):
        run(Case("different", {"hand": way("hand", 1.0), "adapterkit": way("adapterkit", 1.5)}))
    assert calls == ["hand", "adapterkit"]  # once each, for the check


@pytest.mark.parametrize(
    ("one", "other", "text"),
    [
        ([1, 2], [1], "2 and 1 values"),
        ({"a": 1}, {"b": 1}, r"differ in \['a', 'b'\]"),
        ({"a": True}, {"a": False}, "at 'a': True and False"),
        (torch.zeros(2), torch.zeros(3), r"shapes \(2,\) and \(3,\)"),
        (torch.zeros(2), 0, "tensor"),
        (None, None, "say nothing of what they did"),
    ],
)
def test_results_are_compared_in_every_part(one: object, other: object, text: str) -> None:
    with pytest.raises(Unequal, match=text):
        same({"hand": one, "adapterkit": other})
    within(1e-2, 0.0)({"hand": torch.ones(2), "adapterkit": torch.full((2,), 1.001)})


def test_every_way_is_measured_as_often_and_in_turns() -> None:
    order: list[str] = []
    ways = {name: repeated(lambda name=name: order.append(name)) for name in ("hand", "peft")}
    row = run(Case("turns", ways, check=unchecked("order only"), seconds=math.inf), rounds=4)
    assert order == [*("hand", "peft"), *("hand", "peft", "peft", "hand") * 2]
    assert {sample.count for sample in row.ways.values()} == {4}


@pytest.mark.parametrize(
    ("goal", "reached"),
    [
        (Goal(1.5), True),
        (Goal(1.4), False),
        (Goal(1.0, "peft"), True),
        (Goal(limit=2.9), False),
        (Goal(1.0, "x"), None),
    ],
)
def test_goals_are_judged_by_the_medians(goal: Goal, reached: bool | None) -> None:
    row = said(**{"hand": 4.0, "hand: other": 2.0, "adapterkit": 3.0, "peft": 6.0})
    assert row.reached(goal) is reached
    assert (row.ratio("adapterkit", "hand"), row.ratio("adapterkit", "lycoris")) == (1.5, None)  # the best by hand


def test_slope_is_the_exponent_of_the_growth() -> None:
    rows = [
        Row("grow", "ms", {"flat": Sample.of([3.0]), "square": Sample.of([0.5 * n**2])}, curve=("layers", n))
        for n in (2, 8, 32)
    ]
    ((key, group),) = table.curves(rows).items()
    assert key == ("grow", "layers")
    assert table.slopes(group) == pytest.approx({"flat": 0.0, "square": 2.0})


def test_results_come_back_from_json_as_they_were(tmp_path: Path) -> None:
    row = Row("x", "ms", {"hand": Sample(1.0, 0.5, 2.0, 3)}, (Goal(1.5),), ("rank", 4), "why", True, "note")
    before = results.Results.today("load", "How?", 1, {"cpu": "one"}, [row])
    assert results.Results.read(before.write(tmp_path)) == before


def test_saved_bytes_are_those_of_what_autograd_keeps() -> None:
    x, weight = torch.randn(8, 16), torch.nn.Parameter(torch.randn(32, 16))
    kept = saved(lambda: torch.nn.functional.linear(x, weight).sigmoid().sum(), own=(x,))
    assert kept * 2**20 == 8 * 32 * 4  # the sigmoid's output; its own input and the weight are there anyway


def test_peak_is_the_highest_total_and_not_the_sum() -> None:
    x = torch.zeros(2**18)
    assert peak(lambda: [(x + i).sum() for i in range(4)]) == pytest.approx(1.0, abs=0.01)


def test_peak_rss_is_the_child_s_own() -> None:
    here = bytearray(300 << 20)
    assert 100 < peak_rss("x = bytearray(100 << 20)") < 200
    del here


@pytest.mark.parametrize("name", NAMES)
def test_benchmark_runs_at_its_smallest_size(name: str) -> None:
    module = load(name)
    assert question(module).endswith("?")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the peers'
        rows = [run(case, rounds=1) for case in module.cases(tiny=True)]
    assert rows
    assert all("adapterkit" in row.ways and len(row.ways) > 1 for row in rows)
    assert all(not isinstance(row.curve, tuple) or row.why for row in rows)


# What is committed


@pytest.mark.parametrize("path", sorted(results.FOLDER.glob("*.json")), ids=lambda path: path.stem)
def test_committed_results_have_the_schema_and_say_nothing_of_whose_machine_it_was(path: Path) -> None:
    found = json.loads(path.read_text(encoding="utf-8"))
    assert found.keys() == KEYS
    assert all(row.keys() == ROW_KEYS for row in found["rows"])
    assert {"cpu", "cores", "memory", "system", "python", "torch", "peft"} <= found["machine"].keys()
    assert "/" not in "".join(found["machine"].values())
    assert found["benchmark"] == path.stem


def test_the_page_is_what_the_committed_results_give() -> None:
    text, found = page.PAGE.read_text(encoding="utf-8"), results.read_all()
    assert tuple(found) == NAMES
    assert page.filled(text, found) == text
    with pytest.raises(ValueError, match="differ in: imports"):
        page.filled("# Nothing\n", {"imports": found["imports"]})


def test_the_picture_has_every_plotted_row(tmp_path: Path) -> None:
    rows = plot.plotted()
    plot.draw(rows, tmp_path / "picture.svg")
    drawn = (tmp_path / "picture.svg").read_text(encoding="utf-8")
    committed = plot.PICTURE.read_text(encoding="utf-8")
    assert rows
    assert all(f">{row.operation}<" in drawn and f">{row.operation}<" in committed for row in rows)
