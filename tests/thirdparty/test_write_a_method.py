"""The tutorial is done as a reader would: its files are built and installed, its code is run."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from tests.test_docs import blocks
from tests.thirdparty.environment import HERE, ROOT, Environment

sys.path.insert(0, str(ROOT / "docs"))
import build_hookspecs

from adapterkit.contract import hookspecs

TUTORIAL = (ROOT / "docs" / "write-a-method.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"^`([\w.]+)`:\n\n```\w+\n(.*?)^```", TUTORIAL, re.MULTILINE | re.DOTALL))


def test_the_tutorials_package_is_the_one_that_the_suite_installs() -> None:
    package = HERE / "adapterkit_outer"
    assert {path.name: path.read_text(encoding="utf-8") for path in package.glob("*.*")} == FILES
    code = [line for line in FILES["adapterkit_outer.py"].splitlines() if line.strip()]
    assert len(code) <= 50


def test_first_screens_reach_a_packaged_and_checked_method() -> None:
    before = TUTORIAL[: TUTORIAL.index("$ pytest")]
    assert before.count("\n") < 120


def test_console_commands_are_those_that_the_suite_runs() -> None:
    assert blocks(TUTORIAL, "console") == ["$ pip install -e . pytest\n$ pytest\n"]


def test_the_tutorials_code_runs(environment: Environment, tmp_path: Path) -> None:
    code = [block for block in blocks(TUTORIAL, "python") if block not in FILES.values()]
    (tmp_path / "tutorial.py").write_text("\n".join(code), encoding="utf-8")
    out = environment.run(f"import os; os.chdir({str(tmp_path)!r}); import tutorial", path=[tmp_path])
    assert "adapter 'mine'" in out
    assert "check_merged_equals_adapted - A merged adapter gives" in out


def test_the_tutorials_links_lead_somewhere() -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", TUTORIAL):
        assert (ROOT / "docs" / link).exists(), link


def test_the_reference_of_hooks_is_what_the_docstrings_say() -> None:
    assert build_hookspecs.PAGE.read_text(encoding="utf-8") == build_hookspecs.page(), "python docs/build_hookspecs.py"


def test_the_reference_has_every_hook_and_argument() -> None:
    page = build_hookspecs.PAGE.read_text(encoding="utf-8")
    heads = re.findall(
        r"^## `(\w+)`\n\n```python\n\w+\(([^\n]*)\) -> [^\n]+\n```\n\n(.+?)(?=\n## |\Z)", page, re.MULTILINE | re.DOTALL
    )
    assert sorted(name for name, _, _ in heads) == sorted(hookspecs.names())
    for name, arguments, text in heads:
        spec = getattr(hookspecs, name)
        given = re.findall(r"(\w+): ", arguments)
        assert given == list(spec.__code__.co_varnames[: spec.__code__.co_argcount])
        assert " ".join(text.split()) == " ".join((spec.__doc__ or "").split())
