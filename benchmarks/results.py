"""Results as JSON, one file a benchmark: `benchmarks/results/<name>.json`."""

from __future__ import annotations

import dataclasses
import datetime
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import NAMES
from benchmarks.runner import Goal, Row, Sample

FOLDER = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Results:
    """One benchmark's rows, and when and on what they were measured."""

    benchmark: str
    question: str
    date: str
    threads: int
    machine: dict[str, str]
    rows: tuple[Row, ...]

    @classmethod
    def today(cls, benchmark: str, question: str, threads: int, machine: dict[str, str], rows: list[Row]) -> Results:
        """Results measured just now."""
        date = datetime.datetime.now(datetime.UTC).date().isoformat()
        return cls(benchmark, question, date, threads, machine, tuple(rows))

    def write(self, folder: Path = FOLDER) -> Path:
        """Write `<benchmark>.json`; numbers to four digits, which is more than they are worth."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.benchmark}.json"
        path.write_text(json.dumps(_short(dataclasses.asdict(self)), indent=1, ensure_ascii=False) + "\n", "utf-8")
        return path

    @classmethod
    def read(cls, path: Path) -> Results:
        """The reverse of `write`."""
        fields = json.loads(path.read_text(encoding="utf-8"))
        return cls(**{**fields, "rows": tuple(_row(row) for row in fields["rows"])})


def read_all(folder: Path = FOLDER) -> dict[str, Results]:
    """Every benchmark's results, in the order of `NAMES`."""
    return {name: Results.read(folder / f"{name}.json") for name in NAMES if (folder / f"{name}.json").is_file()}


def _row(fields: dict[str, Any]) -> Row:
    curve = fields["curve"]
    return Row(
        **{
            **fields,
            "ways": {name: Sample(**sample) for name, sample in fields["ways"].items()},
            "goals": tuple(Goal(**goal) for goal in fields["goals"]),
            "curve": None if curve is None else (curve[0], curve[1]),
        }
    )


def _short(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: _short(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_short(item) for item in value]
    return value
