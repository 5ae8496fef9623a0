"""`ak.new_package`: a package for a new method, written from templates.

In: the name of the method. Out: a folder that installs and passes the test kit.
Uses: errors, files, describe.
"""

from __future__ import annotations

import importlib.util
import keyword
import re
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from string import Template

from adapterkit.describe import describe_methods
from adapterkit.errors import ConfigError, PluginError, SaveError, UsageError, usage
from adapterkit.files import local_path, new_folder

# Each template and its place; both may contain placeholders.
_FILES = {
    "pyproject.toml": "pyproject.toml",
    "README.md": "README.md",
    "gitignore": ".gitignore",
    "ci.yml": ".github/workflows/ci.yml",
    "init.py": "src/$module/__init__.py",
    "config.py": "src/$module/config.py",
    "layer.py": "src/$module/layer.py",
    "plugin.py": "src/$module/plugin.py",
    "test.py": "tests/test_$name.py",
}
_LONGEST_NAME = 32


@usage()
def new_package(name: str, folder: str | Path | None = None) -> Path:
    """Write a package with an adapter method of this name. It installs and passes the test kit without changes.

    The package contains a config, a layer and a plugin for a small additive method, which you change into yours, the
    packaging with the entry point, tests with `adapterkit.testing`, and a workflow for GitHub. The code passes ruff and
    `mypy --strict`.

    Args:
        name: the name of the method: lower-case letters, digits and underscores.
        folder: the folder of the project, which must not exist; by default `adapterkit-<name>`, here.

    Returns:
        The folder.

    Raises:
        ConfigError: the name is invalid, or the folder exists.
        PluginError: an installed method has the name.
        SaveError: the folder cannot be written; nothing of it remains.
    """
    _check_name(name)
    project = f"adapterkit-{name.replace('_', '-')}"
    folder = local_path(project if folder is None else folder)
    if folder.exists() or folder.is_symlink():
        raise ConfigError(f"{folder} already exists. Remove it, or choose another folder.")
    values = {
        "name": name,
        "Name": "".join(part.capitalize() for part in name.split("_")),
        "prefix": f"{name}_",
        "module": f"adapterkit_{name}",
        "project": project,
        "requirement": _requirement(),
    }
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with new_folder(folder) as fresh:
            _write(fresh, values)
    except OSError as error:
        raise SaveError(f"The package cannot be written to {folder}: {error}. Nothing of it remains.") from error
    return folder


def _write(folder: Path, values: dict[str, str]) -> None:
    templates = files("adapterkit.scaffold") / "templates"
    for source, place in _FILES.items():
        path = folder / Template(place).substitute(values)
        path.parent.mkdir(parents=True, exist_ok=True)
        text = (templates / f"{source}.template").read_text(encoding="utf-8")
        path.write_text(Template(text).substitute(values), encoding="utf-8")
    (folder / "src" / values["module"] / "py.typed").touch()


def _check_name(name: str) -> None:
    if not isinstance(name, str) or not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name):
        proposed = re.sub(r"[^a-z0-9]+", "_", str(name).lower()).strip("_0123456789")
        hint = f" Perhaps {proposed!r}?" if proposed else ""
        raise UsageError(
            f"{name!r} cannot be a method's name: a name starts with a letter, and has lower-case letters, digits and "
            f"single underscores only.{hint}"
        )
    if keyword.iskeyword(name) or keyword.issoftkeyword(name):
        raise UsageError(f"{name!r} is a keyword of Python. Choose another name.")
    if len(name) > _LONGEST_NAME:
        raise UsageError(f"{name!r} has {len(name)} characters, but a method's name may have at most {_LONGEST_NAME}.")
    for method in describe_methods().methods:
        if method.name == name:
            raise PluginError(f"A method {name!r} already exists, from {method.package}. Choose another name.")
    if importlib.util.find_spec(f"adapterkit_{name}") is not None:
        raise UsageError(f"A module adapterkit_{name} already exists. Choose another name.")


def _requirement() -> str:
    """This version and those that are compatible with it: before 1.0 a minor version may break, after it a major."""
    here = version("adapterkit")
    major, minor = (int(re.match(r"\d+", part).group()) for part in here.split(".")[:2])  # type: ignore[union-attr]
    return f"adapterkit>={here},<{f'{major + 1}' if major else f'0.{minor + 1}'}"
