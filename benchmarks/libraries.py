"""The same adapters in each library: LoRA of rank 16 on every layer of a `models.Stack`."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import peft
import torch
from torch import Tensor, nn

import adapterkit as ak
from benchmarks.hand import HandModel
from benchmarks.models import NAMES

RANK = 16
OUR_CONFIG = ak.config("lora", r=RANK, lora_alpha=RANK, target_modules=NAMES)
PEFT_CONFIG = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=NAMES)


_COUNT = itertools.count()


def names() -> Iterator[str]:
    """Names that no adapter has yet."""
    return (f"x{i}" for i in _COUNT)


def hand(make: Callable[[], nn.Module], count: int) -> HandModel:
    """`count` adapters by hand, `a0`, `a1`, ...; the first acts."""
    model = HandModel(make(), RANK)
    for i in range(count):
        model.inject(f"a{i}", train=not i)
    return model


def ours(make: Callable[[], nn.Module], count: int) -> ak.Adapters:
    """The same with adapterkit."""
    adapters = ak.attach(make())
    for i in range(count):
        adapters.add(f"a{i}", OUR_CONFIG, activate=not i)
    return adapters


def theirs(make: Callable[[], nn.Module], count: int) -> Any:
    """The same with PEFT."""
    model = peft.get_peft_model(make(), PEFT_CONFIG, adapter_name="a0")
    for i in range(1, count):
        model.add_adapter(f"a{i}", PEFT_CONFIG)
    return model


@torch.no_grad()
def give_values(parameters: Iterator[tuple[str, nn.Parameter]], seed: int) -> None:
    """The same values whatever the library: by the order of A and B in the model."""
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in parameters:
        parameter.copy_(torch.randn(parameter.shape, generator=generator).to(parameter) * 0.05)


def adapter_parameters(model: nn.Module, name: str) -> Iterator[tuple[str, nn.Parameter]]:
    """An adapter's factors in a model, whichever library made it: A before B, layer by layer."""
    for path, parameter in model.named_parameters():
        if "lora_" in path and name in (part for piece in path.split(".") for part in (piece, piece[7:])):
            yield path, parameter


@torch.no_grad()
def output(model: Any) -> Tensor:
    """What a model makes of the probe of the `models.Stack` in it."""
    stack = model.base_model.model if isinstance(model, peft.PeftModel) else model
    return model(stack.probe()).clone()
