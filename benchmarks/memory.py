"""Memory as the allocator counts it: what autograd keeps, and how far memory rises during a run."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from benchmarks.runner import Measure, Run


def saved(run: Run, calls: int = 1, own: Iterable[Tensor] = ()) -> float:
    """MiB that autograd keeps for the backward of `run()`; parameters and those in `own` (inputs) are not counted."""
    storages: dict[int, Any] = {}
    known = {tensor.untyped_storage().data_ptr() for tensor in own}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if not _is_parameter(tensor) and storage.data_ptr() not in known:
            storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        returned = run()
    total = sum(storage.nbytes() for storage in storages.values()) / 2**20
    del returned
    return total


def _is_parameter(tensor: Tensor) -> bool:
    whole = tensor if tensor._base is None else tensor._base
    return isinstance(whole, torch.nn.Parameter)


def peak(run: Run, calls: int = 1) -> float:
    """MiB by which the CPU allocator's total rises, at its highest, while `run()` runs."""
    from torch.profiler import ProfilerActivity, profile

    with _silent(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        returned = run()
    del returned
    total = highest = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            total += event.nbytes()
            highest = max(highest, total)
    return highest / 2**20


@contextmanager
def _silent() -> Iterator[None]:
    """Nothing on stderr, to which torch's profiler writes each time that it starts and ends."""
    kept = os.dup(2)
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)


def peak_rss(code: str) -> float:
    """MiB that a new Python process that runs `code` has resident at its highest."""
    # VmHWM is this program's own; getrusage's ru_maxrss is passed on from the process that started it.
    code += "\nprint(*[line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1]) / 2**10


SAVED = Measure("MiB", saved)
PEAK = Measure("MiB", peak)
