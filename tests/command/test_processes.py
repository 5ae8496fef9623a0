"""The installed command as a process: what only a process has."""

from __future__ import annotations

import os
import signal
import subprocess
import textwrap
from pathlib import Path

import pytest
from tests.command.conftest import COMMAND, execute, start
from tests.core.test_registry import METHOD
from tests.processes import environment

import adapterkit as ak


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a third party's method `foo`, and one that says that it is imported, and then takes its time."""
    folder = tmp_path_factory.mktemp("foreign")
    slow = "import sys, time\nprint('importing', flush=True)\ntime.sleep(100)\n"
    for name, code in (("foo", METHOD.format(name="foo")), ("slow", slow)):
        info = folder / name / f"{name}_dist-1.2.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}_dist\nVersion: 1.2\n")
        (info / "entry_points.txt").write_text(f"[adapterkit.methods]\n{name} = plugin_of_{name}\n")
        (folder / name / f"plugin_of_{name}.py").write_text(textwrap.dedent(code))
    return folder


def test_a_report_is_all_there_is_on_stdout_without_colours_in_a_pipe(foreign: Path) -> None:
    status, out, error = execute("methods", path=[foreign / "foo"])
    assert (status, error) == (0, "")
    assert out.startswith("method ")
    assert "foo     foo_dist 1.2      foo_" in out
    assert "\x1b" not in out


def test_what_closes_its_input_is_no_error() -> None:
    with start("methods", "--json") as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.wait(timeout=900) == 141
        assert process.stderr is not None
        assert process.stderr.read() == ""


def test_ctrl_c_ends_it_without_a_traceback(foreign: Path) -> None:
    """A plugin that is being imported speaks on stderr: stdout is for the report."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background may ignore it
    try:
        process = start("methods", path=[foreign / "slow"])
    finally:
        signal.signal(signal.SIGINT, before)
    assert process.stderr is not None
    assert process.stderr.readline() == "importing\n"
    os.kill(process.pid, signal.SIGINT)
    out, error = process.communicate(timeout=900)
    assert (process.returncode, out, error) == (130, "", "adapterkit: interrupted\n")


def test_help_and_version_are_there() -> None:
    status, out, _ = execute("--version")
    assert (status, out) == (0, f"adapterkit {ak.__version__}\n")
    status, out, error = execute("-h", PYTHONIOENCODING="ascii", COLUMNS="60")
    assert (status, error) == (0, "")
    assert "Usage: adapterkit [OPTIONS] COMMAND [ARGS]..." in out


def test_it_works_without_streams() -> None:
    line = ["/bin/sh", "-c", f"exec {COMMAND} methods >&- 2>&-"]
    assert subprocess.run(line, env=environment(), timeout=900, check=False).returncode == 0
