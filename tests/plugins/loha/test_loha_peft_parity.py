"""LoHa files against the real PEFT, both ways: the same outputs from the same files.

Where PEFT itself is wrong (padding modes) or has no such layer, mathematics is the reference: see test_loha_math.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from tests.models import MODELS, assert_same_outputs, build, inputs, run
from torch import Tensor, nn

import adapterkit as ak
from adapterkit_loha import LoHaConfig

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")

# Layers that PEFT's LoHa knows: (model, fields).
TARGETS = {
    "bert": ["query", "value", "intermediate.dense"],
    "convnet": ["conv1d", "conv2d", "grouped", "dilated", "fc"],
    "llama": ["q_proj", "v_proj", "down_proj"],
    "vit": ["q_proj", "projection"],
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"default-{name}": (name, {}) for name in TARGETS},
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
every_case = pytest.mark.parametrize(("name", "fields"), CASES.values(), ids=CASES)


def fields_for(name: str, fields: dict[str, Any]) -> dict[str, Any]:
    return {"target_modules": TARGETS[name], **fields}


def perturb(parameters: Iterable[nn.Parameter]) -> None:
    """As training would: every trained number moves."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


def saved_by_peft(folder: Path, name: str, **fields: Any) -> Tensor:
    torch.manual_seed(3)
    model = peft.get_peft_model(build(name), peft.LoHaConfig(**fields_for(name, fields))).eval()
    perturb(p for p in model.parameters() if p.requires_grad)
    model.save_pretrained(folder)
    return run(model, name)


def saved_by_us(folder: Path, name: str, **fields: Any) -> Tensor:
    torch.manual_seed(3)
    base = build(name)
    adapters = ak.attach(base)
    adapters.add("mine", LoHaConfig(**{"modules_to_save": None, **fields_for(name, fields)}))
    perturb(adapters.parameters("mine"))
    adapters.save("mine", folder)
    return run(base, name)


def assert_same(found: Tensor, expected: Tensor, name: str) -> None:
    """The same outputs, and none of the bare model's."""
    assert (expected - run(build(name), name)).abs().max() > 1e-3, "the adapter changes nothing: nothing is shown"
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@every_case
def test_what_peft_saves_gives_the_same_outputs_here(name: str, fields: dict[str, Any], tmp_path: Path) -> None:
    expected = saved_by_peft(tmp_path, name, **fields)
    base = build(name)
    assert ak.attach(base).load(tmp_path, name="loaded").ok
    assert_same(run(base, name), expected, name)


@every_case
def test_what_is_saved_here_gives_the_same_outputs_in_peft(name: str, fields: dict[str, Any], tmp_path: Path) -> None:
    expected = saved_by_us(tmp_path, name, **fields)
    assert_same(run(peft.PeftModel.from_pretrained(build(name), tmp_path).eval(), name), expected, name)


@every_case
def test_files_have_the_keys_and_shapes_of_pefts(name: str, fields: dict[str, Any], tmp_path: Path) -> None:
    saved_by_us(tmp_path / "here", name, **fields)
    saved_by_peft(tmp_path / "peft", name, **fields)
    ours, theirs = (load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("here", "peft"))
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
    ours_json, theirs_json = (
        json.loads((tmp_path / folder / "adapter_config.json").read_text()) for folder in ("here", "peft")
    )
    assert ours_json.keys() <= theirs_json.keys()
    own = ("r", "alpha", "rank_dropout", "module_dropout", "use_effective_conv2d", "init_weights")
    assert {k: ours_json[k] for k in own} == {k: theirs_json[k] for k in own}


def test_fields_and_defaults_are_pefts() -> None:
    ours, theirs = LoHaConfig().to_dict(), peft.LoHaConfig().to_dict()
    ours["modules_to_save"] = None  # here "auto", which becomes a list or null in the file
    theirs["peft_type"] = theirs["peft_type"].value
    bookkeeping = {"peft_version", "auto_mapping", "inference_mode"}
    assert {k: v for k, v in ours.items() if k not in bookkeeping} == {
        k: v for k, v in theirs.items() if k not in bookkeeping
    }


@pytest.mark.parametrize("init", [True, False])
@pytest.mark.parametrize("effective", [True, False])
def test_initial_values_have_pefts_distribution(init: bool, effective: bool) -> None:
    fields = {"target_modules": ["conv2d", "fc"], "r": 16, "init_weights": init, "use_effective_conv2d": effective}
    torch.manual_seed(0)
    theirs = peft.get_peft_model(build("convnet"), peft.LoHaConfig(**fields))
    adapters = ak.attach(build("convnet"))
    adapters.add("mine", LoHaConfig(**fields))
    found, expected = adapters.state_dict("mine"), peft.get_peft_model_state_dict(theirs)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert bool((found[key] == 0).all()) == bool((value == 0).all()) == (init and key.endswith("hada_w2_b"))
        # Uniform within 1 / sqrt(fan in), of which the largest of many draws is near.
        bound = (value[0].numel()) ** -0.5 * bool(value.any())
        assert 0.6 * bound <= found[key].abs().max() <= bound * (1 + 1e-6)
        assert value.abs().max() <= bound * (1 + 1e-6)


@pytest.mark.parametrize("name", ["bert", "convnet"])
def test_gradients_are_pefts(name: str) -> None:
    # Not of effective convolutions: PEFT's hand-written backward takes t2 and w2_b for the gradient of w1_a, and
    # the other way round (HadaWeightCP). Ours pass gradcheck in test_loha_math.
    torch.manual_seed(0)
    fields = fields_for(name, {"init_weights": False, "r": 3})
    theirs = peft.get_peft_model(build(name), peft.LoHaConfig(**fields))
    perturb(p for p in theirs.parameters() if p.requires_grad)
    base = build(name)
    adapters = ak.attach(base)
    adapters.add("mine", LoHaConfig(**fields, modules_to_save=None))
    adapters.load_state_dict("mine", peft.get_peft_model_state_dict(theirs))
    for model in (base.eval(), theirs.eval()):
        out = model(**inputs(name))
        (out if isinstance(out, Tensor) else out.logits).square().sum().backward()
    expected = {k: p.grad for k, p in theirs.named_parameters() if p.grad is not None}
    found = {k: p.grad for k, p in adapters.named_parameters("mine")}
    assert len(found) == len(expected) > 0
    for key, grad in found.items():
        assert grad is not None
        torch.testing.assert_close(grad, expected[f"base_model.model.{key}.default"], rtol=1e-3, atol=1e-5)


def test_every_model_that_peft_refuses_is_adapted_here(tmp_path: Path) -> None:
    # GPT-2's Conv1D, embeddings and Conv3d: files of ours that only we read.
    for name, targets in {"gpt2": ["c_attn", "wte"], "convnet": ["conv3d"], "gemma3": ["embed_tokens"]}.items():
        assert name in MODELS
        base = build(name)
        adapters = ak.attach(base)
        adapters.add("mine", LoHaConfig(r=3, target_modules=targets, init_weights=False, modules_to_save=None))
        perturb(adapters.parameters("mine"))
        expected = run(base, name)
        adapters.save("mine", tmp_path / name)
        again = build(name)
        ak.attach(again).load(tmp_path / name, "mine")
        assert_same_outputs(run(again, name), expected)
        assert (expected - run(build(name), name)).abs().max() > 1e-3


def test_the_order_of_patterns_that_overlap_survives_the_file(tmp_path: Path) -> None:
    # PEFT sorts them when it writes, so its own files may come back as another adapter; it reads them in order.
    fields = {"rank_pattern": {"v_proj": 2, "^model.*": 3}, "alpha_pattern": {"q_proj": 32, "^model.*": 2}}
    expected = saved_by_us(tmp_path, "llama", **fields)
    base = build("llama")
    ak.attach(base).load(tmp_path, "again")
    assert_same_outputs(run(base, "llama"), expected)
    assert_same(run(peft.PeftModel.from_pretrained(build("llama"), tmp_path).eval(), "llama"), expected, "llama")
