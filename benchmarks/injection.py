"""What does it cost to add an adapter?

`hand` registers two parameters at each layer and does nothing else: this is the lower bound. `hand: modules` puts a
module around each layer, with a linear layer for each factor, as textbooks do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import peft
import torch
from torch import nn

import adapterkit as ak
from benchmarks.hand import HandModel, inject_modules
from benchmarks.libraries import OUR_CONFIG, PEFT_CONFIG, hand, names, ours, output, theirs
from benchmarks.models import Stack, llama
from benchmarks.runner import Case, Goal, Run, Way, repeated


def cases(tiny: bool) -> Iterator[Case]:
    """First adapters, further ones, and one on the meta device."""
    for blocks in (1,) if tiny else (32, 80, 200):
        yield _first(blocks, plotted=blocks == 80)
    for count, blocks in ((2, 1),) if tiny else ((9, 80), (3, 200)):
        yield _further(count, blocks, plotted=blocks == 80)
    yield _on_meta(1 if tiny else 32)


def _first(blocks: int, plotted: bool) -> Case:
    def way(inject: Callable[[nn.Module], Any]) -> Way:
        def prepare() -> Run:
            model = Stack(blocks)
            return lambda: inject(model)

        return Way(prepare, _said)

    return Case(
        f"first adapter on {7 * blocks} layers of 256",
        {
            "hand": way(_by_hand),
            "hand: modules": way(inject_modules),
            "adapterkit": way(_ours),
            "peft": way(_theirs),
        },
        (Goal(2.0),),
        rounds=7,
        plotted=plotted,
    )


def _by_hand(model: nn.Module) -> nn.Module:
    HandModel(model).inject("x")
    return model


def _ours(model: nn.Module) -> nn.Module:
    ak.attach(model).add("x", OUR_CONFIG)
    return model


def _theirs(model: nn.Module) -> Any:
    return peft.get_peft_model(model, PEFT_CONFIG, adapter_name="x")


def _said(model: nn.Module) -> dict[str, Any]:
    """A new adapter changes nothing, has these factors, and A's values are spread as A's are."""
    trained = [p.detach() for p in model.parameters() if p.requires_grad]
    down, up = trained[::2], trained[1::2]
    values = torch.cat([p.flatten() for p in down])
    bound = down[0].shape[1] ** -0.5
    spread = values.std().item() / bound, (values.abs().max() / bound).item()
    return {
        "output": output(model),
        "A": [tuple(p.shape) for p in down],
        "B": [(tuple(p.shape), p.any().item()) for p in up],
        "spread": [round(spread[0], 1), round(spread[1], 1)],
    }


def _further(count: int, blocks: int, plotted: bool) -> Case:
    by_hand, adapters, model = (make(lambda: Stack(blocks), count) for make in (hand, ours, theirs))
    new = names()

    def way(add: Callable[[str], object], model: nn.Module, mark: str) -> Way:
        def run() -> str:
            name = next(new)
            add(name)
            return name

        return repeated(run, lambda name: _shapes(model, mark.format(name)))

    return Case(
        f"a further adapter beside {count} or more on {7 * blocks} layers of 256",
        {
            "hand": way(lambda name: by_hand.inject(name, train=False), by_hand.model, "_{}."),
            "adapterkit": way(lambda name: adapters.add(name, OUR_CONFIG, activate=False), adapters.model, ".{}."),
            "peft": way(lambda name: model.add_adapter(name, PEFT_CONFIG), model, ".{}."),
        },
        (Goal(2.0),),
        rounds=3,
        plotted=plotted,
    )


def _shapes(model: nn.Module, mark: str) -> list[Any]:
    return [tuple(p.shape) for name, p in model.named_parameters() if mark in f"{name}."]


def _on_meta(blocks: int) -> Case:
    def way(inject: Callable[[nn.Module], Any]) -> Way:
        def prepare() -> Run:
            model = llama(blocks)
            return lambda: inject(model)

        return Way(prepare, lambda model: [tuple(p.shape) for p in model.parameters() if p.requires_grad])

    return Case(
        f"first adapter on the meta device, shape of Llama 8B ({7 * blocks} layers)",
        {"hand": way(_by_hand), "adapterkit": way(_ours), "peft": way(_theirs)},
        (Goal(2.0),),
        rounds=7,
        plotted=True,
    )
