"""How PEFT's tests ended, one line of JSON each."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Outcome:
    """How one test ended.

    Attributes:
        made: the types of the adapters that it made, each with why no method here makes it, or `None`.
        error: the error in one line.
    """

    test: str
    outcome: str
    made: Mapping[str, str | None]
    error: str

    @property
    def lacking(self) -> str | None:
        """Why a test of the control cannot pass here, if so."""
        return next((why for why in self.made.values() if why is not None), None)

    @property
    def counts(self) -> bool:
        """Whether a test of the control should pass on views."""
        return self.outcome == "passed" and bool(self.made) and self.lacking is None

    def write(self, file: Path) -> None:
        """Append it to a file."""
        with file.open("a") as lines:
            lines.write(json.dumps(asdict(self)) + "\n")


def read(files: Iterable[Path]) -> dict[str, Outcome]:
    """The outcomes in these files by test; the last line of a test counts."""
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    return {line["test"]: Outcome(**line) for line in lines}
