"""Imports between the rooms of the core go one way, and a room is entered through its `__init__`."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

CORE = Path(__file__).parents[1] / "core" / "adapterkit"
# Each room may import the rooms before it.
ROOMS = (
    *("errors", "results", "tensors", "kinds", "contract", "forward", "rows", "model", "files", "merging", "combining"),
    *("integrations", "features", "disk", "preview", "describe", "report", "adapters", "scaffold", "testing"),
)


def imports(tree: ast.AST) -> Iterator[str]:
    """Modules of the core that the code imports when it runs; what is imported for types alone is left out."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "adapterkit":
            if node.module == "adapterkit":
                yield from (f"adapterkit.{alias.name}" for alias in node.names)
            else:
                yield str(node.module)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("adapterkit."))
        yield from imports(node)


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_rooms_before_it_through_their_init(room: str) -> None:
    files = sorted((CORE / room).rglob("*.py")) or [CORE / f"{room}.py"]
    wrong = []
    for file in files:
        for name in imports(ast.parse(file.read_text(encoding="utf-8"))):
            other = name.split(".")[1]
            if other != room and (other not in ROOMS[: ROOMS.index(room)] or name.count(".") > 1):
                wrong.append(f"{file.relative_to(CORE)} imports {name}")
    assert not wrong


def test_every_module_of_the_core_is_in_a_room() -> None:
    found = {path.stem for path in CORE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert found - {"__init__", "__main__"} == set(ROOMS)
