"""`python -m benchmarks.page`: write the results into `docs/performance.md`, between the marks that are there.

`<!-- results: load -->` begins the table of the benchmark `load`, and `<!-- end -->` ends it. The text between them is
made from `benchmarks/results/load.json` alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks import table
from benchmarks.results import Results, read_all
from benchmarks.runner import Row

PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
_MARKED = re.compile(r"(<!-- results: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def filled(text: str, results: Mapping[str, Results]) -> str:
    """The page with the tables that these results give.

    Raises:
        ValueError: a mark without results, or results without a mark.
    """
    marks = [name for _, name, _ in _MARKED.findall(text)]
    if sorted(marks) != sorted(results):
        odd = ", ".join(sorted(set(marks) ^ set(results)))
        raise ValueError(f"docs/performance.md has marks for {', '.join(marks)}; marks and results differ in: {odd}.")
    return _MARKED.sub(lambda found: f"{found[1]}{section(results[found[2]])}{found[3]}", text)


def section(results: Results) -> str:
    """One benchmark: what it was measured on, its table and its curves."""
    rows = results.rows
    single = [row for row in rows if row.curve is None]
    notes = list(dict.fromkeys(row.note for row in rows if row.note))
    parts = [_where(results), _table(single), _curves(rows), *notes]
    return "".join(f"\n{part}\n" for part in parts if part) + "\n"


def _where(results: Results) -> str:
    machine = results.machine
    versions = ", ".join(f"{name} {machine[name]}" for name in ("torch", "peft", "lycoris-lora") if name in machine)
    return (
        f"{results.date}, {machine['cpu']}, {machine['cores']} cores, {machine['memory']}; {results.threads} "
        f"thread(s); {versions}."
    )


def _table(rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    lines = [[*table.header(rows), "spread"], *([*table.cells(row, rows), table.spread(row)] for row in rows)]
    return _markdown(lines)


def _curves(rows: Sequence[Row]) -> str:
    """One line an operation and axis: its cost at the smallest and the largest size, and how each way grows."""
    found = table.curves(rows)
    if not found:
        return ""
    names = table.ways(rows)
    lines = [["operation", "grows with", "adapterkit", *(f"slope of {name}" for name in names), "why"]]
    for (operation, axis), group in found.items():
        sizes = [row.curve[1] for row in group if row.curve]
        ends = [table.number(row.ways["adapterkit"].median) for row in (group[0], group[-1])]
        slopes = table.slopes(group)
        line = [operation, f"{axis}, {sizes[0]} to {sizes[-1]}", f"{ends[0]} to {ends[1]} {group[0].unit}"]
        lines.append([*line, *(f"{slopes[n]:.2f}" if n in slopes else "" for n in names), group[0].why])
    return _markdown(lines)


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    first, *rest = lines
    rule = ["---", *("--:" for _ in first[1:])]
    return "\n".join("| " + " | ".join(line) + " |" for line in (first, rule, *rest))


def main() -> None:
    """Write the page."""
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), read_all()), encoding="utf-8")


if __name__ == "__main__":
    main()
