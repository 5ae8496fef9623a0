"""State dicts of wrapped models: an adapter that a training script dumped, whatever stands around its names."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.models import build
from torch import Tensor, nn

import adapterkit as ak

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
Keys = Callable[[str], str]


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=torch.arange(3, 12)[None]).logits
    return found


def trained(
    folder: Path, config: peft.PeftConfig | None = None, name: str = "default"
) -> tuple[peft.PeftModel, Tensor]:
    """A model of PEFT, its saved adapter, and what it computes."""
    config = config or peft.LoraConfig(r=2, target_modules=["query", "value"])
    model = peft.get_peft_model(build("bert"), config, adapter_name=name)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
    model.eval().save_pretrained(folder)
    if name != "default":
        shutil.copytree(folder / name, folder, dirs_exist_ok=True)
        shutil.rmtree(folder / name)
    return model, outputs(model)


def loaded(place: Path) -> Tensor:
    model = build("bert").eval()
    assert ak.attach(model).load(place, "x").ok
    return outputs(model)


def renamed(folder: Path, name: Keys) -> None:
    tensors = load_file(folder / WEIGHTS)
    save_file({name(key): tensor for key, tensor in tensors.items()}, folder / WEIGHTS, metadata={"format": "pt"})


def in_parameter(name: str) -> Keys:
    return lambda key: key.replace(".lora_A.", f".lora_A.{name}.").replace(".lora_B.", f".lora_B.{name}.")


WRAPPERS: dict[str, Keys] = {
    "ddp": lambda key: f"module.{key}",
    "ddp twice": lambda key: f"module.module.{key}",
    "compiled": lambda key: f"_orig_mod.{key}",
    "compiled inside": lambda key: key.replace(PREFIX, f"{PREFIX}_orig_mod."),
    "compiled layers": lambda key: key.replace(".layer.", ".layer._orig_mod."),
    "ddp and compiled": lambda key: f"module._orig_mod.{key}",
    "compiled and ddp": lambda key: f"_orig_mod.module.{key}",
    "lightning": lambda key: f"model.{key}",
    "lightning and ddp": lambda key: f"model.module.{key}",
    "fsdp": lambda key: f"_fsdp_wrapped_module.{key}".replace("attention.self", "attention._fsdp_wrapped_module.self"),
    "checkpointing": lambda key: key.replace(".layer.0.", ".layer.0._checkpoint_wrapped_module."),
    "ddp inside": lambda key: key.replace(PREFIX, f"{PREFIX}module."),
    "base model inside": lambda key: key.replace(PREFIX, f"{PREFIX}base_model."),
    "base model alone": lambda key: key.replace(PREFIX, "base_model."),
    "peft twice": lambda key: PREFIX + key,
    "peft three times": lambda key: PREFIX * 2 + key,
    "name": in_parameter("default"),
    "name of diffusers": in_parameter("default_0"),
    "any name": in_parameter("style_v1"),
    "name without prefix": lambda key: in_parameter("default")(key).removeprefix(PREFIX),
    "all": lambda key: f"module._orig_mod.{in_parameter('default')(PREFIX + key)}",
}


@pytest.mark.parametrize("name", WRAPPERS.values(), ids=WRAPPERS)
def test_names_of_wrappers_are_taken_away(name: Keys, tmp_path: Path) -> None:
    _, expected = trained(tmp_path)
    renamed(tmp_path, name)
    torch.testing.assert_close(loaded(tmp_path), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "name", [WRAPPERS[case] for case in ("ddp and compiled", "checkpointing", "peft twice", "name")]
)
def test_names_of_wrappers_are_taken_away_from_state_dicts(name: Keys, tmp_path: Path) -> None:
    _, expected = trained(tmp_path)
    model = build("bert").eval()
    adapters = ak.attach(model)
    adapters.load(tmp_path, "x")
    renamed(tmp_path, name)
    adapters.reset("x")
    assert adapters.load_state_dict("x", load_file(tmp_path / WEIGHTS)).ok
    torch.testing.assert_close(outputs(model), expected, rtol=0, atol=1e-5)


def test_on_disk_too(tmp_path: Path) -> None:
    base = tmp_path / "base"
    model, expected = trained(tmp_path / "a", DUMPED["head"][0])
    build("bert").save_pretrained(base)
    renamed(tmp_path / "a", WRAPPERS["all"])
    ak.merge_checkpoint(base, tmp_path / "a", tmp_path / "merged")
    merged = type(model.get_base_model()).from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(outputs(merged), expected, rtol=0, atol=1e-5)
    assert ak.inspect_adapter(tmp_path / "a").unknown == ()


DUMPED: dict[str, tuple[peft.PeftConfig, str]] = {
    "head": (peft.LoraConfig(r=2, target_modules=["query"], modules_to_save=["classifier"]), "default"),
    "head, any name": (peft.LoraConfig(r=2, target_modules=["query"], modules_to_save=["classifier"]), "my_style"),
    "biases": (peft.LoraConfig(r=2, target_modules=["query", "word_embeddings"], bias="all"), "mine"),
    "loha": (peft.LoHaConfig(r=2, target_modules=["query"]), "mine"),
    "vera": (peft.VeraConfig(r=2, target_modules=["query", "value"]), "default"),
    "vera, any name": (peft.VeraConfig(r=2, target_modules=["query", "value"]), "mine"),
}


@pytest.mark.parametrize(("config", "name"), DUMPED.values(), ids=DUMPED)
def test_whole_state_dict_of_pefts_model(config: peft.PeftConfig, name: str, tmp_path: Path) -> None:
    """Beside the adapter it holds the base's own weights, heads as they were before, and copies at each layer."""
    model, expected = trained(tmp_path, config, name)
    (tmp_path / WEIGHTS).unlink()
    torch.save({f"module.{key}": tensor for key, tensor in model.state_dict().items()}, tmp_path / "adapter_model.bin")
    torch.testing.assert_close(loaded(tmp_path), expected, rtol=0, atol=1e-5)


def test_a_module_called_like_a_wrapper_stays(tmp_path: Path) -> None:
    model = nn.ModuleDict({"module": nn.Linear(4, 4)})
    adapters = ak.attach(model)
    adapters.add("a", ak.config("lora", r=2, target_modules=["module"]))
    adapters.save("a", tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    save_file({key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()}, tmp_path / WEIGHTS)
    assert adapters.load(tmp_path, "b").ok


def test_two_adapters_in_one_dump_are_refused(tmp_path: Path) -> None:
    trained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    both = {
        in_parameter(name)(key): tensor.clone() for key, tensor in tensors.items() for name in ("default", "default_1")
    }
    save_file(both, tmp_path / WEIGHTS)
    with pytest.raises(ak.CheckpointError, match=r"it holds several adapters\. Save the one that you mean"):
        loaded(tmp_path)


@pytest.mark.parametrize(
    "outer",
    [
        lambda t: {"state_dict": t, "epoch": 3, "optimizer_states": [{"lr": 1e-3}]},
        lambda t: {"model": t, "iteration": 10},
        lambda t: {"checkpoint": 1, "module": {"state_dict": t}},
    ],
    ids=["lightning", "model", "nested"],
)
def test_state_dict_inside_others(outer: Callable[[dict[str, Tensor]], object], tmp_path: Path) -> None:
    _, expected = trained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    (tmp_path / WEIGHTS).unlink()
    torch.save(outer({f"model.{key}": tensor for key, tensor in tensors.items()}), tmp_path / "adapter_model.bin")
    torch.testing.assert_close(loaded(tmp_path), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_config_with_a_byte_order_mark(encoding: str, tmp_path: Path) -> None:
    _, expected = trained(tmp_path)
    text = (tmp_path / CONFIG).read_text(encoding="utf-8")
    (tmp_path / CONFIG).write_text(text, encoding=encoding)
    torch.testing.assert_close(loaded(tmp_path), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("below", ["default", "adapter_model", "checkpoint-10/adapter"])
def test_the_one_adapter_in_a_folder_below_is_read_and_that_is_told(below: str, tmp_path: Path) -> None:
    _, expected = trained(tmp_path / below)
    with pytest.warns(ak.AdapterWarning, match=f"is not an adapter; the one below is read: {below}"):
        torch.testing.assert_close(loaded(tmp_path), expected, rtol=0, atol=1e-5)


def test_several_adapters_in_folders_below_are_named(tmp_path: Path) -> None:
    for name in ("english", "german"):
        trained(tmp_path / name)
    with pytest.raises(ak.CheckpointError, match=r"is not an adapter, but holds 2: english, german\. Give one of them"):
        ak.inspect_adapter(tmp_path)


def test_textual_inversion_beside_an_adapter_is_left_out_and_told(tmp_path: Path) -> None:
    """OneTrainer's `bundle_emb`."""
    _, expected = trained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    place = tmp_path / "a.safetensors"
    plain = {
        key.removeprefix(PREFIX).replace("lora_A", "lora_down").replace("lora_B", "lora_up"): t
        for key, t in tensors.items()
    }
    alphas = {key.replace("lora_down.weight", "alpha"): torch.tensor(8.0) for key in plain if "down" in key}
    save_file(plain | alphas | {"bundle_emb.cat.string_to_param.*": torch.ones(1, 16)}, place)
    with pytest.warns(ak.AdapterWarning, match=r"also has a textual inversion, the embeddings of new tokens"):
        torch.testing.assert_close(loaded(place), expected, rtol=0, atol=1e-5)


def test_a_file_s_content_counts_and_not_its_suffix(tmp_path: Path) -> None:
    _, expected = trained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    (tmp_path / WEIGHTS).rename(tmp_path / "adapter_model.bin")
    torch.testing.assert_close(loaded(tmp_path), expected, rtol=0, atol=1e-5)
    for archive in (True, False):
        torch.save(tensors, tmp_path / WEIGHTS, _use_new_zipfile_serialization=archive)
        torch.testing.assert_close(loaded(tmp_path), expected, rtol=0, atol=1e-5)


def test_folder_in_which_diffusers_saved_adapters_is_their_file(tmp_path: Path) -> None:
    _, expected = trained(tmp_path / "peft")
    tensors = load_file(tmp_path / "peft" / WEIGHTS)
    header = {"lora_adapter_metadata": json.dumps({"unet.r": 2, "unet.lora_alpha": 8})}
    named = {f"unet.{key.removeprefix(PREFIX)}": tensor for key, tensor in tensors.items()}
    save_file(named, tmp_path / "pytorch_lora_weights.safetensors", header)
    torch.testing.assert_close(loaded(tmp_path), expected, rtol=0, atol=1e-5)


def test_state_dict_of_a_model_with_our_adapters_says_what_to_do(tmp_path: Path) -> None:
    model = build("bert")
    ak.attach(model).add("a", ak.config("lora", r=2, target_modules=["query"]))
    torch.save(model.state_dict(), tmp_path / "a.pt")
    with pytest.raises(ak.UnsupportedError, match="Add the adapter with its config and load this"):
        ak.attach(build("bert")).load(tmp_path / "a.pt", "x")
