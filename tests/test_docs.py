"""The README is run: every Python block, one after the other, as a reader would."""

import re
import sys
from pathlib import Path

import pytest

import adapterkit as ak

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


@pytest.fixture
def model_folder(monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    from data import minilm_folder

    return minilm_folder()


def test_readme_python_blocks_run(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "readme"}
    module = type(sys)("readme")
    monkeypatch.setitem(sys.modules, "readme", module)
    try:
        for number, block in enumerate(blocks(README, "python")):
            code = block.replace("sentence-transformers/all-MiniLM-L6-v2", str(model_folder))
            exec(compile(code, f"README.md block {number}", "exec"), namespace)
    finally:
        if "outer" in ak.default_registry._methods:
            ak.default_registry.unregister("outer")
    assert "adapter 'mine'" in capsys.readouterr().out


def test_readme_calls_exist() -> None:
    calls = set(re.findall(r"adapters\.(\w+)\(", README)) | set(re.findall(r"attach\(model\)\.(\w+)\(", README))
    assert {name for name in calls if not hasattr(ak.Adapters, name)} == set()


def test_readme_is_under_200_lines() -> None:
    assert README.count("\n") < 200


def test_readme_links_are_absolute_so_that_they_work_on_pypi_and_what_they_name_is_there() -> None:
    here = "https://github.com/adapterkit/adapterkit/blob/main/"
    named = re.findall(r"\]\(([^)]+)\)", README) + re.findall(r"^\[[^\]]+\]: (\S+)$", README, re.MULTILINE)
    assert named
    assert [link for link in named if not link.startswith("https://")] == []
    assert [link for link in named if link.startswith(here) and not (ROOT / link.removeprefix(here)).exists()] == []
    defined = set(re.findall(r"^\[([^\]]+)\]: ", README, re.MULTILINE))
    assert set(re.findall(r"\]\[([^\]]+)\]", README)) <= defined


def test_readme_test_command_is_what_ci_runs() -> None:
    command = "python -m pytest -n 2 -q"
    assert command in README
    assert command in (ROOT / ".ci/run").read_text(encoding="utf-8")
    assert "-m pytest -n 2 -q" in (ROOT / "Makefile").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", ["blocks", "port-a-peft-method", "write-a-layer-kind"])
def test_the_code_of_a_page_runs(page: str) -> None:
    module = type(sys)(page)  # whose names annotations are resolved in
    sys.modules[page] = module
    extensions = {*ak.default_registry.extensions()}
    try:
        for block in blocks((ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8"), "python"):
            exec(compile(block, f"docs/{page}.md", "exec"), module.__dict__)
    finally:
        del sys.modules[page]
        if "fourierft" in ak.default_registry._methods:
            ak.default_registry.unregister("fourierft")
        for name, extension in ak.default_registry.extensions().items():
            if name not in extensions:
                ak.default_registry.retract(extension.plugin)
