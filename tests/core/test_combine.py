"""Combining and converting adapters on real modules, against dense float64 sums."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests import combining
from tests.combining import adapted, deltas, nothing_changes, same, sums, tiny, with_changes
from tests.models import assert_same_outputs, build, run
from torch import nn

import adapterkit as ak
from adapterkit_lora import LoraConfig

KINDS = ("gpt2", "bert", "convnet", "embednet", "bart")
TWO: dict[str, dict[str, Any]] = {"a": {}, "b": {"r": 2}}


@pytest.fixture
def outer() -> Iterator[ModuleType]:
    plugin = combining.outer_method()
    ak.register(plugin)
    yield plugin
    ak.default_registry.unregister("outer")


@pytest.fixture
def scale(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    plugin = combining.scaling_method(mergeable=request.param)
    ak.register(plugin)
    yield plugin
    ak.default_registry.unregister("scale")


@pytest.mark.parametrize("name", KINDS)
def test_linear_is_the_sum_of_the_changes_on_every_kind_of_layer(name: str) -> None:
    adapters = tiny(name, TWO)
    weights = {"a": 0.7, "b": -1.3}
    report = adapters.combine("c", weights)
    assert adapters.active == ("b",)
    same(deltas(adapters, "c"), sums(adapters, weights))
    adapters.activate("c", trainable=False)
    expected = run(with_changes(adapters.model, sums(adapters, weights)), name)
    torch.testing.assert_close(run(adapters.model, name), expected)
    assert set(report.errors.values()) == {0.0}
    assert max(report.ranks.values()) <= 5


@given(weights=st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=4), rank=st.integers(1, 12))
@settings(max_examples=15, deadline=None)
def test_linear_is_linear_for_all_weights_and_ranks(weights: list[float], rank: int) -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 1), nn.Linear(1, 6)).double()
    names = [f"s{i}" for i in range(len(weights))]
    adapters = adapted(model, {n: {"r": rank + i} for i, n in enumerate(names)}, ["0", "1", "2"])
    given_weights = dict(zip(names, weights, strict=True))
    report = adapters.combine("c", given_weights)
    same(deltas(adapters, "c"), sums(adapters, given_weights), 1e-8)
    assert report.ranks["1"] == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_adapters_of_every_dtype_are_combined_in_float32_at_least(dtype: torch.dtype, tmp_path: Path) -> None:
    adapters = tiny("bert", TWO, dtype)
    for name in "ab":  # kept in the file's dtype, as PEFT's half-precision files are loaded on request
        adapters.save(name, tmp_path / name)
        adapters.load(tmp_path / name, f"{name}-file", dtype=dtype)
    adapters.combine("c", {"a-file": 0.7, "b-file": 0.3})
    found = deltas(adapters, "c")
    same(found, sums(adapters, {"a-file": 0.7, "b-file": 0.3}), 1e-6)
    exact = sums(adapters, {"a": 0.7, "b": 0.3})
    assert all(float((found[p] - d).norm() / d.norm()) < 2e-2 for p, d in exact.items())


def test_twelve_sources() -> None:
    adapters = tiny("bert", {f"s{i}": {"r": 1 + i % 3} for i in range(12)})
    weights = {f"s{i}": (-1) ** i / (i + 1) for i in range(12)}
    adapters.combine("c", weights)
    same(deltas(adapters, "c"), sums(adapters, weights))
    for method in ("ties", "tsv"):
        density = {"density": 0.3} if method == "ties" else {}
        report = adapters.combine(method, weights, method=method, space="core", **density)
        assert set(report.ranks) == set(deltas(adapters, "c"))


def test_a_target_that_only_some_have_is_combined_from_those() -> None:
    adapters = adapted(
        build("bert").double(), {"a": {"target_modules": ["query"]}, "b": {"target_modules": ["query", "value"]}}
    )
    for method in ("linear", "tsv"):
        adapters.combine(method, {"a": 2.0, "b": 0.5}, method=method)
        assert set(deltas(adapters, method)) == set(deltas(adapters, "b"))
        values = {p: 0.5 * d for p, d in deltas(adapters, "b").items() if p.endswith("value")}
        same({p: d for p, d in deltas(adapters, method).items() if p.endswith("value")}, values)


def test_a_layer_too_small_for_the_rank_gets_the_largest_that_it_can_have_and_the_report_says_so() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3)).double()
    adapters = adapted(model, {"a": {"r": 4}, "b": {"r": 4}}, ["0", "1"])
    weights = {"a": 0.7, "b": 0.3}
    reports = [adapters.combine("c", weights, rank=4), adapters.convert("a", to="lora", name="d", rank=5)]
    assert [r.ranks for r in reports] == [{"0": 4, "1": 3}] * 2
    assert [r.clipped for r in reports] == [("1",), ("1",)]
    assert "clipped to rank 3: 1" in str(reports[0])
    assert adapters.combine("e", weights, rank=3).clipped == ()
    exact = sums(adapters, weights)
    same({"1": deltas(adapters, "c")["1"]}, {"1": exact["1"]})
    same(deltas(adapters, "d"), deltas(adapters, "a"))


BACK: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("bert", {}),
    "rslora": ("bert", {"use_rslora": True, "r": 4}),
    "patterns": ("bert", {"rank_pattern": {"query": 5}, "alpha_pattern": {"value": 40}}),
    "rslora patterns": ("gpt2", {"use_rslora": True, "rank_pattern": {"c_attn": 7}}),
    "lora_bias": ("bert", {"lora_bias": True, "target_modules": ["query", "value"]}),
    "lora_bias conv": ("convnet", {"lora_bias": True}),
    "bias all": ("bert", {"bias": "all"}),
    "bias lora_only": ("convnet", {"bias": "lora_only"}),
    "pissa": ("bert", {"init_lora_weights": "pissa", "target_modules": ["query"]}),
    "olora": ("gpt2", {"init_lora_weights": "olora", "target_modules": ["c_attn"]}),
    "wide": ("bert", {"r": 40}),
    "embedding": ("embednet", {}),
    "scaled embedding": ("bart", {}),
}


@pytest.mark.parametrize("case", BACK)
def test_one_adapter_of_weight_one_acts_as_itself(case: str) -> None:
    name, fields = BACK[case]
    adapters = tiny(name, {"a": fields})
    expected = run(adapters.model, name)
    adapters.combine("c", {"a": 1.0})
    adapters.convert("a", to="lora", name="d")
    for result in "cd":
        adapters.activate(result, trainable=False)
        torch.testing.assert_close(run(adapters.model, name), expected)
    assert adapters.config("c").use_rslora is False


@pytest.mark.parametrize("case", ["rslora patterns", "lora_bias", "bias all", "embedding", "scaled embedding"])
def test_a_result_is_saved_and_loaded_as_any_adapter(case: str, tmp_path: Path) -> None:
    name, fields = BACK[case]
    adapters = tiny(name, {"a": fields, "b": {**fields, "r": 2}})
    adapters.combine("c", {"a": 0.5, "b": -0.5})
    adapters.activate("c", trainable=False)
    expected = run(adapters.model, name)
    fresh = build(name).double()
    assert ak.attach(fresh).load(adapters.save("c", tmp_path), name="c").ok
    assert_same_outputs(run(fresh, name), expected)


def test_trained_biases_are_summed_by_weight() -> None:
    adapters = tiny("bert", {"a": {"bias": "all"}, "b": {"bias": "all"}, "m": {}})
    adapters.combine("c", {"a": 0.5, "b": -2.0})
    found = adapters.state_dict("c")
    for key in (k for k in found if k.endswith(".bias")):
        base = dict(adapters.model.named_parameters())[key.removeprefix("base_model.model.").replace(".base_layer", "")]
        a, b = adapters.state_dict("a")[key], adapters.state_dict("b")[key]
        torch.testing.assert_close(found[key], base + 0.5 * (a - base) - 2.0 * (b - base))
    adapters.merge("m")
    with nothing_changes(adapters), pytest.raises(ak.StateError, match=r"merged into .* now\. Call unmerge\(\) first"):
        adapters.combine("d", {"a": 1.0})


def test_rank_and_energy_truncate_optimally_and_say_what_it_cost() -> None:
    adapters = tiny("bert", {"a": {"r": 6}, "b": {"r": 6}})
    weights = {"a": 1.0, "b": 1.0}
    whole = sums(adapters, weights)
    report = adapters.combine("r2", weights, rank=2)
    for path, delta in whole.items():
        values = torch.linalg.svdvals(delta)
        error = float(values[2:].square().sum().sqrt() / values.square().sum().sqrt())
        assert report.errors[path] == pytest.approx(error, rel=1e-6)
        assert float((deltas(adapters, "r2")[path] - delta).norm() / delta.norm()) == pytest.approx(error, rel=1e-6)
    assert set(report.ranks.values()) == {2}
    report = adapters.combine("e", weights, energy=0.9)
    assert all(error**2 <= 0.1 for error in report.errors.values())
    assert "largest relative error of truncation" in str(report)
    assert "of rank" in str(report)


def test_a_third_partys_method_is_combined_with_lora_and_converted_exactly(outer: ModuleType, tmp_path: Path) -> None:
    adapters = tiny("gpt2", {"a": {}})
    adapters.add("o", outer.config(target_modules=["c_attn", "wte"], modules_to_save=None))
    combining.randomise(adapters, "o", 3)
    weights = {"a": 0.5, "o": 2.0}
    for space in ("delta", "core"):
        adapters.combine(space, weights, space=space)
        same(deltas(adapters, space), sums(adapters, weights))
    report = adapters.convert("o", to="lora", name="served")
    assert set(report.ranks.values()) == {1}
    same(deltas(adapters, "served"), deltas(adapters, "o"), 1e-15)
    adapters.save("served", tmp_path)
    with nothing_changes(adapters), pytest.raises(ak.UnsupportedError) as caught:
        adapters.convert("a", to="outer", name="no")
    assert str(caught.value) == (
        "The method 'outer' cannot be a result: it has no hook from_factors, so no change can be "
        "converted to it. Use to='lora', which can express every low-rank change."
    )


@pytest.mark.parametrize(
    ("scale", "advice"),
    [(True, r"Merge it \(adapters\.merge\), or activate it beside"), (False, r"Activate it beside the others instead")],
    indirect=["scale"],
    ids=["mergeable", "not"],
)
def test_what_is_not_additive_says_what_can_be_done_instead(scale: ModuleType, advice: str) -> None:
    adapters = tiny("bert", {"a": {"target_modules": ["query"]}})
    adapters.add("s", scale.config(target_modules=["query"], modules_to_save=None))
    message = r"Adapter 's' \(scale\) has no low-rank change of the weight at 'bert\.encoder\.layer\.0.*" + advice
    with nothing_changes(adapters), pytest.raises(ak.UnsupportedError, match=message):
        adapters.combine("c", {"a": 1.0, "s": 1.0})
    with pytest.raises(ak.UnsupportedError, match=message):
        adapters.convert("s", to="lora", name="c")


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups:UserWarning")
def test_factors_of_peft_that_cross_groups_cannot_be_combined(tmp_path: Path) -> None:
    config = peft.LoraConfig(target_modules=["grouped"], r=4, init_lora_weights=False)
    peft.get_peft_model(build("convnet"), config).save_pretrained(tmp_path)
    adapters = ak.attach(build("convnet"))
    adapters.load(tmp_path, "a")
    with nothing_changes(adapters), pytest.raises(ak.UnsupportedError, match=r"no low-rank change .* at 'grouped'"):
        adapters.combine("c", {"a": 1.0})


def test_grouped_convolutions_in_our_own_form_are_combined() -> None:
    adapters = adapted(build("convnet").double(), TWO, ["grouped", "dilated", "circular"])
    adapters.combine("c", {"a": 0.5, "b": 1.5})
    adapters.activate("c")
    expected = run(with_changes(adapters.model, sums(adapters, {"a": 0.5, "b": 1.5})), "convnet")
    torch.testing.assert_close(run(adapters.model, "convnet"), expected)


def test_a_seed_gives_the_same_masks_whatever_else_is_drawn() -> None:
    adapters = tiny("bert", TWO)

    def combined(name: str, **fields: Any) -> dict[str, torch.Tensor]:
        adapters.combine(name, {"a": 1.0, "b": 1.0}, method="dare_linear", density=0.5, **fields)
        return deltas(adapters, name)

    first = combined("first", seed=7)
    torch.rand(5)
    same(combined("again", seed=7), first, 1e-12)
    other = combined("other", seed=8)
    assert any(not torch.allclose(other[p], d) for p, d in first.items())
    paths = sorted(first)
    assert not torch.equal(first[paths[0]] == 0, first[paths[1]] == 0)  # each target has masks of its own


def test_a_combination_of_merged_adapters_is_of_the_adapters_alone() -> None:
    adapters = tiny("bert", TWO)
    adapters.merge("a")
    adapters.combine("c", {"a": 1.0, "b": 1.0})
    same(deltas(adapters, "c"), sums(adapters, {"a": 1.0, "b": 1.0}))
    adapters.unmerge()


def test_the_result_is_frozen_until_it_is_activated() -> None:
    adapters = tiny("bert", TWO)
    adapters.combine("c", {"a": 1.0})
    assert not any(p.requires_grad for p in adapters.parameters("c"))
    adapters.activate("c")
    assert all(p.requires_grad for p in adapters.parameters("c"))


def test_the_config_keeps_where_the_sources_are_from() -> None:
    where = {"base_model_name_or_path": "org/base", "revision": "v1"}
    adapters = tiny("bert", {"a": where, "b": {**where, "task_type": "SEQ_CLS"}})
    adapters.combine("c", {"a": 1.0, "b": 1.0})
    assert adapters.config("c").base_model_name_or_path == "org/base"
    assert adapters.config("c").revision == "v1"
    assert adapters.config("c").task_type is None  # its head is not here


def nan_in_a(adapters: ak.Adapters) -> None:
    with torch.no_grad():
        next(adapters.parameters("a")).fill_(float("nan"))


ERRORS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "list": ({"sources": ["a", "b"]}, ak.ConfigError, r"combine takes adapters and their weights, \{'a': 0\.7"),
    "empty": ({"sources": {}}, ak.ConfigError, r"combine takes adapters and their weights"),
    "unknown": ({"sources": {"x": 1.0}}, ak.UnknownNameError, r"Unknown adapter 'x'\. Available: 'a', 'b'"),
    "nan": (
        {"sources": {"a": float("nan")}},
        ak.ConfigError,
        r"The weight of 'a' is nan, but it must be a finite number",
    ),
    "inf": ({"sources": {"a": 1.0, "b": -float("inf")}}, ak.ConfigError, r"The weight of 'b' is -inf"),
    "huge": ({"sources": {"a": 10**400}}, ak.ConfigError, r"The weight of 'a' is 1000"),
    "bool": ({"sources": {"a": True}}, ak.ConfigError, r"The weight of 'a' is True"),
    "text": ({"sources": {"a": "1"}}, ak.ConfigError, r"The weight of 'a' is '1'"),
    "taken": ({"name": "b"}, ak.ConfigError, r"There is an adapter 'b' already"),
    "dot": ({"name": "a.b"}, ak.ConfigError, r"'a\.b' cannot be an adapter's name"),
    "rank 0": ({"rank": 0}, ak.ConfigError, r"rank = 0 must be a whole number of at least 1"),
    "rank 99": (
        {"rank": 99},
        ak.ConfigError,
        r"rank = 99 is larger than any .* The largest is 16, min\(out, in\) of '",
    ),
    "both": ({"rank": 1, "energy": 0.5}, ak.ConfigError, r"Give rank= or energy=, not both"),
    "to": ({"to": "nothing"}, ak.UnknownNameError, r"Unknown adapter method 'nothing'"),
    "ranks": (
        {"space": "factors"},
        ak.ConfigError,
        r"'.*': space='factors' combines the factors entry by entry, so all ranks must be equal, not \[2, 3\]\. Use "
        r"space='delta' or space='core'\.",
    ),
    "heads": ({"heads": "x"}, ak.UnknownNameError, r"Unknown choice of heads 'x'\. Available: 'a', 'average', 'b'"),
    "overflow": (
        {"sources": {"a": 1e308, "b": 1e308}},
        ak.StateError,
        r"The change of 'c' at '.*' would have values that are not finite\. Nothing was changed",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_what_is_wrong_and_change_nothing(case: str) -> None:
    fields, kind, message = ERRORS[case]
    adapters = tiny("bert", TWO, torch.float32)
    with nothing_changes(adapters), pytest.raises(kind, match=message):
        adapters.combine(**{"name": "c", "sources": {"a": 0.5, "b": 0.5}, **fields})


def test_adapters_that_are_not_finite_are_named() -> None:
    adapters = tiny("bert", TWO)
    nan_in_a(adapters)
    with nothing_changes(adapters), pytest.raises(ak.StateError, match=r"Adapter 'a' has values at '.*' that are not"):
        adapters.combine("c", {"b": 1.0, "a": 1.0}, method="tsv")


def test_adapters_of_different_bases_are_refused_with_the_reason() -> None:
    bases = {n: {"base_model_name_or_path": f"org/{n}"} for n in "ab"}
    adapters = tiny("bert", bases)
    message = (
        r"The adapters were trained on different bases: 'a' of 'org/a', 'b' of 'org/b'\. If these are names of one "
        r"model, pass same_base=True\."
    )
    with nothing_changes(adapters), pytest.raises(ak.ConfigError, match=message):
        adapters.combine("c", {"a": 1.0, "b": 1.0})
    adapters.combine("c", {"a": 1.0, "b": 1.0}, same_base=True)


def test_a_bias_beside_an_embedding_cannot_be_told_in_one_lora_config() -> None:
    adapters = adapted(
        build("embednet"),
        {"a": {"lora_bias": True, "target_modules": ["layers.0"]}, "b": {"target_modules": ["embed"]}},
    )
    with nothing_changes(adapters), pytest.raises(ak.ConfigError, match="lora_bias has no meaning at 'embed'"):
        adapters.combine("c", {"a": 1.0, "b": 1.0})


def test_a_meta_model_says_that_there_is_nothing_to_combine() -> None:
    adapters = ak.attach(build("bert").to("meta"))
    adapters.add("a", LoraConfig(target_modules=["query"]))
    with pytest.raises(ak.StateError, match=r"Adapter 'a' has no values at '.*': it is on the meta device"):
        adapters.combine("c", {"a": 1.0}, heads="drop")
