"""Combining and converting across the methods that are installed: every pair of them, by their factors alone."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tests.combining import deltas, nothing_changes, outer_method, randomise, registered, same, sums
from tests.models import MODELS, build, run

import adapterkit as ak

# PEFT's remark that it sets fan_in_fan_out for Conv1D.
pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")

METHODS = tuple(ak.methods())
TARGETS = {"bert": ["query", "intermediate.dense"], "gpt2": ["c_attn"]}


def with_adapters(model: str, *methods: str) -> ak.Adapters:
    adapters = ak.attach(build(model).double())
    for seed, method in enumerate(methods):
        config = ak.config(method, target_modules=TARGETS[model], modules_to_save=None)
        adapters.add(f"{method}{seed}", config.replace(r=3))
        randomise(adapters, f"{method}{seed}", seed)
    return adapters


@pytest.mark.parametrize("space", ["delta", "core"])
@pytest.mark.parametrize("pair", list(itertools.combinations_with_replacement(METHODS, 2)), ids="-".join)
def test_every_pair_of_methods_is_combined_exactly(pair: tuple[str, str], space: str) -> None:
    adapters = with_adapters("bert", *pair)
    first, second = adapters.names
    weights = {first: 0.7, second: -1.5}
    adapters.combine("c", weights, space=space)
    same(deltas(adapters, "c"), sums(adapters, weights), 1e-9)
    adapters.combine("t", weights, method="tsv", space=space, rank=3)
    assert all(rank <= 3 for rank in adapters.config("t").rank_pattern.values() or (3,))


@pytest.mark.parametrize("model", TARGETS)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_becomes_lora_exactly_and_is_served_by_peft(method: str, model: str, tmp_path: Path) -> None:
    adapters = with_adapters(model, method)
    (name,) = adapters.names
    expected = run(adapters.model, model)
    report = adapters.convert(name, to="lora", name="served")
    assert set(report.errors.values()) == {0.0}
    assert max(report.ranks.values()) <= (9 if method == "loha" else 3)
    adapters.activate("served", trainable=False)
    torch.testing.assert_close(run(adapters.model, model), expected)
    loaded = peft.PeftModel.from_pretrained(build(model).double(), adapters.save("served", tmp_path)).double()
    with torch.no_grad():
        out = loaded(**MODELS[model].inputs()).logits
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("answer", "kind", "message"),
    [
        (None, ak.UsageError, "The method 'outer' cannot be a result: it has no hook from_factors"),
        ({"x": torch.zeros(1)}, ak.PluginError, r"from_factors gave \['x'\] for .*; the layer has \['out"),
    ],
    ids=["none", "wrong"],
)
def test_what_a_method_cannot_express_is_named(answer: Any, kind: type[Exception], message: str) -> None:
    plugin = outer_method()

    @ak.hookimpl
    def from_factors(factors: Mapping[str, ak.Factors]) -> Any:
        return answer and (plugin.config(), {f"{path}.{name}": t for path in factors for name, t in answer.items()})

    plugin.from_factors = from_factors  # type: ignore[attr-defined]
    adapters = with_adapters("bert", "lora")
    with registered(plugin), nothing_changes(adapters), pytest.raises(kind, match=message):
        adapters.convert("lora0", to="outer", name="no")


def test_a_method_of_ones_own_can_be_the_result_with_trained_biases() -> None:
    plugin = outer_method()

    @ak.hookimpl
    def from_factors(factors: Mapping[str, ak.Factors]) -> tuple[ak.AdapterConfig, Mapping[str, torch.Tensor]]:
        named = {f"{path}.outer_u": f.up[:, 0] for path, f in factors.items()}
        return plugin.config(), named | {f"{path}.outer_v": f.down[0] for path, f in factors.items()}

    plugin.from_factors = from_factors  # type: ignore[attr-defined]
    adapters = ak.attach(build("bert"))
    adapters.add("b", ak.config("lora", target_modules=["query"], modules_to_save=None, bias="all", r=1))
    adapters.add("plain", ak.config("lora", target_modules=["query"], modules_to_save=None, r=1))
    randomise(adapters, "plain", 1)
    with registered(plugin):
        adapters.convert("b", to="outer", name="with_biases")
        assert adapters.config("with_biases").bias == "all"
        adapters.convert("plain", to="outer", name="yes")
        same(deltas(adapters, "yes"), deltas(adapters, "plain"), 1e-6)
