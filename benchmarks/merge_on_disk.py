"""What does it cost to merge an adapter into a checkpoint on disk, and how much memory?

Each way runs in a new process. Time begins after its imports and ends when the output is on the disk (fsync); the
input is in the page cache. `copy` copies the folder. `hand` maps each tensor, adds the product and writes, without a
model and without checks. PEFT loads the model and the adapter, merges and saves.
`processor` is the time on all cores together, on which other programs have less influence. Memory is the highest
resident size of the process, libraries included.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import adapterkit as ak
from adapterkit_lora import LoraConfig
from benchmarks.check import unchecked, within
from benchmarks.runner import SAID_MEBIBYTES, SAID_MILLISECONDS, Case, Goal, Run, Way, repeated

RANK, BLOCK = 16, 64
WAYS = ("hand", "adapterkit", "peft", "copy")


def cases(tiny: bool) -> Iterator[Case]:
    """1 GB in bfloat16 and 2 GB in float32."""
    for dtype in (torch.bfloat16, torch.float32):
        made = World(dtype, tiny)
        size = f"{(made.root / 'base' / 'model.safetensors').stat().st_size / 1e9:.1f} GB"
        what = f"merge into {size} in {str(dtype).removeprefix('torch.')}"
        ways = {name: made.way(name) for name in WAYS}
        note = "PEFT merges in the dtype of the weights, so its result is checked within the rounding of that dtype."
        goals = (Goal(1.5, "copy"),)
        yield Case(what, ways, goals, _check, SAID_MILLISECONDS, 5, warm_up=False, seconds=90, note=note)
        timed = unchecked("measured in the runs that were timed")
        processor = {name: repeated(functools.partial(made.last, name, "cpu")) for name in WAYS}
        yield Case(f"{what}: processor", processor, (), timed, SAID_MILLISECONDS, rounds=1, warm_up=False)
        memory = {name: repeated(functools.partial(made.last, name, "mib")) for name in WAYS}
        yield Case(f"{what}: memory", memory, (), timed, SAID_MEBIBYTES, rounds=1, warm_up=False)
        made.remove()


def _check(results: Mapping[str, Any]) -> None:
    """A copy holds no merge; all others agree."""
    within(2e-2, 2e-2)({name: found for name, found in results.items() if name != "copy"})


class World:
    """A checkpoint of one file, an adapter for it, and processes that merge the two."""

    def __init__(self, dtype: torch.dtype, tiny: bool) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        self.root, self.tiny = Path(tempfile.mkdtemp(prefix="merge_on_disk.")), tiny
        self.said: dict[str, dict[str, float]] = {}
        self.remove = weakref.finalize(self, shutil.rmtree, self.root)
        width, layers = (32, 1) if tiny else (2048, 8)
        sizes = {"hidden_size": width, "intermediate_size": width * 43 // 16, "num_hidden_layers": layers}
        config = LlamaConfig(vocab_size=50 * width // 3, num_attention_heads=16, dtype=dtype, **sizes)
        with torch.device("meta"):
            model = LlamaForCausalLM(config)
        model = model.to_empty(device="cpu").to(dtype)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.uniform_(-0.02, 0.02)
        model.save_pretrained(self.root / "base")
        adapters = ak.attach(model)
        adapters.add("a", LoraConfig(r=RANK, target_modules="all-linear", init_lora_weights=False))
        adapters.save("a", self.root / "a")

    def way(self, name: str) -> Way:
        """One way: a process of its own that says how long it took."""

        def prepare() -> Run:
            shutil.rmtree(self.root / "out", ignore_errors=True)
            return lambda: self._run(name)

        return Way(prepare, lambda _: self._result())

    def _run(self, name: str) -> float:
        if self.tiny:
            said = child(name, self.root)
        else:
            command = [sys.executable, "-m", "benchmarks.merge_on_disk", name, str(self.root)]
            printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            said = dict(json.loads(printed.splitlines()[-1]))
        self.said[name] = said
        return said["ms"]

    def last(self, name: str, measured: str) -> float:
        """What the last process that worked in this way said of itself."""
        return self.said[name][measured]

    def _result(self) -> list[Tensor]:
        merged = ak.Checkpoint.open(self.root / "out")
        names = [n for n in merged.entries if "layers.0" in n and "_proj" in n]
        return [merged.tensor(n)[:BLOCK].float().clone() for n in sorted(names)]


# What the processes do


def child(name: str, root: Path) -> dict[str, float]:
    """Merge in one way; the milliseconds it took, those of the processor, and the MiB that this process had at most."""
    run = _WAYS[name](root)
    start, processor = time.perf_counter(), time.process_time()
    run()
    for path in (root / "out").iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    took = (time.perf_counter() - start) * 1e3
    status = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    (highest,) = (line.split()[1] for line in status if line.startswith("VmHWM"))
    return {"ms": took, "cpu": (time.process_time() - processor) * 1e3, "mib": int(highest) / 2**10}


def _ours(root: Path) -> Run:
    import transformers.models.llama.modeling_llama  # noqa: F401 - imports are not measured here

    return lambda: ak.merge_checkpoint(root / "base", root / "a", root / "out")


def _peft(root: Path) -> Run:
    import transformers.models.llama.modeling_llama  # noqa: F401
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    def run() -> None:
        model = AutoModelForCausalLM.from_pretrained(root / "base", dtype="auto")
        PeftModel.from_pretrained(model, root / "a").merge_and_unload().save_pretrained(root / "out")

    return run


def _hand(root: Path) -> Run:
    from safetensors import safe_open

    def run() -> None:
        shutil.copytree(root / "base", root / "out", ignore=shutil.ignore_patterns("*.safetensors"))
        source, target = (root / n / "model.safetensors" for n in ("base", "out"))
        with safe_open(root / "a/adapter_model.safetensors", "pt") as file:
            factors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        with safe_open(source, "pt") as file, source.open("rb") as old, target.open("wb") as new:
            length = int.from_bytes(old.read(8), "little")
            old.seek(0)
            new.write(old.read(8 + length))
            for key in file.offset_keys():
                _add(tensor := file.get_tensor(key), factors, f"base_model.model.{key.removesuffix('.weight')}")
                new.write(memoryview(tensor.view(torch.uint8).numpy()))  # type: ignore[arg-type]

    return run


def _add(weight: Tensor, factors: Mapping[str, Tensor], prefix: str) -> None:
    down, up = factors.get(f"{prefix}.lora_A.weight"), factors.get(f"{prefix}.lora_B.weight")
    if down is None or up is None:
        return
    up = up * (LoraConfig().lora_alpha / RANK)
    if weight.dtype == torch.float32:
        weight.addmm_(up, down)
        return
    for start in range(0, len(weight), BLOCK):
        rows = weight[start : start + BLOCK]
        rows.copy_(torch.addmm(rows.float(), up[start : start + BLOCK], down))


def _copy(root: Path) -> Run:
    return lambda: shutil.copytree(root / "base", root / "out")


_WAYS: dict[str, Callable[[Path], Run]] = {
    "hand": _hand,
    "adapterkit": _ours,
    "peft": _peft,
    "copy": _copy,
}


if __name__ == "__main__":
    if len(sys.argv) == 3:
        torch.set_num_threads(1)
        print(json.dumps(child(sys.argv[1], Path(sys.argv[2]))))
    else:
        from benchmarks.__main__ import main

        main(["merge_on_disk", *sys.argv[1:]])
