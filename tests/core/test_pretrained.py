"""`save_pretrained` of an adapted model, and its `load_state_dict`."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
from tests.models import build, run
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    EncoderDecoderModel,
)

import adapterkit as ak
from adapterkit_lora import LoraConfig

from .conftest import different, set_parameters

Trained = Callable[..., ak.Adapters]
FILES = {"adapter_config.json", "adapter_model.safetensors"}
QUERY = {"target_modules": ["query"], "modules_to_save": None}
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"safe_serialization": False}, "only safetensors is written"),
    ({"variant": "fp16"}, "adapter files have no variants"),
    ({"save_peft_format": False}, "only PEFT's keys are written"),
    ({"distributed_checkpoint": True}, "use torch.distributed.checkpoint"),
]


@pytest.fixture
def model(tmp_path: Path) -> nn.Module:
    """A classifier that was loaded from a folder, as people's are."""
    build("bert").save_pretrained(tmp_path / "base")
    return BertForSequenceClassification.from_pretrained(tmp_path / "base").eval()


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("fields", [QUERY, {"target_modules": ["query"]}], ids=["layers", "with a head"])
def test_the_adapter_that_acts_is_what_is_written(
    fields: dict[str, Any], model: nn.Module, tmp_path: Path, trained: Trained
) -> None:
    trained(model, "a", **fields).activate("a")
    expected = run(model, "bert")
    model.save_pretrained(tmp_path / "out")
    assert names(tmp_path / "out") == FILES
    fresh = build("bert")
    assert ak.attach(fresh).load(tmp_path / "out", "b").ok
    torch.testing.assert_close(run(fresh, "bert"), expected)
    if fields is QUERY:  # others read it too
        theirs = peft.PeftModel.from_pretrained(build("bert"), tmp_path / "out").eval()
        torch.testing.assert_close(run(theirs, "bert"), expected)
        theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
        torch.testing.assert_close(run(theirs, "bert"), expected)


def test_several_that_act_have_a_subfolder_each_and_one_that_does_not_act(
    model: nn.Module, tmp_path: Path, trained: Trained
) -> None:
    adapters = trained(model, "a", "b", **QUERY)
    adapters.activate("b")
    model.save_pretrained(tmp_path / "out")
    assert names(tmp_path / "out") == FILES | {"a"}
    saved = safetensors.torch.load_file(tmp_path / "out" / "a" / "adapter_model.safetensors")
    assert all(torch.equal(saved[key], value) for key, value in adapters.state_dict("a").items())
    adapters.activate("a", "b")
    expected = run(model, "bert")
    model.save_pretrained(tmp_path / "out")
    assert names(tmp_path / "out") == {"a", "b"}  # the files of the one that acted before would be read as the whole
    fresh = build("bert")
    again = ak.attach(fresh)
    for name in ("a", "b"):
        again.load(tmp_path / "out" / name, name, activate=False)
    again.activate("a", "b")
    torch.testing.assert_close(run(fresh, "bert"), expected)


@pytest.mark.parametrize(("name", "fields"), [
    ("bert", {"target_modules": ["query"], "bias": "all"}),
    ("vit", {"target_modules": "all-linear"}),
    ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    ("gpt2", {"target_modules": ["c_attn"]}),
])  # fmt: skip
def test_merged_the_model_is_written_as_it_computes(name: str, fields: Any, tmp_path: Path, trained: Trained) -> None:
    model = build(name)
    adapters = trained(model, "a", **fields)
    adapters.activate("a")
    expected = run(model, name)
    assert different(expected, run(build(name), name))
    adapters.merge("a")
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(run(again, name), expected, rtol=1e-4, atol=1e-5)
    assert not any("adapter" in file for file in names(tmp_path))


@pytest.mark.parametrize("given", [False, True])
def test_merged_the_head_that_acts_and_its_labels_are_the_models(given: bool, model: nn.Module, tmp_path: Path) -> None:
    adapters = ak.attach(model)
    config = LoraConfig(r=2, target_modules=["query"])
    adapters.add("b", config, num_labels=4)
    adapters.add("a", config, id2label=dict(enumerate("vwxyz")))
    set_parameters(adapters, "a")
    adapters.merge("a")
    expected = run(model, "bert")
    model.save_pretrained(tmp_path / "out", **({"state_dict": model.state_dict()} if given else {}))
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(run(again, "bert"), expected)
    assert list(again.config.id2label.values()) == list("vwxyz")
    adapters.unmerge()
    with adapters.disabled():
        model.save_pretrained(tmp_path / "bare")
    bare = AutoModelForSequenceClassification.from_pretrained(tmp_path / "bare").eval()
    torch.testing.assert_close(run(bare, "bert"), run(build("bert"), "bert"))


def test_an_adapter_is_not_written_beside_another_whole_model(
    model: nn.Module, tmp_path: Path, trained: Trained
) -> None:
    adapters = trained(model, "a", **QUERY)
    adapters.merge("a")
    model.save_pretrained(tmp_path / "out")
    adapters.unmerge()
    adapters.activate("a")
    before = names(tmp_path / "out")
    with pytest.raises(ak.SaveError, match="holds a whole model, and the adapter beside it would be read as one of"):
        model.save_pretrained(tmp_path / "out")
    assert names(tmp_path / "out") == before
    model.save_pretrained(tmp_path / "base")  # of its own base it is one
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base").eval()
    torch.testing.assert_close(run(again, "bert"), run(model, "bert"))
    with pytest.raises(ak.SaveError, match="holds a whole model"):  # whose weights would be overwritten
        model.save_pretrained(tmp_path / "base", state_dict=model.state_dict())


def test_a_merged_model_is_not_written_beside_an_adapter(model: nn.Module, tmp_path: Path, trained: Trained) -> None:
    adapters = trained(model, "a", "b", **QUERY)
    adapters.save("a", tmp_path / "out")
    adapters.activate("a")
    adapters.merge("a")
    with pytest.raises(ak.SaveError, match="holds an adapter, which from_pretrained would add to the merged model"):
        model.save_pretrained(tmp_path / "out")
    assert names(tmp_path / "out") == FILES
    adapters.activate("b")
    with pytest.raises(ak.StateError, match="Adapter 'a' is merged and 'b' acts beside it, and no format holds both"):
        model.save_pretrained(tmp_path / "both")
    assert not (tmp_path / "both").exists()


def test_what_cannot_be_had_for_adapters_is_refused_and_another_process_writes_nothing(
    model: nn.Module, tmp_path: Path, trained: Trained
) -> None:
    trained(model, "a", **QUERY).activate("a")
    for option, message in REFUSED:
        with pytest.raises(ak.UnsupportedError, match=message):
            model.save_pretrained(tmp_path / "out", **option)
    model.save_pretrained(tmp_path / "out", is_main_process=False)
    assert not (tmp_path / "out").exists()


def test_the_state_dict_that_is_given_is_what_is_written(model: nn.Module, tmp_path: Path, trained: Trained) -> None:
    adapters = trained(model, "a", **QUERY)
    adapters.activate("a")
    given = {f"_orig_mod.{key}": value + 1 for key, value in model.state_dict().items()}
    model.save_pretrained(tmp_path / "out", state_dict=given)
    saved = safetensors.torch.load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert all(torch.equal(saved[key], value + 1) for key, value in adapters.state_dict("a").items())
    training = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
    assert training.keys() == {"adapterkit.setting", *(key for key in given if ".adapters.a." in key)}
    model.save_pretrained(tmp_path / "out")  # what a training resumes from is as new as the adapter
    training = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
    own = {key: value for key, value in model.state_dict().items() if ".adapters.a." in key}
    assert training.keys() == {"adapterkit.setting", *own}
    assert all(torch.equal(training[key], value) for key, value in own.items())
    with pytest.raises(ak.CheckpointError, match="The state dict lacks 4 of adapter 'a''s tensors"):
        model.save_pretrained(tmp_path / "other", state_dict={})
    assert not (tmp_path / "other").exists()


def test_a_compiled_model_takes_back_what_it_gave(model: nn.Module, tmp_path: Path, trained: Trained) -> None:
    adapters = trained(model, "a", **QUERY)
    adapters.activate("a")
    compiled, expected = nn.Module(), run(model, "bert")
    compiled._orig_mod = model  # what torch.compile makes: its keys are those
    model.save_pretrained(tmp_path / "out", state_dict=compiled.state_dict())  # as Trainer does
    set_parameters(adapters, "a", seed=5)
    assert different(run(model, "bert"), expected)
    compiled.load_state_dict(safetensors.torch.load_file(tmp_path / "out" / "model.safetensors"), strict=False)
    torch.testing.assert_close(run(model, "bert"), expected)


@pytest.mark.parametrize("way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_the_model_writes_its_own_adapters(
    way: Callable[[nn.Module], nn.Module], model: nn.Module, tmp_path: Path, trained: Trained
) -> None:
    trained(model, "a", **QUERY).activate("a")
    other = way(model)
    set_parameters(ak.attach(other), "a", seed=5)
    other.save_pretrained(tmp_path / "out")
    saved = safetensors.torch.load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert all(torch.equal(saved[key], value) for key, value in ak.attach(other).state_dict("a").items())
    keys = other.load_state_dict({k: v for k, v in model.state_dict().items() if ".adapters." in k}, strict=False)
    assert not keys.missing_keys
    torch.testing.assert_close(run(other, "bert"), run(model, "bert"))


def two_towers() -> nn.Module:
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(vocab_size=32, **tower)
    decoder = BertConfig(vocab_size=32, is_decoder=True, add_cross_attention=True, **tower)
    from transformers import EncoderDecoderConfig

    torch.manual_seed(0)
    return EncoderDecoderModel(EncoderDecoderConfig.from_encoder_decoder_configs(config, decoder)).eval()


def hidden(encoder: nn.Module) -> Tensor:
    with torch.no_grad():
        output: Tensor = encoder(input_ids=torch.arange(6)[None]).last_hidden_state
    return output


def test_a_model_inside_is_written_with_its_part_of_the_adapter(tmp_path: Path, trained: Trained) -> None:
    model = two_towers()
    model.encoder.save_pretrained(tmp_path / "base")
    plain = type(model.encoder).from_pretrained(tmp_path / "base").eval()
    trained(model, "a", target_modules=["encoder.encoder.layer.0.attention.self.query"]).activate("a")
    assert different(hidden(model.encoder), hidden(plain))
    model.encoder.save_pretrained(tmp_path / "encoder")
    ak.attach(plain).load(tmp_path / "encoder", "b")
    torch.testing.assert_close(hidden(plain), hidden(model.encoder))
    model.decoder.save_pretrained(tmp_path / "decoder")  # has no part of it
    assert "adapter_config.json" not in names(tmp_path / "decoder")


def test_a_model_inside_is_not_written_with_half_an_adapter(tmp_path: Path, trained: Trained) -> None:
    model = two_towers()
    trained(model, "a", **QUERY).activate("a")
    expected = hidden(model.encoder)
    with pytest.raises(ak.StateError, match=r"'encoder' cannot be saved with adapter 'a', which has another part at"):
        model.encoder.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    ak.attach(model).merge("a")
    model.encoder.save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(hidden(type(model.encoder).from_pretrained(tmp_path / "merged").eval()), expected)


def test_a_state_dict_without_an_adapter_that_trains_is_refused(model: nn.Module, trained: Trained) -> None:
    adapters = trained(model, "a", "b", **QUERY)
    adapters.activate("a", "b")
    state = {key: value for key, value in model.state_dict().items() if ".adapters.a." in key}
    with pytest.raises(ak.CheckpointError, match=re.escape("The model trains 'b', and the state dict lacks them")):
        model.load_state_dict(state, strict=False)
    assert model.load_state_dict(model.state_dict()) == ([], [])


def test_a_state_dict_of_an_adapter_of_another_rank_is_refused(model: nn.Module, trained: Trained) -> None:
    trained(model, "a", **QUERY)
    other = build("bert")
    ak.attach(other).add("a", LoraConfig(r=3, **QUERY))
    with pytest.raises(ak.CheckpointError, match=r"'a' was saved with another config .*lora_A.*' is \(3, 16\)"):
        model.load_state_dict(dict(other.state_dict()))


def test_a_state_dict_of_the_base_alone_is_loaded_with_a_warning(model: nn.Module, trained: Trained) -> None:
    adapters = trained(model, "a", **QUERY)
    base = build("bert", seed=3).state_dict()
    assert set(model.load_state_dict(base, strict=False).missing_keys) == model.state_dict().keys() - base.keys()
    adapters.activate("a")
    with pytest.warns(ak.AdapterWarning, match="The state dict holds no adapters: 'a' stays as it is"):
        model.load_state_dict(base, strict=False)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in base.items())


def test_what_a_state_dict_lacks_of_adapters_and_modules_around_the_model_is_missing(
    model: nn.Module, trained: Trained
) -> None:
    trained(model, "a", **QUERY).activate("a")
    whole = nn.Sequential(nn.Linear(2, 2), model)
    left_out, *given = (key for key in whole.state_dict() if ".adapters.a." in key)
    state = {key: value for key, value in whole.state_dict().items() if key in given}
    assert set(whole.load_state_dict(state, strict=False).missing_keys) == {left_out, "0.weight", "0.bias"}


def test_the_bare_base_is_written_without_a_word_in_a_block_alone(
    model: nn.Module, tmp_path: Path, trained: Trained
) -> None:
    adapters = trained(model, "a", **QUERY)
    with pytest.warns(ak.AdapterWarning, match="No adapter is active, so the bare base is written, without 'a'"):
        model.save_pretrained(tmp_path / "out")
    with adapters.disabled():
        model.save_pretrained(tmp_path / "out")
    assert not FILES & names(tmp_path / "out")


def test_blocks_decide_what_is_written(model: nn.Module, tmp_path: Path, trained: Trained) -> None:
    adapters = trained(model, "a", "b", **QUERY)
    adapters.activate("a")
    with adapters.activated("b"):
        model.save_pretrained(tmp_path / "activated")
    with adapters.per_sample(["a", "b"]):
        model.save_pretrained(tmp_path / "per sample")
    with adapters.disabled():
        model.save_pretrained(tmp_path / "disabled")
    assert names(tmp_path / "activated") == FILES | {"a"}
    assert names(tmp_path / "per sample") == {"a", "b"}
    assert names(tmp_path / "disabled") == {"config.json", "model.safetensors"}


def test_what_is_pushed_is_what_was_written(
    model: nn.Module, tmp_path: Path, trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    calls: list[dict[str, Any]] = []
    created = SimpleNamespace(repo_id="me/out")
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda self, repo_id, **_: created)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", lambda self, **given: calls.append(given))
    trained(model, "a", "b", **QUERY).activate("a")
    model.save_pretrained(tmp_path / "out", push_to_hub=True, commit_message="Trained")
    (call,) = calls
    assert (call["repo_id"], call["commit_message"]) == ("me/out", "Trained")
    assert set(call["allow_patterns"]) == FILES | {"b/*"}


def test_model_around_the_one_that_has_adapters_says_that_its_files_give_the_bare_base(tmp_path: Path) -> None:
    model = build("llama")
    adapters = ak.attach(model.model)
    adapters.add("a", LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.warns(ak.AdapterWarning, match="attached to 'model' inside this model, which does not know them"):
        model.save_pretrained(tmp_path / "whole")
    model.model.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()
    adapters.detach()
    model.save_pretrained(tmp_path / "bare")


def test_adapters_of_an_earlier_save_in_subfolders_are_told_and_stay(tmp_path: Path) -> None:
    model = build("llama")
    adapters = ak.attach(model)
    for name in ("a", "b"):
        adapters.add(name, LoraConfig(r=2, target_modules=["q_proj"]))
    adapters.activate("a", "b")
    model.save_pretrained(tmp_path)
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / "adapter_config.json").touch()
    adapters.remove("b")
    adapters.activate("a")
    with pytest.warns(ak.AdapterWarning, match="holds adapters from before, in the subfolders 'a', 'b'. Delete them"):
        model.save_pretrained(tmp_path)
    assert (tmp_path / "b" / "adapter_config.json").is_file()
