"""Strengths: the change of an active adapter times a number that may change from one call to the next."""

from __future__ import annotations

import copy
import math
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.combining import outer_method, scaling_method, sums, tiny, with_changes
from tests.core.conftest import assert_as_before, set_parameters, snapshot
from tests.models import NAMES, build, inputs, run
from torch import nn
from torch.utils.checkpoint import checkpoint

import adapterkit as ak
from adapterkit.forward import delta
from adapterkit_lora import LoraConfig

METHODS = ("lora", "loha", "vera", "outer")


@pytest.fixture(autouse=True)
def registered() -> None:
    for plugin in (outer_method(), scaling_method(mergeable=True)):
        ak.register(plugin)


def mlp() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 6)).double()


def adapted(model: nn.Module, **configs: Any) -> ak.Adapters:
    """`model` with an adapter of each config, as if trained. None is active."""
    adapters = ak.attach(model)
    for seed, (name, config) in enumerate(configs.items()):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            adapters.add(name, config, activate=False)
        set_parameters(adapters, name, seed=seed)
    return adapters


def lora(**fields: Any) -> LoraConfig:
    return LoraConfig(**{"r": 2, "target_modules": ["0", "2"], **fields})


X = torch.linspace(-1, 1, 18, dtype=torch.float64).reshape(3, 6)


@pytest.mark.parametrize("name", NAMES)
def test_every_kind_of_layer_computes_with_the_sum_of_the_scaled_changes(name: str) -> None:
    adapters, strengths = tiny(name, {"a": {}, "b": {"r": 2}}), {"a": 0.7, "b": -0.4}
    adapters.activate("a", "b", strengths=strengths)
    expected = run(with_changes(adapters.model, sums(adapters, strengths)), name)
    torch.testing.assert_close(run(adapters.model, name), expected)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_every_additive_method_has_strengths(method: str, training: bool) -> None:
    sizes = {} if method == "outer" else {"r": 2}
    adapters = adapted(mlp(), a=ak.config(method, target_modules=["0"], **sizes))
    adapters.model.train(training)
    adapters.activate("a", strengths={"a": 0.3})
    expected = with_changes(adapters.model, sums(adapters, {"a": 0.3}))(X)
    torch.testing.assert_close(adapters.model(X), expected)


@pytest.mark.parametrize("method", ["loha", "outer"])
def test_dropped_rows_have_the_strength(method: str) -> None:
    config = ak.config(method, target_modules=["0"], **({"r": 2, "rank_dropout": 0.5} if method == "loha" else {}))
    adapters = adapted(mlp(), a=config)
    layer, outs = adapters.layers("a")["0"], []
    layer.row_dropout = 0.5
    for strength in (0.0, 1.0, 0.25):
        adapters.activate("a", strengths={"a": strength})
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            outs.append(adapters.model.train()[0](X))
    torch.testing.assert_close(outs[2], torch.lerp(outs[0], outs[1], 0.25))


def test_biases_have_the_strength_and_heads_have_none() -> None:
    model = build("bert")
    config = LoraConfig(r=2, target_modules=["query"], bias="lora_only", modules_to_save=["classifier"])
    adapters = adapted(model, a=config)
    adapters.activate("a", strengths={"a": 0.0})
    found, plain = run(model, "bert"), build("bert")
    plain.classifier.load_state_dict(adapters._adapters["a"].heads["classifier"].state_dict())
    torch.testing.assert_close(found, run(plain, "bert"))
    bias = next(iter(adapters._adapters["a"].biases))
    adapters.activate("a", strengths={"a": 0.5})
    own, base = adapters._adapters["a"].biases[bias].bias, plain.get_submodule(bias).bias
    torch.testing.assert_close(ak.effective_weight(model.get_submodule(bias), "bias"), (own + base) / 2)


def test_the_bias_of_factors_has_the_strength() -> None:
    adapters = adapted(mlp(), a=lora(lora_bias=True))
    adapters.activate("a", strengths={"a": 0.25})
    expected = copy.deepcopy(adapters.model)
    ak.attach(expected).merge_and_detach()
    torch.testing.assert_close(adapters.model(X), expected(X))
    layer, base = adapters.layers("a")["0"], mlp()[0].bias
    torch.testing.assert_close(
        ak.effective_weight(adapters.model[0], "bias"), base + 0.25 * layer.factors().folded().bias
    )


def test_a_bias_that_the_layer_lacks_has_the_strength_inside_another_method() -> None:
    model = nn.Sequential(nn.Linear(6, 5, bias=False)).double()
    adapters = adapted(
        model, a=lora(target_modules=["0"], lora_bias=True), outer=ak.config("scale", target_modules=["0"])
    )
    found = []
    for strength in (1.0, 0.3):
        adapters.activate("a", "outer", strengths={"a": strength})
        found.append(ak.effective_weight(model[0], "bias"))
    torch.testing.assert_close(found[1], 0.3 * found[0])  # type: ignore[operator]


def test_a_layer_with_a_forward_of_its_own_has_the_strength() -> None:
    adapters = adapted(mlp(), a=lora())
    adapters.activate("a", strengths={"a": 0.3})
    expected = adapters.model(X)
    for layer in adapters.layers("a").values():
        layer.__class__ = type("Own", (type(layer),), {"forward": lambda self, base, x: base(x) + delta(self, x)})
    adapters.activate("a", strengths={"a": 0.3})
    torch.testing.assert_close(adapters.model(X), expected)


def test_a_new_strength_holds_at_once_and_writes_no_tensor() -> None:
    adapters = adapted(mlp(), a=lora())
    written = [p._version for p in adapters.model.parameters()]
    outs = []
    for strength in (1.0, 0.5, 0.0):
        adapters.activate("a", strengths={"a": strength})
        outs.append(adapters.model[0](X))
    torch.testing.assert_close(outs[1], (outs[0] + outs[2]) / 2)
    assert torch.equal(outs[2], mlp()[0](X))
    assert [p._version for p in adapters.model.parameters()] == written


def test_merge_takes_the_strength_that_acts_or_the_one_given() -> None:
    adapters = adapted(mlp(), a=lora(), b=lora())
    before = snapshot(adapters.model)
    adapters.activate("a", trainable=False, strengths={"a": 0.7})
    acting = adapters.model(X)
    adapters.merge("a", "b", strengths={"a": 0.7, "b": 0.0})
    torch.testing.assert_close(adapters.model(X), acting)
    adapters.unmerge()
    assert adapters.strengths == {"a": 0.7}
    adapters.merge("a")
    torch.testing.assert_close(adapters.model(X), acting)
    adapters.unmerge()
    assert torch.equal(adapters.model(X), acting)
    adapters.activate(trainable=False)
    assert_as_before(adapters.model, before)


def test_merge_and_detach_keeps_what_the_model_computes() -> None:
    adapters = adapted(mlp(), a=lora(), b=lora())
    adapters.activate("a", "b", trainable=False, strengths={"a": 0.7, "b": -2})
    acting = adapters.model(X)
    torch.testing.assert_close(copy.deepcopy(adapters.model)(X), acting)
    torch.testing.assert_close(adapters.merge_and_detach("b", "a")(X), acting)


def test_a_block_has_strengths_of_its_own_and_other_threads_do_not_see_them() -> None:
    adapters = adapted(mlp(), a=lora())
    adapters.activate("a", trainable=False, strengths={"a": 0.5})
    half, seen = adapters.model(X), []
    started, ready = threading.Event(), threading.Event()
    thread = threading.Thread(target=lambda: (started.set(), ready.wait(), seen.append(adapters.model(X))))
    thread.start()
    started.wait()
    with adapters.activated("a", trainable=False, strengths={"a": 2}):
        assert adapters.strengths == {"a": 2.0}
        twice = adapters.model(X)
        ready.set()
        thread.join()
    assert torch.equal(seen[0], half)
    assert torch.equal(adapters.model(X), half)
    assert not torch.allclose(twice, half)


def test_gradients_are_those_of_the_scaled_change_also_when_computed_again() -> None:
    adapters = adapted(mlp(), a=lora())
    grads = []
    for again in (False, True):
        adapters.activate("a", strengths={"a": 0.3})
        loss = (checkpoint(adapters.model, X, use_reentrant=False) if again else adapters.model(X)).square().sum()
        adapters.activate("a", strengths={"a": 5.0})
        grads.append(torch.autograd.grad(loss, list(adapters.parameters("a"))))
    for first, second in zip(*grads, strict=True):
        torch.testing.assert_close(first, second)
    expected = adapted(mlp(), a=lora(lora_alpha=0.3 * lora().lora_alpha))
    expected.activate("a")
    loss = expected.model(X).square().sum()
    for found, other in zip(grads[0], torch.autograd.grad(loss, list(expected.parameters("a"))), strict=True):
        torch.testing.assert_close(found, other)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("trainable", [False, True])
def test_each_row_has_the_strength_of_its_adapter(method: str, trainable: bool) -> None:
    sizes: dict[str, Any] = {} if method == "outer" else {"r": 2, "bias": "all"}
    config = ak.config(method, target_modules=["query", "word_embeddings"], modules_to_save=None, **sizes)
    adapters = adapted(build("bert").double(), a=config, b=config)
    given = {key: torch.cat([value, value[:1]]) for key, value in inputs("bert").items()}
    with adapters.per_sample(["a", "b", None], strengths={"a": 0.4, "b": -1.5}, trainable=trainable):
        found = adapters.model(**given).logits
    for row, (name, strength) in enumerate([("a", 0.4), ("b", -1.5), (None, None)]):
        chosen = {} if name is None else {"strengths": {name: strength}}
        with adapters.activated(*filter(None, [name]), trainable=False, **chosen):
            expected = adapters.model(**{key: value[row : row + 1] for key, value in given.items()}).logits
        torch.testing.assert_close(found[row : row + 1], expected)


def test_a_weight_that_is_read_has_the_strength() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).double()
    adapters = adapted(model, a=lora(target_modules=["self_attn.out_proj", "linear1"]))
    x = torch.randn(2, 3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    adapters.activate("a", strengths={"a": 0.6})
    found = model(x)
    adapters.merge("a")
    torch.testing.assert_close(found, model(x))


def test_layers_around_have_the_scaled_layer_inside() -> None:
    adapters = adapted(mlp(), a=lora(), outer=ak.config("scale", target_modules=["0"]))
    adapters.activate("a", "outer", strengths={"a": 0.3})
    found = adapters.model(X)
    scaled = with_changes(adapters.model, sums(adapters, {"a": 0.3}))
    expected = adapted(scaled, outer=ak.config("scale", target_modules=["0"]))
    for mine, other in zip(expected.parameters("outer"), adapters.parameters("outer"), strict=True):
        mine.data = other.data.clone()
    expected.activate("outer")
    torch.testing.assert_close(found, scaled(X))


def test_a_compiled_model_follows_the_strength() -> None:
    adapters = adapted(mlp(), a=lora(), b=ak.config("loha", r=2, target_modules=["0"]))
    compiled = torch.compile(adapters.model, fullgraph=True, backend="eager")
    for strength in (0.5, 1.0, 0.25):
        adapters.activate("a", "b", trainable=False, strengths={"a": strength, "b": 2 * strength})
        torch.testing.assert_close(compiled(X), adapters.model(X))


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # inductor's own call
def test_torchs_default_compiler_keeps_scalings_and_strengths() -> None:
    torch._dynamo.reset()
    adapters = adapted(mlp(), a=lora(bias="lora_only"), b=ak.config("loha", r=2, target_modules=["0"]))
    adapters.activate("a", "b", trainable=False, strengths={"b": 0.25})
    torch.testing.assert_close(torch.compile(adapters.model)(X), adapters.model(X))


def test_a_strength_goes_with_the_name_and_not_with_the_adapter(tmp_path: Path) -> None:
    adapters = adapted(mlp(), a=lora())
    adapters.activate("a", trainable=False, strengths={"a": 0.5})
    half = adapters.model(X)
    adapters.rename("a", "b")
    assert adapters.strengths == {"b": 0.5}
    assert torch.equal(adapters.model(X), half)
    assert "strength of 0.5" in str(adapters.status())
    adapters.load(adapters.save("b", tmp_path / "b"), "a")
    assert adapters.strengths == {"a": 1.0}
    adapters.activate("b")
    assert adapters.strengths == {"b": 1.0}


@pytest.mark.parametrize(
    ("strengths", "error", "message"),
    [
        *(({"a": it}, ak.ConfigError, "must be a finite number") for it in ("1", math.nan, math.inf, True, None)),
        ({"b": 0.5}, ak.UnknownNameError, "'b'"),
        (0.5, ak.ConfigError, "strengths by adapter"),
        ({"a": {"2": 0.5}}, ak.UnknownNameError, "layer of adapter 'a'"),
        ({"a": {"": 0.5}}, ak.UnknownNameError, "layer of adapter 'a'"),
        ({"a": {"0": "x"}}, ak.ConfigError, "at '0'"),
    ],
)
def test_a_strength_is_a_finite_number_for_an_adapter_of_the_call_or_a_layer_that_it_has(
    strengths: Any, error: type[Exception], message: str
) -> None:
    adapters = adapted(mlp(), a=lora(target_modules=["0"]), b=lora())
    with pytest.raises(error, match=message):
        adapters.activate("a", strengths=strengths)
    assert adapters.active == ()


def test_an_adapter_that_is_not_additive_has_none_but_1() -> None:
    adapters = adapted(mlp(), a=ak.config("scale", target_modules=["0"]))
    adapters.activate("a", strengths={"a": 1})
    acting = adapters.model(X)
    for refused in (
        lambda: adapters.activate("a", strengths={"a": 0.5}),
        lambda: adapters.merge("a", strengths={"a": 0.5}),
    ):
        with pytest.raises(ak.UnsupportedError, match="has no multiple"):
            refused()
    assert torch.equal(adapters.model(X), acting)


@pytest.mark.parametrize("by", ["save", "save_pretrained"])
def test_a_file_of_an_adapter_that_trains_with_a_strength_comes_with_a_warning(by: str, tmp_path: Path) -> None:
    model: Any = build("bert")
    adapters = ak.attach(model)
    adapters.add("a", LoraConfig(r=2, target_modules=["query"], modules_to_save=None))
    adapters.activate("a", strengths={"a": 0.5})
    with pytest.warns(ak.AdapterWarning, match=r"trains with a strength of 0.5.*activate\('a', strengths={'a': 0.5}\)"):
        adapters.save("a", tmp_path) if by == "save" else model.save_pretrained(tmp_path)
    adapters.activate("a", strengths={"a": 0.5}, trainable=False)
    adapters.save("a", tmp_path)


BY_LAYER: list[tuple[dict[str, float | None], dict[str, float]]] = [
    ({"bert.encoder.layer.0": 0.5}, {"layer.0": 0.5, "layer.1": 1.0}),
    ({"bert.encoder": -1.0, "bert.encoder.layer.1": None}, {"layer.0": -1.0, "layer.1": 0.0}),
    ({"bert.encoder.layer": 0.25, "bert.encoder.layer.0.attention.self.query": 2.0}, {"layer.0": 2.0, "layer.1": 0.25}),
]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("given", "at"), BY_LAYER)
def test_layers_and_blocks_have_strengths_of_their_own(method: str, given: Any, at: dict[str, float]) -> None:
    sizes = {} if method == "outer" else {"r": 2}
    model = build("bert").double()
    adapters = adapted(model, a=ak.config(method, target_modules=["query"], modules_to_save=None, **sizes))
    changes = {path: change * at[path.split("encoder.")[1][:7]] for path, change in sums(adapters, {"a": 1.0}).items()}
    expected = run(with_changes(model, changes), "bert")
    adapters.activate("a", strengths={"a": given})
    torch.testing.assert_close(run(model, "bert"), expected)
    again = copy.deepcopy(model)
    torch.testing.assert_close(run(again, "bert"), expected)
    with adapters.per_sample(["a", None], strengths={"a": given}):
        torch.testing.assert_close(model(**inputs("bert")).logits[0], expected[0])
    before = snapshot(model)
    adapters.merge("a")
    torch.testing.assert_close(run(model, "bert"), expected)
    adapters.unmerge()
    assert_as_before(model, before)
    torch.testing.assert_close(run(model, "bert"), expected)
    assert "at each layer" in str(adapters.status())


def test_equal_strengths_of_all_layers_are_one() -> None:
    adapters = adapted(mlp(), a=lora())
    adapters.activate("a", strengths={"a": {"0": 0.5, "2": 0.5}})
    assert adapters.strengths == {"a": 0.5}
    adapters.strengths["a"] = 3.0
    assert adapters.strengths == {"a": 0.5}


def test_a_layer_that_is_off_takes_no_gradients_and_computes_as_the_base() -> None:
    adapters = adapted(mlp(), a=lora(bias="all"), outer=ak.config("scale", target_modules=["0"]))
    adapters.activate("a", "outer", strengths={"a": {"0": None}, "outer": {"0": None}})
    assert torch.equal(adapters.model[0](X), mlp()[0](X))
    adapters.model(X).sum().backward()
    assert all(p.grad is None for p in adapters.layers("a")["0"].parameters())
    assert all(p.grad is not None for p in adapters.layers("a")["2"].parameters())
