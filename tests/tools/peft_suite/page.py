"""What the two runs say: which tests count, which pass on views, and the reasons of those that do not."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Self

from tests.tools.peft_suite.outcomes import Outcome
from tests.tools.peft_suite.reasons import REASONS

PAGE = Path(__file__).parents[3] / "docs" / "peft-tests.md"


@dataclass
class File:
    """The numbers of one of PEFT's files.

    Attributes:
        counted: tests that pass in the control, make adapters of installed methods, and need nothing that these lack.
        ran: those of them that ran on views.
        passed: those that pass there.
    """

    counted: int = 0
    ran: int = 0
    passed: int = 0

    def __str__(self) -> str:
        return f"{self.passed:,} of {self.ran:,} ({self.passed / max(self.ran, 1):.1%}); {self.counted:,} count"


@dataclass
class Result:
    """The comparison of both runs.

    Attributes:
        explained: failures by their reason.
        unexplained: failures without a reason.
        left_out: how many tests that pass in the control need something that is not there, by what that is.
    """

    files: dict[str, File] = field(default_factory=dict)
    explained: dict[str, list[Outcome]] = field(default_factory=dict)
    unexplained: list[Outcome] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)

    @classmethod
    def of(cls, control: Mapping[str, Outcome], views: Mapping[str, Outcome]) -> Self:
        """Compare the outcomes of the control with those on views."""
        result = cls()
        for name, expected in control.items():
            if expected.outcome == "passed" and expected.lacking is not None:
                result.left_out[_short(expected.lacking)] += 1
            if expected.counts:
                result.add(name, views.get(name))
        return result

    def add(self, name: str, found: Outcome | None) -> None:
        """Count a test; `None`: it did not run on views."""
        file = self.files.setdefault(name.partition("::")[0].rpartition("/")[2], File())
        file.counted += 1
        if found is None:
            return
        file.ran += 1
        if found.outcome == "passed":
            file.passed += 1
            return
        reason = next((why for why, pattern in REASONS.items() if re.search(pattern, _line(found))), None)
        if reason is None:
            self.unexplained.append(found)
        else:
            self.explained.setdefault(reason, []).append(found)

    def text(self) -> str:
        """The numbers, the reasons and what has none."""
        lines = [f"{name}: {file}" for name, file in self.files.items()]
        lines += [f"{len(failures):5}  {reason}" for reason, failures in self.by_size()]
        lines += [f"   ??  {_line(failure)}" for failure in self.unexplained]
        return "\n".join([*lines, f"{self.share} of all"])

    @property
    def share(self) -> str:
        """The estimated share of all tests that count which pass: each file counts by the tests that it has."""
        ran = [file for file in self.files.values() if file.ran]
        passing = sum(file.counted * file.passed / file.ran for file in ran)
        return f"{passing / max(sum(file.counted for file in ran), 1):.1%}"

    def by_size(self) -> list[tuple[str, list[Outcome]]]:
        """The reasons, the most frequent first."""
        return sorted(self.explained.items(), key=lambda item: -len(item[1]))


def _line(failure: Outcome) -> str:
    return f"{failure.test} {failure.error}"


def _short(lacking: str) -> str:
    """What a test lacks, without values."""
    option = re.search(r"adapter_config.json: (\w+) = |init_lora_weights = '(\w+?)[_\d]*'", lacking)
    if option:
        return f"`{option[1] or 'init_lora_weights'}`" + (f" = {option[2]!r}" if option[2] else "")
    kind = re.search(r"is an adapter of type (?:<PeftType.)?'?(\w+)", lacking)
    return f"adapters of type {kind[1]}" if kind else lacking


def write(result: Result) -> None:
    """Write the page."""
    text = PAGE.read_text(encoding="utf-8")
    start, end = text.index("<!-- results -->"), text.index("<!-- end -->")
    files = [
        (name, f"{file.counted:,}", f"{file.ran:,}", f"{file.passed:,}", f"{file.passed / max(file.ran, 1):.1%}")
        for name, file in result.files.items()
        if file.ran
    ]
    failing = [(why, len(failures), f"`{_name(failures[0])}`") for why, failures in result.by_size()]
    tables = (
        _table(("file", "count", "ran on views", "pass", "share"), files),
        _table(("why a test fails", "tests", "one of them"), failing),
        _table(("left out: the test needs", "tests"), result.left_out.most_common()),
    )
    share = f"Of all tests that count, {result.share} pass, each file's share taken for all of its tests."
    made = f"<!-- results -->\n\nPEFT {version('peft')}. {share}\n\n" + "\n".join(tables) + "\n"
    PAGE.write_text(text[:start] + made + text[end:], encoding="utf-8")


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def _name(failure: Outcome) -> str:
    return failure.test.rpartition("::")[2].partition("[")[0]
