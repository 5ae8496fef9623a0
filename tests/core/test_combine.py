"""Combining and converting adapters on real modules, against dense float64 sums."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tests import combining, oracles
from tests.combining import adapted, deltas, nothing_changes, same, sums, tiny, with_changes
from tests.models import assert_same_outputs, build, run
from torch import nn

import adapterkit as ak

KINDS = ("gpt2", "bert", "embednet", "bart", "convnet")
TWO: dict[str, dict[str, Any]] = {"a": {}, "b": {"r": 2}}


@pytest.mark.parametrize("name", KINDS)
def test_linear_is_the_sum_of_the_changes_on_every_kind_of_layer(name: str) -> None:
    convolutions = ["grouped", "dilated", "circular", "fc"]
    adapters = adapted(build(name).double(), TWO, convolutions) if name == "convnet" else tiny(name, TWO)
    weights = {"a": 0.7, "b": -1.3}
    report = adapters.combine("c", weights)
    assert adapters.active == ("b",)
    assert not any(p.requires_grad for p in adapters.parameters("c"))
    same(deltas(adapters, "c"), sums(adapters, weights))
    adapters.activate("c", trainable=False)
    expected = run(with_changes(adapters.model, sums(adapters, weights)), name)
    torch.testing.assert_close(run(adapters.model, name), expected)
    assert set(report.errors.values()) == {0.0}
    assert max(report.ranks.values()) <= 5


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


def test_a_target_that_only_some_have_is_combined_from_those() -> None:
    fields = {"a": {"target_modules": ["query"]}, "b": {"target_modules": ["query", "value"]}}
    adapters = adapted(build("bert").double(), fields)
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
def test_one_adapter_of_weight_one_acts_as_itself_here_and_from_its_file(case: str, tmp_path: Path) -> None:
    name, fields = BACK[case]
    adapters = tiny(name, {"a": fields})
    expected = run(adapters.model, name)
    adapters.combine("c", {"a": 1.0})
    adapters.convert("a", to="lora", name="d")
    for result in "cd":
        adapters.activate(result, trainable=False)
        torch.testing.assert_close(run(adapters.model, name), expected)
    assert adapters.config("c").use_rslora is False
    fresh = build(name).double()
    assert ak.attach(fresh).load(adapters.save("d", tmp_path), name="d").ok
    assert_same_outputs(run(fresh, name), run(adapters.model, name))


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


def test_a_density_that_keeps_nothing_is_said() -> None:
    adapters = tiny("bert", {"a": {}})
    with pytest.warns(ak.AdapterWarning, match=r"'c' changes no weight: density = 1e-06 keeps none of the entries"):
        adapters.combine("c", {"a": 1.0}, method="ties", density=1e-6)


@pytest.mark.parametrize("name", ["classifier.weight", "bert.pooler.dense.bias"])
def test_heads_and_biases_that_are_not_finite_are_refused(name: str) -> None:
    adapters = tiny("bert", {"a": {"bias": "all", "modules_to_save": ["classifier"], "target_modules": ["query"]}})
    with torch.no_grad():
        dict(adapters.named_parameters("a"))[name].fill_(torch.nan)
    with nothing_changes(adapters), pytest.raises(ak.StateError, match=r"'c' would have values at '.*' that are not"):
        adapters.combine("c", {"a": 1.0}, heads="a")


def test_rank_and_energy_truncate_optimally_and_say_what_it_cost() -> None:
    adapters, weights = tiny("bert", {"a": {"r": 6}, "b": {"r": 6}}), {"a": 1.0, "b": 1.0}
    report = adapters.combine("r2", weights, rank=2)
    found = deltas(adapters, "r2")
    for path, delta in sums(adapters, weights).items():
        best = oracles.best(delta, 2)
        same({path: found[path]}, {path: best}, 1e-9)
        assert report.errors[path] == pytest.approx(float((delta - best).norm() / delta.norm()), rel=1e-6)
    assert set(report.ranks.values()) == {2}
    report = adapters.combine("e", weights, energy=0.9)
    assert all(error**2 <= 0.1 for error in report.errors.values())
    assert "largest relative error of truncation" in str(report)


@pytest.mark.parametrize(
    ("mergeable", "advice"),
    [(True, r"Merge it \(adapters\.merge\), or activate it beside"), (False, r"Activate it beside the others instead")],
)
def test_what_is_not_additive_says_what_can_be_done_instead(mergeable: bool, advice: str) -> None:
    adapters = tiny("bert", {"a": {"target_modules": ["query"]}})
    message = r"Adapter 's' \(scale\) has no low-rank change of the weight at 'bert\.encoder\.layer\.0.*" + advice
    with combining.registered(combining.scaling_method(mergeable)) as scale:
        adapters.add("s", scale.config(target_modules=["query"], modules_to_save=None))
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
    masks = [delta == 0 for delta in first.values() if delta.shape == (16, 16)]
    assert len(masks) > 1
    assert not any(torch.equal(masks[0], mask) for mask in masks[1:])  # each target has masks of its own


def test_the_config_keeps_where_the_sources_are_from() -> None:
    where = {"base_model_name_or_path": "org/base", "revision": "v1", "task_type": "SEQ_CLS"}
    adapters = tiny("bert", {"a": where, "b": where})
    adapters.combine("c", {"a": 1.0, "b": 1.0})
    assert adapters.config("c").base_model_name_or_path == "org/base"
    assert adapters.config("c").revision == "v1"
    assert adapters.config("c").task_type is None  # its head is not here


WEIGHTS, RANKS = (
    "combine takes adapters and their weights",
    r"ranks must be equal, not \[2, 3\]\. Use space='delta' or",
)
ERRORS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "list": ({"sources": ["a", "b"]}, ak.ConfigError, WEIGHTS),
    "empty": ({"sources": {}}, ak.ConfigError, WEIGHTS),
    "unknown": ({"sources": {"x": 1.0}}, ak.UnknownNameError, r"Unknown adapter 'x'\. Available: 'a', 'b'"),
    "nan": ({"sources": {"a": float("nan")}}, ak.ConfigError, "The weight of 'a' is nan, but it must be a finite num"),
    "inf": ({"sources": {"a": 1.0, "b": -float("inf")}}, ak.ConfigError, "The weight of 'b' is -inf"),
    "huge": ({"sources": {"a": 10**400}}, ak.ConfigError, "The weight of 'a' is 1000"),
    "bool": ({"sources": {"a": True}}, ak.ConfigError, "The weight of 'a' is True"),
    "text": ({"sources": {"a": "1"}}, ak.ConfigError, "The weight of 'a' is '1'"),
    "taken": ({"name": "b"}, ak.ConfigError, "There is an adapter 'b' already"),
    "dots": ({"name": ".."}, ak.ConfigError, r"'\.\.' cannot be an adapter's name"),
    "rank 99": ({"rank": 99}, ak.ConfigError, r"rank = 99 is larger than any .* is 16, min\(out, in\) of '"),
    "to": ({"to": "nothing"}, ak.UnknownNameError, "Unknown adapter method 'nothing'"),
    "ranks": ({"space": "factors"}, ak.ConfigError, RANKS),
    "heads": ({"heads": "x"}, ak.UnknownNameError, r"Unknown choice of heads 'x'\. Available: 'a', 'average', 'b'"),
    "overflow": (
        {"sources": {"a": 3e38, "b": 3e38}},
        ak.StateError,
        r"'c' would have values at '.*' that are not finite",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_what_is_wrong_and_change_nothing(case: str) -> None:
    fields, kind, message = ERRORS[case]
    adapters = tiny("bert", TWO, torch.float32)
    with nothing_changes(adapters), pytest.raises(kind, match=message):
        adapters.combine(**{"name": "c", "sources": {"a": 0.5, "b": 0.5}, **fields})


def not_finite() -> ak.Adapters:
    adapters = tiny("bert", TWO)
    with torch.no_grad():
        next(adapters.parameters("a")).fill_(float("nan"))
    return adapters


def bias_beside_an_embedding() -> ak.Adapters:
    fields = {"a": {"lora_bias": True, "target_modules": ["layers.0"]}, "b": {"target_modules": ["embed"]}}
    return adapted(build("embednet"), fields)


def without_values() -> ak.Adapters:
    adapters = tiny("bert", TWO)
    adapters.model.to("meta")
    return adapters


ADAPTERS: dict[str, tuple[Callable[[], ak.Adapters], type[Exception], str]] = {
    "nan": (not_finite, ak.StateError, r"Adapter 'a' has values at '.*' that are not finite"),
    "meta": (without_values, ak.StateError, r"Adapter 'a' has no values at '.*': it is on the meta device"),
    "bias": (bias_beside_an_embedding, ak.ConfigError, "lora_bias has no meaning at 'embed'"),
    "bases": (
        lambda: tiny("bert", {n: {"base_model_name_or_path": f"org/{n}"} for n in "ab"}),
        ak.ConfigError,
        r"The adapters were trained on different bases: 'a' of 'org/a', 'b' of 'org/b'\. If these are names of one "
        r"model, pass same_base=True\.",
    ),
}


@pytest.mark.parametrize("case", ADAPTERS)
def test_adapters_that_cannot_be_combined_are_refused_with_the_reason(case: str) -> None:
    make, kind, message = ADAPTERS[case]
    adapters = make()
    picture = nothing_changes(adapters) if case != "meta" else nullcontext()
    with picture, pytest.raises(kind, match=message):
        adapters.combine("c", {"b": 1.0, "a": 1.0} if case == "nan" else {"a": 1.0, "b": 1.0}, same_base=False)
    if case == "bases":  # adapters of one model have one base, whatever their configs call it
        adapters.combine("c", {"a": 1.0, "b": 1.0})
