"""LoRA files against the real PEFT, both ways: the same outputs from the same files.

Where PEFT itself is wrong, mathematics is the reference, and the test's name says so.
"""

from __future__ import annotations

import copy
import json
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from tests.models import MODELS, NAMES, VOCABULARY, build, run
from tests.plugins import parity
from tests.plugins.parity import assert_same, fields_for, loaded_here, loaded_in_peft, perturb
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.contract.config import OPTIONS
from adapterkit_lora import LoraConfig

pytestmark = [
    # PEFT's remarks: it sets fan_in_fan_out for Conv1D, saves targeted embeddings, finds no bias to merge into.
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
]

saved_by_peft = partial(parity.saved_by_peft, "lora")
saved_by_us = partial(parity.saved_by_us, "lora")


# PiSSA and OLoRA: PEFT changes the base, we do not


@pytest.mark.parametrize("fields", [{}, {"use_rslora": True}, {"rank_pattern": {"q.*": 3}}], ids=str)
@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_an_unconverted_file_of_peft_is_computed_again_from_the_base(
    name: str, init: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    expected = saved_by_peft(build(name), tmp_path, name, r=4, init_lora_weights=init, **fields)
    assert_same(loaded_here(build(name), tmp_path, name), expected, name)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_unconverted_file_of_peft_is_merged_and_converted_with_the_bases_weights(init: str, tmp_path: Path) -> None:
    base: Any = build("llama")
    base.save_pretrained(tmp_path / "base")
    expected = saved_by_peft(build("llama"), tmp_path / "a", "llama", r=4, init_lora_weights=init)
    ak.merge_checkpoint(tmp_path / "base", tmp_path / "a", tmp_path / "out")
    assert_same(run(type(base).from_pretrained(tmp_path / "out").eval(), "llama"), expected, "llama")
    with pytest.raises(ak.StateError, match="give base="):
        ak.convert_file(tmp_path / "a", tmp_path / "b")
    ak.convert_file(tmp_path / "a", tmp_path / "b", base=tmp_path / "base")
    assert_same(loaded_here(build("llama"), tmp_path / "b", "llama"), expected, "llama")


def test_an_unconverted_pissa_file_of_peft_loads_on_conv1d(tmp_path: Path) -> None:
    expected = saved_by_peft(build("gpt2"), tmp_path, "gpt2", r=4, init_lora_weights="pissa")
    assert_same(loaded_here(build("gpt2"), tmp_path, "gpt2"), expected, "gpt2")


def test_an_unconverted_file_of_randomised_pissa_is_refused(tmp_path: Path) -> None:
    saved_by_peft(build("llama"), tmp_path, "llama", r=4, init_lora_weights="pissa_niter_4")
    with pytest.raises(ak.CheckpointError, match="That start is random, so it cannot be computed again"):
        ak.attach(build("llama")).load(tmp_path, name="a")


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"use_rslora": True, "lora_alpha": 5},
        {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"v_proj": 3}},
        {"use_rslora": True, "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"v_proj": 3}},
    ],
    ids=str,
)
@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
def test_our_converted_file_loads_in_peft_and_here_on_the_unchanged_base(
    init: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    expected = saved_by_us(build("llama"), tmp_path, "llama", r=4, init_lora_weights=init, **fields)
    base = run(build("llama"), "llama")
    assert_same(loaded_in_peft(build("llama"), tmp_path, "llama"), expected, base)
    assert_same(loaded_here(build("llama"), tmp_path, "llama"), expected, base)


def test_a_converted_pissa_file_of_peft_loads_here(tmp_path: Path) -> None:
    torch.manual_seed(3)
    config = peft.LoraConfig(r=4, init_lora_weights="pissa", target_modules=["q_proj", "v_proj"])
    model = peft.get_peft_model(build("llama"), config).eval()
    # PEFT converts against the adapter as it was at the start, in a file of its own
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = "pissa"
    perturb(p for p in model.parameters() if p.requires_grad)
    expected = run(model, "llama")
    model.save_pretrained(tmp_path / "end", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    assert_same(loaded_here(build("llama"), tmp_path / "end", "llama"), expected, "llama")


# Dtypes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5", "convnet", "embednet"])
def test_on_a_half_precision_base_outputs_equal_pefts(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    fields = {"target_modules": [*MODELS[name].targets, *filter(None, [MODELS[name].embedding])]}
    expected = saved_by_peft(build(name).to(dtype), tmp_path, name, **fields)
    model = build(name).to(dtype)
    before = run(model, name)
    found = loaded_here(model, tmp_path, name)
    assert found.dtype == expected.dtype == dtype
    assert (expected - before).abs().max() > 1e-3
    # PEFT's parameters lie in other memory: a value may be rounded to its neighbour there, not every tenth of them.
    assert (found - expected).float().norm() <= 0.1 * (expected - before).float().norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_the_adapters_own_dtype_is_pefts(dtype: torch.dtype, tmp_path: Path) -> None:
    saved_by_peft(build("bert").to(dtype), tmp_path / "peft", "bert")
    saved_by_us(build("bert").to(dtype), tmp_path / "here", "bert")
    here, theirs = (load_file(tmp_path / side / "adapter_model.safetensors") for side in ("here", "peft"))
    assert {k: v.dtype for k, v in here.items()} == {k: v.dtype for k, v in theirs.items()}


def test_a_half_precision_file_acts_in_float32_as_in_peft(tmp_path: Path) -> None:
    model = peft.get_peft_model(
        build("llama"), peft.LoraConfig(**fields_for("lora", "llama", {})), autocast_adapter_dtype=False
    )
    perturb(p for p in model.parameters() if p.requires_grad)
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    expected = loaded_in_peft(build("llama"), tmp_path, "llama")
    assert_same(loaded_here(build("llama"), tmp_path, "llama"), expected, "llama")


# Embeddings of a resized vocabulary


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "bart", "t5", "gemma3"])
def test_embeddings_saved_after_resizing_the_vocabulary_act_here(name: str, tmp_path: Path) -> None:
    model = build(name)
    model.resize_token_embeddings(VOCABULARY + 3, mean_resizing=False)
    torch.manual_seed(3)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**fields_for("lora", name, {}))).eval()
    with torch.no_grad():
        model.get_input_embeddings().weight.normal_()
    perturb(p for p in wrapped.parameters() if p.requires_grad)
    wrapped.save_pretrained(tmp_path, save_embedding_layers=True)
    base = build(name)
    base.resize_token_embeddings(VOCABULARY + 3, mean_resizing=False)
    before = run(copy.deepcopy(base), name)
    assert_same(loaded_here(base, tmp_path, name), run(wrapped, name), before)


def test_saved_embeddings_of_another_size_say_what_to_resize_to(tmp_path: Path) -> None:
    model = build("llama")
    model.resize_token_embeddings(VOCABULARY + 3, mean_resizing=False)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**fields_for("lora", "llama", {})))
    wrapped.save_pretrained(tmp_path, save_embedding_layers=True)
    with pytest.raises(ak.CheckpointError, match=rf"model\.resize_token_embeddings\({VOCABULARY + 3}\) first"):
        ak.attach(build("llama")).load(tmp_path, name="a")


def test_own_embeddings_of_an_adapter_go_when_it_goes(tmp_path: Path) -> None:
    saved_by_peft(build("llama", seed=1), tmp_path, "llama", target_modules=["embed_tokens", "q_proj"])
    model = build("llama", seed=0)
    before = run(model, "llama")
    adapters = ak.attach(model)
    adapters.load(tmp_path, name="a")
    with adapters.disabled():
        assert torch.equal(run(model, "llama"), before)
    adapters.remove("a")
    assert torch.equal(run(model, "llama"), before)


def test_own_embeddings_of_an_adapter_are_saved_for_peft_again(tmp_path: Path) -> None:
    expected = saved_by_peft(build("llama", seed=1), tmp_path / "peft", "llama", target_modules=["embed_tokens"])
    model = build("llama", seed=1)
    with torch.no_grad():
        model.model.embed_tokens.weight.zero_()
    adapters = ak.attach(model)
    adapters.load(tmp_path / "peft", name="a")
    adapters.save("a", tmp_path / "here")
    base = build("llama", seed=1)
    with torch.no_grad():
        base.model.embed_tokens.weight.zero_()
    assert_same(loaded_in_peft(base, tmp_path / "here", "llama"), expected, run(build("llama", seed=1), "llama"))


# Config files


def peft_defaults(tmp_path: Path) -> dict[str, Any]:
    peft.LoraConfig(inference_mode=True).save_pretrained(tmp_path)  # as a model of PEFT's always writes it
    return json.loads((tmp_path / "adapter_config.json").read_text())


def test_every_field_of_peft_at_its_default_is_accepted_and_written_back(tmp_path: Path) -> None:
    theirs = peft_defaults(tmp_path)
    assert LoraConfig.from_dict(theirs).to_dict() == theirs


def test_our_defaults_are_pefts(tmp_path: Path) -> None:
    theirs = peft_defaults(tmp_path)
    ours = LoraConfig(modules_to_save=None).to_dict()
    assert ours == {key: theirs[key] for key in ours}


def test_every_field_of_pefts_that_lora_lacks_is_in_the_cores_table_with_pefts_default(tmp_path: Path) -> None:
    lacking = peft_defaults(tmp_path).keys() - {*LoraConfig().to_dict(), "auto_mapping", "peft_version"}
    assert lacking <= OPTIONS.keys()
    theirs = peft_defaults(tmp_path)
    assert {name: OPTIONS[name] for name in lacking if OPTIONS[name] is not ...}.items() <= theirs.items()


@pytest.mark.parametrize("name", NAMES)
def test_the_config_we_write_is_one_that_peft_writes_back(name: str, tmp_path: Path) -> None:
    saved_by_us(build(name), tmp_path / "here", name, lora_alpha=4, rank_pattern={MODELS[name].targets[0]: 2})
    ours = json.loads((tmp_path / "here" / "adapter_config.json").read_text())
    peft.PeftModel.from_pretrained(build(name), tmp_path / "here").save_pretrained(tmp_path / "peft")
    theirs = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    theirs["target_modules"], ours["target_modules"] = sorted(theirs["target_modules"]), sorted(ours["target_modules"])
    assert ours.items() <= (theirs | {"fan_in_fan_out": False}).items()


def test_the_config_file_is_formatted_as_pefts(tmp_path: Path) -> None:
    saved_by_us(build("llama"), tmp_path, "llama")
    text = (tmp_path / "adapter_config.json").read_text()
    assert text.rstrip() == json.dumps(json.loads(text), indent=2, sort_keys=True)


def test_a_field_of_pefts_that_changes_the_numbers_is_refused_by_name(tmp_path: Path) -> None:
    saved_by_peft(build("llama"), tmp_path, "llama", use_dora=True)
    with pytest.raises(ak.UnsupportedError, match="use_dora = True changes what the adapter computes"):
        ak.attach(build("llama")).load(tmp_path, name="a")


# Where PEFT is wrong, mathematics is the reference


def dense(model: nn.Module, path: str, folder: Path) -> nn.Module:
    """`model` with the file's `B A` written into its weight at `path`; `alpha / r` must be 1."""
    tensors = load_file(folder / "adapter_model.safetensors")
    layer = model.get_submodule(path)
    down = tensors[f"base_model.model.{path}.lora_A.weight"]
    up = tensors[f"base_model.model.{path}.lora_B.weight"]
    with torch.no_grad():
        layer.weight += torch.einsum("or,r...->o...", up.flatten(1), down)
    return model


@pytest.mark.parametrize("path", ["dilated", "circular"])
def test_padding_mode_and_dilation_which_peft_ignores_follow_the_merged_weight(path: str, tmp_path: Path) -> None:
    found = saved_by_us(build("convnet"), tmp_path, "convnet", target_modules=[path])
    assert_same(found, run(dense(build("convnet"), path, tmp_path), "convnet"), "convnet")


def test_a_file_of_a_circular_convolution_acts_as_its_merged_weight_and_not_as_in_pefts_forward(tmp_path: Path) -> None:
    wrong = saved_by_peft(build("convnet"), tmp_path, "convnet", target_modules=["circular"])
    found = loaded_here(build("convnet"), tmp_path, "convnet")
    expected = run(dense(build("convnet"), "circular", tmp_path), "convnet")
    assert_same(found, expected, "convnet")
    assert not torch.allclose(wrong, expected, atol=1e-4)


def test_grouped_convolutions_whose_a_reads_all_channels_in_peft_act_as_there(tmp_path: Path) -> None:
    expected = saved_by_peft(build("convnet"), tmp_path, "convnet", target_modules=["grouped"])
    assert_same(loaded_here(build("convnet"), tmp_path, "convnet"), expected, "convnet")


def test_grouped_convolutions_in_pefts_form_are_saved_in_that_form_again(tmp_path: Path) -> None:
    expected = saved_by_peft(build("convnet"), tmp_path / "peft", "convnet", target_modules=["grouped"])
    model = build("convnet")
    loaded_here(model, tmp_path / "peft", "convnet")
    ak.attach(model).save("loaded", tmp_path / "here")
    found = loaded_in_peft(build("convnet"), tmp_path / "here", "convnet")
    assert_same(found, expected, "convnet")


def test_our_grouped_convolutions_come_back_here_whatever_peft_reads(tmp_path: Path) -> None:
    expected = saved_by_us(build("convnet"), tmp_path, "convnet", target_modules=["grouped"])
    assert_same(loaded_here(build("convnet"), tmp_path, "convnet"), expected, "convnet")


def test_exact_names_for_which_peft_ignores_layer_numbers_are_reported(tmp_path: Path) -> None:
    fields = {"target_modules": ["q_proj", "lm_head"], "layers_to_transform": [1]}
    saved_by_peft(build("llama"), tmp_path, "llama", **fields)
    with pytest.raises(ak.CheckpointError, match=r"unexpected \(2\):\s+lm_head\.lora_A\.weight"):
        ak.attach(build("llama")).load(tmp_path, name="a")


def test_heads_that_peft_took_because_their_name_ends_like_an_entry_load_here(tmp_path: Path) -> None:
    fields = {"target_modules": ["layers.0"], "modules_to_save": ["head"]}
    expected = saved_by_peft(build("embednet"), tmp_path, "embednet", **fields)
    model = build("embednet")
    assert_same(loaded_here(model, tmp_path, "embednet"), expected, "embednet")
    assert ak.attach(model).status().rows[0].heads == ("overhead", "head")


def test_embedding_dropout_which_peft_ignores_acts_in_training() -> None:
    model = build("embednet")
    adapters = ak.attach(model)
    adapters.add("a", LoraConfig(target_modules=["embed"], lora_dropout=0.5))
    perturb(adapters.parameters("a"))
    model.train()
    assert not torch.equal(run(model, "embednet"), run(model, "embednet"))


def test_layer_numbers_beside_a_regex_which_peft_refuses_are_written_as_it_can_read_them(tmp_path: Path) -> None:
    fields = {"target_modules": r".*\.(q_proj|fc1)", "layers_to_transform": {"encoder.layers": [-1]}}
    expected = saved_by_us(build("bart"), tmp_path, "bart", **fields)
    assert_same(loaded_in_peft(build("bart"), tmp_path, "bart"), expected, "bart")


class TwoNames(nn.Module):
    """One layer under two paths, called by both."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = self.first

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def test_file_of_peft_for_a_module_of_two_paths_is_loaded_with_a_warning(tmp_path: Path) -> None:
    config = peft.LoraConfig(target_modules=["first", "second"], init_lora_weights=False)
    peft.get_peft_model(TwoNames(), config).save_pretrained(tmp_path)
    with pytest.warns(
        ak.AdapterWarning, match="'first' is one module with 'second', .* PEFT, .* adapts the first path"
    ):
        ak.attach(TwoNames()).load(tmp_path, "a")


def test_own_file_for_a_module_of_two_paths_is_loaded_without_a_warning(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = TwoNames()
    adapters, other = ak.attach(copy.deepcopy(model)), ak.attach(model)
    adapters.add("a", LoraConfig(target_modules=["first"], init_lora_weights=False))
    other.load(adapters.save("a", tmp_path), "a")
    x = torch.ones(2, 4)
    torch.testing.assert_close(other.model(x), adapters.model(x))
