"""Expressions of a downloaded config cost little memory and time, however they are written."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from tests.processes import python

import adapterkit as ak
from adapterkit.contract import Pattern, PatternTable, patterns

LARGE = {
    "nested repeats": "(?:a{20000}){20000}",
    "three levels": "(((a{100}){100}){100})",
    "one repeat": "a{99999}",
    "at most": "(?:ab){1,99999999999}",
    "a repeated class": r"[(){}\]]{99999}",
    "depth": "(" * 5000 + ")" * 5000,
    "length": "x" * 100_000,
    "an open bracket": "[" * 100_000,
}


@pytest.mark.skipif(sys.platform != "linux", reason="limits of a process")
def test_large_expressions_are_refused_before_they_are_compiled(tmp_path: Path) -> None:
    code = (
        "import resource, sys, adapterkit as ak\n"
        "from adapterkit.contract import Pattern\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 28),) * 2)\n"
        "resource.setrlimit(resource.RLIMIT_CPU, (60, 60))\n"
        f"for expression in {list(LARGE.values())!r}:\n"
        "    try: Pattern(expression, 'target_modules')\n"
        "    except ak.ConfigError as error: print(len(str(error)))\n"
    )
    (tmp_path / "code.py").write_text(code, encoding="utf-8")
    lengths = [int(line) for line in python(tmp_path / "code.py").split()]
    assert len(lengths) == len(LARGE)
    assert max(lengths) < 1000


@pytest.mark.parametrize(
    ("expression", "path"),
    [
        (r".*\.layers\.\d{1,2}\.(q|v)_proj", "model.layers.12.q_proj"),
        (r"(?:\w{1,40}\.){2,12}[qkv]", "a.b.c.q"),
        (r"x[{}(]\(\{3}", "x(({3}"),
        ("|".join(f"layers.{i}.q" for i in range(2000)), "layers.1999.q"),
    ],
)
def test_ordinary_expressions_are_not_too_large(expression: str, path: str) -> None:
    assert Pattern(expression, "target_modules").matches(path)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock by which everything that is timed takes 10 ms."""
    ticks = itertools.count()
    monkeypatch.setattr(patterns, "time", SimpleNamespace(perf_counter=lambda: next(ticks) * 0.01))


@pytest.mark.usefixtures("slow")
def test_all_patterns_of_a_table_share_one_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand patterns that each take a little less than the limit, at each of 200 layers, would take days."""
    monkeypatch.setattr(patterns, "TIME_LIMIT_SECONDS", 0.02)
    table = PatternTable({rf"(a)+{number}b": 1 for number in range(5)}, "rank_pattern")

    def ask_all() -> None:
        for layer in range(200):
            table.get(f"layers.{layer}.a", None)

    with pytest.raises(ak.ConfigError, match=r"took over 0\.2 s"):
        ask_all()


@pytest.mark.usefixtures("slow")
def test_compiling_thousands_of_expressions_is_on_the_same_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "TIME_LIMIT_SECONDS", 0.005)
    with pytest.raises(ak.ConfigError, match=r"took over 0\.05 s"):
        PatternTable({f"x{number}(a|b){{1,30}}": 1 for number in range(50)}, "rank_pattern")
