"""Plugins are code, which may do anything; but a broken one breaks only itself, and none is run by mistake."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

import pytest
from tests.command.conftest import execute, run
from tests.core.test_registry import METHOD
from tests.processes import python

import adapterkit as ak

ENDINGS = ("import sys; sys.exit(0)", "raise GeneratorExit", "class E(BaseException): ...\nraise E", "import nothing_")


def distribution(folder: Path, name: str, code: str, group: str = "methods") -> Path:
    info = folder / "dist-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: some_dist\nVersion: 1\n")
    (info / "entry_points.txt").write_text(f"[adapterkit.{group}]\n{name} = some_plugin\n")
    (folder / "some_plugin.py").write_text(textwrap.dedent(code))
    return folder


@pytest.mark.parametrize("group", ["methods", "extensions"])
@pytest.mark.parametrize("code", ENDINGS, ids=["exit", "generator", "own", "import"])
def test_a_plugin_that_ends_while_it_is_imported_is_that_plugins_error(
    code: str, group: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(distribution(tmp_path, "broken", code, group))
    monkeypatch.setitem(sys.modules, "some_plugin", None)
    del sys.modules["some_plugin"]
    done = run("methods")
    assert done.exit_code == 0
    assert "cannot be imported from 'some_plugin'" in done.stdout
    assert "loha" in done.stdout
    if group == "methods":
        with pytest.raises(ak.PluginError, match="cannot be imported"):
            ak.method("broken")


def test_code_that_ends_the_process_while_a_command_runs_is_an_internal_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def leave() -> None:
        raise SystemExit(0)

    monkeypatch.setattr(ak, "describe_methods", leave)
    done = run("methods")
    assert done.exit_code == 3
    assert "SystemExit" in done.stderr


def test_a_plugin_with_commas_in_its_name_can_be_switched_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(distribution(tmp_path, "a,b", "raise SystemExit"))
    assert "a,b" in ak.methods()
    for value in ("a,b", "x, a , b,y"):
        monkeypatch.setenv("ADAPTERKIT_DISABLE_PLUGINS", value)
        assert "a,b" not in ak.methods()
    for value in ("a", "b,a", "a,x,b"):
        monkeypatch.setenv("ADAPTERKIT_DISABLE_PLUGINS", value)
        assert "a,b" in ak.methods()


@pytest.mark.parametrize("options", [["-P"], []], ids=["-P", "without"])
def test_a_downloaded_folder_is_no_place_for_plugins(options: list[str], tmp_path: Path) -> None:
    distribution(tmp_path, "foo", "open('ran', 'w')\n" + textwrap.dedent(METHOD.format(name="foo")))
    assert "foo" not in python(*options, "-m", "adapterkit", "methods", cwd=tmp_path)
    assert not (tmp_path / "ran").exists()


def test_the_script_does_not_look_in_the_working_directory_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    distribution(tmp_path, "foo", METHOD.format(name="foo"))
    monkeypatch.chdir(tmp_path)
    status, out, _ = execute("methods")
    assert (status, "foo" in out) == (0, False)
