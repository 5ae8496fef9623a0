"""What the fuzz has found, as it was found, and a little of the fuzz itself: `make fuzz` does more of it."""

from __future__ import annotations

import ast
import base64
import contextlib
import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.fuzz import before_after, commands, configs, folders, kills, machine, oracle
from tests.fuzz.oracle import Finding

import adapterkit as ak
from adapterkit import adapters

CORPUS = sorted((Path(__file__).parent / "corpus").glob("*.json"))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("world")
    commands.world(place)
    return place


def replay(entry: dict[str, Any], place: Path, world: Path) -> None:
    match entry["part"]:
        case "folders":
            target = folders.Target(place)
            files = {name: base64.b64decode(data) for name, data in entry["files"].items()}
            target.check(files)
            target.check_more(files)
        case "configs":
            configs.Target().check(entry["method"], ast.literal_eval(entry["fields"]))
        case "commands":
            commands.check(entry["words"], world)
        case part:
            raise AssertionError(part)


@pytest.mark.parametrize("file", CORPUS, ids=lambda file: file.stem)
def test_what_was_found_is_found_no_more(file: Path, tmp_path: Path, world: Path) -> None:
    replay(json.loads(file.read_text(encoding="utf-8")), tmp_path, world)


def test_folders_are_loaded_or_refused(tmp_path: Path) -> None:
    known, target = folders.seeds(tmp_path), folders.Target(tmp_path)
    accepted = 0
    for number in range(200):
        files = folders.draw(random.Random(number), known).files()
        accepted += target.check(files)
        if number % 10 == 0:
            target.check_more(files)
    assert 10 < accepted < 190


def test_configs_are_accepted_or_refused() -> None:
    target = configs.Target()
    accepted = sum(target.check(*configs.draw(random.Random(number))) for number in range(600))
    assert 10 < accepted < 590


def test_command_lines_end_as_they_should(world: Path) -> None:
    for number in range(60):
        commands.check(commands.draw(random.Random(number)), world)


@settings(max_examples=12, suppress_health_check=[HealthCheck.data_too_large, HealthCheck.large_base_example])
@given(dice=st.randoms(use_true_random=False))
def test_calls_in_any_order_with_faults_are_done_or_not(dice: random.Random) -> None:
    with machine.World(dice) as drawn:
        for _ in range(6):
            drawn.step()


@pytest.mark.parametrize("seed", range(8))
def test_calls_of_a_longer_life_with_faults_are_done_or_not(seed: int) -> None:
    with machine.World(random.Random(seed)) as drawn:
        for _ in range(15):
            drawn.step()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux exchanges folders in one step")
def test_a_killed_process_leaves_a_whole_version(tmp_path: Path) -> None:
    with kills.Writer(tmp_path) as writer:
        for work in kills.WORKS:
            found = {writer.kill_and_look(work, random.Random(number)) for number in range(8)}
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
