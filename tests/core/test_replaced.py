"""Modules that are replaced, resized, moved or taken away after an adapter was put on them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.core.conftest import set_parameters
from tests.models import build, run
from torch import nn
from torch.nn.utils import parametrizations

import adapterkit as ak
from adapterkit_lora import LoraConfig


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 6)
        self.body = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        h = self.embed(ids).mean(1)
        if hasattr(self, "body"):
            h = self.body(h)
        return self.head(self.norm(h))


IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])


def net() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Net().eval()


def adapted(model: nn.Module | None = None, **fields: Any) -> ak.Adapters:
    adapters = ak.attach(net() if model is None else model)
    given = {"target_modules": ["body.0", "body.2", "embed", "head"], "modules_to_save": None, **fields}
    adapters.add("a", LoraConfig(r=2, **given))
    set_parameters(adapters, "a")
    return adapters


class Other(nn.Linear):
    pass


def replace_head(model: Any) -> None:
    model.head = nn.Linear(6, 5)


def resize_weight(model: Any) -> None:
    model.head.weight = nn.Parameter(torch.zeros(5, 6))
    model.head.bias = nn.Parameter(torch.zeros(5))


def grow_embedding(model: Any) -> None:
    model.embed.weight = nn.Parameter(torch.zeros(12, 6))
    model.embed.num_embeddings = 12


def changes(**attributes: Any) -> Callable[[Any], None]:
    """Sets attributes of what it is given, behind `nn.Module`'s back."""
    return lambda layer: layer.__dict__.update(attributes)


REPLACED: dict[str, tuple[Callable[[Any], None], str]] = {
    "a head": (replace_head, "'head' was replaced"),
    "a layer of a sequence": (lambda m: m.body.__setitem__(2, nn.Linear(6, 6)), "'body.2' was replaced"),
    "a parent": (
        lambda m: setattr(m, "body", nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))),
        r"'body.0' \(and 1 more: 'body.2'\) was replaced",
    ),
    "a deleted module": (lambda m: delattr(m, "body"), "'body.0' .* was replaced"),
    "a class": (
        lambda m: setattr(m.body[0], "__class__", Other),
        r"'body.0' was given another class \(Other\)",
    ),
    "a weight": (resize_weight, r"'head' has another weight, of shape \(5, 6\) in place of \(3, 6\): it was resized"),
    "an embedding": (grow_embedding, r"'embed' has another weight, of shape \(12, 6\) in place of \(8, 6\)"),
}
every_way = pytest.mark.parametrize(("change", "message"), REPLACED.values(), ids=REPLACED.keys())


@every_way
def test_calls_that_would_pass_it_over_are_refused_and_change_nothing(
    change: Any, message: str, tmp_path: Path
) -> None:
    adapters = adapted()
    folder = adapters.save("a", tmp_path / "a")
    change(adapters.model)
    before = {key: value.clone() for key, value in adapters.model.state_dict().items()}
    calls: list[Callable[[], Any]] = [
        lambda: adapters.activate("a"),
        lambda: adapters.merge("a"),
        adapters.merge_and_detach,
        lambda: adapters.copy("a", "b"),
        lambda: adapters.rename("a", "b"),
        lambda: adapters.combine("b", {"a": 1.0}),
        lambda: adapters.convert("a", to="lora", name="b"),
        lambda: adapters.swap("a", folder),
        lambda: adapters.load_state_dict("a", {}),
        lambda: adapters.per_sample(["a", None]).__enter__(),
    ]
    for call in calls:
        with pytest.raises(ak.StateError, match=message + ".* since adapter 'a' was added.*Add it again"):
            call()
    assert adapters.names == adapters.active == ("a",)
    after = adapters.model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], value) for key, value in before.items())


@every_way
def test_what_was_trained_can_be_saved(change: Any, message: str, tmp_path: Path) -> None:
    adapters = adapted()
    expected = adapters.model(IDS)
    tensors = {key: tensor.clone() for key, tensor in adapters.state_dict("a").items()}
    change(adapters.model)
    with pytest.warns(
        ak.AdapterWarning, match=message + ".* since adapter 'a' was added.*The file holds what was trained there"
    ):
        folder = adapters.save("a", tmp_path / "a")
    with pytest.warns(ak.AdapterWarning, match=message):
        found = adapters.state_dict("a")
    assert all(torch.equal(found[key], tensor) for key, tensor in tensors.items())
    again = ak.attach(net())
    again.load(folder, "a")
    torch.testing.assert_close(again.model(IDS), expected)


@every_way
def test_the_model_is_cleaned_and_stays_as_it_is(change: Any, message: str) -> None:
    adapters, alone = adapted(), net()
    old = [module for module in adapters.model.modules() if "adapters" in module._modules]
    for model in (adapters.model, alone):
        torch.manual_seed(1)
        change(model)
    model = adapters.detach()
    assert list(model.state_dict()) == list(alone.state_dict())
    assert {n: type(m) for n, m in model.named_modules()} == {n: type(m) for n, m in alone.named_modules()}
    torch.testing.assert_close(model(IDS), alone(IDS))
    assert len(old) == 4
    assert {type(module) for module in old} <= {nn.Linear, nn.Embedding, Other}
    assert not any("adapters" in module._modules for module in old)


@every_way
def test_status_and_the_first_forward_after_a_switch_for_inference_say_so(change: Any, message: str) -> None:
    adapters = adapted()
    assert adapters.status().rows[0].notes == ()
    adapters.activate("a", trainable=False)
    change(adapters.model)
    notes = " ".join(adapters.status().rows[0].notes)
    assert message.split("'")[1] in notes
    assert "since" in str(adapters.status()).splitlines()[-1]
    adapters.activate("a", trainable=False)
    with pytest.raises(ak.StateError, match=message):
        adapters.model(IDS)


@pytest.mark.parametrize(
    ("fields", "change", "text"),
    [
        (
            {},
            grow_embedding,
            r"'embed' has another weight, of shape \(12, 6\) in place of \(8, 6\): it was resized",
        ),
        ({}, resize_weight, r"'head' has another weight, of shape \(5, 6\) in place of \(3, 6\): it was resized"),
        (
            {"modules_to_save": ["embed"], "target_modules": ["body.0"]},
            grow_embedding,
            r"'embed' has another weight, of shape \(12, 6\) in place of \(8, 6\)",
        ),
    ],
)
def test_a_table_a_weight_or_a_head_that_grew_is_named_by_the_forward(
    fields: dict[str, Any], change: Callable[[Any], None], text: str
) -> None:
    adapters = adapted(**fields)
    adapters.model(IDS)
    with pytest.raises(IndexError):  # other errors stay what they are
        adapters.model(IDS + 8)
    change(adapters.model)
    with pytest.raises(ak.StateError, match=text):
        adapters.model(IDS)


def test_a_layer_with_one_output_that_grew_is_named_by_the_forward() -> None:
    model = nn.Sequential(nn.Linear(6, 1, bias=False))
    ak.attach(model).add("a", LoraConfig(r=2, target_modules=["0"]))
    model(torch.ones(2, 6))
    model[0].weight.data = torch.ones(5, 6)
    with pytest.raises(ak.StateError, match=r"'0' has another weight, of shape \(5, 6\) in place of \(1, 6\)"):
        model(torch.ones(2, 6))


@pytest.mark.parametrize("name", ["gpt2", "bart"])
def test_resize_token_embeddings_after_add_is_noticed(name: str, tmp_path: Path) -> None:
    model: Any = build(name)
    table, layer = {"gpt2": ("wte", "c_attn"), "bart": ("encoder.embed_tokens", "q_proj")}[name]
    adapters = ak.attach(model)
    adapters.add("a", LoraConfig(r=2, target_modules=[layer, table], modules_to_save=None))
    model.resize_token_embeddings(40)
    with pytest.raises(ak.StateError, match=f"{table}.* since adapter 'a' was added"):
        adapters.merge("a", untie=True)
    with pytest.raises(ak.StateError, match=f"{table}.* since adapter 'a' was added"):
        run(model, name)


def test_resizing_to_the_same_size_is_no_change() -> None:
    model: Any = build("llama")
    adapters = adapted(model, target_modules=["q_proj", "embed_tokens", "lm_head"])
    expected = run(model, "llama")
    model.resize_token_embeddings(32)
    assert adapters.status().rows[0].notes == ()
    adapters.activate("a")
    torch.testing.assert_close(run(model, "llama"), expected)


def test_batch_norms_that_were_converted(tmp_path: Path) -> None:
    adapters = adapted(target_modules=["body.0"], modules_to_save=["norm"])
    model = nn.SyncBatchNorm.convert_sync_batchnorm(adapters.model)
    assert model is adapters.model
    with pytest.raises(ak.StateError, match="'norm' was replaced since adapter 'a' was added"):
        adapters.merge_and_detach()


class Wrapper(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any) -> Any:
        return self.inner(*args)


def test_what_is_wrapped_or_moved_acts_and_can_be_merged() -> None:
    adapters = adapted(modules_to_save=["head"], target_modules=["body.0"])
    model: Any = adapters.model
    expected, tensors = model(IDS), adapters.state_dict("a")
    model.head, model.body[0] = Wrapper(model.head), Wrapper(model.body[0])
    model.body = nn.Sequential(nn.Identity(), *model.body)
    assert adapters.status().rows[0].notes == ()
    adapters.activate("a")
    torch.testing.assert_close(model(IDS), expected)
    found = adapters.state_dict("a")
    assert all(torch.equal(found[key], value) for key, value in tensors.items())
    plain = adapters.merge_and_detach()
    torch.testing.assert_close(plain(IDS), expected)
    assert isinstance(plain.head, Wrapper)


@pytest.mark.parametrize("change", [replace_head, resize_weight])
def test_weights_that_were_replaced_while_merged_stay(change: Any) -> None:
    adapters = adapted()
    before = {key: value.clone() for key, value in net().state_dict().items()}
    adapters.merge("a")
    change(adapters.model)
    head = {key: value.clone() for key, value in adapters.model.head.state_dict().items()}
    with pytest.raises(ak.StateError, match=r"unmerge is refused: 'head' .* since adapter 'a' was added"):
        adapters.unmerge()
    assert adapters.merged == ("a",)
    with pytest.warns(ak.AdapterWarning, match="'head' .* What is there now stays as it is"):
        model = adapters.detach()
    for key, value in model.state_dict().items():
        assert torch.equal(value, head[key.removeprefix("head.")] if key.startswith("head.") else before[key]), key


def test_a_weight_that_is_computed_since_it_was_merged_into_stays() -> None:
    adapters = adapted(target_modules=["head"])
    adapters.merge("a")
    parametrizations.weight_norm(adapters.model.head)
    expected = adapters.model(IDS)
    with pytest.raises(ak.StateError, match=r"unmerge is refused: 'head.weight' was edited"):
        adapters.unmerge()
    with pytest.warns(ak.AdapterWarning, match=r"'head.weight' is computed .* What is there now stays as it is"):
        model = adapters.detach()
    torch.testing.assert_close(model(IDS), expected)
    assert not model.head._buffers


def test_a_trained_bias_without_the_layers_bias_is_noticed() -> None:
    adapters = adapted(target_modules=["head"], bias="all")
    adapters.model.head.bias = None
    with pytest.raises(ak.StateError, match=r"merge is refused: 'head' has no bias any more since adapter 'a'"):
        adapters.merge("a")


def test_a_module_that_was_replaced_at_one_of_its_places_is_noticed() -> None:
    class Twice(Net):
        def __init__(self) -> None:
            super().__init__()
            self.again = self.body

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.again(self.body(self.embed(ids).mean(1))))

    adapters = adapted(Twice().eval(), target_modules=["body.0"])
    adapters.model.again = nn.Linear(6, 6)
    with pytest.raises(ak.StateError, match=r"'body.0' was replaced since"):
        adapters.merge("a")
    adapters.model.again = adapters.model.body
    adapters.merge("a")


def test_quantisation_that_swaps_modules_is_noticed() -> None:
    adapters = adapted(modules_to_save=["head"], target_modules=["body.0"])
    expected = adapters.model(IDS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao is deprecated
        quantised = torch.ao.quantization.quantize_dynamic(adapters.model, {nn.Linear}, inplace=True)
    torch.testing.assert_close(quantised(IDS), expected, rtol=0.1, atol=0.1)
    with pytest.raises(ak.StateError, match="'head' has another module in place of the adapter's own: it was replaced"):
        adapters.merge_and_detach()


def test_a_copy_of_the_model_asks_itself() -> None:
    adapters = adapted()
    other = copy.deepcopy(adapters.model)
    replace_head(adapters.model)
    assert ak.attach(other).status().rows[0].notes == ()
    ak.attach(other).activate("a")
    replace_head(other)
    assert ak.attach(other).status().rows[0].notes != ()


def conv(**fields: Any) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(4, 4, 3, **{"padding": 1, **fields}))


RESHAPED: dict[str, tuple[dict[str, Any], Callable[[Any], None], str]] = {
    "stride": ({"stride": 2}, changes(stride=(1, 1)), r"another stride: \(1, 1\) in place of \(2, 2\)"),
    "one stride for both": ({"stride": 2}, changes(stride=1), r"another stride: \(1, 1\)"),
    "padding": ({}, changes(padding=(2, 2)), r"another padding: \(2, 2\) in place of \(1, 1\)"),
    "dilation of the same output": (
        {},
        changes(padding=(2, 2), dilation=(2, 2)),
        r"another padding: \(2, 2\) in place",
    ),
    "padding mode": (
        {},
        changes(padding_mode="circular", _reversed_padding_repeated_twice=[1, 1, 1, 1]),
        "another padding_mode: 'circular' in place of 'zeros'",
    ),
    "amount of circular padding": (
        {"padding_mode": "circular"},
        changes(_reversed_padding_repeated_twice=[2, 2, 2, 2]),
        r"another padding: \(2, 2, 2, 2\)",
    ),
    "groups": ({"groups": 2}, changes(groups=4), "another number of groups: 4 in place of 2"),
}


@pytest.mark.parametrize(("fields", "change", "message"), RESHAPED.values(), ids=RESHAPED.keys())
def test_convolution_that_does_something_else_is_refused_in_the_forward_and_by_calls(
    fields: dict[str, Any], change: Callable[[Any], None], message: str
) -> None:
    model, x = conv(**fields), torch.ones(2, 4, 8, 8)
    adapters = adapted(model, target_modules=["0"])
    model(x)
    change(model[0])
    with pytest.raises(ak.StateError, match=message + ".* since adapter 'a' was added, which was made for the old one"):
        model(x)
    with pytest.raises(ak.StateError, match=message), adapters.per_sample(["a", None]):
        model(x)
    with pytest.raises(ak.StateError, match="merge is refused: '0' has " + message):
        adapters.merge("a")
