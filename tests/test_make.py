"""The Makefile finds a Python that runs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BROKEN = "#!/bin/sh\necho 'the shim of a version that is not active' >&2\nexit 127\n"
OLD = "#!/bin/sh\nexit 1\n"  # what the check in the Makefile gives on a Python before 3.11
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


def make(folder: Path, pythons: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """Make the environment in `folder / "venv"`, where these programs are all the Pythons; pip installs nothing."""
    programs = folder / "bin"
    programs.mkdir()
    for name, text in pythons.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    for name in ("make", "sh", "touch", "true"):
        (programs / name).symlink_to(str(shutil.which(name)))
    stamp = folder / "venv" / ".installed"
    return subprocess.run(
        [str(programs / "make"), "-C", str(ROOT), "PIP=true", f"VENV={folder / 'venv'}", *arguments, str(stamp)],
        env={"PATH": str(programs), "HOME": os.environ.get("HOME", "")},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_python_that_does_not_run_is_passed_over(tmp_path: Path) -> None:
    works = f'#!/bin/sh\nexec {sys.executable} "$@"\n'
    done = make(tmp_path, {"python3.11": BROKEN, "python3.13": OLD, "python3": works})
    assert done.returncode == 0, done.stderr
    version = ".".join(map(str, sys.version_info[:3]))
    assert f"with python3, Python {version}" in done.stdout
    assert (tmp_path / "venv" / "bin" / "python").exists()


@pytest.mark.parametrize("arguments", [(), ("PYTHON=python3.11",)], ids=["any", "the named one"])
def test_without_a_python_the_names_that_were_tried_are_said(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    done = make(tmp_path, {"python3.11": BROKEN, "python3": OLD}, *arguments)
    assert done.returncode != 0
    assert "None of these runs and is Python 3.11 or later, with venv and pip: python3.11" in done.stderr
    assert "make PYTHON=/path/to/python3" in done.stderr
    assert not (tmp_path / "venv").exists()
