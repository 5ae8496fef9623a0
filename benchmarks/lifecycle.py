"""What does it cost to add, switch, disable, remove, save, load and merge an adapter?

Beside PEFT and the least raw torch that does the same ("hand": no checks, no names, no way back).
"""

from __future__ import annotations

import copy
import itertools
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import adapterkit as ak
from adapterkit_lora import LoraConfig
from benchmarks.runner import Row, compare

LAYERS, NAMES, HIDDEN, RANK = 80, list("abcdefg"), 256, 16


class Block(nn.Module):
    """Seven linear layers, as many as a Llama block has."""

    def __init__(self) -> None:
        super().__init__()
        for name in NAMES:
            setattr(self, name, nn.Linear(HIDDEN, HIDDEN, bias=False))


class Model(nn.Module):
    """560 linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(LAYERS))


def linears(model: nn.Module) -> list[nn.Linear]:
    return [m for m in model.modules() if isinstance(m, nn.Linear)]


def by_hand(model: nn.Module) -> list[tuple[nn.Parameter, nn.Parameter]]:
    model.requires_grad_(False)
    factors = []
    for layer in linears(model):
        down = nn.Parameter(torch.empty(RANK, layer.in_features))
        nn.init.kaiming_uniform_(down, a=math.sqrt(5))
        factors.append((down, nn.Parameter(torch.zeros(layer.out_features, RANK))))
    return factors


def ours(count: int, model: nn.Module | None = None) -> ak.Adapters:
    adapters = ak.attach(Model() if model is None else model)
    for i in range(count):
        adapters.add(f"a{i}", LoraConfig(r=RANK, target_modules=NAMES), activate=False)
    return adapters


def theirs(count: int) -> Any:
    config = peft.LoraConfig(r=RANK, target_modules=NAMES)
    model = peft.get_peft_model(Model(), config, adapter_name="a0")
    for i in range(1, count):
        model.add_adapter(f"a{i}", config)
    return model


def run() -> Iterator[Row]:
    """One row an operation."""
    yield from _adding()
    yield from _switching()
    yield from _files()
    yield _merging()


def _adding() -> Iterator[Row]:
    config, other = LoraConfig(r=RANK, target_modules=NAMES), peft.LoraConfig(r=RANK, target_modules=NAMES)

    def first() -> Any:
        adapters = ours(0)
        return lambda: adapters.add("x", config)

    def peft_first() -> Any:
        model = Model()
        return lambda: peft.get_peft_model(model, other)

    def hand() -> Any:
        model = Model()
        return lambda: by_hand(model)

    ways = {"hand": hand, "adapterkit": first, "peft": peft_first}
    yield compare("first adapter, 560 linears", ways, rounds=5)
    nine, peft_nine = ours(9), theirs(9)
    names = (f"x{i}" for i in itertools.count())
    more = {
        "hand": hand,
        "adapterkit": lambda: lambda: nine.add(next(names), config, activate=False),
        "peft": lambda: lambda: peft_nine.add_adapter(next(names), other),
    }
    yield compare("a further adapter beside 9 to 12, 560 linears", more, rounds=3)


def _switching() -> Iterator[Row]:
    for count in (2, 10):
        adapters, other = ours(count), theirs(count)
        turn = itertools.cycle(["a0", "a1"])

        def disabled(adapters: ak.Adapters = adapters) -> None:
            with adapters.disabled():
                pass

        def peft_disabled(other: Any = other) -> None:
            with other.disable_adapter():
                pass

        switch = {
            "adapterkit": lambda: lambda: adapters.activate(next(turn), trainable=False),  # noqa: B023 - used here
            "peft": lambda: lambda: other.set_adapter(next(turn), inference_mode=True),  # noqa: B023
        }
        yield compare(f"switch between {count} adapters, for inference", switch, calls=4)
        train = {
            "adapterkit": lambda: lambda: adapters.activate(next(turn)),  # noqa: B023
            "peft": lambda: lambda: other.set_adapter(next(turn)),  # noqa: B023
        }
        yield compare(f"switch between {count} adapters, for training", train, calls=4)
        off = {"adapterkit": lambda d=disabled: d, "peft": lambda d=peft_disabled: d}
        yield compare(f"disabled() with {count} adapters", off, rounds=3)


def _files() -> Iterator[Row]:
    adapters, other = ours(1), theirs(1)
    base = Model()
    tensors = {k: v.contiguous() for k, v in adapters.state_dict("a0").items()}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        adapters.save("a0", root / "a")
        other.save_pretrained(root / "peft", selected_adapters=["a0"])
        save_file(tensors, root / "raw.safetensors")
        names = (f"x{i}" for i in itertools.count())
        saving = {
            "hand": lambda: lambda: save_file(tensors, root / "raw.safetensors"),
            "adapterkit": lambda: lambda: adapters.save("a0", root / "a"),
            "peft": lambda: lambda: other.save_pretrained(root / "peft", selected_adapters=["a0"]),
        }
        yield compare("save, 560 linears", saving)
        loading = {
            "hand": lambda: lambda: _assign(base, load_file(root / "raw.safetensors")),
            "adapterkit": lambda: lambda: adapters.load(root / "a", next(names), activate=False),
            "peft": lambda: lambda: other.load_adapter(root / "peft" / "a0", next(names)),
        }
        yield compare("load a further adapter, 560 linears", loading, rounds=3)


def _assign(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear):
            for part in ("lora_A", "lora_B"):
                module._parameters[part] = nn.Parameter(tensors[f"base_model.model.{path}.{part}.weight"])


def _merging() -> Row:
    torch.manual_seed(0)
    adapters, other, plain = ours(1), theirs(1), Model()
    factors = by_hand(copy.deepcopy(plain))

    @torch.no_grad()
    def hand() -> None:
        for layer, (down, up) in zip(linears(plain), factors, strict=True):
            layer.weight.addmm_(up, down)

    def merge() -> Any:
        if adapters.merged:
            adapters.unmerge()
        return lambda: adapters.merge("a0")

    def peft_merge() -> Any:
        if other.base_model.model.layers[0].a.merged:
            other.unmerge_adapter()
        return other.merge_adapter

    return compare(
        "merge, 560 linears (ours keeps the base)", {"hand": lambda: hand, "adapterkit": merge, "peft": peft_merge}
    )
