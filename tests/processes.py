"""Other programs that tests start, with the environment of this process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


def environment(*path: Path, **variables: str) -> dict[str, str]:
    """The environment of this process with these variables; Python searches the folders `path` first."""
    places = [*map(str, path), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, **({"PYTHONPATH": os.pathsep.join(places)} if places else {}), **variables}


def output(*command: object, path: Sequence[Path] = (), cwd: Path | None = None, **variables: str) -> str:
    """What a program prints. It must succeed."""
    done = subprocess.run(
        [*map(str, command)], capture_output=True, text=True, check=False, cwd=cwd, env=environment(*path, **variables)
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
    return done.stdout


def python(*arguments: object, **options: object) -> str:
    """What Python prints with these arguments; see `output`."""
    return output(sys.executable, *arguments, **options)  # type: ignore[arg-type]
