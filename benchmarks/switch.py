"""What does it cost to switch adapters, to disable them, and to delete one?

`hand` is one pointer that all layers read, and a loop over the parameters where `requires_grad` must follow.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import adapterkit as ak
from benchmarks.hand import HandModel
from benchmarks.libraries import (
    OUR_CONFIG,
    PEFT_CONFIG,
    adapter_parameters,
    give_values,
    hand,
    names,
    ours,
    output,
    theirs,
)
from benchmarks.models import Stack
from benchmarks.runner import Case, Goal, Run, Way


def cases(tiny: bool) -> Iterator[Case]:
    """Each operation with few adapters on the model and with many."""
    blocks = 1 if tiny else 32
    for count in (2, 3) if tiny else (2, 10, 30):
        three = Three(blocks, count)
        yield three.switching(plotted=count == 10)
        yield three.training()
        yield three.disabling(plotted=count == 10)
        yield three.deleting()


class Three:
    """A model with `count` adapters of the same values, made in three ways."""

    def __init__(self, blocks: int, count: int, hidden: int = 256, peft: bool = True) -> None:
        self.of = f"{count} adapters × {7 * blocks} layers"
        self.hand: HandModel = hand(lambda: Stack(blocks, hidden), count)
        self.ours: ak.Adapters = ours(lambda: Stack(blocks, hidden), count)
        self.models: dict[str, Any] = {"hand": self.hand.model, "adapterkit": self.ours.model}
        self.peft: Any = None
        if peft:
            self.peft = self.models["peft"] = theirs(lambda: Stack(blocks, hidden), count)
        for model in self.models.values():
            for i in range(2):
                give_values(adapter_parameters(model, f"a{i}"), i)

    def _way(self, name: str, run: Run) -> Way:
        return Way(lambda: run, lambda returned: output(self.models[name]))

    def _turns(self, switch: Any) -> Run:
        turn = itertools.cycle(["a1", "a0"])
        return lambda: switch(next(turn))

    def switching(self, plotted: bool) -> Case:
        def point(name: str) -> None:
            self.hand.pointer.name = name

        runs = {
            "hand": self._turns(point),
            "adapterkit": self._turns(lambda name: self.ours.activate(name, trainable=False)),
            "peft": self._turns(lambda name: self.peft.set_adapter(name, inference_mode=True)),
        }
        ways = {name: self._way(name, run) for name, run in runs.items() if name in self.models}
        return Case(f"switch for inference, {self.of}", ways, (Goal(limit=0.02),), calls=20, plotted=plotted)

    def training(self) -> Case:
        runs = {
            "hand": self._turns(self.hand.train),
            "adapterkit": self._turns(self.ours.activate),
            "peft": self._turns(self.peft and self.peft.set_adapter),
        }
        ways = {
            name: Way(lambda run=run: run, lambda _, name=name: (output(self.models[name]), self._trained(name)))
            for name, run in runs.items()
            if name in self.models
        }
        return Case(f"switch for training (requires_grad), {self.of}", ways, (Goal(2.0),), calls=4)

    def _trained(self, name: str) -> list[bool]:
        model = self.models[name]
        return [p.requires_grad for i in range(2) for _, p in adapter_parameters(model, f"a{i}")]

    def disabling(self, plotted: bool) -> Case:
        def way(name: str, context: Any) -> Way:
            def run() -> None:
                with context():
                    pass

            def inside(_: object) -> Any:
                with context():
                    return output(self.models[name])

            return Way(lambda: run, inside)

        contexts: dict[str, Any] = {
            "hand": self._nobody,
            "adapterkit": self.ours.disabled,
            "peft": self.peft and self.peft.disable_adapter,
        }
        ways = {name: way(name, context) for name, context in contexts.items() if name in self.models}
        return Case(f"disabled(), enter and exit, {self.of}", ways, (Goal(limit=0.02),), calls=20, plotted=plotted)

    @contextmanager
    def _nobody(self) -> Iterator[None]:
        before, self.hand.pointer.name = self.hand.pointer.name, None
        try:
            yield
        finally:
            self.hand.pointer.name = before

    def deleting(self) -> Case:
        new = names()

        def by_hand() -> Run:
            name = next(new)
            self.hand.inject(name, train=False)
            return lambda: self.hand.remove(name)

        def own() -> Run:
            name = next(new)
            self.ours.add(name, OUR_CONFIG, activate=False)
            return lambda: self.ours.remove(name)

        def peft() -> Run:
            name = next(new)
            self.peft.add_adapter(name, PEFT_CONFIG)
            return lambda: self.peft.delete_adapter(name)

        def left(name: str) -> Any:
            return lambda _: (output(self.models[name]), len(list(self.models[name].parameters())))

        runs = {"hand": by_hand, "adapterkit": own, "peft": peft}
        ways = {name: Way(prepare, left(name)) for name, prepare in runs.items() if name in self.models}
        return Case(f"delete one, {self.of}", ways, (Goal(2.0),), rounds=5, seconds=4.0)
