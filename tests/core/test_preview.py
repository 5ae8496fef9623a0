"""What an adapter would be on a model, and that adding it makes just that."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.models import build
from torch import nn
from transformers import BertConfig, LlamaConfig

import adapterkit as ak
from adapterkit.results import merged_paths
from adapterkit_loha import LoHaConfig
from adapterkit_lora import LoraConfig
from adapterkit_vera import VeraConfig

CONFIGS: dict[str, ak.AdapterConfig] = {
    "lora": LoraConfig(r=3, target_modules="all-linear"),
    "ranks by a pattern": LoraConfig(r=3, target_modules="all-linear", rank_pattern={"query": 5}),
    "biases": LoraConfig(r=2, target_modules=["query", "value"], bias="all"),
    "from the base's weights": LoraConfig(r=2, target_modules=["query"], init_lora_weights="pissa"),
    "loha": LoHaConfig(r=2, target_modules=["query", "word_embeddings"]),
    "vera": VeraConfig(r=4, target_modules=["query", "output.dense"]),
    "some layers": LoraConfig(target_modules="all-linear", layers_to_transform=[-1]),
    "no head": LoraConfig(target_modules=["query"], modules_to_save=None),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_it_is_what_add_makes(config: ak.AdapterConfig) -> None:
    model = build("bert")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    seen = ak.preview(model, config)
    assert not ak.attach(model).names
    assert all(p.requires_grad for p in model.parameters())
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    report = ak.attach(model).add("a", config)
    assert seen.paths == report.targets
    assert tuple(seen.heads) == report.heads
    assert (seen.parameters, seen.total, seen.share) == (report.parameters, report.total, report.share)
    assert sum(group.layers for group in seen.groups) == len(report.targets)


def test_a_model_of_70_billion_parameters_from_its_config_alone(tmp_path: Path) -> None:
    shape = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
    config = LlamaConfig(**shape, num_key_value_heads=8, vocab_size=128256, architectures=["LlamaForCausalLM"])
    config.save_pretrained(tmp_path)
    seen = ak.preview(tmp_path, LoraConfig(r=16, target_modules=["q_proj", "v_proj"]))
    assert [(g.path, g.layers, g.parameters) for g in seen.groups] == [
        ("model.layers.{0-79}.self_attn.q_proj", 80, 16 * (8192 + 8192)),
        ("model.layers.{0-79}.self_attn.v_proj", 80, 16 * (8192 + 1024)),
    ]
    assert seen.total == 70_553_706_496
    assert str(seen).splitlines()[-1] == (
        "lora on LlamaForCausalLM: 160 layers, 32,768,000 parameters, 0.046% of the base model's 70,553,706,496"
    )


def test_a_model_with_adapters_is_previewed_as_its_base() -> None:
    model = build("bert")
    config = LoraConfig(r=2, target_modules="all-linear")
    expected = ak.preview(model, config)
    adapters = ak.attach(model)
    adapters.add("a", config)
    assert ak.preview(model, config) == expected
    adapters.merge()
    assert str(ak.preview(model, config)) == str(expected)


def test_layers_alike_are_one_row_and_others_are_not() -> None:
    model = nn.ModuleDict({"a": nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(4, 4))})
    groups = ak.preview(model, LoraConfig(r=1, target_modules="all-linear")).groups
    assert [(g.path, g.layers, g.out_features) for g in groups] == [("a.{0-1,3}", 3, 4), ("a.2", 1, 2)]


def test_what_was_left_out_has_its_reason_once() -> None:
    config = LoraConfig(target_modules=["query", "nothing"], layers_to_transform=[0])
    seen = ak.preview(build("bert"), config)
    ((path, reason),) = seen.skipped
    assert path == "bert.encoder.layer.1.attention.self.query"
    assert "leaves out layer 1" in reason
    assert seen.unmatched == ("target_modules 'nothing'",)
    assert f"left out: {path}: {reason}" in str(seen)
    assert "matched nothing: target_modules 'nothing'" in str(seen)


class SharedConfig(ak.AdapterConfig):
    method = "half_shared"


class SharedLayer(ak.LowRankLayer):
    def setup(self, target: ak.Target, config: ak.AdapterConfig) -> None:
        self.half_shared_up = target.new(target.out_features, 1)

    def factors(self) -> ak.Factors:
        return ak.Factors(self.half_shared_up, self.shared.half_shared_down[:, : self.kind.in_features])


class SharedDown(ak.Shared):
    def setup(self, targets: Sequence[ak.Target], config: ak.AdapterConfig, root: ak.Target) -> None:
        self.half_shared_down = root.new(1, max(target.in_features for target in targets), init=1.0)


def test_trained_tensors_that_all_layers_share_are_counted_once() -> None:
    ak.register(ak.plugin(SharedConfig, SharedLayer, prefix="half_shared_", shared=SharedDown))
    model = build("bert")
    seen = ak.preview(model, SharedConfig(target_modules=["query"], modules_to_save=None))
    report = ak.attach(model).add("a", SharedConfig(target_modules=["query"], modules_to_save=None))
    assert (seen.shared, seen.parameters) == (16, 2 * 16 + 16) == (16, report.parameters)
    assert "shared by all layers: 16 parameters" in str(seen)


@pytest.mark.parametrize(
    ("texts", "merged"),
    [
        ("layers.3.mlp layers.1.mlp layers.2.mlp layers.7.mlp", "layers.{1-3,7}.mlp"),
        ("a.0.b.0 a.0.b.1 a.2.b.1", "a.{0,2}.b.{0-1}"),
        ("0 10 9", "{0,9-10}"),
    ],
)
def test_numbers_that_differ_are_in_braces(texts: str, merged: str) -> None:
    assert merged_paths(texts.split()) == merged


def test_refusals_are_those_of_select(tmp_path: Path) -> None:
    with pytest.raises(ak.SelectionError, match="matched none of the"):
        ak.preview(build("bert"), LoraConfig(target_modules=["nothing"]))
    with pytest.raises(ak.CheckpointError, match=r"is not a model: it has no config\.json"):
        ak.preview(tmp_path, LoraConfig())
    BertConfig(architectures=["BertModel"]).save_pretrained(tmp_path)
    with pytest.raises(ak.ConfigError, match="is not an adapter config"):
        ak.preview(tmp_path, {"r": 4})  # type: ignore[arg-type]


# Configs from files


def test_read_config_gives_what_was_saved(tmp_path: Path) -> None:
    adapters = ak.attach(build("bert"))
    adapters.add("a", LoraConfig(r=3, target_modules=["query"]))
    adapters.save("a", tmp_path / "a")
    read = ak.read_config(tmp_path / "a")
    assert isinstance(read, LoraConfig)
    assert (read.r, read.target_modules, read.modules_to_save) == (3, ("query",), ("classifier",))
    assert ak.read_config(str(tmp_path / "a" / "adapter_config.json")) == read
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "target_modules": ["query"]}')
    assert ak.read_config(tmp_path).modules_to_save is None  # in a file, no heads are named


NO_CONFIGS: dict[str, tuple[Any, str]] = {
    "no JSON": ("{", "is not valid JSON"),
    "a list": ("[]", "must hold a JSON object"),
    "no method": ("{}", "has no 'peft_type'"),
    "a method that is not installed": (json.dumps({"peft_type": "IA3"}), "no plugin provides the method 'ia3'"),
    "a field not implemented": (json.dumps({"peft_type": "LORA", "use_dora": True}), "use_dora = True changes what"),
}


@pytest.mark.parametrize(("text", "message"), NO_CONFIGS.values(), ids=NO_CONFIGS.keys())
def test_read_config_refuses(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(ak.AdapterError, match=message):
        ak.read_config(tmp_path)
