"""Tests with the tools people train with; `make test-tools` installs them and runs these."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Before a tool is imported: they look at these once.
os.environ |= {"HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

# Warnings are errors here too, but for these: each names its source and cannot be avoided by a user of that tool.
FOREIGN_WARNINGS = (
    # TRL 1.16 sets a field of TrainingArguments by the name that transformers 5.23 renamed.
    "ignore:`gradient_checkpointing.*` is deprecated:FutureWarning",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            for warning in FOREIGN_WARNINGS:
                item.add_marker(pytest.mark.filterwarnings(warning))


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tools leave files in the working directory."""
    monkeypatch.chdir(tmp_path)
