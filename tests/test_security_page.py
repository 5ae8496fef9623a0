"""The page of security names tests that are there, and the template of a method keeps its promises."""

from __future__ import annotations

import re
from pathlib import Path

import adapterkit as ak

HERE = Path(__file__).parent
PAGE = (HERE.parent / "docs" / "security.md").read_text(encoding="utf-8")


def test_the_page_names_tests_that_exist() -> None:
    sources = {path.name: path.read_text(encoding="utf-8") for path in HERE.glob("test_security*.py")}
    for name in re.findall(r"tests/(test_security\w+\.py)", PAGE):
        assert name in sources
    named = re.findall(r"\btest_(?!security)\w+", PAGE)
    assert len(named) > 8
    for name in named:
        assert any(f"def {name}(" in source for source in sources.values()), name


def test_the_workflow_of_a_new_package_may_only_read_and_pins_its_actions(tmp_path: Path) -> None:
    place = ak.new_package("careful", tmp_path / "package")
    (workflow,) = place.rglob("*.yml")
    text = workflow.read_text(encoding="utf-8")
    assert "permissions:\n  contents: read\n" in text
    uses = re.findall(r"uses: (\S+)", text)
    assert uses
    assert all(re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", action) for action in uses)
