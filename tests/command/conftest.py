"""What the tests of the command share: a base model, adapters of it, and the installed command."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from tests.models import build
from tests.processes import environment
from typer.testing import CliRunner, Result

import adapterkit as ak
from adapterkit_command.app import app
from adapterkit_loha import LoHaConfig
from adapterkit_lora import LoraConfig

COMMAND = Path(sys.executable).with_name("adapterkit")
ROOT = Path(__file__).parents[2]


def start(*arguments: str, path: Sequence[Path] = (), **variables: str) -> subprocess.Popen[str]:
    """The installed command as a process; the folders `path` are searched for plugins as well."""
    both = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([COMMAND, *arguments], text=True, env=environment(*path, **variables), **both)


def execute(*arguments: str, path: Sequence[Path] = (), **variables: str) -> tuple[int, str, str]:
    """Its exit status, stdout and stderr."""
    process = start(*arguments, path=path, **variables)
    out, error = process.communicate(timeout=900)
    return process.returncode, out, error


def run(*arguments: str) -> Result:
    """The command in this process."""
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "100"})


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the checkpoint `base` of a small BERT, and its adapters `mood`, `topic` (LoRA) and `loha`."""
    folder = tmp_path_factory.mktemp("files")
    model = build("bert")
    model.save_pretrained(folder / "base")
    adapters = ak.attach(model)
    configs = {
        "mood": LoraConfig(r=4, lora_alpha=8, target_modules=["query", "value"]),
        "topic": LoraConfig(r=2, target_modules=["query", "output.dense"]),
        "loha": LoHaConfig(r=2, target_modules=["query"]),
    }
    for name, config in configs.items():
        adapters.add(name, config)
        generator = torch.Generator().manual_seed(len(name))
        with torch.no_grad():
            for parameter in adapters.parameters(name):
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        adapters.save(name, folder / name)
    return folder


@pytest.fixture
def here(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory with links to those."""
    for place in files.iterdir():
        (tmp_path / place.name).symlink_to(place)
    monkeypatch.chdir(tmp_path)
    return tmp_path
