"""What becomes of heads when adapters are combined."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.combining import nothing_changes, randomise
from tests.models import assert_same_outputs, build, inputs, run
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.contract.keys import HEADS
from adapterkit_lora import LoraConfig


def classifier(counts: tuple[int, ...] = (10, 27), **fields: Any) -> ak.Adapters:
    """Adapters `t0`, `t1`, ... with heads of these sizes on one BERT."""
    adapters = ak.attach(build("bert"))
    for i, count in enumerate(counts):
        labels = {n: f"t{i}-{n}" for n in range(count)}
        adapters.add(f"t{i}", LoraConfig(target_modules=["query"], **fields), id2label=labels)
        randomise(adapters, f"t{i}", i)
    return adapters


def logits(adapters: ak.Adapters, *names: str, heads: str | None = None) -> Tensor:
    with adapters.activated(*names, trainable=False, heads=heads):
        return run(adapters.model, "bert")


def test_concat_is_one_model_over_all_labels(tmp_path: Path) -> None:
    adapters = classifier()
    report = adapters.combine("both", {"t0": 0.5, "t1": 0.5}, heads="concat")
    assert report.heads == ("classifier",)
    found = logits(adapters, "both")
    # the combined body under each task's own head
    adapters.combine("body0", {"t0": 0.5, "t1": 0.5}, heads="t0")
    adapters.combine("body1", {"t0": 0.5, "t1": 0.5}, heads="t1")
    torch.testing.assert_close(found, torch.cat([logits(adapters, "body0"), logits(adapters, "body1")], dim=1))
    adapters.activate("both")
    config = adapters.model.config
    assert config.num_labels == adapters.model.num_labels == 37
    assert config.id2label == {i: f"t0-{i}" if i < 10 else f"t1-{i - 10}" for i in range(37)}
    assert config.label2id["t1-26"] == 36
    loss = adapters.model(**inputs("bert"), labels=torch.tensor([3, 36])).loss
    assert torch.isfinite(loss)

    adapters.save("both", tmp_path)
    fresh = ak.attach(build("bert"))
    fresh.load(tmp_path, "both")
    assert fresh.model.config.num_labels == 37
    assert_same_outputs(run(fresh.model, "bert"), found)

    model = adapters.detach()
    assert model.config.num_labels == model.num_labels == 3
    assert model.classifier.out_features == 3


def test_concat_tells_equal_labels_apart_by_adapter() -> None:
    adapters = ak.attach(build("bert"))
    for name, labels in {"a": ("good", "bad"), "b": ("bad", "ugly")}.items():
        adapters.add(name, LoraConfig(target_modules=["query"]), id2label=dict(enumerate(labels)))
    adapters.combine("c", {"a": 1.0, "b": 1.0}, heads="concat")
    adapters.activate("c")
    assert list(adapters.model.config.id2label.values()) == ["good", "a/bad", "b/bad", "ugly"]


@pytest.mark.parametrize("heads", ["average", "t1"])
def test_a_head_is_the_mean_or_a_copy_in_new_memory(heads: str) -> None:
    adapters = classifier((4, 4))
    adapters.combine("c", {"t0": 3.0, "t1": -1.0}, heads=heads)
    slots = adapters.model.classifier._modules[HEADS]
    expected = (slots["t0"].weight + slots["t1"].weight) / 2 if heads == "average" else slots["t1"].weight
    torch.testing.assert_close(slots["c"].weight, expected)
    assert slots["c"].weight.data_ptr() not in [slots[name].weight.data_ptr() for name in ("t0", "t1")]
    adapters.activate("c")
    assert adapters.model.num_labels == 4


def test_drop_leaves_the_models_own_unless_an_adapter_has_that_name() -> None:
    adapters = classifier((4,))
    assert adapters.combine("bare", {"t0": 1.0}, heads="drop").heads == ()
    assert logits(adapters, "bare").shape == (2, 3)
    adapters.rename("t0", "drop")
    assert adapters.convert("drop", to="lora", name="c").heads == ("classifier",)
    torch.testing.assert_close(logits(adapters, "c"), logits(adapters, "drop"))


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases_beside_a_head_are_saved_and_loaded(bias: str, tmp_path: Path) -> None:
    adapters = classifier((4, 4), bias=bias)
    adapters.combine("c", {"t0": 0.5, "t1": 0.5}, heads="average")
    expected = logits(adapters, "c")
    fresh = ak.attach(build("bert"))
    assert fresh.load(adapters.save("c", tmp_path), "c").ok
    torch.testing.assert_close(run(fresh.model, "bert"), expected)


class TwoLayerHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense, self.out_proj = nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_proj(torch.tanh(self.dense(x)))


def two_layers() -> ak.Adapters:
    model = build("bert")
    model.classifier = TwoLayerHead()
    adapters = ak.attach(model)
    for name in ("t0", "t1"):
        adapters.add(name, LoraConfig(target_modules=["query"]))
    return adapters


def test_concat_of_larger_heads_that_share_what_leads_to_the_output() -> None:
    adapters = two_layers()
    adapters.combine("c", {"t0": 1.0, "t1": 1.0}, heads="concat")
    assert logits(adapters, "c").shape == (2, 6)


def test_tables_that_are_tied_are_tied_in_the_result(tmp_path: Path) -> None:
    adapters = ak.attach(build("gpt2"))
    adapters.add("a", LoraConfig(target_modules=["c_attn"]))
    adapters.model.get_input_embeddings().weight.data.add_(1.0)
    adapters.save("a", tmp_path, embeddings=True)
    adapters = ak.attach(build("gpt2"))
    adapters.load(tmp_path, "a")
    adapters.convert("a", to="lora", name="b")
    tables = [module._modules[HEADS] for module in adapters.model.modules() if HEADS in module._modules]
    assert len(tables) == 2
    assert tables[0]["b"].weight is tables[1]["b"].weight is not tables[0]["a"].weight


def differing() -> ak.Adapters:
    adapters = two_layers()
    randomise(adapters, "t0", 1)
    return adapters


def elsewhere() -> ak.Adapters:
    adapters = classifier((4,))
    adapters.add("t1", LoraConfig(target_modules=["query"], modules_to_save=["pooler"]))
    return adapters


def without_labels() -> ak.Adapters:
    adapters = ak.attach(build("convnet"))
    for name in ("t0", "t1"):
        adapters.add(name, LoraConfig(target_modules=["fc"], modules_to_save=["head"]))
    return adapters


def with_a_change_inside() -> ak.Adapters:
    adapters = classifier((4,))
    adapters.add("t1", LoraConfig(target_modules=["classifier", "query"], modules_to_save=None, bias="all"))
    return adapters


CHOOSE = "'t0', 't1' have heads. Choose one of heads='t0', heads='t1', heads='average', heads='concat', heads='drop'"
SHAPES = "at classifier.weight 't0' has (10, 16), 't1' has (27, 16). Use heads='concat'"
LEADS = "stacks output layers, but classifier.dense.weight, which leads to them, differs between the adapters."
AT = "needs heads at the same modules, but they are at 't0': classifier; 't1': bert.pooler"
ERRORS: dict[str, tuple[Any, str | None, str]] = {
    "no choice": (classifier, None, CHOOSE),
    "unknown": (classifier, "mean", "Unknown choice of heads 'mean'. Available: 'average', 'concat', 'drop', 't0'"),
    "average of sizes": (classifier, "average", SHAPES),
    "differing": (differing, "concat", LEADS),
    "elsewhere": (elsewhere, "concat", f"heads='concat' {AT}"),
    "elsewhere average": (elsewhere, "average", f"heads='average' {AT}"),
    "inside": (with_a_change_inside, "t0", "replaces 'classifier', which 't1' changes, so the result cannot have both"),
    "no labels": (without_labels, "concat", "heads='concat' needs adapters with one head and a label set each"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_say_what_is_wrong_and_change_nothing(case: str) -> None:
    make, choice, message = ERRORS[case]
    adapters = make()
    with nothing_changes(adapters), pytest.raises(ak.AdapterError, match=re.escape(message)):
        adapters.combine("c", {"t0": 1.0, "t1": 1.0}, heads=choice)
