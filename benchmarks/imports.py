"""What does `import` cost?

Each import runs in a new process, which measures it. `hand` is `import torch`, which every library needs.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

from benchmarks.check import unchecked
from benchmarks.runner import SAID_MILLISECONDS, Case, Goal, Way, repeated

_CHILD = "import time; start = time.perf_counter(); import {}; print((time.perf_counter() - start) * 1e3)"


def cases(tiny: bool) -> Iterator[Case]:
    """One row."""
    modules = {"hand": "torch", "adapterkit": "adapterkit", "peft": "peft", "lycoris": "lycoris"}
    yield Case(
        "import in a new process",
        {way: _importing(module) for way, module in modules.items() if not tiny or way in ("hand", "adapterkit")},
        (Goal(1.05),),
        unchecked("an import returns nothing"),
        SAID_MILLISECONDS,
        rounds=1 if tiny else 5,
        warm_up=False,
        seconds=90.0,
        plotted=True,
    )


def _importing(module: str) -> Way:
    def run() -> float:
        command = [sys.executable, "-c", _CHILD.format(module)]
        return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    return repeated(run)
