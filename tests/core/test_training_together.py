"""Several adapters in one training: a row of the batch for each, all on every row, and some of them frozen."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pytest
import torch
from tests.core.conftest import set_parameters
from tests.models import build
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import adapterkit as ak

CONFIGS = {
    "lora": ak.config("lora", r=2, target_modules=["query", "intermediate.dense"], modules_to_save=["classifier"]),
    "biases": ak.config("lora", r=2, target_modules=["query"], bias="lora_only", modules_to_save=None),
    "loha": ak.config("loha", r=2, target_modules=["query", "word_embeddings"], modules_to_save=None),
    "vera": ak.config("vera", r=4, target_modules=["value"], modules_to_save=None),
}
RATES = {"lora": 1e-2, "biases": 3e-3, "loha": 1e-3, "vera": 2e-2}
ROWS = ["lora", "vera", None, "loha", "lora", "biases", "loha"]


def model() -> nn.Module:
    return build("bert").double()  # in eval mode: a dropout would draw other numbers for other rows


def adapted(*names: str) -> ak.Adapters:
    """A model in float64 with these adapters, as they are in the middle of a training. None is active."""
    adapters = ak.attach(model())
    for seed, name in enumerate(CONFIGS):
        if name in names:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                adapters.add(name, CONFIGS[name], activate=False)
            set_parameters(adapters, name, seed=seed)
    return adapters


def optimizer(adapters: ak.Adapters, names: Iterable[str]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(adapters.parameter_groups({name: {"lr": RATES[name]} for name in names}))


def batches(count: int = 4) -> list[tuple[Tensor, Tensor]]:
    noise = torch.Generator().manual_seed(0)
    shape = (len(ROWS), 9)
    return [
        (torch.randint(1, 30, shape, generator=noise), torch.randint(0, 3, shape[:1], generator=noise))
        for _ in range(count)
    ]


def loss(adapters: ak.Adapters, ids: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(adapters.model(input_ids=ids).logits, labels, reduction="sum")


def values(adapters: ak.Adapters, name: str) -> Mapping[str, Tensor]:
    return {key: parameter.detach().clone() for key, parameter in adapters.named_parameters(name)}


def assert_same(found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, atol=1e-6, rtol=0.0)


def test_adapters_on_rows_of_their_own_train_as_each_does_alone() -> None:
    together = adapted(*CONFIGS)
    together.activate(*CONFIGS)
    steps = optimizer(together, CONFIGS)
    for ids, labels in batches():
        with together.per_sample(ROWS, trainable=True):
            loss(together, ids, labels).backward()
        steps.step()
        steps.zero_grad()
    for name in CONFIGS:
        alone, own = adapted(name), [i for i, row in enumerate(ROWS) if row == name]
        before = values(alone, name)
        alone.activate(name)
        steps = optimizer(alone, [name])
        for ids, labels in batches():
            loss(alone, ids[own], labels[own]).backward()
            steps.step()
            steps.zero_grad()
        assert_same(values(together, name), values(alone, name))
        assert all(not torch.equal(value, before[key]) for key, value in values(alone, name).items())


def test_adapters_on_all_rows_train_with_a_rate_each() -> None:
    names = ("biases", "loha", "vera")
    found, expected = adapted(*names), adapted(*names)
    for adapters in (found, expected):
        adapters.activate(*names)
    one = optimizer(found, names)
    several = [torch.optim.AdamW(expected.parameters(name), lr=RATES[name]) for name in names]
    for ids, labels in batches():
        loss(found, ids, labels).backward()
        one.step()
        one.zero_grad()
        loss(expected, ids, labels).backward()
        for each in several:
            each.step()
            each.zero_grad()
    for name in names:
        assert_same(values(found, name), values(expected, name))


@pytest.mark.parametrize("frozen", ["lora", "loha", "vera"])
def test_an_adapter_trains_on_top_of_a_frozen_one_as_on_its_merge(frozen: str) -> None:
    found, expected = adapted(frozen, "biases"), adapted(frozen, "biases")
    before = values(found, frozen)
    found.activate(frozen, "biases", trainable=["biases"])
    assert found.trainable == ("biases",)
    expected.merge(frozen)
    expected.activate("biases")
    for adapters in (found, expected):
        steps = optimizer(adapters, ["biases"])
        for ids, labels in batches():
            loss(adapters, ids, labels).backward()
            steps.step()
            steps.zero_grad()
    assert_same(values(found, "biases"), values(expected, "biases"))
    for key, parameter in found.named_parameters(frozen):
        assert parameter.grad is None
        assert torch.equal(parameter, before[key])


@pytest.mark.parametrize("again", [False, True])
def test_in_a_block_a_frozen_adapter_is_a_constant_though_it_trains_outside(again: bool) -> None:
    adapters = adapted("loha", "biases")
    adapters.activate("loha")
    ids, labels = batches(1)[0]
    with adapters.activated("loha", "biases", trainable=["biases"]):
        arguments = (adapters, ids, labels)
        inside = checkpoint(loss, *arguments, use_reentrant=False) if again else loss(*arguments)
    inside.backward()
    assert all(parameter.grad is None for parameter in adapters.parameters("loha"))
    assert all(parameter.grad is not None for parameter in adapters.parameters("biases"))
    loss(adapters, ids, labels).backward()
    assert all(parameter.grad is not None for parameter in adapters.parameters("loha"))


def test_some_of_the_rows_train() -> None:
    adapters = adapted("lora", "loha")
    ids, labels = batches(1)[0]
    rows = [row if row in adapters else None for row in ROWS]
    with adapters.per_sample(rows, trainable=["loha"]):
        loss(adapters, ids, labels).backward()
    assert all(parameter.grad is None for parameter in adapters.parameters("lora"))
    found = {key: parameter.grad for key, parameter in adapters.named_parameters("loha")}
    own, alone = [i for i, row in enumerate(rows) if row == "loha"], adapted("loha")
    alone.activate("loha")
    loss(alone, ids[own], labels[own]).backward()
    assert_same(found, {key: parameter.grad for key, parameter in alone.named_parameters("loha")})


def test_names_that_train_are_active_ones() -> None:
    adapters = adapted("lora", "loha")
    with pytest.raises(ak.UnknownNameError, match="'loha'"):
        adapters.activate("lora", trainable=["loha"])
    with pytest.raises(ak.ConfigError, match="a list of the names"):
        adapters.activate("lora", trainable="lora")
    assert adapters.active == ()
    adapters.activate("lora", "loha", trainable=["lora"])
    adapters.rename("lora", "x")
    assert adapters.trainable == ("x",)
    adapters.activate("x", "loha", trainable=["loha"])
    assert adapters.trainable == ("loha",)
