"""Adapters out of the difference of two models."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tests import oracles
from tests.combining import adapted, deltas, nothing_changes, same
from tests.models import MODELS, build, run
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.combining import extraction
from adapterkit.contract.registry import default_registry
from adapterkit_lora import LoraConfig

EVERYTHING = {
    "bert": ["query", "intermediate.dense", "word_embeddings"],
    "gpt2": ["c_attn", "wte"],
    "convnet": ["conv1d", "conv2d", "conv3d", "grouped", "dilated", "circular", "fc"],
}


@torch.no_grad()
def tuned(model: nn.Module) -> nn.Module:
    """A full fine-tune: every weight matrix changed."""
    other, generator = copy.deepcopy(model), torch.Generator().manual_seed(5)
    for parameter in other.parameters():
        if parameter.dim() > 1:
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter), alpha=0.1)
    return other


def differences(base: nn.Module, other: nn.Module, paths: Any) -> dict[str, Tensor]:
    found = {}
    for path in paths:
        kind = default_registry.kind_of(base.get_submodule(path))
        assert kind is not None
        found[path] = (kind.read(other.get_submodule(path)) - kind.read(base.get_submodule(path))).detach().double()
    return found


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", EVERYTHING)
def test_every_layer_gets_the_best_of_its_rank(name: str, dtype: torch.dtype) -> None:
    base = build(name).to(dtype)
    other = tuned(base)
    report = ak.extract(base, other, rank=2, target_modules=EVERYTHING[name], modules_to_save=None)
    adapters = ak.attach(base)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-4  # the difference of two bfloat16 is exact in float32
    exact = differences(base.double(), other.double(), report.ranks)
    best = {path: oracles.best(delta, 2) for path, delta in exact.items()}
    same(deltas(adapters, "extracted"), best, tolerance)
    left_out = {path: float((delta - best[path]).norm() / delta.norm()) for path, delta in exact.items()}
    assert report.errors == pytest.approx(left_out, abs=1e-4)
    report = ak.extract(base, other, energy=0.5, target_modules=EVERYTHING[name], modules_to_save=None, name="half")
    assert report.ranks == {path: oracles.rank_for(delta, 0.5) for path, delta in exact.items()}


def test_a_merged_adapter_is_found_again_exactly(tmp_path: Path) -> None:
    base, targets = build("bert").double(), ["query", "value"]
    merged = adapted(copy.deepcopy(base), {"a": {"r": 2, "lora_bias": True}}, targets).merge_and_detach("a")
    report = ak.extract(base, merged, rank=2, target_modules=targets, name="again")
    assert max(report.errors.values()) < 1e-10
    ak.attach(base).activate("again", trainable=False)
    torch.testing.assert_close(run(base, "bert"), run(merged, "bert"))

    again = peft.PeftModel.from_pretrained(build("bert").double(), ak.attach(base).save("again", tmp_path))
    with torch.no_grad():
        torch.testing.assert_close(again(**MODELS["bert"].inputs()).logits, run(merged, "bert"), rtol=1e-5, atol=1e-5)


def test_the_head_comes_from_the_tuned_model_with_its_labels() -> None:
    base = build("bert")
    other = tuned(base)
    other.classifier = nn.Linear(16, 5)
    other.config = copy.deepcopy(base.config)
    other.config.id2label = dict(enumerate("vwxyz"))
    report = ak.extract(base, other, rank=1)
    assert report.heads == ("classifier",)
    assert set(report.ranks) == set(ak.select(base, LoraConfig(target_modules="all-linear")).paths)
    ak.attach(base).activate("extracted")
    assert run(base, "bert").shape == (2, 5)
    assert base.config.id2label[4] == "z"
    assert not any(p is q for p in other.classifier.parameters() for q in base.parameters())


def test_large_layers_are_decomposed_at_random_but_always_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extraction, "_LARGE", 30)
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(60, 50), nn.Linear(50, 8)).double()
    other = copy.deepcopy(base)
    decay = torch.diag(0.95 ** torch.arange(50.0, dtype=torch.float64))
    with torch.no_grad():
        other[0].weight += torch.randn(50, 50, dtype=torch.float64) @ decay @ torch.randn(50, 60, dtype=torch.float64)
        other[1].weight += torch.randn(8, 50, dtype=torch.float64)
    state = torch.random.get_rng_state()
    monkeypatch.setattr(torch.cuda, "manual_seed_all", None)  # the states of GPUs, too, stay as they are
    report = ak.extract(base, other, rank=6, name="one")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert ak.extract(base, other, rank=9, name="clipped").clipped == ("1",)
    ak.extract(base, other, rank=6, name="two")
    adapters = ak.attach(base)
    first, exact = deltas(adapters, "one"), differences(base, other, report.ranks)
    same(deltas(adapters, "two"), first, 0.0)
    for path, delta in exact.items():
        optimum = float((delta - oracles.best(delta, 6)).norm() / delta.norm())
        stated = report.errors[path]
        assert stated == pytest.approx(float((delta - first[path]).norm() / delta.norm()), rel=1e-6)
        assert stated <= optimum * 1.01


def test_no_difference_gives_an_adapter_that_does_nothing() -> None:
    base = build("bert").double()
    expected = run(base, "bert")
    report = ak.extract(base, copy.deepcopy(base), rank=2)
    assert set(report.errors.values()) == {0.0}
    ak.attach(base).activate("extracted")
    torch.testing.assert_close(run(base, "bert"), expected, rtol=0, atol=0)


def other_shape(name: str) -> nn.Module:
    model = build(name)
    model.bert.encoder.layer[0].attention.self.query = nn.Linear(16, 20)
    return model


def not_finite(name: str) -> nn.Module:
    model = build(name)
    model.bert.encoder.layer[1].attention.self.query.weight.data[0, 0] = float("inf")
    return model


MERGED = r"The base's weights have 'there' merged into them\. Call unmerge\(\) first"
ERRORS: dict[str, tuple[Any, dict[str, Any], type[Exception], str]] = {
    "no size": (build, {"rank": None}, ak.ConfigError, r"extract needs rank= or energy=: the exact"),
    "rank": (build, {"rank": 17}, ak.ConfigError, r"rank = 17 is larger .* largest is 16, min.* of '.*query'"),
    "taken": (build, {"name": "there"}, ak.ConfigError, r"There is an adapter 'there' already"),
    "shape": (other_shape, {}, ak.SelectionError, r"'.*layer\.0\.attention\.self\.query' is Linear.* in the base"),
    "module": (lambda _: build("gpt2"), {}, ak.SelectionError, r"has no module '.*so it is not a fine-tune"),
    "inf": (not_finite, {}, ak.StateError, r"The difference of the models at '.*layer\.1.*' has values that"),
    "meta": (lambda name: build(name).to("meta"), {}, ak.StateError, r"is on the meta device\. Both models must be"),
    "merged": (build, {}, ak.StateError, MERGED),
    "to": (build, {"to": "nothing"}, ak.UnknownNameError, r"Unknown adapter method 'nothing'"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_say_what_is_wrong_and_change_nothing(case: str) -> None:
    make, fields, kind, message = ERRORS[case]
    base, other = build("bert"), make("bert")
    adapters = ak.attach(base)
    adapters.add("there", LoraConfig(target_modules=["value"]))
    if case == "merged":
        adapters.merge("there")
    with nothing_changes(adapters), pytest.raises(kind, match=message):
        ak.extract(base, other, **{"rank": 2, "target_modules": ["query"], "modules_to_save": None, **fields})


def test_layers_without_a_difference_are_left_out_and_counted() -> None:
    base = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        tuned[1].weight.add_(torch.ones(4, 4))
    report = ak.extract(base, tuned, rank=1)
    assert list(report.ranks) == ["1"]
    assert report.unchanged == ("0", "2")
    ak.attach(base).activate("extracted")
    assert "left out, because the models are the same there: 2 layers" in str(report)
    with torch.no_grad():
        torch.testing.assert_close(base(torch.ones(1, 4)), tuned(torch.ones(1, 4)))
