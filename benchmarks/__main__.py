"""`python -m benchmarks [NAME ...]`: run all benchmarks, or the named ones, print the results and write JSON."""

from __future__ import annotations

import argparse
import gc
import importlib
import sys
import warnings
from types import ModuleType

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import NAMES, table
from benchmarks.machine import describe
from benchmarks.results import Results
from benchmarks.runner import Row, run


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}; all if none is given")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="rows whose operation has TEXT in it; nothing is kept"
    )
    parser.add_argument("--no-save", action="store_true", help="leave benchmarks/results as it is")
    given = parser.parse_args(arguments)
    unknown = sorted(set(given.names) - set(NAMES))
    if unknown:
        sys.exit(f"Unknown benchmark {', '.join(unknown)}. Available: {', '.join(NAMES)}.")
    torch.set_num_threads(given.threads)
    warnings.simplefilter("ignore")  # the peers', about deprecations
    modules = {name: load(name) for name in given.names or NAMES}
    gc.collect()
    gc.freeze()  # what is imported: it is there for all, and collecting garbage need not look at it each time
    machine, console = describe(), Console(width=None if sys.stdout.isatty() else 160)
    console.print(", ".join(f"{k} {v}" for k, v in machine.items()) + f", {given.threads} thread(s); medians")
    for name, module in modules.items():
        rows = [run(case) for case in module.cases(tiny=False) if given.only in case.operation]
        console.print(rendered(question(module), rows) if rows else f"{name}: no row has {given.only!r}")
        if not (given.no_save or given.only):
            Results.today(name, question(module), given.threads, machine, rows).write()


def load(name: str) -> ModuleType:
    """The module of a benchmark: its docstring asks the question, and the rows of `cases(tiny)` answer it."""
    return importlib.import_module(f"benchmarks.{name}")


def question(module: ModuleType) -> str:
    """The first line of the docstring."""
    return (module.__doc__ or "").partition("\n")[0]


def rendered(title: str, rows: list[Row]) -> Table:
    """A table for the terminal."""
    shown = Table(title=title, title_justify="left")
    for i, name in enumerate([*table.header(rows), "spread"]):
        shown.add_column(name, justify="right" if i else "left")
    for row in rows:
        size = f" [{row.curve[0]} {row.curve[1]}]" if row.curve else ""
        first, *rest = table.cells(row, rows)
        shown.add_row(first + size.replace("[", r"\["), *rest, table.spread(row))
    for (operation, axis), group in table.curves(rows).items():
        found = ", ".join(f"{way} {slope:.2f}" for way, slope in table.slopes(group).items())
        shown.caption = f"{shown.caption or ''}\n{operation}, growth with {axis}: {found}".strip()
    return shown


if __name__ == "__main__":
    main()
