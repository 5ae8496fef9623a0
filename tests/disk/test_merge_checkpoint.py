"""Merging on disk gives what merging in memory gives, bit for bit, and keeps the files' form."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests import models
from tests.disk.merging import Setting, assert_same_folder, assert_same_tensors, both_ways, save_adapters, save_base
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

import adapterkit as ak
from adapterkit import Checkpoint
from adapterkit.contract.registry import default_registry
from adapterkit.disk.checkpoint import match_names
from adapterkit_loha import LoHaConfig
from adapterkit_lora import LoraConfig
from adapterkit_vera import VeraConfig

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "thirdparty" / "adapterkit_ia3"))
from adapterkit_ia3 import IA3Config
from adapterkit_ia3 import plugin as ia3

BF16 = torch.bfloat16


def base_class(model: Any) -> None:
    """Save the model's body alone, under the names that it has by itself."""
    body, whole = getattr(model, model.base_model_prefix), type(model)

    def save(folder: Path, **arguments: Any) -> None:
        body.save_pretrained(folder, **arguments)
        model.config.architectures = [whole.__name__]
        model.config.save_pretrained(folder)

    model.save_pretrained = save


@pytest.fixture(autouse=True, scope="module")
def _third_party() -> Iterator[None]:
    ak.register(ia3)
    yield
    default_registry.unregister("ia3")


LINEAR = LoraConfig(target_modules="all-linear", r=3)
SETTINGS = {
    "bert, biases, embeddings and a larger head": Setting(
        "bert", [LoraConfig(target_modules=["query", "word_embeddings"], r=3, bias="all")], added={"num_labels": 5}
    ),
    "bert in bf16, in shards": Setting("bert", [LINEAR], BF16, "5KB", {"num_labels": 2}),
    "bert from its base class": Setting("bert", [LINEAR], change=base_class),
    "gpt2 (Conv1D)": Setting("gpt2", [LoraConfig(target_modules=["c_attn", "c_proj"], r=3, bias="all")]),
    "gpt2 from its base class, in shards": Setting("gpt2", [LINEAR], BF16, "8KB", change=base_class),
    "gpt2 untied": Setting("gpt2", [LoraConfig(target_modules=["c_attn", "wte"], r=3)], merged={"untie": True}),
    "llama, LoHa": Setting("llama", [LoHaConfig(target_modules="all-linear", r=7)], BF16, "4KB"),
    "llama, its output layer in full": Setting("llama", [LoraConfig(r=2, modules_to_save=["lm_head"])], BF16),
    "t5, VeRA by its key": Setting("t5", [VeraConfig(target_modules=["q"], r=4, save_projection=False)]),
    "vit, renamed at loading, with a convolution": Setting(
        "vit", [LoraConfig(target_modules=["projection", "q_proj"], r=3)], torch.float16, added={"num_labels": 7}
    ),
    "bart": Setting("bart", [LoraConfig(target_modules=["q_proj", "fc2"], r=3, bias="lora_only")]),
    "gemma3, tied, untouched there": Setting("gemma3", [LINEAR], BF16, "4KB"),
    "(IA)3, no sum, in shards": Setting(
        "bert", [IA3Config(target_modules=["key", "output.dense"], feedforward_modules=["output.dense"])], BF16, "1KB"
    ),
    "three methods at once": Setting(
        "bert",
        [
            LoraConfig(target_modules=["query", "key"], r=3, bias="all", modules_to_save=None),
            LoHaConfig(target_modules=["query", "value"], r=6, modules_to_save=None),
            IA3Config(target_modules=["query", "value"], feedforward_modules=[], modules_to_save=None),
        ],
        BF16,
    ),
    "two heads": Setting("bert", [LINEAR, LINEAR], added={"num_labels": 4}, merged={"heads": "a"}),
}


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS.keys())
def test_the_tensors_are_those_of_a_merge_in_memory(setting: Setting, tmp_path: Path) -> None:
    memory, out, report = both_ways(setting, tmp_path)
    if setting.change is base_class:  # names and files stay the base's
        cls: Any = type(models.build(setting.model))
        loaded = [cls.from_pretrained(folder, dtype="auto") for folder in (memory, out)]
        assert all(
            torch.equal(one, other) for one, other in zip(*(m.state_dict().values() for m in loaded), strict=True)
        )
    else:
        assert_same_tensors(memory, out)
    assert sum(report.merged.values()) > 0
    assert not (tmp_path / ".out.partial").exists()


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS.keys())
def test_the_merged_model_loads_and_computes_the_same(setting: Setting, tmp_path: Path) -> None:
    memory, out, _ = both_ways(setting, tmp_path)
    cls: Any = type(models.build(setting.model))
    first, second = (cls.from_pretrained(folder, dtype="auto").eval() for folder in (memory, out))
    models.assert_same_outputs(models.run(first, setting.model), models.run(second, setting.model))
    assert type(first.config)(**first.config.to_dict()).id2label == second.config.id2label
    assert second.config.architectures == first.config.architectures
    ties = [getattr(m.config, "tie_word_embeddings", None) for m in (first, second)]
    assert ties[0] == ties[1]


def test_files_names_order_and_metadata_are_the_bases(tmp_path: Path) -> None:
    setting = Setting("llama", [LoraConfig(target_modules=["q_proj"], layers_to_transform=[0], r=2)], BF16, "3KB")
    _, out, report = both_ways(setting, tmp_path)
    base, merged = Checkpoint.open(tmp_path / "base"), Checkpoint.open(out)
    assert list(merged.shards) == list(base.shards)
    assert sum(report.merged.values()) == 1
    for name, shard in base.shards.items():
        assert merged.shards[name].header == shard.header
        same = (tmp_path / "base" / name).read_bytes() == (out / name).read_bytes()
        assert same == (report.merged[name] == 0)
    index = "model.safetensors.index.json"
    assert (out / index).read_bytes() == (tmp_path / "base" / index).read_bytes()


def test_the_index_counts_what_was_added(tmp_path: Path) -> None:
    setting = Setting("bert", [LINEAR], shard="5KB", added={"num_labels": 30}, change=base_class)
    _, out, report = both_ways(setting, tmp_path)
    assert set(report.added) == {"classifier.weight", "classifier.bias"}
    assert report.heads == ("classifier",)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    merged = Checkpoint.open(out)
    assert index["weight_map"] == {n: e.file.name for n, e in merged.entries.items()}
    assert index["metadata"]["total_size"] == sum(e.nbytes for e in merged.entries.values())


def test_every_tensor_of_a_changed_layout_can_be_mapped(tmp_path: Path) -> None:
    """Where sizes change, wide elements go first: a float32 tensor behind three bytes of bf16 could not be mapped."""
    save_file({"a": torch.ones(3, dtype=BF16), "b": torch.ones(2)}, tmp_path / "x.safetensors")
    setting = Setting("bert", [LINEAR], BF16, added={"num_labels": 1})
    _, out, _ = both_ways(setting, tmp_path)
    for entry in Checkpoint.open(out).entries.values():
        assert entry.start % entry.torch_dtype.itemsize == 0
    assert load_file(out / "model.safetensors")["classifier.bias"].shape == (1,)


def test_a_weight_scales_the_change(tmp_path: Path) -> None:
    both = [
        LoraConfig(target_modules=["q_proj"], r=3, bias="all"),
        LoHaConfig(target_modules=["q_proj", "v_proj"], r=7),
    ]
    setting = Setting("bart", both)
    cls = save_base(setting, tmp_path / "base")
    adapters = save_adapters(setting, tmp_path / "base", cls, tmp_path)
    before = {k: v.clone() for k, v in load_file(tmp_path / "base/model.safetensors").items()}
    changes = []
    for name in "ab":
        adapters.merge(name)
        changes.append({k: v.detach() - before[k] for k, v in adapters.model.state_dict().items() if k in before})
        adapters.unmerge()
    ak.merge_checkpoint(tmp_path / "base", {tmp_path / "a": 0.5, tmp_path / "b": -2}, tmp_path / "out")
    found = load_file(tmp_path / "out/model.safetensors")
    for key, value in before.items():
        torch.testing.assert_close(found[key], value + 0.5 * changes[0][key] - 2 * changes[1][key])


def test_files_beside_the_weights_are_copied_but_for_other_weights_and_adapters(tmp_path: Path) -> None:
    setting = Setting("bert", [LINEAR])
    base = tmp_path / "base"
    cls = save_base(setting, base)
    save_adapters(setting, base, cls, tmp_path)
    for name in (
        "tokenizer.json",
        "vocab.txt",
        "1_Pooling/config.json",
        "pytorch_model.bin",
        ".cache/x",
        "onnx/m.onnx",
    ):
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text(name)
    shutil.copytree(tmp_path / "a", base / "an adapter")
    (base / "README.md").symlink_to(base / "vocab.txt")
    (base / "linked").symlink_to(tmp_path)
    report = ak.merge_checkpoint(base, tmp_path / "a", tmp_path / "out")
    names = sorted(p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*") if p.is_file())
    kept = ["1_Pooling/config.json", "README.md", "config.json", "model.safetensors", "tokenizer.json", "vocab.txt"]
    assert names == sorted([*kept, "adapterkit_merge.json"])
    assert not (tmp_path / "out/README.md").is_symlink()
    assert set(report.not_copied) == {"pytorch_model.bin", ".cache", "onnx/m.onnx", "an adapter", "linked"}
    assert (tmp_path / "out/config.json").read_bytes() == (base / "config.json").read_bytes()
    assert "not copied: " in str(report)


def test_the_manifest_tells_what_was_merged(tmp_path: Path) -> None:
    _, out, _ = both_ways(Setting("llama", [LINEAR], shard="6KB"), tmp_path)
    manifest = json.loads((out / "adapterkit_merge.json").read_text())
    for name, recorded in manifest["files"].items():
        assert recorded == {"size": (out / name).stat().st_size}
    (adapter,) = manifest["inputs"]["adapters"]
    weights = (tmp_path / "a/adapter_model.safetensors").read_bytes()
    assert adapter["files"]["adapter_model.safetensors"]["sha256"] == hashlib.sha256(weights).hexdigest()
    assert adapter["weight"] == 1.0


def test_a_base_of_another_class_takes_the_class_that_has_the_head(tmp_path: Path) -> None:
    setting = Setting("bert", [LINEAR])
    cls = save_base(setting, tmp_path / "base")
    save_adapters(setting, tmp_path / "base", cls, tmp_path)
    model: Any = models.build("bert")
    shutil.rmtree(tmp_path / "base")
    model.bert.save_pretrained(tmp_path / "base")
    ak.merge_checkpoint(
        tmp_path / "base", tmp_path / "a", tmp_path / "out", architecture="BertForSequenceClassification"
    )
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["architectures"] == ["BertForSequenceClassification"]
    found = cls.from_pretrained(tmp_path / "out", output_loading_info=True)[1]
    assert not found["missing_keys"]
    with pytest.raises(ak.CheckpointError, match="transformers has no model of the class 'BertForNothing'"):
        ak.skeleton(tmp_path / "base", architecture="BertForNothing")


def _bare_base(task: str | None, root: Path) -> type[Any]:
    """A base that is stored without its head, and an adapter with one."""
    setting = Setting("bert", [LINEAR.replace(task_type=task)])
    cls = save_base(setting, root / "base")
    save_adapters(setting, root / "base", cls, root)
    shutil.rmtree(root / "base")
    model: Any = models.build("bert")
    model.bert.save_pretrained(root / "base")
    return cls


def test_the_adapters_task_says_the_class_of_a_bare_base(tmp_path: Path) -> None:
    cls = _bare_base("SEQ_CLS", tmp_path)
    ak.merge_checkpoint(tmp_path / "base", tmp_path / "a", tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["architectures"] == ["BertForSequenceClassification"]
    assert not cls.from_pretrained(tmp_path / "out", output_loading_info=True)[1]["missing_keys"]


def test_without_a_task_the_modules_that_the_base_lacks_are_named(tmp_path: Path) -> None:
    _bare_base(None, tmp_path)
    message = re.escape(
        "names BertModel, which has no 'bert', 'classifier', as the adapters have. If they are for this model with a "
        "task's head, say its class: architecture="
    )
    refused(ak.CheckpointError, message, tmp_path, tmp_path / "base", tmp_path / "a", tmp_path / "out")


def test_a_model_that_is_not_of_transformers_is_given_on_the_meta_device(tmp_path: Path) -> None:
    model = models.build("convnet")
    (tmp_path / "base").mkdir()
    save_file(model.state_dict(), tmp_path / "base/model.safetensors")
    adapters = ak.attach(model)
    adapters.add("a", LoraConfig(target_modules=".*(conv|fc|grouped).*", r=2, init_lora_weights=False))
    adapters.save("a", tmp_path / "a")
    with torch.device("meta"):
        empty = models.ConvNet()
    ak.merge_checkpoint(tmp_path / "base", tmp_path / "a", tmp_path / "out", model=empty)
    plain = adapters.merge_and_detach("a")
    found = load_file(tmp_path / "out/model.safetensors")
    assert all(torch.equal(found[k], v) for k, v in plain.state_dict().items())


@pytest.mark.parametrize("shift", [0.0, 1.0])
@pytest.mark.parametrize("model", ["llama", "gemma3"])
def test_an_embedding_that_the_adapter_holds_in_full_is_merged_with_its_change(
    shift: float, model: str, tmp_path: Path
) -> None:
    """PEFT writes it with every adapter that changes it: often it is the base's."""
    setting = Setting(model, [LoraConfig(target_modules=["q_proj", "embed_tokens"], r=2)], BF16)
    cls = save_base(setting, tmp_path / "base")
    adapters = save_adapters(setting, tmp_path / "base", cls, tmp_path)
    tensors = load_file(tmp_path / "a/adapter_model.safetensors")
    full = adapters.model.get_submodule("model.embed_tokens").weight.detach() + shift
    tensors["base_model.model.model.embed_tokens.base_layer.weight"] = full
    save_file(tensors, tmp_path / "a/adapter_model.safetensors")
    adapters = ak.attach(cls.from_pretrained(tmp_path / "base", dtype="auto").eval())
    adapters.load(tmp_path / "a", "a")
    adapters.merge_and_detach("a", untie=True).save_pretrained(tmp_path / "memory")
    ak.merge_checkpoint(tmp_path / "base", tmp_path / "a", tmp_path / "out", untie=True)
    assert_same_tensors(tmp_path / "memory", tmp_path / "out")


def test_progress_reaches_all_bytes(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    _, _, report = both_ways(
        Setting("llama", [LINEAR], shard="6KB"), tmp_path, progress=lambda done, total: seen.append((done, total))
    )
    assert seen[0] == (0, report.nbytes)
    assert seen[-1] == (report.nbytes, report.nbytes)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


# Refusals


def prepared(tmp_path: Path, *configs: ak.AdapterConfig, model: str = "bert") -> Path:
    setting = Setting(model, configs or [LINEAR])
    cls = save_base(setting, tmp_path / "base")
    save_adapters(setting, tmp_path / "base", cls, tmp_path)
    return tmp_path / "base"


def refused(error: type[ak.AdapterError], text: str, tmp_path: Path, *arguments: Any, **options: Any) -> None:
    with pytest.raises(error, match=text):
        ak.merge_checkpoint(*arguments, **options)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / ".out.partial").exists()


def test_a_tied_target_is_refused_unless_it_is_to_be_untied(tmp_path: Path) -> None:
    base = prepared(tmp_path, LoraConfig(target_modules=["wte"], r=2), model="gpt2")
    refused(ak.StateError, r"'transformer.wte.weight' is tied", tmp_path, base, tmp_path / "a", tmp_path / "out")


@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_a_tie_that_the_files_hold_apart_is_none_if_the_values_differ(shift: float, tmp_path: Path) -> None:
    setting = Setting("gpt2", [LoraConfig(target_modules=["wte"], r=2)])
    cls = save_base(setting, tmp_path / "base")
    tensors = load_file(tmp_path / "base/model.safetensors")
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"] + shift
    save_file(tensors, tmp_path / "base/model.safetensors", {"format": "pt"})
    adapters = save_adapters(setting, tmp_path / "base", cls, tmp_path)
    arguments = (tmp_path / "base", tmp_path / "a", tmp_path / "out")
    if not shift:
        refused(ak.StateError, r"'transformer.wte.weight' is tied", tmp_path, *arguments)
        return
    ak.merge_checkpoint(*arguments)
    adapters.merge_and_detach("a").save_pretrained(tmp_path / "memory")
    assert_same_tensors(tmp_path / "memory", tmp_path / "out")


def test_ties_in_code_cannot_be_untied_in_files(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
            self.head.weight = self.embed.weight

    model = Tied()
    (tmp_path / "base").mkdir()
    save_file({"embed.weight": model.embed.weight.detach()}, tmp_path / "base/model.safetensors")
    adapters = ak.attach(model)
    adapters.add("a", LoraConfig(target_modules=["embed"], r=2))
    adapters.save("a", tmp_path / "a")
    with torch.device("meta"):
        empty = Tied()
    arguments = (tmp_path / "base", tmp_path / "a", tmp_path / "out")
    refused(ak.UnsupportedError, "ties weights in its code", tmp_path, *arguments, untie=True, model=empty)


def test_a_fused_target_is_refused_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = MixtralForCausalLM(MixtralConfig(vocab_size=16, num_hidden_layers=1, num_local_experts=2, **sizes))
    model.save_pretrained(tmp_path / "base")
    adapters = ak.attach(model)
    adapters.add("a", LoraConfig(target_modules=["q_proj"], r=2))
    adapters.save("a", tmp_path / "a")
    assert ak.merge_checkpoint(tmp_path / "base", tmp_path / "a", tmp_path / "fine").merged
    monkeypatch.setattr(
        "adapterkit.disk.model.match_names",
        lambda *a: _fused(*match_names(*a)),
    )
    text = r"'model.layers.0.self_attn.q_proj.weight' is not a tensor of .*: transformers makes it from 1 others"
    refused(ak.UnsupportedError, text, tmp_path, tmp_path / "base", tmp_path / "a", tmp_path / "out")


def _fused(in_file: dict[str, str], fused: Any) -> Any:
    key = "model.layers.0.self_attn.q_proj.weight"
    return {k: v for k, v in in_file.items() if k != key}, {key: ("qkv.weight",)}


def test_a_target_that_the_files_lack_is_refused(tmp_path: Path) -> None:
    base = prepared(tmp_path)
    tensors = load_file(base / "model.safetensors")
    del tensors["bert.encoder.layer.0.attention.self.query.weight"]
    save_file(tensors, base / "model.safetensors")
    text = "has no tensor for 'bert.encoder.layer.0.attention.self.query.weight' of a BertFor"
    refused(ak.CheckpointError, text, tmp_path, base, tmp_path / "a", tmp_path / "out")


@pytest.mark.parametrize("change", [lambda t: t[:-1].contiguous(), lambda t: t.to(torch.int8)])
def test_a_target_of_another_shape_or_quantised_is_refused(change: Any, tmp_path: Path) -> None:
    base = prepared(tmp_path)
    tensors = load_file(base / "model.safetensors")
    key = "bert.encoder.layer.0.attention.self.query.weight"
    tensors[key] = change(tensors[key])
    save_file(tensors, base / "model.safetensors")
    text = "it is quantised, or does not go with the config"
    refused(ak.CheckpointError, text, tmp_path, base, tmp_path / "a", tmp_path / "out")


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    prepared(tmp_path)
    save_base(Setting("llama", [LINEAR]), tmp_path / "other")
    text = "names LlamaForCausalLM, which has no 'bert', 'classifier', as the adapters have"
    refused(ak.CheckpointError, text, tmp_path, tmp_path / "other", tmp_path / "a", tmp_path / "out")


def test_a_multiple_of_what_is_no_sum_is_refused(tmp_path: Path) -> None:
    base = prepared(tmp_path, IA3Config(target_modules=["key"], feedforward_modules=[]))
    text = "cannot be merged with the weight 0.5: the method 'ia3' is not additive"
    refused(ak.UnsupportedError, text, tmp_path, base, {tmp_path / "a": 0.5}, tmp_path / "out")


def test_one_adapter_by_two_names_is_refused(tmp_path: Path) -> None:
    base = prepared(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "a")
    refused(
        ak.ConfigError,
        "are one adapter; give it once",
        tmp_path,
        base,
        [tmp_path / "a", tmp_path / "link"],
        tmp_path / "out",
    )


def test_an_adapter_in_the_bases_place_is_told_so(tmp_path: Path) -> None:
    base = prepared(tmp_path)
    refused(ak.CheckpointError, "It is an adapter; give the model", tmp_path, tmp_path / "a", base, tmp_path / "out")


def test_two_heads_need_a_choice(tmp_path: Path) -> None:
    base = prepared(tmp_path, LINEAR, LINEAR)
    both = [tmp_path / "a", tmp_path / "b"]
    refused(ak.ConfigError, "'a' and 'b' each have their own 'classifier'", tmp_path, base, both, tmp_path / "out")
    ak.merge_checkpoint(base, both, tmp_path / "out", heads=str(tmp_path / "b"))
    head = load_file(tmp_path / "b/adapter_model.safetensors")["base_model.model.classifier.weight"]
    assert torch.equal(load_file(tmp_path / "out/model.safetensors")["classifier.weight"], head)


@pytest.mark.parametrize("adapters", [[], {}, ["a", "a"]])
def test_without_adapters_or_with_one_twice_there_is_nothing_to_do(adapters: Any, tmp_path: Path) -> None:
    text = "merge_checkpoint needs adapters, each once"
    refused(ak.ConfigError, text, tmp_path, prepared(tmp_path), adapters, tmp_path / "out")


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), True, "1"])
def test_a_weight_that_is_no_number_is_refused(weight: Any, tmp_path: Path) -> None:
    base = prepared(tmp_path)
    refused(ak.ConfigError, "must be a finite number, not", tmp_path, base, {tmp_path / "a": weight}, tmp_path / "out")


def test_two_adapters_of_one_name_are_told_apart(tmp_path: Path) -> None:
    base = prepared(tmp_path)
    (tmp_path / "x").mkdir()
    shutil.copytree(tmp_path / "a", tmp_path / "x" / "a")
    report = ak.merge_checkpoint(base, [tmp_path / "a", tmp_path / "x" / "a"], tmp_path / "out", heads="a_2")
    assert list(report.adapters) == ["a", "a_2"]


def test_an_added_tensor_that_would_not_be_found_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setting = Setting("bert", [LINEAR], change=base_class)
    cls = save_base(setting, tmp_path / "base")
    save_adapters(setting, tmp_path / "base", cls, tmp_path)
    monkeypatch.setattr("adapterkit.disk.merge.match_names", lambda model, names: match_names(model, []))
    text = "lacks 'classifier.weight', and beside the names that it has, such a tensor would not be found"
    refused(ak.UnsupportedError, text, tmp_path, tmp_path / "base", tmp_path / "a", tmp_path / "out")


def test_merging_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    base = prepared(tmp_path)
    for name in ("out", "again"):
        ak.merge_checkpoint(base, tmp_path / "a", tmp_path / name)
    assert_same_folder(tmp_path / "out", tmp_path / "again")


@pytest.mark.parametrize("text", ["[", "[]"])
def test_a_config_that_is_no_object_is_refused(text: str, tmp_path: Path) -> None:
    base = prepared(tmp_path)
    (base / "config.json").write_text(text)
    refused(ak.CheckpointError, "There is no config of a model for", tmp_path, base, tmp_path / "a", tmp_path / "out")


def test_a_base_that_is_not_there_is_refused(tmp_path: Path) -> None:
    prepared(tmp_path)
    refused(ak.CheckpointError, "There is no folder", tmp_path, tmp_path / "nowhere", tmp_path / "a", tmp_path / "out")
