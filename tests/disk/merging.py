"""What the tests on disk share: a base and adapters in folders, the same merge in memory, and the memory of a call."""

from __future__ import annotations

import os
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import models
from torch import nn
from transformers.utils import logging

import adapterkit as ak
from adapterkit import Checkpoint

logging.disable_progress_bar()  # type: ignore[no-untyped-call]
logging.set_verbosity_error()  # type: ignore[no-untyped-call]


@dataclass
class Setting:
    """One model, its adapters, and how the base is saved.

    Attributes:
        configs: of the adapters `a`, `b`, ..., in the order in which they are merged.
        added: more arguments of `Adapters.add`.
        merged: arguments of both merges.
        change: done to the model before it is saved.
    """

    model: str
    configs: Sequence[ak.AdapterConfig]
    dtype: torch.dtype = torch.float32
    shard: str = "50GB"
    added: dict[str, Any] = field(default_factory=dict)
    merged: dict[str, Any] = field(default_factory=dict)
    change: Callable[[Any], object] = lambda model: None


def save_base(setting: Setting, folder: Path) -> type[Any]:
    """Save the base; the class to load it with."""
    model: Any = models.build(setting.model).to(setting.dtype)
    setting.change(model)
    model.save_pretrained(folder, max_shard_size=setting.shard)
    return type(model)


def save_adapters(setting: Setting, base: Path, cls: type[Any], root: Path) -> ak.Adapters:
    """Adapters as if trained on the base as it is loaded, each in a folder of its name."""
    adapters = ak.attach(cls.from_pretrained(base, dtype="auto").eval())
    for name, config in zip("abcdef", setting.configs, strict=False):
        adapters.add(name, config, **setting.added)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(ord(name))
            for parameter in adapters.parameters(name):
                nn.init.normal_(parameter, std=0.3)
        adapters.save(name, root / name)
    return adapters


def both_ways(setting: Setting, root: Path, **arguments: Any) -> tuple[Path, Path, ak.MergeReport]:
    """The folders of the merge in memory and of that on disk."""
    base, memory, out = root / "base", root / "memory", root / "out"
    cls = save_base(setting, base)
    names = list("abcdef"[: len(setting.configs)])
    adapters = save_adapters(setting, base, cls, root)
    adapters.activate(*names, trainable=False, heads=setting.merged.get("heads"))
    plain = adapters.merge_and_detach(*names, **setting.merged)
    plain.save_pretrained(memory, max_shard_size=setting.shard)
    return memory, out, ak.merge_checkpoint(base, [root / n for n in names], out, **setting.merged, **arguments)


def assert_same_tensors(one: Path, other: Path) -> None:
    """The same names, dtypes and bits."""
    first, second = Checkpoint.open(one), Checkpoint.open(other)
    assert set(first.entries) == set(second.entries)
    for name, entry in first.entries.items():
        assert (entry.dtype, entry.shape) == (second.entries[name].dtype, second.entries[name].shape), name
        assert torch.equal(first.tensor(name), second.tensor(name)), name


def assert_same_folder(one: Path, other: Path) -> None:
    """The same files, byte for byte."""
    files = {p.relative_to(one): p.read_bytes() for p in one.rglob("*") if p.is_file()}
    assert files == {p.relative_to(other): p.read_bytes() for p in other.rglob("*") if p.is_file()}


def in_child(work: Callable[[], object]) -> int:
    """Run in a forked process; its exit status, or the negative of the signal that ended it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # this process has threads, which the child does not use
        child = os.fork()
    if not child:
        try:
            work()
            os._exit(0)
        except BaseException:  # noqa: BLE001 - pytest shows it where the status is not what was wanted
            os.write(2, traceback.format_exc().encode())
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def peak(work: Callable[[], object], note: Path) -> int:
    """By how many bytes the memory of a forked process grows at most in `work`; `note` is a file for the number.

    Skips the test where the system does not tell.
    """
    status = Path("/proc/self/status")
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs Linux")

    def told(field: str) -> int:
        line = next(line for line in status.read_text().splitlines() if line.startswith(field))
        return int(line.split()[1]) << 10

    def measured() -> None:
        work()  # once before: what imports and pools keep does not matter
        Path("/proc/self/clear_refs").write_text("5")
        before = told("VmRSS")
        work()
        note.write_text(str(told("VmHWM") - before))

    assert in_child(measured) == 0
    return int(note.read_text())
