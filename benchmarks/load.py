"""What does it cost to load a further adapter from a file?

`hand` maps the file and registers its tensors as parameters; adapterkit reads them into memory of their own. Files are
PEFT's, in the page cache.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
from safetensors.torch import load_file
from torch import Tensor, nn

import adapterkit as ak
from benchmarks.libraries import RANK, names
from benchmarks.models import NAMES, Stack, linears
from benchmarks.runner import Case, Goal, Way

FILE = "adapter_model.safetensors"
CONFIGS: dict[str, Any] = {
    "LoRA": peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=NAMES, init_lora_weights=False),
    "LoHa": peft.LoHaConfig(r=RANK, alpha=RANK, target_modules=NAMES, init_weights=False),
    "VeRA": peft.VeraConfig(r=RANK, target_modules=NAMES, init_weights=False),
}


def cases(tiny: bool) -> Iterator[Case]:
    """One row a method."""
    for method in CONFIGS:
        yield _loading(method, 1 if tiny else 80, 64 if tiny else 256)


def _loading(method: str, blocks: int, hidden: int) -> Case:
    model = peft.get_peft_model(Stack(blocks, hidden), CONFIGS[method], adapter_name="a0")
    temporary = tempfile.TemporaryDirectory()
    root = Path(temporary.name)
    model.save_pretrained(root, selected_adapters=["a0"])
    folder = root / "a0"
    adapters = ak.attach(Stack(blocks, hidden))
    adapters.load(folder, "a0")
    plain = Stack(blocks, hidden)
    plain.requires_grad_(False)
    new = names()

    def load() -> str:
        name = next(new)
        adapters.load(folder, name, activate=False)
        return name

    def peft_load() -> str:
        name = next(new)
        model.load_adapter(folder, name)
        return name

    def held(_: object) -> dict[str, Tensor]:
        return {key: value.detach() for key, value in _by_layer(plain)}

    return Case(
        f"load a further {method} adapter, {7 * blocks} layers of {hidden}",
        {
            "hand": Way(lambda: lambda: _by_hand(plain, load_file(folder / FILE)), held),
            "adapterkit": Way(lambda: load, lambda name: dict(adapters.state_dict(name))),
            "peft": Way(
                lambda: peft_load, lambda name: peft.get_peft_model_state_dict(model, adapter_name=name) or temporary
            ),
            "raw load_file": Way(lambda: lambda: load_file(folder / FILE)),
        },
        (Goal(1.5),),
        rounds=5,
        plotted=True,
    )


def _by_hand(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Every tensor of a layer becomes its parameter; what no layer has, the projections of VeRA, the model's buffer."""
    layers = {f"base_model.model.{path}": layer for path, layer in linears(model)}
    for key, tensor in tensors.items():
        path, _, name = key.removesuffix(".weight").rpartition(".")
        if path in layers:
            layers[path]._parameters[name] = nn.Parameter(tensor)
        else:
            model._buffers[name] = tensor


def _by_layer(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for path, layer in linears(model):
        for name, value in layer._parameters.items():
            if value is not None and name != "weight":
                suffix = ".weight" if name.startswith("lora_") else ""
                yield f"base_model.model.{path}.{name}{suffix}", value
    for name, buffer in model._buffers.items():
        if buffer is not None:
            yield f"base_model.{name}", buffer
