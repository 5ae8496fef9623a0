"""A vocabulary that was resized before an adapter was added: its tables go where the adapter goes."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from tests.core.conftest import set_parameters
from tests.models import build
from torch import Tensor, nn

import adapterkit as ak
from adapterkit_lora import LoraConfig

ROWS = 40
LAYERS = {"llama": "q_proj", "gpt2": "c_attn", "bert": "query", "t5": "q", "bart": "q_proj", "gemma3": "q_proj"}
# The tables that a file holds; a table that is tied to another is written once.
TABLES = {
    "llama": ["lm_head.weight", "model.embed_tokens.weight"],
    "gpt2": ["transformer.wte.weight"],
    "bert": ["bert.embeddings.word_embeddings.weight"],
    "t5": ["shared.weight"],
    "bart": ["model.shared.weight"],
    "gemma3": ["model.embed_tokens.weight"],
}
every_model = pytest.mark.parametrize("name", LAYERS)


def resized(name: str, seed: int) -> Any:
    """The base, whose new rows are other ones for each seed."""
    model: Any = build(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.resize_token_embeddings(ROWS, mean_resizing=False)
        with torch.no_grad():  # far from the old ones
            for table in {model.get_input_embeddings(), model.get_output_embeddings()} - {None}:
                table.weight[32:] = torch.randn(ROWS - 32, table.weight.shape[1])
    return model


def logits(model: nn.Module, name: str) -> Tensor:
    """The output for tokens old and new."""
    ids = torch.tensor([[1, 35, 39, 4], [33, 5, 6, 38]])
    given = {"decoder_input_ids": ids} if name in ("t5", "bart") else {}
    with torch.no_grad():
        return model(input_ids=ids, **given).logits


def adapted(model: Any, name: str, *more: str) -> ak.Adapters:
    adapters = ak.attach(model)
    adapters.add("a", LoraConfig(r=2, target_modules=[LAYERS[name], *more], modules_to_save=None))
    set_parameters(adapters, "a")
    return adapters


def written(folder: Path) -> list[str]:
    keys = load_file(folder / "adapter_model.safetensors")
    return sorted(key.removeprefix("base_model.model.") for key in keys if "lora" not in key)


def assert_read_by_peft(folder: Path, adapters: ak.Adapters, name: str) -> None:
    theirs = peft.PeftModel.from_pretrained(resized(name, 1), folder).eval()
    torch.testing.assert_close(logits(theirs, name), logits(adapters.model, name))


@every_model
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")
def test_the_new_rows_are_in_the_file_and_act_on_a_base_resized_alike(name: str, tmp_path: Path) -> None:
    adapters = adapted(resized(name, 0), name)
    expected = logits(adapters.model, name)
    folder = adapters.save("a", tmp_path / "a")
    assert written(folder) == TABLES[name]
    assert_read_by_peft(folder, adapters, name)
    other = resized(name, 1)
    bare = logits(other, name)
    again = ak.attach(other)
    assert again.load(folder, "a") == ak.LoadReport()
    torch.testing.assert_close(logits(other, name), expected)
    assert not torch.allclose(bare, expected, atol=1e-2)
    with again.disabled():
        torch.testing.assert_close(logits(other, name), bare)
    third = ak.attach(resized(name, 2))
    third.load(again.save("a", tmp_path / "b"), "a")
    torch.testing.assert_close(logits(third.model, name), expected)
    torch.testing.assert_close(logits(third.merge_and_detach(untie=True), name), expected, rtol=1e-4, atol=1e-5)


def test_an_adapter_of_the_table_itself(tmp_path: Path) -> None:
    adapters = adapted(resized("llama", 0), "llama", "embed_tokens")
    folder = adapters.save("a", tmp_path / "a")
    assert written(folder) == ["lm_head.weight", "model.embed_tokens.base_layer.weight"]
    again = ak.attach(resized("llama", 1))
    again.load(folder, "a")
    torch.testing.assert_close(logits(again.model, "llama"), logits(adapters.model, "llama"))
    assert_read_by_peft(folder, adapters, "llama")
    adapters.merge("a")
    with pytest.raises(ak.StateError, match=r"The file must hold 'model.embed_tokens', because the vocabulary was"):
        adapters.save("a", tmp_path / "b")
    adapters.save("a", tmp_path / "b", embeddings=False)


@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_the_config_of_a_base_on_this_machine_decides(name: str, tmp_path: Path) -> None:
    build(name).save_pretrained(tmp_path / "base")
    cls = type(build(name))
    for rows in (None, 32, 24, ROWS):
        model = cls.from_pretrained(tmp_path / "base")
        if rows is not None:
            model.resize_token_embeddings(rows, mean_resizing=False)
        folder = adapted(model, name).save("a", tmp_path / str(rows))
        assert written(folder) == (TABLES[name] if rows in (24, ROWS) else [])
    ak.attach(model).detach().save_pretrained(tmp_path / "resized")
    model = cls.from_pretrained(tmp_path / "resized")
    assert written(adapted(model, name).save("a", tmp_path / "c")) == []


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_models_that_were_not_resized_have_none_in_the_file(name: str, tmp_path: Path) -> None:
    adapters = adapted(build(name), name)
    assert written(adapters.save("a", tmp_path / "a")) == []
    assert written(adapters.save("a", tmp_path / "b", embeddings=True)) == TABLES[name]
    adapters = adapted(resized(name, 0), name)
    assert written(adapters.save("a", tmp_path / "c", embeddings=False)) == []


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_they_stay_with_the_adapter_whatever_is_made_of_it(name: str, tmp_path: Path) -> None:
    resized(name, 1).save_pretrained(tmp_path / "base")
    cls = type(build(name))

    def base() -> ak.Adapters:
        return ak.attach(cls.from_pretrained(tmp_path / "base"))

    adapters = adapted(resized(name, 0), name)
    expected = logits(adapters.model, name)
    folder = adapters.save("a", tmp_path / "a")
    ak.combine_files({folder: 1.0}, tmp_path / "combined", heads="a")
    ak.convert_file(folder, tmp_path / "converted", to="lora")
    for made in ("combined", "converted"):
        again = base()
        again.load(tmp_path / made, "x")
        torch.testing.assert_close(logits(again.model, name), expected, rtol=1e-4, atol=1e-4)
    again.copy("x", "y")
    again.combine("z", {"y": 1.0}, heads="y")
    for made in "yz":
        again.activate(made)
        torch.testing.assert_close(logits(again.model, name), expected, rtol=1e-4, atol=1e-4)
    again.activate("z")
    again.merge_and_detach().save_pretrained(tmp_path / "merged")
    ak.merge_checkpoint(tmp_path / "base", folder, tmp_path / "on_disk")
    for made in ("merged", "on_disk"):
        model = cls.from_pretrained(tmp_path / made)
        torch.testing.assert_close(logits(model, name), expected, rtol=1e-4, atol=1e-4)


def test_a_full_state_dict_and_save_pretrained_give_them_too(tmp_path: Path) -> None:
    adapters = adapted(resized("llama", 0), "llama")
    full = {f"module.{key}": tensor for key, tensor in adapters.model.state_dict().items()}
    full["module.model.embed_tokens.weight"] = full["module.model.embed_tokens.weight"] + 1
    folder = adapters.save("a", tmp_path / "a", source=full)
    held = load_file(folder / "adapter_model.safetensors")["base_model.model.model.embed_tokens.weight"]
    torch.testing.assert_close(held, adapters.model.get_submodule("model.embed_tokens").weight + 1)
    alone = {key: tensor for key, tensor in full.items() if ".adapters." in key}
    assert written(adapters.save("a", tmp_path / "b", source=alone)) == TABLES["llama"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapters.model.save_pretrained(tmp_path / "c")
    assert written(tmp_path / "c") == TABLES["llama"]


@pytest.mark.parametrize(
    ("name", "heads", "tables"),
    [
        ("llama", ["embed_tokens", "lm_head"], TABLES["llama"]),
        ("gpt2", ["wte"], ["lm_head.weight", "transformer.wte.weight"]),  # the other of two tied ones is written too
    ],
)
def test_trained_heads_at_the_tables_are_written_as_such(
    name: str, heads: list[str], tables: list[str], tmp_path: Path
) -> None:
    adapters = ak.attach(resized(name, 0))
    gpt2 = name == "gpt2"
    adapters.add("a", LoraConfig(r=2, target_modules=[LAYERS[name]], modules_to_save=heads, fan_in_fan_out=gpt2))
    set_parameters(adapters, "a")
    folder = adapters.save("a", tmp_path / "a")
    assert written(folder) == tables
    again = ak.attach(resized(name, 1))
    again.load(folder, "a")
    torch.testing.assert_close(logits(again.model, name), logits(adapters.model, name))
    if gpt2:
        assert_read_by_peft(folder, adapters, name)


def test_add_says_that_the_file_will_hold_them_and_a_smaller_base_what_to_resize_to(tmp_path: Path) -> None:
    adapters = ak.attach(resized("gpt2", 0))
    report = adapters.add("a", LoraConfig(r=2, target_modules=["c_attn"]))
    assert "note: the vocabulary was resized, so the adapter's file will hold 'transformer.wte' too" in str(report)
    folder = adapters.save("a", tmp_path / "a")
    with pytest.raises(ak.CheckpointError, match=rf"call model\.resize_token_embeddings\({ROWS}\) first"):
        ak.attach(build("gpt2")).load(folder, "a")
