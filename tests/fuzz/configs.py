"""Fields of configs, given in Python: each method's own and the common ones, at values of every kind."""

from __future__ import annotations

import copy
import random
import warnings
from dataclasses import fields as fields_of
from typing import Any

import torch
from tests.fuzz.folders import VALUES, net
from tests.fuzz.oracle import Finding, State, refused

import adapterkit as ak

METHODS = ("lora", "loha", "vera")
GOOD: dict[str, dict[str, Any]] = {m: {"r": 2, "target_modules": ["layers.0", "conv"]} for m in METHODS}
GOOD["vera"]["target_modules"] = ["layers.0", "layers.1"]
MORE: list[Any] = [
    *(("layers.0",), {"layers.0"}, object(), b"layers.0", range(3), torch.tensor(2), torch.float32, int, lambda: 1),
    *(0.1, 0.999, 1.0, 4, "gaussian", "pissa", "olora", "lora_only", r"layers\.\d", "layers", {"layers.0": 1}),
    *({"conv": 0.5}, "orthogonal", "eva", "pissa_niter_2", "pissa_niter_0", ["head"], ["norm"], ["embed"], [0]),
    *([5], "SEQ_CLS"),
]


def draw(dice: random.Random) -> tuple[str, dict[str, Any]]:
    """A method, and fields that would work with a few changes."""
    method = dice.choice(METHODS)
    names = [f.name for f in fields_of(ak.method(method).config_type())]
    fields = copy.copy(GOOD[method])
    for _ in range(dice.choice([1, 1, 2, 2, 3, 4])):
        name = dice.choice(names) if dice.random() < 0.97 else dice.choice(["", "new", "R", "r "])
        fields[name] = dice.choice(VALUES + MORE)
    return method, fields


class Target:
    """The model that adapters are added to."""

    def __init__(self) -> None:
        self.model = net()
        self.adapters = ak.attach(self.model)
        self.adapters.add("held", ak.config("lora", r=1, target_modules=["layers.0"]), activate=False)
        self.state = State.of(self.model)

    def check(self, method: str, fields: dict[str, Any]) -> bool:
        """Add an adapter with these fields, run it and remove it; say whether it was accepted.

        Raises:
            Finding: another error than the library's own; a refused call that changed the model; an adapter that was
                accepted and does not run, or that leaves something behind.
        """

        def add() -> None:
            self.adapters.add("x", ak.config(method, **fields), activate=False)

        ids = torch.arange(6).view(1, 6)
        accepted = not refused(add)
        if accepted:

            def run() -> None:
                with self.adapters.activated("x"):
                    self.model(ids).sum().backward()

            if refused(run):
                raise Finding("what was added does not run")
            for parameter in self.adapters.parameters("x"):
                parameter.grad = None
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.adapters.remove("x")
        if State.of(self.model) != self.state:
            raise Finding("the model was changed")
        return accepted
