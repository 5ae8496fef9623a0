"""The shape of the project: who imports whom, what the package holds, how long its parts are."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from tests.processes import python

import adapterkit as ak

ROOT = Path(__file__).parents[2]
CORE = ROOT / "core" / "adapterkit"
PLUGINS = sorted(p for p in (ROOT / "plugins").iterdir() if p.is_dir())
PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
COMMAND = ROOT / "core" / "adapterkit_command"
CORE_FILES = sorted(CORE.rglob("*.py"))
COMMAND_FILES = sorted(COMMAND.rglob("*.py"))
SOURCES = [*CORE_FILES, *COMMAND_FILES, *sorted((ROOT / "plugins").rglob("*.py"))]
HEAVY = (
    *("transformers", "adapterkit_lora", "huggingface_hub", "regex", "tqdm"),
    *("accelerate", "peft", "pytest", "matplotlib", "rich", "typer"),
)


def package(plugin: Path) -> str:
    return f"adapterkit_{plugin.name}"


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path: Path) -> Iterator[tuple[str, str]]:
    """Every `(module, name)` that a file imports, wherever in it; the name is empty for `import module`."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            yield from ((node.module or "", alias.name) for alias in node.names)


# Who imports whom


def test_core_imports_no_plugin() -> None:
    """Nor the command, but for `python -m adapterkit`."""
    found = [(path.name, module) for path in CORE_FILES for module, _ in imports(path)]
    assert {pair for pair in found if pair[1].startswith("adapterkit_")} == {("__main__.py", "adapterkit_command")}


def test_command_imports_public_names_and_little_else() -> None:
    others = {"adapterkit_command", "rich", "torch", "typer", *sys.stdlib_module_names}
    for path in COMMAND_FILES:
        for module, name in imports(path):
            if module == "adapterkit":
                assert name == "" or name in ak.__all__, f"{path}: {name!r} is not public"
            else:
                assert module.partition(".")[0] in others, path


def test_core_names_no_method() -> None:
    """Messages may give LoRA as an example; code may not ask for it."""
    for path in [*CORE_FILES, *COMMAND_FILES]:
        for node in ast.walk(tree(path)):
            for given in [node.left, *node.comparators] if isinstance(node, ast.Compare) else []:
                text = str(given.value) if isinstance(given, ast.Constant) else ""
                assert not re.search(r"lora|loha|hada|\bvera", text), f"{path}:{node.lineno}"


def test_plugins_import_public_names_torch_and_the_standard_library_only() -> None:
    for path in [path for plugin in PLUGINS for path in plugin.rglob("*.py")]:
        own = path.relative_to(ROOT / "plugins").parts[1]
        for module, name in imports(path):
            if module.partition(".")[0] == "adapterkit":
                assert module == "adapterkit", f"{path}: {module} is not public"
                assert not name or name in ak.__all__, f"{path}: {name!r} is not public"
            else:
                assert module.partition(".")[0] in {own, "torch", *sys.stdlib_module_names}, f"{path}: {module}"
        for used in re.findall(r"\bak\.(\w+)", path.read_text(encoding="utf-8")):
            assert used in ak.__all__, f"{path}: ak.{used} is not public"


def test_public_names_are_those_of_the_package() -> None:
    assert sorted(ak.__all__) == ak.__all__
    assert all(hasattr(ak, name) for name in ak.__all__)


def test_neither_importing_nor_listing_methods_imports_anything_heavy() -> None:
    """Each line is what is loaded then; the last one shows that the test can fail."""
    steps = ("import torch", "import adapterkit as ak; ak.methods(); ak.AdapterConfig()", "import adapterkit_lora")
    lines = ["import sys", *(f"{step}; print([name for name in {HEAVY} if name in sys.modules])" for step in steps)]
    before, after, heavy = map(ast.literal_eval, python("-c", "\n".join(lines)).splitlines())
    assert after == before
    assert set(heavy) - set(before) >= {"adapterkit_lora"}


def test_help_imports_no_torch() -> None:
    """The command answers at once where it can; whatever imports `adapterkit` imports torch."""
    code = "from adapterkit_command.app import app; app(['--help'], standalone_mode=False)"
    said = python("-c", f"{code}\nimport sys\nprint('torch' in sys.modules)")
    assert "Usage: " in said
    assert said.splitlines()[-1] == "False"


# What the package holds


def test_packages_and_entry_points_are_the_folders() -> None:
    wanted = ["core/adapterkit", "core/adapterkit_command", *(f"plugins/{p.name}/{package(p)}" for p in PLUGINS)]
    assert PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"] == wanted
    assert all((ROOT / folder / "__init__.py").is_file() for folder in wanted)
    entries = PYPROJECT["project"]["entry-points"]["adapterkit.methods"]
    assert entries == {p.name: f"{package(p)}.plugin:plugin" for p in PLUGINS}


def test_installed_metadata_are_those_of_pyproject() -> None:
    """Those of an editable install go stale until it is installed again: `make setup`."""
    distribution = importlib.metadata.distribution("adapterkit")
    assert distribution.version == PYPROJECT["project"]["version"]
    installed = {e.name: e.value for e in distribution.entry_points if e.group == "adapterkit.methods"}
    assert installed == PYPROJECT["project"]["entry-points"]["adapterkit.methods"]
    scripts = {e.name: e.value for e in distribution.entry_points if e.group == "console_scripts"}
    assert scripts == PYPROJECT["project"]["scripts"] == {"adapterkit": "adapterkit_command:main"}


def test_the_citation_is_of_this_version_and_place() -> None:
    cited = dict(re.findall(r"^([a-z-]+): *(\S.*)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.MULTILINE))
    project = PYPROJECT["project"]
    assert (cited["version"], cited["license"]) == (project["version"], project["license"])
    assert cited["repository-code"] == project["urls"]["Homepage"]


def test_builtin_methods_are_found_like_any_other() -> None:
    for plugin in PLUGINS:
        assert ak.methods()[plugin.name].provider == "adapterkit"
        assert ak.method(plugin.name).config_type().__module__.startswith(package(plugin))


def test_wheel_holds_every_source_file_and_announces_every_method(tmp_path: Path) -> None:
    """It is built here without the network."""
    python("-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path, cwd=ROOT)
    archive = zipfile.ZipFile(next(tmp_path.iterdir()))
    held = {n for n in archive.namelist() if ".dist-info/" not in n}
    folders = [CORE, COMMAND, *(p / package(p) for p in PLUGINS)]
    files = [f for folder in folders for f in folder.rglob("*") if f.is_file() and "__pycache__" not in f.parts]
    assert held == {str(f.relative_to(next(d for d in folders if f.is_relative_to(d)).parent)) for f in files}
    assert {f"{d.name}/py.typed" for d in folders} <= held
    text = archive.read(next(n for n in archive.namelist() if n.endswith("entry_points.txt"))).decode()
    assert "[adapterkit.methods]" in text
    assert all(f"{p.name} = {package(p)}.plugin:plugin" in text for p in PLUGINS)
    assert "adapterkit = adapterkit_command:main" in text


# How long its parts are


def test_file_is_one_idea_long_and_says_which() -> None:
    """`Adapters` is one class in one file: every public method with its docstring."""
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= (1200 if path == CORE / "adapters.py" else 600), path
        assert ast.get_docstring(tree(path)), path
        assert not re.search(r"TODO|FIXME|XXX|HACK", text), path
        assert "# type: ignore\n" not in text, path


def test_functions_are_short() -> None:
    """Fifty lines of code at most; the docstring, which may be long, is not counted."""
    for path in SOURCES:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                first = node.body[1] if ast.get_docstring(node) and len(node.body) > 1 else node.body[0]
                length = (node.end_lineno or 0) - first.lineno + 1
                assert length <= 50, f"{path}:{node.lineno} {node.name} has {length} lines"
