"""Skeletons: models without values, and the names of checkpoints matched with theirs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import models
from torch import nn
from transformers import LlamaConfig, MixtralConfig, MixtralForCausalLM
from transformers.utils import logging

import adapterkit as ak
from adapterkit.disk.checkpoint import Checkpoint, match_names
from adapterkit_lora import LoraConfig

logging.disable_progress_bar()  # type: ignore[no-untyped-call]
logging.set_verbosity_error()  # type: ignore[no-untyped-call]
NAMES = [n for n in models.NAMES if n not in ("convnet", "embednet")]


def ties(model: nn.Module) -> set[frozenset[str]]:
    """Names that are one parameter."""
    places: dict[nn.Parameter, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        places.setdefault(parameter, set()).add(name)
    return {frozenset(names) for names in places.values()}


@pytest.mark.parametrize("name", NAMES)
def test_a_skeleton_is_the_model_without_values_and_names_are_matched(name: str, tmp_path: Path) -> None:
    model: Any = models.build(name)
    model.save_pretrained(tmp_path)
    found = ak.skeleton(tmp_path)
    assert type(found) is type(model)
    assert all(p.is_meta for p in found.parameters())
    assert not found.training
    assert {k: (t.shape, t.dtype) for k, t in found.state_dict().items()} == {
        k: (t.shape, t.dtype) for k, t in model.state_dict().items()
    }
    assert ties(found) == ties(model)
    assert_matched(model, tmp_path)
    # Saved from the base class, the names lack the prefix.
    getattr(model, model.base_model_prefix, model).save_pretrained(tmp_path)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(tmp_path)
    assert_matched(model, tmp_path)


def assert_matched(model: Any, folder: Path) -> None:
    """Names are matched as transformers loads them."""
    files = Checkpoint.open(folder)
    in_file, fused = match_names(ak.skeleton(folder), files.entries)
    assert fused == {}
    loaded = type(model).from_pretrained(folder).state_dict()
    assert set(in_file.values()) == set(files.entries)
    assert all(torch.equal(loaded[key], files.tensor(name)) for key, name in in_file.items())


def test_tensors_that_are_fused_at_loading_are_told_apart(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = MixtralForCausalLM(MixtralConfig(vocab_size=16, num_hidden_layers=1, num_local_experts=2, **sizes))
    model.save_pretrained(tmp_path)
    in_file, fused = match_names(ak.skeleton(tmp_path), Checkpoint.open(tmp_path).entries)
    experts = "model.layers.0.block_sparse_moe.experts"
    assert fused["model.layers.0.mlp.experts.down_proj"] == (f"{experts}.0.w2.weight", f"{experts}.1.w2.weight")
    assert "model.layers.0.self_attn.q_proj.weight" in in_file
    assert not set(fused) & set(in_file)


def test_old_names_are_known(tmp_path: Path) -> None:
    models.build("bert").save_pretrained(tmp_path)
    key = "bert.embeddings.LayerNorm"
    in_file, _ = match_names(ak.skeleton(tmp_path), [f"{key}.gamma", f"{key}.beta", "cls.predictions.bias"])
    assert in_file == {f"{key}.weight": f"{key}.gamma", f"{key}.bias": f"{key}.beta"}


def test_a_model_of_70_billion_numbers_can_be_selected_from(tmp_path: Path) -> None:
    sizes = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
    config = LlamaConfig(num_key_value_heads=8, architectures=["LlamaForCausalLM"], dtype="bfloat16", **sizes)
    config.save_pretrained(tmp_path)
    model = ak.skeleton(tmp_path)
    assert len(ak.select(model, LoraConfig(target_modules="all-linear")).paths) == 560
    assert next(model.parameters()).dtype == torch.bfloat16


def test_without_an_architecture_it_is_the_base_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "num_hidden_layers": 1}))
    assert type(ak.skeleton(tmp_path)).__name__ == "BertModel"


REFUSED: dict[str, tuple[object, str]] = {
    "no JSON": ("{", "There is no config of a model for"),
    "no model type": ({}, "Should have a `model_type` key"),
    "unknown model type": ({"model_type": "berd"}, "There is no config of a model for"),
    "a value of another type": ({"model_type": "bert", "hidden_size": "x"}, "There is no config of a model for"),
    "sizes that do not fit": (
        {"model_type": "bert", "hidden_size": 10},
        "transformers cannot build a model from",
    ),
    "code beside it": ({"auto_map": {"AutoModel": "m.M"}}, "the model is code beside its weights"),
    "no class at all": (
        {"model_type": "encodec_", "architectures": ["X"]},
        "There is no config of a model for",
    ),
}


@pytest.mark.parametrize(("config", "text"), REFUSED.values(), ids=REFUSED.keys())
def test_a_config_that_gives_no_model_is_refused_with_its_reason(config: object, text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    with pytest.raises((ak.CheckpointError, ak.UnsupportedError), match=re.escape(text)):
        ak.skeleton(tmp_path)


def test_a_folder_without_a_config_says_what_it_has(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").touch()
    with pytest.raises(
        ak.CheckpointError, match=r"is not a model: it has no config.json. It holds adapter_config.json"
    ):
        ak.skeleton(tmp_path)


@pytest.mark.parametrize("place", ["./nowhere", "a/b/c", Path("nowhere")])
def test_a_folder_that_is_not_there_is_refused(place: str | Path) -> None:
    with pytest.raises(ak.CheckpointError, match="There is no model folder"):
        ak.skeleton(place)
