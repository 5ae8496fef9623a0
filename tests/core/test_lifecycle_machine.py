"""The life of adapters in any order: whatever is done, each adapter is what it was, and the base comes back."""

from __future__ import annotations

import copy
import io
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from tests.core.conftest import assert_as_before, set_parameters, snapshot
from tests.models import assert_same_outputs, build, inputs
from torch import Tensor, nn

import adapterkit as ak
from adapterkit_lora import LoraConfig

# One of them is a part of the model's paths, one a method of containers, one a part of the adapters' own keys.
NAMES = ("a", "query", "keys", "lora_A", "classifier")
CONFIGS: tuple[tuple[dict[str, Any], dict[str, Any]], ...] = (
    ({"target_modules": ["query", "value"], "modules_to_save": None}, {}),
    ({"target_modules": ["query"], "bias": "lora_only"}, {}),
    ({"target_modules": ["value", "intermediate.dense"], "bias": "all", "modules_to_save": None}, {}),
    ({"target_modules": "all-linear", "lora_dropout": 0.2}, {"num_labels": 5}),
    ({"target_modules": ["word_embeddings"], "use_rslora": True}, {"id2label": {0: "other"}}),
    ({"target_modules": ["output.dense"], "modules_to_save": ["pooler", "classifier"], "lora_bias": True}, {}),
    ({"target_modules": ["classifier"], "modules_to_save": None, "init_lora_weights": "orthogonal"}, {}),
)


def user_hook(module: nn.Module, args: object, output: Tensor) -> Tensor:
    """A hook of the user's own on an adapted layer; it changes the output, so it is seen if it fires twice."""
    return output * 1.5


def output_of(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(**inputs("bert")).logits


class Lifecycle(RuleBasedStateMachine):
    """Its own record of every adapter is the output it gave, alone, when it last changed."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.model = build("bert")
        self.model.bert.encoder.layer[0].attention.self.query.register_forward_hook(user_hook)
        self.model.classifier.register_forward_hook(user_hook)
        self.model.bert.embeddings.requires_grad_(False)  # the user had frozen something already
        self.before = snapshot(self.model)
        self.base = output_of(self.model)
        self.adapters = ak.attach(self.model)
        self.records: dict[str, Tensor] = {}
        self.configs: dict[str, ak.AdapterConfig] = {}
        self.saved: dict[str, Tensor] = {}
        self.active: tuple[str, ...] = ()
        self.trained: tuple[str, ...] = ()

    def teardown(self) -> None:
        self.folder.cleanup()
        assert_as_before(self.adapters.detach(), self.before)

    # What the rules need

    def alone(self, name: str) -> Tensor:
        with self.adapters.activated(name, trainable=False):
            return output_of(self.model)

    def free(self) -> list[str]:
        return [n for n in NAMES if n not in self.records]

    def heads(self, name: str) -> set[str]:
        row = next(row for row in self.adapters.status().rows if row.name == name)
        return set(row.heads)

    def take(self, model: nn.Module) -> None:
        self.model, self.adapters = model, ak.attach(model)

    # Rules

    @initialize(which=st.integers(0, len(CONFIGS) - 1))
    def begin(self, which: int) -> None:
        self.put("a", which)

    @rule(data=st.data(), which=st.integers(0, len(CONFIGS) - 1), activate=st.booleans())
    @precondition(lambda self: len(self.records) < 4)
    def add(self, data: st.DataObject, which: int, activate: bool) -> None:
        self.put(data.draw(st.sampled_from(self.free())), which, activate)

    def put(self, name: str, which: int, activate: bool = True) -> None:
        fields, labels = CONFIGS[which]
        config = LoraConfig(r=2, **fields)
        self.adapters.add(name, config, activate=activate, **labels)
        set_parameters(self.adapters, name, seed=which)
        self.records[name], self.configs[name] = self.alone(name), config
        if activate:
            self.active = self.trained = (name,)

    @rule(data=st.data(), trainable=st.booleans())
    @precondition(lambda self: self.records)
    def activate(self, data: st.DataObject, trainable: bool) -> None:
        names = data.draw(st.lists(st.sampled_from(sorted(self.records)), unique=True, max_size=3))
        owners = [n for n in names if self.heads(n)]
        chosen = data.draw(st.sampled_from(owners)) if len(owners) > 1 else None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ak.AdapterWarning)  # what one changes in another's head does not act
            self.adapters.activate(*names, trainable=trainable, heads=chosen)
        self.active = tuple(names)
        self.trained = self.active if trainable else ()

    @rule()
    @precondition(lambda self: self.trained)
    def train(self) -> None:
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.model.train()
        loss = self.model(**inputs("bert")).logits.square().mean()
        loss.backward()
        self.model.eval()
        with torch.no_grad():
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad, alpha=0.1)
                    parameter.grad = None
        for name in self.trained:
            self.records[name] = self.alone(name)

    @rule(data=st.data())
    @precondition(lambda self: self.records)
    def save(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.records)))
        self.adapters.save(name, Path(self.folder.name) / name)
        self.saved[name] = self.records[name]

    @rule(data=st.data(), activate=st.booleans(), trainable=st.booleans())
    @precondition(lambda self: self.saved and len(self.records) < 4)
    def load(self, data: st.DataObject, activate: bool, trainable: bool) -> None:
        source, name = data.draw(st.sampled_from(sorted(self.saved))), data.draw(st.sampled_from(self.free()))
        report = self.adapters.load(Path(self.folder.name) / source, name, activate=activate, trainable=trainable)
        assert report.ok
        self.records[name], self.configs[name] = self.saved[source], self.adapters.config(name)
        if activate:
            self.active = (name,)
            self.trained = (name,) if trainable else ()
        elif trainable:
            self.trained += (name,)

    @rule(data=st.data())
    @precondition(lambda self: self.records)
    def remove(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.records)))
        self.adapters.remove(name)
        del self.records[name], self.configs[name]
        self.active = tuple(n for n in self.active if n != name)
        self.trained = tuple(n for n in self.trained if n != name)

    @rule(data=st.data())
    @precondition(lambda self: self.records and self.free())
    def rename(self, data: st.DataObject) -> None:
        old, new = data.draw(st.sampled_from(sorted(self.records))), data.draw(st.sampled_from(self.free()))
        self.adapters.rename(old, new)
        names = {name: new if name == old else name for name in self.records}
        self.records = {names[n]: record for n, record in self.records.items()}
        self.configs = {names[n]: config for n, config in self.configs.items()}
        self.active, self.trained = (tuple(map(names.__getitem__, group)) for group in (self.active, self.trained))

    @rule(data=st.data())
    @precondition(lambda self: 0 < len(self.records) < 4)
    def copy(self, data: st.DataObject) -> None:
        source, target = data.draw(st.sampled_from(sorted(self.records))), data.draw(st.sampled_from(self.free()))
        self.adapters.copy(source, target)
        self.configs[target] = self.configs[source]
        assert_same_outputs(self.alone(target), self.records[source])
        set_parameters(self.adapters, target, seed=9)  # which leaves the source alone
        self.records[target] = self.alone(target)

    @rule()
    def deepcopy_model(self) -> None:
        self.take(copy.deepcopy(self.model))

    @rule()
    def pickle_model(self) -> None:
        buffer = io.BytesIO()
        torch.save(self.model, buffer)
        buffer.seek(0)
        self.take(torch.load(buffer, weights_only=False))

    @rule()
    def detach(self) -> None:
        model = self.adapters.detach()
        assert_as_before(model, self.before)
        assert_same_outputs(output_of(model), self.base)
        self.adapters = ak.attach(model)
        self.records, self.configs, self.active, self.trained = {}, {}, (), ()

    # Invariants

    @invariant()
    def the_bare_model_is_the_base(self) -> None:
        with self.adapters.disabled():
            assert_same_outputs(output_of(self.model), self.base)
            assert self.model.config.num_labels == self.base.shape[1]

    @invariant()
    def each_adapter_alone_gives_its_own_output(self) -> None:
        for name, expected in self.records.items():
            with self.adapters.activated(name, trainable=False):
                output = output_of(self.model)
                assert_same_outputs(output, expected)
                assert self.model.config.num_labels == self.model.num_labels == output.shape[1]

    @invariant()
    def names_are_kept_in_order(self) -> None:
        assert self.adapters.names == tuple(self.records)
        assert self.adapters.active == self.active
        assert {n: self.adapters.config(n) for n in self.adapters.names} == self.configs

    @invariant()
    def trainable_adapters_alone_require_gradients(self) -> None:
        expected = {id(p) for name in self.trained for p in self.adapters.parameters(name)}
        if self.records:
            assert {id(p) for p in self.model.parameters() if p.requires_grad} == expected


Lifecycle.TestCase.settings = settings(
    max_examples=15,
    stateful_step_count=20,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)
TestLifecycle = Lifecycle.TestCase
