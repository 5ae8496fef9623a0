"""`ak.new_package`: what it writes is built, installed and tested as its author would do it, and is clean."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

import pytest
from tests.processes import python
from tests.thirdparty.environment import ROOT

import adapterkit as ak
from adapterkit import scaffold

SHORT, LONG = "x", "a" + "1" * 31


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory, new_package: Path) -> dict[str, Path]:
    """A package for the shortest name, for a usual one, and for the longest."""
    folder = tmp_path_factory.mktemp("packages")
    return {"low_sum": new_package, **{name: ak.new_package(name, folder / name) for name in (SHORT, LONG)}}


def test_it_is_clean_for_ruff(packages: dict[str, Path]) -> None:
    for folder in packages.values():
        python("-m", "ruff", "check", "--no-cache", ".", cwd=folder)
        python("-m", "ruff", "format", "--no-cache", "--check", ".", cwd=folder)


MYPY = """
[mypy]
strict = True
warn_unreachable = True
enable_error_code = ignore-without-code, truthy-bool
mypy_path = {core}:{package}
[mypy-adapterkit.*]
follow_imports = silent
[mypy-transformers.*,huggingface_hub.*]
follow_imports = skip
"""


def test_it_is_clean_for_mypy_strict(packages: dict[str, Path], tmp_path: Path) -> None:
    """`skip`: what the package itself does not import is not read; that would take three times as long."""
    pytest.importorskip("mypy")
    package = packages["low_sum"]
    settings = tmp_path / "mypy.ini"
    settings.write_text(MYPY.format(core=ROOT / "core", package=package / "src"))
    cache = ROOT / ".mypy_cache" / "new_package"
    out = python("-m", "mypy", "--config-file", settings, "--cache-dir", cache, "src", "tests", cwd=package)
    assert "no issues found in 5 source files" in out


def test_it_needs_the_versions_of_adapterkit_that_are_compatible(packages: dict[str, Path]) -> None:
    project = tomllib.loads((packages["low_sum"] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["dependencies"] == [f"adapterkit>={ak.__version__},<0.2"]
    assert project["entry-points"] == {"adapterkit.methods": {"low_sum": "adapterkit_low_sum.plugin:plugin"}}


@pytest.mark.parametrize(
    ("here", "range_"), [("0.9.3", ">=0.9.3,<0.10"), ("1.2.0", ">=1.2.0,<2"), ("2.0rc1", ">=2.0rc1,<3")]
)
def test_the_range_of_other_versions(monkeypatch: pytest.MonkeyPatch, here: str, range_: str) -> None:
    monkeypatch.setattr(scaffold, "version", lambda _: here)
    assert scaffold._requirement() == f"adapterkit{range_}"


def test_its_readmes_code_runs(packages: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = packages["low_sum"]
    monkeypatch.syspath_prepend(str(folder / "src"))
    from adapterkit_low_sum import plugin  # type: ignore[import-not-found]

    ak.register(plugin)
    try:
        (code,) = re.findall(r"^```python\n(.*?)^```", (folder / "README.md").read_text(), re.MULTILINE | re.DOTALL)
        exec(code, {})
    finally:
        ak.default_registry.unregister("low_sum")
        for name in [name for name in sys.modules if name.startswith("adapterkit_low_sum")]:
            del sys.modules[name]


def test_without_a_folder_it_is_beside_the_caller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "usual").mkdir()
    assert ak.new_package("low_sum") == Path("adapterkit-low-sum")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapterkit-low-sum", "usual"]
    assert Path("adapterkit-low-sum").stat().st_mode == Path("usual").stat().st_mode


NAMES = {
    "dash": ("my-method", "'my-method' cannot be a method's name: ", "Perhaps 'my_method'?"),
    "capital": ("MyMethod", "has lower-case letters, digits and single underscores only", "Perhaps 'mymethod'?"),
    "digit": ("2d", "a name starts with a letter", "Perhaps 'd'?"),
    "underscores": ("a__b", "cannot be a method's name", "Perhaps 'a_b'?"),
    "path": ("../x", "cannot be a method's name", "Perhaps 'x'?"),
    "nothing": ("", "'' cannot be a method's name", ""),
    "accent": ("é", "cannot be a method's name", ""),
    "keyword": ("lambda", "'lambda' is a keyword of Python. Choose another name.", ""),
    "soft keyword": ("match", "'match' is a keyword of Python.", ""),
    "long": ("a" * 33, "has 33 characters, but a method's name may have at most 32.", ""),
    "installed": ("lora", "A method 'lora' already exists, from adapterkit. Choose another name.", ""),
    "module": ("command", "A module adapterkit_command already exists. Choose another name.", ""),
}


@pytest.mark.parametrize(("name", "text", "hint"), NAMES.values(), ids=NAMES.keys())
def test_names_that_are_refused(name: str, text: str, hint: str, tmp_path: Path) -> None:
    with pytest.raises(ak.AdapterError) as caught:
        ak.new_package(name, tmp_path / "new")
    assert text in str(caught.value)
    assert str(caught.value).endswith(hint)
    assert not list(tmp_path.iterdir())


def test_a_name_may_begin_like_the_prefix_of_another_method(tmp_path: Path) -> None:
    assert ak.new_package("lora_x", tmp_path / "new").is_dir()


@pytest.mark.parametrize("what", ["a folder", "a file", "a link to nothing"])
def test_what_exists_is_left_alone(what: str, tmp_path: Path) -> None:
    place = tmp_path / "new"
    {"a folder": place.mkdir, "a file": place.touch, "a link to nothing": lambda: place.symlink_to("nowhere")}[what]()
    with pytest.raises(ak.ConfigError, match=r"already exists\. Remove it, or choose another folder\."):
        ak.new_package("low_sum", place)
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
    assert place.is_symlink() or not place.is_dir() or not list(place.iterdir())


def test_nothing_half_written_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, *_: object, **__: object) -> int:
        if path.name == "plugin.py":
            raise OSError(28, "No space left on device")
        return 0

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(ak.SaveError, match=r"The package cannot be written to .*No space left.*Nothing of it remains"):
        ak.new_package("low_sum", tmp_path / "new")
    assert not list(tmp_path.iterdir())


def test_every_template_is_used() -> None:
    folder = Path(scaffold.__file__).parent / "templates"
    assert {path.name for path in folder.iterdir()} == {f"{name}.template" for name in scaffold._FILES}
