"""The examples are run as a user would run them, on less data."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_quickstart_learns_and_gives_the_saved_outputs_again() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "quickstart.py"), "--rows", "192", "--test-rows", "128"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},  # two threads thrash beside other tests
    )
    assert done.returncode == 0, done.stderr
    differences = re.findall(r"by at most (\S+)", done.stdout)
    assert len(differences) == 2
    assert all(float(d) < 1e-5 for d in differences)
    shares = re.findall(r"accuracy there ([\d.]+)% before training, ([\d.]+)% after", done.stdout)
    assert all(float(after) > float(before) + 20 for before, after in shares)


def test_quickstart_can_be_read_in_one_go() -> None:
    text = (ROOT / "examples" / "quickstart.py").read_text(encoding="utf-8")
    assert text.count("\n") <= 80


def test_multitask_prints_every_choice_and_probes() -> None:
    few = ["--rows", "48", "--test-rows", "24", "--layers", r".*\.5\..*\.(query|value)"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "multitask.py"), *few],
        capture_output=True,
        text=True,
        check=False,
        # One thread: beside another test's process, two of them wait for each other more than they work.
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "labels of the model now: negative, positive, tweet, amazon, movie, nyt" in done.stdout
    rows = re.findall(r"^(\w+), (delta|core)(, iso)? +([\d.]+)% .*?([\d.]+)% \(", done.stdout, re.MULTILINE)
    assert len(rows) == 16
    figures = {(method, space, iso): (a, b) for method, space, iso, a, b in rows}
    for method in ("linear", "tsv"):  # these are the same in both spaces
        assert figures[method, "delta", ""] == figures[method, "core", ""]
    probes = re.findall(
        r"^(the bare base|tweet-polarity|source-domain|both|tsv) +([\d.]+)% ", done.stdout, re.MULTILINE
    )
    assert len(probes) == 5
    assert all(float(share) > 40 for _, share in probes)


def test_disturbance_prints_what_every_sum_keeps() -> None:
    few = ["--rows", "16", "--test-rows", "8", "--weights", "1"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "disturbance.py"), *few],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"^(\S+) +(\S+) +1 +([\d.]+)% +([\d.]+)%$", done.stdout, re.MULTILINE)
    assert len(rows) == 3 * 3
    share = {(one, other): float(disturbance) for one, other, disturbance, _ in rows}
    for one in ("polarity", "domain"):
        assert share[one, "random"] < share[one, "polarity-16"]
    assert len(re.findall(r"cut to 99 % +[\d.]+%", done.stdout)) == 3
