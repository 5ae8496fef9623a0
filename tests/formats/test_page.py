"""The page of files: every row names a test that exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TABLES = [
    table.splitlines()
    for table in (ROOT / "docs" / "files.md").read_text(encoding="utf-8").split("\n\n")
    if table.partition("\n")[0].endswith("| shown by |")
]
ROWS = [row for table in TABLES for row in table[2:]]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.split("|")[1].strip())
def test_every_row_names_its_test(row: str) -> None:
    shown = re.fullmatch(r"`([\w./]+?)(?:::(\w+))?`", row.strip("| ").rpartition("|")[2].strip())
    assert shown is not None, row
    functions = [
        node.name for node in ast.parse((ROOT / shown[1]).read_text(encoding="utf-8")).body if hasattr(node, "name")
    ]
    assert shown[2] is None or shown[2] in functions


def test_every_program_that_is_refused_is_on_the_page() -> None:
    text = "".join(ROWS)
    source = (ROOT / "core" / "adapterkit" / "formats" / "refused.py").read_text(encoding="utf-8")
    for program in (
        "DeepSpeed-Chat",
        "NeMo",
        "LitGPT",
        "torchtune",
        "XLabs",
        "cloneofsimo",
        "AdapterHub",
        "IP-Adapter",
    ):
        assert program in text
        assert program in source
