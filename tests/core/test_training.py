"""What a training needs of adapters: which ones train, with which learning rates, and their whole state."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from tests.core.conftest import set_parameters
from tests.models import build, inputs, run
from torch import Tensor, nn

import adapterkit as ak
from adapterkit_loha import LoHaConfig
from adapterkit_lora import LoraConfig
from adapterkit_vera import VeraConfig

Trained = Callable[..., ak.Adapters]
close = torch.testing.assert_close


# Which adapters train


def test_trainable_tells_which_adapters_require_gradients_whoever_set_it(trained: Trained) -> None:
    adapters = trained(build("bert"), "a", "b", "c", target_modules=["query"], modules_to_save=None)
    assert adapters.trainable == ()
    adapters.activate("c", "a")
    assert adapters.trainable == ("a", "c")
    next(iter(adapters.parameters("b"))).requires_grad_(True)
    with adapters.activated("b", trainable=False):
        assert adapters.trainable == ("a", "b", "c")
    adapters.activate()
    adapters.merge("a")
    assert adapters.trainable == ()
    with adapters.activated("b"):
        assert adapters.trainable == ("b",)


def test_heads_are_the_adapters_own_copies_by_path() -> None:
    model = build("bert")
    adapters = ak.attach(model)
    adapters.add("a", LoraConfig(target_modules=["query"], modules_to_save=["classifier"]), num_labels=5)
    adapters.add("b", LoraConfig(target_modules=["query"], modules_to_save=None))
    (path,) = adapters.heads("a")
    head = adapters.heads("a")[path]
    assert path == "classifier"
    assert isinstance(head, torch.nn.Linear)
    assert head.out_features == 5
    assert head is not model.get_submodule(path)
    assert adapters.heads("b") == {}


# The state of a training

CONFIGS: dict[str, ak.AdapterConfig] = {
    "rslora": LoraConfig(r=4, use_rslora=True, lora_dropout=0.2, bias="all", modules_to_save=None),
    "pissa": LoraConfig(r=2, init_lora_weights="pissa", modules_to_save=None),
    "olora": LoraConfig(r=2, init_lora_weights="olora", modules_to_save=None),
    "loha": LoHaConfig(r=2, rank_dropout=0.1, modules_to_save=None),
    "vera": VeraConfig(r=4, projection_prng_key=5, save_projection=False, modules_to_save=None),
    "head": LoraConfig(r=2, modules_to_save=["classifier"]),
}


def adapted(name: str) -> ak.Adapters:
    """A model with the adapter "a" of this config, of which two of any do not have the same random values."""
    adapters = ak.attach(build("bert").train())
    labels = 5 if name == "head" else None
    adapters.add("a", CONFIGS[name].replace(target_modules=["query", "intermediate.dense"]), num_labels=labels)
    return adapters


def train(adapters: ak.Adapters, optimizer: torch.optim.Optimizer, steps: int) -> None:
    """With the same dropout in each step."""
    for step in range(steps):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(step)
            adapters.model(**inputs("bert")).logits.square().mean().backward()
        optimizer.step()
        adapters.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("name", CONFIGS)
def test_a_training_goes_on_from_its_state(name: str) -> None:
    first, second = adapted(name), adapted(name)
    optimizers = [torch.optim.AdamW(adapters.parameters("a"), lr=0.01) for adapters in (first, second)]
    train(first, optimizers[0], 3)
    state = copy.deepcopy((first.training_state("a"), optimizers[0].state_dict()))
    train(first, optimizers[0], 3)
    second.load_training_state("a", state[0])
    optimizers[1].load_state_dict(state[1])
    found = second.training_state("a")
    assert found.keys() == state[0].keys()
    assert all(torch.equal(tensor, state[0][key]) for key, tensor in found.items())
    assert second.trainable == ("a",)
    train(second, optimizers[1], 3)
    for key, tensor in second.training_state("a").items():
        close(tensor, first.training_state("a")[key], rtol=1e-5, atol=1e-7)
    close(run(second.model.eval(), "bert"), run(first.model.eval(), "bert"), rtol=1e-5, atol=1e-6)


def test_a_state_has_no_name_and_each_tensor_once() -> None:
    first, second = adapted("head"), adapted("head")
    second.rename("a", "b")
    second.load_training_state("b", first.training_state("a"))
    close(run(second.model.eval(), "bert"), run(first.model.eval(), "bert"))
    state = second.training_state("b")
    assert "classifier.adapter_heads.weight" in state
    assert len({tensor.data_ptr() for tensor in state.values()}) == len(state)


def test_shared_tensors_of_two_adapters_part_and_meet_again() -> None:
    adapters = ak.attach(build("bert"))
    for key, name in enumerate("aab"):
        adapters.add(name + str(key), VeraConfig(r=4, projection_prng_key=key // 2, target_modules=["query"]))
    set_parameters(adapters, "b2")
    state, expected = adapters.training_state("b2"), run(adapters.model, "bert")
    state["config"] = adapters.training_state("a0")["config"]  # as if "a0" had been loaded from another's projections
    adapters.load_training_state("a0", state)
    adapters.activate("a0")
    close(run(adapters.model, "bert"), expected)
    shared = {name: next(iter(adapters.layers(name).values())).shared for name in adapters}
    assert shared["a0"] is shared["b2"]
    assert shared["a0"] is not shared["a1"]


def test_a_resized_vocabulary_is_in_the_state() -> None:
    first, second = (ak.attach(build("llama")) for _ in range(2))
    for adapters in (first, second):
        adapters.model.resize_token_embeddings(40)  # type: ignore[operator]
        adapters.add("a", LoraConfig(r=2, target_modules=["q_proj"]))
    second.load_training_state("a", first.training_state("a"))
    tokens = torch.tensor([[35, 39, 1]])
    close(second.model(input_ids=tokens).logits, first.model(input_ids=tokens).logits)
    smaller = ak.attach(build("llama"))
    smaller.add("a", LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ak.CheckpointError, match=r"lm_head.weight is float32 \(40, 16\) in the state"):
        smaller.load_training_state("a", first.training_state("a"))


@pytest.mark.parametrize(
    ("other", "what"),
    [
        ({"lora_alpha": 32}, "lora_alpha = 8, and here it is 32"),
        ({"use_rslora": True}, "use_rslora = False, and here it is True"),
        ({"alpha_pattern": {"query": 4}}, "alpha_pattern = .*, and here it is {'query': 4}"),
    ],
)
def test_a_state_of_another_config_is_refused_though_every_tensor_fits(other: dict[str, Any], what: str) -> None:
    first, second = (ak.attach(build("bert")) for _ in range(2))
    first.add("a", LoraConfig(r=2, target_modules=["query"]))
    second.add("a", LoraConfig(r=2, target_modules=["query"], **other))
    before = copy.deepcopy(second.training_state("a"))
    with pytest.raises(ak.CheckpointError, match=f"it was saved with {what}"):
        second.load_training_state("a", first.training_state("a"))
    assert all(torch.equal(tensor, before[key]) for key, tensor in second.training_state("a").items())


def wrong(key: str, change: Callable[[dict[str, Tensor], str], object]) -> Callable[[dict[str, Tensor]], object]:
    return lambda state: change(state, next(k for k in state if k.endswith(key)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (wrong("lora_A.weight", lambda s, k: s.pop(k)), "it lacks .*lora_A.weight"),
        (wrong("steps", lambda s, k: s.pop(k)), "it lacks steps"),
        (wrong("steps", lambda s, k: s.update({k: torch.ones(2)})), "number of steps is float32"),
        (wrong("config", lambda s, k: s.pop(k)), "it lacks config"),
        (wrong("config", lambda s, k: s.update({k: s[k] + 1})), "its config is no JSON"),
        (wrong("lora_A.weight", lambda s, k: s.update({k + "x": s[k]})), "nothing here has the key .*weightx"),
        (wrong("lora_B.weight", lambda s, k: s.update({k: s[k].mT})), r"float32 \(4, 16\) in the state, and float32 "),
        (wrong("lora_B.weight", lambda s, k: s.update({k: s[k].double()})), "float64 .* in the state, and float32"),
        (wrong("lora_B.weight", lambda s, k: s.update({k: s[k].to("meta")})), "it is on the meta device"),
        (wrong("lora_B.weight", lambda s, k: s.update({k: 1.0})), "there is a float"),  # type: ignore[dict-item]
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(change: Callable[[dict[str, Tensor]], object], message: str) -> None:
    adapters = adapted("rslora")
    before, state = copy.deepcopy(adapters.training_state("a")), copy.deepcopy(adapters.training_state("a"))
    for key, tensor in state.items():
        tensor.add_(key != "config")
    change(state)
    with pytest.raises(ak.CheckpointError, match=message):
        adapters.load_training_state("a", state)
    assert all(torch.equal(tensor, before[key]) for key, tensor in adapters.training_state("a").items())


def test_a_merged_adapter_gives_its_state_and_takes_none(trained: Trained) -> None:
    adapters = trained(build("bert"), "a", target_modules=["query"], modules_to_save=None)
    state = copy.deepcopy(adapters.training_state("a"))
    adapters.merge("a")
    assert all(torch.equal(tensor, state[key]) for key, tensor in adapters.training_state("a").items())
    with pytest.raises(ak.StateError, match="merged"):
        adapters.load_training_state("a", state)


@dataclass(frozen=True, kw_only=True)
class KeepingConfig(ak.AdapterConfig):
    """Of the method whose layers remember something where no state finds it."""

    method = "keeping"


class KeepingLayer(ak.LowRankLayer):
    """A part of rank one."""

    def setup(self, target: ak.Target, config: Any) -> None:
        self.keeping_a, self.keeping_b = target.new(1, target.in_features), target.new(target.out_features, 1)

    def factors(self) -> ak.Factors:
        self.seen = {"x": [torch.zeros(1)]}
        return ak.Factors(self.keeping_b, self.keeping_a)


def test_tensors_that_a_method_hides_are_refused_with_what_to_do() -> None:
    ak.register(ak.plugin(KeepingConfig, KeepingLayer, prefix="keeping_"))
    adapters = ak.attach(nn.Sequential(nn.Linear(3, 3)))
    adapters.add("a", KeepingConfig(target_modules=["0"]))
    adapters.model(torch.ones(1, 3))
    with pytest.raises(ak.PluginError, match=r"KeepingLayer keeps tensors in its attribute 'seen'.*register_buffer"):
        adapters.training_state("a")


# An optimizer


def query(model: nn.Module, name: str) -> None:
    ak.attach(model).add(name, LoraConfig(r=2, target_modules=["query"], modules_to_save=None))


@pytest.mark.parametrize("first", [(), ("a",)], ids=["of the base", "of another adapter"])
def test_a_warning_says_that_the_optimizer_lacks_an_adapter_that_trains(first: tuple[str, ...]) -> None:
    model = build("bert")
    for name in first:
        query(model, name)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad])
    query(model, "b")
    model(**inputs("bert")).logits.sum().backward()
    optimizer.step()
    with pytest.warns(ak.AdapterWarning, match="Adapter 'b' gets gradients, and the optimizer that steps has other"):
        optimizer.step()


def test_optimizers_that_step_one_after_another_are_no_fault() -> None:
    model = build("bert")
    for name in "abc":
        query(model, name)
    adapters = ak.attach(model)
    adapters.activate(*"abc")
    optimizers = [torch.optim.SGD(adapters.parameters(name)) for name in "abc"]
    for _ in range(2):
        model(**inputs("bert")).logits.sum().backward()
        for optimizer in optimizers:
            optimizer.step()


# Groups for an optimizer


def grouped(groups: list[dict[str, Any]]) -> dict[str, tuple[float | None, set[int]]]:
    return {group["name"]: (group.get("lr"), {id(p) for p in group["params"]}) for group in groups}


def ids(adapters: ak.Adapters, name: str, ending: str = "") -> set[int]:
    return {id(p) for key, p in adapters.named_parameters(name) if key.endswith(ending)}


def test_each_adapter_has_its_options_and_each_trained_parameter_one_group(trained: Trained) -> None:
    adapters = trained(build("bert"), "a", "b", "c", "d", target_modules=["query"], modules_to_save=None, bias="all")
    adapters.activate("a", "b", "c")
    next(iter(adapters.parameters("c"))).requires_grad_(False)
    groups = adapters.parameter_groups({"b": {"lr": 1e-4, "weight_decay": 0.1}, "a": {"lr": 1e-3}})
    frozen = id(next(iter(adapters.parameters("c"))))
    assert grouped(groups) == {
        "a": (1e-3, ids(adapters, "a")),
        "b": (1e-4, ids(adapters, "b")),
        "c": (None, ids(adapters, "c") - {frozen}),
    }
    optimizer = torch.optim.AdamW(groups, lr=5.0, weight_decay=0.0)
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [
        (1e-3, 0),
        (1e-4, 0.1),
        (5, 0),
    ]
    assert grouped(adapters.parameter_groups()).keys() == {"a", "b", "c"}


def test_lora_plus_gives_the_up_factor_a_larger_rate_and_all_else_the_plain_one() -> None:
    adapters = ak.attach(build("bert"))
    config = LoraConfig(r=2, target_modules=["query", "word_embeddings"], bias="all", modules_to_save=["classifier"])
    adapters.add("a", config)
    groups = grouped(adapters.parameter_groups({"a": {"lr": 1e-4}}, lora_plus_ratio=16))
    up = ids(adapters, "a", "lora_B.weight") | ids(adapters, "a", "lora_embedding_B")
    assert groups == {"a": (1e-4, ids(adapters, "a") - up), "a.up": (1.6e-3, up)}
    assert len(up) == 3


def test_two_rates_train_two_adapters_as_two_optimizers_do() -> None:
    ends = []
    for joined in (True, False):
        adapters = ak.attach(build("bert"))
        torch.manual_seed(3)
        for name in "ab":
            adapters.add(name, LoraConfig(r=2, target_modules=["query"], modules_to_save=None))
        adapters.activate("a", "b")
        rates = {"a": 0.1, "b": 0.01}
        groups = adapters.parameter_groups({name: {"lr": lr} for name, lr in rates.items()})
        optimizers = [torch.optim.AdamW(groups)] if joined else []
        optimizers += [] if joined else [torch.optim.AdamW(adapters.parameters(n), lr=lr) for n, lr in rates.items()]
        for _ in range(3):
            adapters.model(**inputs("bert")).logits.square().mean().backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        ends.append([p.detach() for name in "ab" for p in adapters.parameters(name)])
    for a, b in zip(*ends, strict=True):
        close(a, b)


@pytest.mark.parametrize(
    ("options", "ratio", "error", "message"),
    [
        ({"x": {"lr": 1.0}}, None, ak.UnknownNameError, "Unknown adapter 'x'"),
        ({"b": {"lr": 1.0}}, None, ak.StateError, "Adapter 'b' does not train. Call activate"),
        ({"a": 0.1}, None, ak.ConfigError, "options of 'a' must be those of a group"),
        (["a"], None, ak.ConfigError, "options must be those of each adapter's group"),
        ({"a": {"params": []}}, None, ak.ConfigError, "options of 'a' must be those of a group"),
        ({"a": {"lr": 1.0}}, 0, ak.ConfigError, "lora_plus_ratio = 0 must be a positive number"),
        ({}, 16, ak.ConfigError, "the options of 'a' have none"),
        ({"v": {"lr": 1.0}, "a": {"lr": 1.0}}, 16, ak.UnsupportedError, "the method is 'vera'"),
    ],
)
def test_groups_that_would_leave_something_out_are_refused(
    options: Any, ratio: float | None, error: type[Exception], message: str
) -> None:
    adapters = ak.attach(build("bert"))
    for name in "ab":
        adapters.add(name, LoraConfig(r=2, target_modules=["query"], modules_to_save=None))
    adapters.add("v", VeraConfig(r=2, target_modules=["query"], modules_to_save=None))
    adapters.activate("a", "v")
    with pytest.raises(error, match=message):
        adapters.parameter_groups(options, lora_plus_ratio=ratio)
    adapters.activate()
    with pytest.raises(ak.StateError, match="No adapter trains"):
        adapters.parameter_groups()
