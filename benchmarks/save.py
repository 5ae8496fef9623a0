"""What does it cost to save an adapter?

`hand` gathers the tensors and calls safetensors' `save_file`. adapterkit writes beside the old files, waits until
the disk has them (`fsync`) and renames, so that a crash leaves the old adapter whole; `hand: synced` does that much.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.hand import HandModel
from benchmarks.libraries import adapter_parameters, give_values, hand, ours, theirs
from benchmarks.models import Stack
from benchmarks.runner import WALL, Case, Goal, Way

FILE = "adapter_model.safetensors"


def cases(tiny: bool) -> Iterator[Case]:
    """A small model with many layers, and one with large tensors."""
    for blocks, hidden in ((1, 64),) if tiny else ((80, 256), (24, 1024)):
        yield _saving(blocks, hidden, plotted=hidden == 1024)


def _saving(blocks: int, hidden: int, plotted: bool) -> Case:
    by_hand, adapters, model = (make(lambda: Stack(blocks, hidden), 1) for make in (hand, ours, theirs))
    for owner in (by_hand.model, adapters.model, model):
        give_values(adapter_parameters(owner, "a0"), 0)
    # Removed when the ways that write there are.
    folder: Any = tempfile.TemporaryDirectory()
    root = Path(folder.name)
    held = by_hand.tensors("a0")

    def way(save: Any, place: str) -> Way:
        def result(_: object, folder: Any = folder) -> dict[str, Tensor]:
            return load_file(root / place)

        return Way(lambda: save, result)

    return Case(
        f"save LoRA of {7 * blocks} layers of {hidden}",
        {
            "hand": way(lambda: _by_hand(by_hand, root / "hand"), "hand"),
            "hand: synced": way(lambda: _synced(by_hand, root / "synced"), "synced"),
            "adapterkit": way(lambda: adapters.save("a0", root / "ours"), f"ours/{FILE}"),
            "peft": way(lambda: model.save_pretrained(root / "p", selected_adapters=["a0"]), f"p/a0/{FILE}"),
            "raw save_file": way(lambda: save_file(held, root / "raw"), "raw"),
        },
        (Goal(1.2, "raw save_file"), Goal(1.2, "hand: synced")),
        measure=WALL,
        rounds=15,
        plotted=plotted,
    )


def _by_hand(model: HandModel, path: Path) -> None:
    save_file(model.tensors("a0"), path)


def _synced(model: HandModel, path: Path) -> None:
    fresh = path.with_suffix(".new")
    save_file(model.tensors("a0"), fresh)
    with fresh.open("rb") as file:
        os.fsync(file.fileno())
    fresh.replace(path)
