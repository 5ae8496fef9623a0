"""Merge, unmerge, combine, convert, activate and remove in any order, against dense float64 sums."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from tests.combining import adapted, deltas, has_bits, nothing_changes, sums
from torch import Tensor, nn
from torch.func import functional_call

import adapterkit as ak

IDS = torch.arange(8).view(2, 4)
NAMES = [f"n{i}" for i in range(4)]
WEIGHTS = st.sampled_from([1.0, -0.5, 0.3])


class Net(nn.Module):
    """An embedding, a linear layer and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.linear, self.conv = nn.Embedding(8, 4), nn.Linear(4, 3), nn.Conv1d(3, 2, 3, padding=1)
        self.double()

    def forward(self, ids: Tensor) -> Tensor:
        return self.conv(torch.tanh(self.linear(self.embed(ids))).transpose(1, 2))


def expected(bits: Mapping[str, Tensor], changes: list[dict[str, Tensor]]) -> Tensor:
    """The output with the base's bits and these dense changes added to its weights."""
    weights = dict(bits)
    for path, delta in (item for change in changes for item in change.items()):
        base = weights[f"{path}.weight"]
        weights[f"{path}.weight"] = base + (delta.t() if path == "embed" else delta.view_as(base))
    return functional_call(Net(), weights, (IDS,))


class Weights(RuleBasedStateMachine):
    """What the outputs must be is known at every step; the base's bits must come back."""

    @initialize()
    def start(self) -> None:
        self.model = Net().eval()
        self.bits = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        targets = {"a": ["embed", "linear", "conv"], "b": ["linear"]}
        fields = {name: {"target_modules": t, "r": 2} for name, t in targets.items()}
        self.adapters = adapted(self.model, fields)
        self.changes = {name: deltas(self.adapters, name) for name in "ab"}
        self.adapters.activate()
        self.asked: list[str] = []  # what was activated, merged ones included
        self.merged: list[str] = []

    def free(self) -> list[str]:
        return [name for name in self.changes if name not in self.merged]

    @rule(data=st.data(), trainable=st.booleans())
    def activate(self, data: st.DataObject, trainable: bool) -> None:
        names = data.draw(st.lists(st.sampled_from(self.free()), unique=True)) if self.free() else []
        self.adapters.activate(*names, trainable=trainable)
        self.asked = [n for n in self.asked if n in self.merged] + names

    @precondition(lambda self: self.free())
    @rule(data=st.data(), safe=st.booleans())
    def merge(self, data: st.DataObject, safe: bool) -> None:
        names = data.draw(st.lists(st.sampled_from(self.free()), unique=True, min_size=1))
        self.adapters.merge(*names, safe=safe)
        self.merged += names

    @precondition(lambda self: self.merged)
    @rule()
    def unmerge(self) -> None:
        self.adapters.unmerge()
        self.merged = []

    @precondition(lambda self: self.merged)
    @rule(data=st.data())
    def what_is_merged_is_left_alone(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(self.merged))
        for call in (self.adapters.merge, self.adapters.remove, self.adapters.activate):
            with nothing_changes(self.adapters):
                try:
                    call(name)
                except ak.StateError:
                    continue
                raise AssertionError(f"{call} took a merged adapter")

    @precondition(lambda self: len(self.changes) < 6)
    @rule(data=st.data(), weight=WEIGHTS, other=WEIGHTS, space=st.sampled_from(["delta", "core"]))
    def combine(self, data: st.DataObject, weight: float, other: float, space: str) -> None:
        pair = data.draw(st.lists(st.sampled_from(sorted(self.changes)), unique=True, min_size=1, max_size=2))
        weights = dict(zip(pair, (weight, other), strict=False))
        name = next(n for n in NAMES if n not in self.changes)
        self.adapters.combine(name, weights, space=space)
        self.changes[name] = sums(self.adapters, weights)

    @precondition(lambda self: len(self.changes) < 6)
    @rule(data=st.data())
    def convert(self, data: st.DataObject) -> None:
        source = data.draw(st.sampled_from(sorted(self.changes)))
        name = next(n for n in NAMES if n not in self.changes)
        self.adapters.convert(source, to="lora", name=name)
        self.changes[name] = self.changes[source]

    @precondition(lambda self: [n for n in self.free() if n not in "ab"])
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from([n for n in self.free() if n not in "ab"]))
        self.adapters.remove(name)
        del self.changes[name]
        self.asked = [n for n in self.asked if n != name]

    @invariant()
    def outputs_are_as_predicted(self) -> None:
        with torch.no_grad():
            active = [name for name in self.asked if name not in self.merged]
            changes = [self.changes[name] for name in [*self.merged, *active]]
            torch.testing.assert_close(self.model(IDS), expected(self.bits, changes), rtol=1e-9, atol=1e-9)
        assert self.adapters.active == tuple(active)
        assert self.adapters.merged == tuple(self.merged)
        assert set(self.adapters.names) == set(self.changes)

    @invariant()
    def the_base_has_its_bits_while_nothing_is_merged(self) -> None:
        assert self.merged or has_bits(self.model, self.bits)

    def teardown(self) -> None:
        if hasattr(self, "adapters"):
            self.adapters.detach()
            found = dict(self.model.named_parameters())
            assert list(found) == list(self.bits)
            assert all(torch.equal(found[name], bits) and found[name].requires_grad for name, bits in self.bits.items())


TestWeights = Weights.TestCase
TestWeights.settings = settings(max_examples=30, stateful_step_count=12, deadline=None)
