"""Files of LoRA, LoHa and VeRA against the real PEFT, both ways: the same outputs, keys and shapes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from tests.models import MODELS, NAMES, build, inputs
from tests.plugins.parity import (
    CONFIGS,
    TARGETS,
    assert_same,
    fields_for,
    loaded_here,
    loaded_in_peft,
    perturb,
    saved_by_peft,
    saved_by_us,
)

import adapterkit as ak

pytestmark = [
    # PEFT's remarks: it sets fan_in_fan_out for Conv1D, saves targeted embeddings, finds no bias to merge into.
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
]

# Every field that changes the numbers, on models where it matters: (model, fields).
LORA: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"default-{name}": (name, {}) for name in NAMES},
    "r": ("llama", {"r": 3}),
    "alpha": ("llama", {"lora_alpha": 20}),
    "rslora": ("llama", {"r": 4, "lora_alpha": 6, "use_rslora": True}),
    "rank_pattern": ("bert", {"rank_pattern": {"layer.1.attention.self.query": 2, "value": 3, "quer.": 5}}),
    "anchored_patterns": ("llama", {"rank_pattern": {"^model.layers.0.*": 3}, "alpha_pattern": {r".*\.q_proj": 2}}),
    "alpha_pattern": ("gpt2", {"alpha_pattern": {"h.0.attn.c_attn": 32, "c_proj": 2}}),
    "rslora_patterns": ("t5", {"use_rslora": True, "rank_pattern": {"q": 2}, "alpha_pattern": {"wo": 5}}),
    "lora_bias": ("bert", {"lora_bias": True}),
    "lora_bias-conv": ("convnet", {"lora_bias": True}),
    "lora_bias-gpt2": ("gpt2", {"lora_bias": True}),
    "bias_all": ("bert", {"bias": "all"}),
    "bias_all-gpt2": ("gpt2", {"bias": "all"}),
    "bias_all-convnet": ("convnet", {"bias": "all"}),
    "bias_lora_only": ("bert", {"bias": "lora_only"}),
    "bias_lora_only-convnet": ("convnet", {"bias": "lora_only"}),
    "init_false": ("llama", {"init_lora_weights": False}),
    "init_gaussian": ("gpt2", {"init_lora_weights": "gaussian"}),
    "init_orthogonal": ("llama", {"init_lora_weights": "orthogonal"}),
    "dropout": ("llama", {"lora_dropout": 0.5}),
    "regex": ("bart", {"target_modules": r".*encoder\.layers\.1\..*\.(q_proj|fc1)"}),
    "all_linear": ("llama", {"target_modules": "all-linear"}),
    "all_linear-t5": ("t5", {"target_modules": "all-linear"}),
    "all_linear-gpt2": ("gpt2", {"target_modules": "all-linear"}),
    "default_targets": ("t5", {"target_modules": None}),
    "layers": ("bart", {"layers_to_transform": [1], "layers_pattern": "layers"}),
    "excluded": ("llama", {"target_modules": "all-linear", "exclude_modules": ["k_proj", "layers.0.mlp.up_proj"]}),
    "bias_all-head": ("bert", {"bias": "all", "modules_to_save": ["classifier"]}),
    "bias_all-conv-head": ("convnet", {"bias": "all", "modules_to_save": ["head", "norm"]}),
    **{
        f"modules_to_save-{name}": (name, {"modules_to_save": [tiny.head]})
        for name, tiny in MODELS.items()
        if tiny.head and name != "embednet"  # see the test of names that end alike
    },
    **{
        f"embedding-{name}": (name, {"target_modules": [tiny.embedding, tiny.targets[0]]})
        for name, tiny in MODELS.items()
        if tiny.embedding
    },
    "embedding-rslora": ("gemma3", {"target_modules": ["embed_tokens"], "use_rslora": True, "r": 4}),
    "embedding-saved": ("llama", {"modules_to_save": ["embed_tokens"]}),
    "lm_head": ("llama", {"target_modules": ["lm_head", "q_proj"]}),
}
LOHA: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"default-{name}": (name, {}) for name in TARGETS["loha"]},
    "r": ("bert", {"r": 3}),
    "alpha": ("bert", {"alpha": 20}),
    "rank_pattern": ("bert", {"rank_pattern": {"layer.1.attention.self.query": 2, "value": 3}}),
    "alpha_pattern": ("llama", {"alpha_pattern": {"q_proj": 32, "^model.layers.1.self_attn.v_proj": 2}}),
    "effective": ("convnet", {"use_effective_conv2d": True}),
    "effective-patterns": ("convnet", {"use_effective_conv2d": True, "rank_pattern": {"conv2d": 2, "conv1d": 3}}),
    "effective-kernel-1": ("vit", {"use_effective_conv2d": True, "target_modules": ["projection", "q_proj"]}),
    "rank_dropout": ("bert", {"rank_dropout": 0.5}),
    "module_dropout": ("bert", {"module_dropout": 0.5}),
    "init_false": ("bert", {"init_weights": False}),
    "regex": ("bert", {"target_modules": r".*layer\.1\..*\.(query|key)"}),
    "all_linear": ("llama", {"target_modules": "all-linear"}),
    "default_targets": ("llama", {"target_modules": None}),
    "excluded": ("llama", {"target_modules": "all-linear", "exclude_modules": ["k_proj", "layers.0.mlp.up_proj"]}),
    "layers": ("llama", {"layers_to_transform": [1], "layers_pattern": "layers"}),
    "modules_to_save": ("bert", {"modules_to_save": ["classifier"]}),
    "modules_to_save-conv": ("convnet", {"modules_to_save": ["head", "norm"], "use_effective_conv2d": True}),
}
VERA: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"default-{name}": (name, {}) for name in TARGETS["vera"]},
    **{f"derived-{name}": (name, {"save_projection": False}) for name in TARGETS["vera"]},
    "r": ("llama", {"r": 3}),
    "key": ("llama", {"projection_prng_key": 1234, "r": 5}),
    "key-derived": ("gpt2", {"projection_prng_key": 7, "save_projection": False, "r": 4}),
    "dropout": ("bert", {"vera_dropout": 0.5}),
    "d_initial": ("bert", {"d_initial": 0.7}),
    "init_false": ("bert", {"init_weights": False}),
    "bias_all": ("bert", {"bias": "all"}),
    "bias_vera_only": ("bert", {"bias": "vera_only"}),
    "bias_vera_only-gpt2": ("gpt2", {"bias": "vera_only", "save_projection": False}),
    "regex": ("bert", {"target_modules": r".*layer\.1\..*\.(query|key)"}),
    "all_linear": ("llama", {"target_modules": "all-linear"}),
    "default_targets": ("llama", {"target_modules": None, "save_projection": False}),
    "layers": ("llama", {"layers_to_transform": [1], "layers_pattern": "layers", "save_projection": False}),
    "modules_to_save": ("bert", {"modules_to_save": ["classifier"], "save_projection": False}),
}
CASES = [
    pytest.param(method, *case, id=f"{method}-{name}")
    for method, cases in (("lora", LORA), ("loha", LOHA), ("vera", VERA))
    for name, case in cases.items()
]


@pytest.mark.parametrize(("method", "name", "fields"), CASES)
def test_files_are_pefts_both_ways(method: str, name: str, fields: dict[str, Any], tmp_path: Path) -> None:
    theirs = saved_by_peft(method, build(name), tmp_path / "peft", name, **fields)
    ours = saved_by_us(method, build(name), tmp_path / "here", name, **fields)
    assert_same(loaded_here(build(name), tmp_path / "peft", name), theirs, name)
    assert_same(loaded_in_peft(build(name), tmp_path / "here", name), ours, name)

    here, there = (load_file(tmp_path / side / "adapter_model.safetensors") for side in ("here", "peft"))
    base = build(name).state_dict()
    # Not ours to write: full embeddings, heads whose name merely ends alike, and biases of heads twice more
    there = {k: v for k, v in there.items() if ".modules_to_save." not in k and ".original_module." not in k}
    full = {k for k in there if _base_key(k) in base and not k.endswith("bias") and not _in_head(k, fields)}
    assert {k: v.shape for k, v in here.items()} == {k: v.shape for k, v in there.items() if k not in full}
    assert all(torch.equal(here[k], there[k]) for k in here if k.startswith("base_model.vera_"))

    config, expected = (
        json.loads((tmp_path / side / "adapter_config.json").read_text(encoding="utf-8")) for side in ("here", "peft")
    )
    assert config.keys() <= expected.keys()
    others = (
        "target_modules",
        "modules_to_save",
        "exclude_modules",
        "fan_in_fan_out",
        "layers_to_transform",
        "layers_pattern",
        "task_type",  # PEFT writes what its user said, and adapterkit what the model is
    )
    assert config["task_type"] == ("SEQ_CLS" if config["modules_to_save"] and name == "bert" else None)
    own = [k for k in config if k not in others and k not in ("inference_mode", "peft_version")]
    assert {k: config[k] for k in own} == {k: expected[k] for k in own}


def _base_key(key: str) -> str:
    return key.removeprefix("base_model.model.").replace(".base_layer.", ".")


def _in_head(key: str, fields: dict[str, Any]) -> bool:
    return any(f".{head}." in key for head in fields.get("modules_to_save", ()))


@pytest.mark.parametrize("method", ["loha", "vera"])
def test_fields_and_defaults_are_pefts(method: str) -> None:
    own, theirs = (kind().to_dict() for kind in CONFIGS[method])
    own["modules_to_save"] = None  # here "auto", which becomes a list or null in the file
    theirs["peft_type"] = theirs["peft_type"].value
    for key in ("peft_version", "auto_mapping", "inference_mode"):
        own.pop(key, None), theirs.pop(key, None)
    assert own == theirs


# Not of LoHa's effective convolutions: PEFT's backward takes t2 and w2_b for the gradient of w1_a, and the other way
# round (HadaWeightCP). Ours pass gradcheck.
@pytest.mark.parametrize(
    ("method", "name"), [("loha", "bert"), ("loha", "convnet"), ("vera", "bert"), ("vera", "gpt2")]
)
def test_gradients_are_pefts(method: str, name: str) -> None:
    torch.manual_seed(0)
    own, other = CONFIGS[method]
    fields = fields_for(method, name, {"init_weights": False, "r": 3})
    theirs = peft.get_peft_model(build(name), other(**fields)).eval()
    perturb(p for p in theirs.parameters() if p.requires_grad)
    base = build(name)
    adapters = ak.attach(base)
    adapters.add("mine", own(**fields, modules_to_save=None))
    adapters.load_state_dict("mine", peft.get_peft_model_state_dict(theirs))
    for model in (base, theirs):
        out = model(**inputs(name))
        (out if isinstance(out, torch.Tensor) else out.logits).square().sum().backward()
    expected = {k: p.grad for k, p in theirs.named_parameters() if p.grad is not None}
    found = {k: p.grad for k, p in adapters.named_parameters("mine")}
    assert len(found) == len(expected) > 0
    for key, grad in found.items():
        torch.testing.assert_close(grad, expected[f"base_model.model.{key}.default"], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        pytest.param("bert", {"bias": "all", "modules_to_save": ["classifier"]}, id="biases of heads twice more"),
        pytest.param("bert", {"bias": "lora_only", "modules_to_save": ["sifier"]}, id="a head that ends alike"),
        pytest.param("convnet", {"bias": "all", "modules_to_save": ["head", "norm"]}, id="several heads"),
        pytest.param("llama", {"modules_to_save": ["mlp", "down_proj"]}, id="a head inside another"),
        pytest.param("llama", {"modules_to_save": ["embed_tokens"]}, id="a table"),
    ],
)
def test_tensors_are_sorted_alike_on_a_model_and_without_one(name: str, fields: dict[str, Any], tmp_path: Path) -> None:
    saved_by_peft("lora", build(name), tmp_path, name, **fields)
    adapters = ak.attach(build(name))
    adapters.load(tmp_path, "a")
    for base in (None, build(name)):
        found = ak.inspect_adapter(tmp_path, base=base)
        assert (found.unknown, found.missing, found.mismatched) == ((), (), ())
        assert {layer.path for layer in found.layers} == {*adapters.layers("a")}
        shapes = {p: {n: tuple(t.shape) for n, t in m.state_dict().items()} for p, m in adapters.heads("a").items()}
        assert found.heads == shapes
        own = (key for key, _ in adapters.named_parameters("a") if "lora_" not in key)
        biases = {key.removesuffix(".bias") for key in own if not key.startswith(tuple(f"{p}." for p in shapes))}
        assert {*found.biases} == biases
