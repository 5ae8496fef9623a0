"""Tests on two processes. A file starts them once, for one scenario, and its tests look at what that gave."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import adapterkit as ak

Found = dict[str, Any]


def on_two_processes(scenario: Callable[[Path], Found], folder: Path) -> tuple[Found, Found]:
    """What the scenario returns in each of two processes of one group."""
    mp.spawn(_process, (scenario, folder), nprocs=2)
    one, other = (torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2))
    return one, other


def _process(rank: int, scenario: Callable[[Path], Found], folder: Path) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    try:
        torch.save(scenario(folder), folder / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


def attempt(call: Callable[[], object]) -> str:
    """The error that the call raises, as text, or `""`."""
    try:
        call()
    except ak.AdapterError as error:
        return f"{type(error).__name__}: {error}"
    return ""
