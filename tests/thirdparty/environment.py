"""A fresh virtual environment with foreign packages in it, built and installed as a user does it."""

from __future__ import annotations

import sysconfig
import textwrap
import venv
from collections.abc import Sequence
from pathlib import Path

from tests.processes import output, python

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
EXAMPLES = ROOT / "examples" / "thirdparty"
NAMES = ("adalora", "bottleneck", "dora", "ia3", "lokr", "oft", "vblora")
PACKAGES = {"outer": HERE / "adapterkit_outer", **{name: EXAMPLES / f"adapterkit_{name}" for name in NAMES}}


class Environment:
    """A virtual environment that sees what is installed here, adapterkit and torch included."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder, with_pip=False)
        self.python = folder / "bin" / "python"
        (place,) = folder.glob("lib/python*/site-packages")
        # `addsitedir` reads the .pth files of editable installs, too.
        lines = [f"import site; site.addsitedir({sysconfig.get_path(name)!r})\n" for name in ("purelib", "platlib")]
        (place / "here.pth").write_text("".join(dict.fromkeys(lines)), encoding="utf-8")

    def install(self, *projects: Path, target: Path | None = None) -> None:
        """Build and install projects, without downloading anything."""
        options = ["--quiet", "--no-index", "--no-build-isolation", "--no-deps", "--disable-pip-version-check"]
        options += [] if target is None else ["--target", str(target)]
        python("-m", "pip", "--python", self.python, "install", *options, *projects)

    def run(self, code: str, *arguments: object, path: Sequence[Path] = ()) -> str:
        """What a script prints."""
        return output(self.python, "-c", textwrap.dedent(code), *arguments, path=path)
