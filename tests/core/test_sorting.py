"""Which part of an adapter a tensor of a file belongs to, by its key."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import adapterkit as ak
from adapterkit.contract import KeyRule, strip_file_prefix
from adapterkit.model import heads_in_file, layer_tensors, sort_tensors
from adapterkit_lora import LoraConfig

RULE = KeyRule("lora_")
LAYERS = {"block.q": "block.q", "again.q": "block.q", "head": "head", "lora_block.q": "lora_block.q"}
HEADS = {"head": "head", "norm": "norm"}
BIASES = {"block.q": "block.q", "again.q": "block.q", "conv": "conv"}


@pytest.mark.parametrize(
    ("key", "part", "place"),
    [
        ("block.q.lora_A.weight", "layers", ("block.q", "lora_A.weight")),
        ("again.q.lora_A.weight", "layers", ("block.q", "lora_A.weight")),  # another path of that module
        ("lora_block.q.lora_A.weight", "layers", ("lora_block.q", "lora_A.weight")),
        ("block.q.lora_group.lora_A", "layers", ("block.q", "lora_group.lora_A")),
        ("norm.weight", "heads", ("norm", "weight")),
        ("norm.inner.bias", "heads", ("norm", "inner.bias")),
        ("head.base_layer.weight", "heads", ("head", "weight")),  # it has an adapter layer too
        ("conv.bias", "biases", ("conv", "bias")),
        ("again.q.base_layer.bias", "biases", ("block.q", "bias")),
        ("block.q.bias", "biases", ("block.q", "bias")),  # before PEFT 0.7
    ],
)
def test_a_tensor_goes_to_the_part_that_its_key_names(key: str, part: str, place: tuple[str, str]) -> None:
    found = sort_tensors({key: torch.ones(1)}, RULE, LAYERS, HEADS, BIASES, shared=True)
    path, name = place
    assert {k: [*v] for k, v in getattr(found, part).items()} == {path: [name]}
    assert not found.rest


@pytest.mark.parametrize(
    ("key", "split"),
    [("lora_a.lora_b.lora_A.weight", ("lora_a.lora_b", "lora_A.weight")), ("lora_A", None), ("a.weight", None)],
)
def test_without_layers_the_last_part_with_the_prefix_begins_the_local_name(key: str, split: object) -> None:
    assert RULE.split(key) == split


@pytest.mark.parametrize(
    ("keys", "stripped"),
    [
        (["base_model.vera_A"], ["vera_A"]),
        (["base_model.model.a.vera_B", "base_model.vera_A"], ["a.vera_B", "vera_A"]),
        (["base_model.a.vera_B"], ["base_model.a.vera_B"]),  # a module of the model that is called `base_model`
    ],
)
def test_the_prefix_of_shared_tensors_is_optional_too(keys: list[str], stripped: list[str]) -> None:
    assert [*strip_file_prefix(dict.fromkeys(keys, torch.ones(1)))] == stripped


@pytest.mark.parametrize("key", ["other.lora_A.weight", "head.weight", "block.q.weight", "c.weight", "normal.weight"])
def test_a_tensor_of_no_part_is_left_over(key: str) -> None:
    assert [*sort_tensors({key: torch.ones(1)}, RULE, LAYERS, HEADS, BIASES, shared=True).rest] == [key]


@pytest.mark.parametrize("shared", [True, False])
def test_a_name_without_a_path_is_a_shared_tensor_if_the_method_shares_any(shared: bool) -> None:
    found = sort_tensors({"lora_bank": torch.ones(1)}, RULE, LAYERS, HEADS, BIASES, shared=shared)
    assert ([*found.shared], [*found.rest]) == ((["lora_bank"], []) if shared else ([], ["lora_bank"]))


def test_what_peft_writes_again_of_a_head_is_not_needed() -> None:
    keys = ["norm.modules_to_save.bias", "norm.original_module.bias", "norm.bias"]
    found = sort_tensors(dict.fromkeys(keys, torch.ones(1)), RULE, LAYERS, HEADS, BIASES, shared=False)
    assert (found.repeated, [*found.heads["norm"]], found.rest) == (keys[:2], ["bias"], {})


def test_tensors_of_layers_that_are_not_asked_for_are_left_out() -> None:
    tensors = {f"{path}.lora_A": torch.ones(1) for path in ("a", "b")}
    assert {path: [*held] for path, held in layer_tensors(tensors, RULE, ["b"]).items()} == {"b": ["lora_A"]}


@pytest.mark.parametrize(
    ("wanted", "heads"),
    [
        (["head"], ["model.head", "overhead"]),  # at a dot, or merely
        (["model.head"], ["model.head"]),
        (["model", "out"], ["model"]),  # the outermost
        ("out", ["model.head.out"]),
        ([], []),
        (None, []),
    ],
)
def test_heads_are_the_modules_that_end_like_an_entry(wanted: list[str] | str | None, heads: list[str]) -> None:
    keys = ["model.head.out.weight", "model.head.out.bias", "overhead.weight", "lora_bank"]
    assert heads_in_file(keys, wanted) == heads


def test_a_file_may_name_any_path_of_a_module() -> None:
    model = nn.Module()
    model.first, model.again = [nn.Linear(4, 4)] * 2
    model.forward = lambda x: model.again(model.first(x))
    adapters = ak.attach(model)
    adapters.add("a", LoraConfig(r=2, target_modules=["first"], bias="lora_only"))
    tensors = {key.replace("first", "again"): tensor + 1 for key, tensor in adapters.state_dict("a").items()}
    assert adapters.load_state_dict("a", tensors).ok
    assert all(torch.equal(t + 0, tensors[k.replace("first", "again")]) for k, t in adapters.state_dict("a").items())


def test_a_tensor_of_as_many_numbers_in_another_shape_does_not_fit() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    adapters = ak.attach(model)
    adapters.add("a", LoraConfig(r=2, target_modules=["0"]))
    turned = {key: tensor.t() for key, tensor in adapters.state_dict("a").items()}
    with pytest.raises(ak.CheckpointError, match=r"0\.lora_A\.weight: \(4, 2\) in the file, \(2, 4\) on this model"):
        adapters.load_state_dict("a", turned)


@pytest.mark.parametrize("key", ["0.lora_C.weight", "1.extra"])
def test_a_name_that_a_part_does_not_have_is_unexpected(key: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    adapters = ak.attach(model)
    adapters.add("a", LoraConfig(r=2, target_modules=["0"], modules_to_save=["1"]))
    tensors = adapters.state_dict("a") | {key: torch.ones(4)}
    with pytest.raises(ak.CheckpointError, match=rf"unexpected \(1\):\n    {key}"):
        adapters.load_state_dict("a", tensors)
