"""Tests on two processes: each runs one function with its assertions in both of them."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

import adapterkit as ak

Tensors = dict[str, Tensor]

# Both processes are forks of a server that imports this once.
multiprocessing.set_forkserver_preload(["tests.core.test_trainer", "torch.distributed.fsdp"])


def on_two_processes(scenario: Callable[[Path], None], folder: Path) -> None:
    """Run the scenario in each of two processes of one group. What one of them raises is raised here."""
    mp.start_processes(_process, (scenario, folder), nprocs=2, start_method="forkserver")


class InTurn:
    """Scenarios as one, each with a folder of its own: two processes are started once for all of them."""

    def __init__(self, *scenarios: Callable[[Path], None]) -> None:
        self.scenarios = scenarios

    def __call__(self, folder: Path) -> None:
        for scenario in self.scenarios:
            print(scenario.__name__, flush=True)  # the last one that is printed is the one that failed
            own = folder / scenario.__name__
            own.mkdir(exist_ok=True)
            scenario(own)
            dist.barrier()


def _process(rank: int, scenario: Callable[[Path], None], folder: Path) -> None:
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    try:
        scenario(folder)
    finally:
        dist.destroy_process_group()


def refused(call: Callable[[], object], *words: str, error: type[ak.AdapterError] = ak.StateError) -> None:
    """The call raises this error, with these words."""
    with pytest.raises(error) as raised:
        call()
    assert all(word in str(raised.value) for word in words), raised.value


def copies(tensors: Tensors) -> Tensors:
    return {key: tensor.clone() for key, tensor in tensors.items()}


def assert_same(given: Tensors, expected: Tensors) -> None:
    assert given.keys() == expected.keys()
    assert all(type(tensor) is Tensor and torch.equal(tensor, expected[key]) for key, tensor in given.items())


def assert_alike(tensors: Tensors) -> None:
    """Both processes have the same tensors."""
    found: list[Tensors] = [{}, {}]
    dist.all_gather_object(found, tensors)
    assert_same(*found)
