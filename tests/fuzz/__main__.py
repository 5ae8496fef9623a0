"""`python -m tests.fuzz [PART ...] --budget SECONDS`: inputs that nobody wrote, until the time is over.

Parts: `folders` (adapter folders and files), `configs` (fields given in Python), `commands` (command lines), `machine`
(calls in any order, with faults) and `kills` (processes killed while they write). The same seed gives the same inputs.
What is found is printed, and kept in `tests/fuzz/corpus`, which the suite runs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import sys
import tempfile
import time
import warnings
from base64 import b64encode
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from tests.fuzz import commands, configs, folders, kills, machine
from tests.fuzz.oracle import Finding

CORPUS = Path(__file__).parent / "corpus"
INPUTS = 1_000_000
# Of the others an input is a time, or what is drawn: the seed repeats it, as long as nothing else is drawn.
REPLAYED = ("folders", "configs", "commands")


class Run:
    """One part: its inputs are counted, its findings kept."""

    def __init__(self, part: str, seed: int, first: int, seconds: float) -> None:
        self.part, self.seed, self.number = part, seed, first
        self.first, self.start, self.end = first, time.monotonic(), time.monotonic() + seconds
        self.found: dict[str, int] = {}

    def dice(self) -> Iterator[random.Random]:
        """A source of chance for each input, until the time is over."""
        while self.number - self.first < INPUTS and time.monotonic() < self.end:
            yield random.Random(f"{self.part} {self.seed} {self.number}")
            self.number += 1

    def keep(self, finding: Finding, entry: dict[str, Any]) -> None:
        """Print and keep a finding, the first of each sort."""
        what = str(finding)
        sort = what.rpartition("(at ")[2] if "(at " in what else what[:60]
        self.found[sort] = self.found.get(sort, 0) + 1
        if self.found[sort] == 1:
            print(f"{self.part} --seed {self.seed} --first {self.number}: {what}", flush=True)
            if self.part not in REPLAYED:
                return
            text = json.dumps({"part": self.part, "what": what.partition(" (at ")[0], **entry}, indent=1)
            name = hashlib.sha256(text.encode()).hexdigest()[:12]
            CORPUS.mkdir(exist_ok=True)
            (CORPUS / f"{self.part}-{name}.json").write_text(text + "\n", encoding="utf-8")

    def summary(self, unit: str = "inputs") -> str:
        """The counts."""
        seconds = time.monotonic() - self.start
        sorts = f"{len(self.found)} sort(s) of findings, {sum(self.found.values())} in all"
        return f"{self.part}: {self.number - self.first:,} {unit} in {seconds:.0f} s; {sorts}"


def fuzz_folders(run: Run) -> str:
    """Adapter folders and files."""
    with tempfile.TemporaryDirectory(dir=_fast()) as place:
        known = folders.seeds(Path(place))
        target, accepted = folders.Target(Path(place)), 0
        for dice in run.dice():
            files = folders.draw(dice, known).files()
            try:
                accepted += target.check(files)
                if run.number % 5 == 0:
                    target.check_more(files)
            except Finding as finding:
                run.keep(finding, {"files": {name: b64encode(data).decode() for name, data in files.items()}})
                target = folders.Target(Path(place))
        return f"{run.summary()}; {accepted:,} loads accepted"


def fuzz_configs(run: Run) -> str:
    """Fields of configs."""
    target, accepted = configs.Target(), 0
    for dice in run.dice():
        method, fields = configs.draw(dice)
        try:
            accepted += target.check(method, fields)
        except Finding as finding:
            run.keep(finding, {"method": method, "fields": repr(fields)})
            target = configs.Target()
    return f"{run.summary()}; {accepted:,} accepted"


def fuzz_commands(run: Run) -> str:
    """Command lines."""
    with tempfile.TemporaryDirectory(dir=_fast()) as place:
        commands.world(Path(place))
        for dice in run.dice():
            words = commands.draw(dice)
            try:
                commands.check(words, Path(place))
            except Finding as finding:
                run.keep(finding, {"words": words})
    return run.summary("command lines")


def fuzz_machine(run: Run) -> str:
    """Calls in any order, with faults."""
    steps = faults = 0
    for dice in run.dice():
        with machine.World(dice) as world:
            try:
                for _ in range(20):
                    world.step()
            except Finding as finding:
                run.keep(finding, {"seed": f"{run.part} {run.seed} {run.number}"})
            steps, faults = steps + world.steps, faults + world.faults
    return f"{run.summary('models')}; {steps:,} calls, {faults:,} of them with a fault"


def fuzz_kills(run: Run) -> str:
    """Processes killed while they write."""
    with tempfile.TemporaryDirectory() as place, kills.Writer(Path(place)) as writer:
        for dice in run.dice():
            work = dice.choice([*kills.WORKS])
            try:
                writer.kill_and_look(work, dice)
            except Finding as finding:
                run.keep(finding, {"work": work})
    return run.summary("kills")


PARTS: dict[str, Callable[[Run], str]] = {
    "folders": fuzz_folders,
    "configs": fuzz_configs,
    "commands": fuzz_commands,
    "machine": fuzz_machine,
    "kills": fuzz_kills,
}
# Of the time that there is: how much each part gets.
SHARES = {"folders": 0.4, "configs": 0.1, "commands": 0.15, "machine": 0.25, "kills": 0.1}


def _fast() -> str | None:
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


def main() -> None:
    """Run the parts one after another; the exit status says whether anything was found."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all if none is given")
    parser.add_argument("--budget", type=float, default=600.0, metavar="SECONDS", help="for all parts together")
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(3), "big"), help="by chance if not given")
    parser.add_argument("--first", type=int, default=0, metavar="N", help="begin with this input")
    parser.add_argument("--inputs", type=int, default=None, metavar="N", help="at most so many of each part")
    given = parser.parse_args()
    unknown = sorted(set(given.parts) - set(PARTS))
    if unknown:
        sys.exit(f"Unknown part {', '.join(unknown)}. Available: {', '.join(PARTS)}.")
    if given.inputs:
        globals()["INPUTS"] = given.inputs
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    os.environ["HF_HUB_OFFLINE"] = "1"
    found, parts = 0, given.parts or list(PARTS)
    for part in parts:
        seconds = given.budget * SHARES[part] / sum(SHARES[p] for p in parts)
        run = Run(part, given.seed, given.first, seconds)
        print(PARTS[part](run), f"(seed {given.seed})", flush=True)
        found += len(run.found)
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
