"""One environment for all foreign packages. Their own tests run there, in one process."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.thirdparty.environment import PACKAGES, Environment

import adapterkit as ak

collect_ignore_glob = ["adapterkit_*"]


@pytest.fixture(scope="session")
def new_package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `adapterkit new low_sum` writes."""
    return ak.new_package("low_sum", tmp_path_factory.mktemp("new") / "low_sum")


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory, new_package: Path) -> Environment:
    made = Environment(tmp_path_factory.mktemp("environment") / "venv")
    made.install(*PACKAGES.values(), new_package)
    return made
