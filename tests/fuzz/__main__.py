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
from pathlib import Path

import torch
from tests.fuzz.oracle import Finding
from tests.fuzz.parts import PARTS, Input

CORPUS = Path(__file__).parent / "corpus"
# Of the time that there is: how much each part gets.
SHARES = {"folders": 0.4, "configs": 0.1, "commands": 0.15, "machine": 0.25, "kills": 0.1}


def fuzz(name: str, seed: int, first: int, inputs: int, seconds: float) -> int:
    """Draw and check inputs of one part until the time is over; how many sorts of findings there are."""
    found: dict[str, int] = {}
    number, accepted, start, part = first, 0, time.monotonic(), None
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as place:
        while number - first < inputs and time.monotonic() - start < seconds:
            if part is None:
                part = PARTS[name](Path(tempfile.mkdtemp(dir=place)))
            given = part.draw(random.Random(f"{name} {seed} {number}"))
            try:
                accepted += part.check(given)
            except Finding as finding:
                what = str(finding)
                sort = what.rpartition("(at ")[2] if "(at " in what else what[:60]
                found[sort] = found.get(sort, 0) + 1
                if found[sort] == 1:
                    print(f"{name} --seed {seed} --first {number}: {what}", flush=True)
                    keep(name, what.partition(" (at ")[0], given)
                part = None
            number += 1
        del part
    sorts = f"{len(found)} sort(s) of findings, {sum(found.values())} in all"
    took = time.monotonic() - start
    print(
        f"{name}: {number - first:,} inputs in {took:.0f} s, {accepted:,} accepted; {sorts} (seed {seed})", flush=True
    )
    return len(found)


def keep(name: str, what: str, given: Input) -> None:
    """Keep an input that found something in the corpus."""
    if name == "configs":
        given = {**given, "fields": repr(given["fields"])}
    text = json.dumps({"part": name, "what": what, **given}, indent=1)
    CORPUS.mkdir(exist_ok=True)
    file = CORPUS / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}.json"
    file.write_text(text + "\n", encoding="utf-8")


def main() -> None:
    """Run the parts one after another; the exit status says whether anything was found."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all if none is given")
    parser.add_argument("--budget", type=float, default=600.0, metavar="SECONDS", help="for all parts together")
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(3), "big"), help="by chance if not given")
    parser.add_argument("--first", type=int, default=0, metavar="N", help="begin with this input")
    parser.add_argument("--inputs", type=int, default=1_000_000, metavar="N", help="at most so many of each part")
    given = parser.parse_args()
    unknown = sorted(set(given.parts) - set(PARTS))
    if unknown:
        sys.exit(f"Unknown part {', '.join(unknown)}. Available: {', '.join(PARTS)}.")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    os.environ["HF_HUB_OFFLINE"] = "1"
    parts = given.parts or list(PARTS)
    total = sum(SHARES[part] for part in parts)
    found = [fuzz(p, given.seed, given.first, given.inputs, given.budget * SHARES[p] / total) for p in parts]
    sys.exit(1 if any(found) else 0)


if __name__ == "__main__":
    main()
