"""The rooms of the core: imports go one way and through each room's `__init__`, as docs/architecture.md says."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

CORE = Path(__file__).parents[1] / "core" / "adapterkit"
PAGE = (Path(__file__).parents[1] / "docs" / "architecture.md").read_text(encoding="utf-8")
# Each room may import the rooms before it.
ROOMS = (
    *("errors", "door", "migration", "results", "tensors", "kinds", "contract", "forward", "rows", "model", "formats"),
    *("files", "merging", "combining", "checkpoints", "features", "disk", "preview", "describe", "report", "view"),
    *("adapters", "integrations", "scaffold", "testing"),
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


@pytest.mark.parametrize("room", [r for r in ROOMS if (CORE / r).is_dir()])
def test_a_room_is_small_enough_to_know(room: str) -> None:
    modules = [path for path in (CORE / room).iterdir() if path.suffix == ".py" and path.stem != "__init__"]
    tools = {path.stem.partition("_")[0] for path in modules}  # a tool may have several files: peft, peft_names, ...
    assert len(tools if room == "integrations" else modules) <= 10
    assert not [path for path in (CORE / room).iterdir() if (path / "__init__.py").is_file()]


@pytest.mark.parametrize(
    "room", [room for room in ROOMS if (CORE / room).is_dir() and room not in ("testing", "scaffold")]
)
def test_a_room_says_what_comes_in_and_goes_out_and_which_rooms_it_uses(room: str) -> None:
    text = ast.get_docstring(ast.parse((CORE / room / "__init__.py").read_text(encoding="utf-8"))) or ""
    said = re.search(r"In: .*Out: .*^Uses: ([^.]*)\.", text, re.MULTILINE | re.DOTALL)
    assert said is not None, text
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in (CORE / room).rglob("*.py")]
    used = {name.split(".")[1] for tree in trees for name in imports(tree)}
    assert set(re.split(r",\s+", said[1])) == used - {room}


@pytest.mark.parametrize("room", ROOMS)
def test_the_page_has_every_room(room: str) -> None:
    assert f"| `{room}/` |" in PAGE or f"| `{room}.py` |" in PAGE


def test_every_place_that_the_page_names_exists() -> None:
    named = re.findall(r"`((?:[a-z_]+/)?[a-z_]+\.py):([A-Za-z_.]+)`", PAGE)
    assert len(named) > 20
    for file, dotted in named:
        inside = ast.parse((CORE / file).read_text(encoding="utf-8")).body
        for name in dotted.split("."):
            found = [node for node in inside if getattr(node, "name", None) == name]
            assert found, f"{file} has no {dotted}"
            inside = getattr(found[0], "body", [])
