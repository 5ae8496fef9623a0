"""A fresh virtual environment with foreign packages in it, built and installed as a user does it."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import textwrap
import venv
from collections.abc import Sequence
from pathlib import Path

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
        command = [sys.executable, "-m", "pip", "--python", str(self.python), "install", "--quiet", "--no-index"]
        command += ["--no-build-isolation", "--no-deps", "--disable-pip-version-check"]
        command += [] if target is None else ["--target", str(target)]
        self._run([*command, *map(str, projects)], {})

    def run(self, code: str, *arguments: str, path: Sequence[Path] = (), **variables: str) -> str:
        """What a script prints."""
        command = [str(self.python), "-c", textwrap.dedent(code), *arguments]
        # adapterkit as this process has it, which need not be the one that is installed.
        ours = {
            str(Path(m.__path__[0]).parent)
            for n, m in sys.modules.items()
            if n.startswith("adapterkit")
            and "." not in n
            and hasattr(m, "__path__")
            and n not in {f"adapterkit_{p}" for p in PACKAGES}
        }
        places = os.pathsep.join([*map(str, path), *sorted(ours)])
        return self._run(command, {"PYTHONPATH": places, **variables})

    def _run(self, command: list[str], variables: dict[str, str]) -> str:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", **variables}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-6000:]}"
        return done.stdout
