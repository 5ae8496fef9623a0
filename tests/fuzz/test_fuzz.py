"""What the fuzz has found, as it was found, and a little of the fuzz itself: `make fuzz` does more of it."""

from __future__ import annotations

import contextlib
import json
import random
import sys
from pathlib import Path

import pytest
from tests.fuzz import before_after, machine, oracle
from tests.fuzz.oracle import Finding
from tests.fuzz.parts import PARTS, Kills, Machine

import adapterkit as ak
from adapterkit import adapters

CORPUS = sorted((Path(__file__).parent / "corpus").glob("*.json"))


@pytest.mark.parametrize("file", CORPUS, ids=lambda file: file.stem)
def test_what_was_found_is_found_no_more(file: Path, tmp_path: Path) -> None:
    entry = json.loads(file.read_text(encoding="utf-8"))
    PARTS[entry["part"]](tmp_path).check(entry)


@pytest.mark.parametrize(("part", "inputs"), [("folders", 120), ("configs", 400), ("commands", 40)])
def test_what_nobody_wrote_is_accepted_or_refused(part: str, inputs: int, tmp_path: Path) -> None:
    target = PARTS[part](tmp_path)
    accepted = [target.check(target.draw(random.Random(number))) for number in range(inputs)]
    assert 0.01 * inputs < sum(accepted) < 0.99 * inputs


@pytest.mark.parametrize(("seeds", "steps"), [(12, 6), (8, 15)])
def test_calls_in_any_order_with_faults_are_done_or_not(seeds: int, steps: int, tmp_path: Path) -> None:
    target = Machine(tmp_path)
    target.steps = steps
    for seed in range(seeds):
        target.check({"seed": f"{steps} {seed}"})


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux exchanges folders in one step")
def test_a_killed_process_leaves_a_whole_version(tmp_path: Path) -> None:
    part = Kills(tmp_path)
    writer = part.writer
    for work in writer.versions:
        found = {writer.kill_and_look(work, random.Random(number)) for number in range(5)}
        while len(found) == 1:  # a busy machine has not written anything yet
            found.add(writer.kill_and_look(work, random.Random(0)))


# The fuzz itself finds what is wrong


def test_another_error_is_a_finding() -> None:
    with pytest.raises(Finding, match="KeyError: 0"):
        oracle.refused(lambda: {}[0])


def test_a_hang_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def turn() -> None:
        while True:
            pass

    monkeypatch.setattr(oracle, "LONGEST", 0.05)
    with pytest.raises(Finding, match=r"it takes longer than 0\.05 s"):
        oracle.refused(turn)


def test_a_half_done_call_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the hold on Ctrl-C, some interrupted call is half done."""
    monkeypatch.setattr(adapters, "uninterrupted", contextlib.nullcontext)
    found = ""
    for seed in range(400):
        with machine.World(random.Random(seed), others=False) as drawn:
            add = ("add", lambda a: a.add("n0", ak.config("lora", target_modules=["conv"])))
            monkeypatch.setattr(drawn, "_drawn", lambda add=add: add)
            try:
                drawn.step()
            except Finding as finding:
                found = str(finding)
                break
    assert "was half done" in found or "repeated it is not the same" in found


def test_two_runs_on_the_same_damaged_adapters_are_compared(tmp_path: Path) -> None:
    before_after.make(tmp_path, 1)
    first, second = before_after.run(tmp_path), before_after.run(tmp_path)
    assert len(first) == 11
    assert before_after.compare(first, second) == "0 of 11 calls differ. {}"
    second["0000 inspect"][0] = "another text"
    assert "0000 inspect returned" in before_after.compare(first, second)
