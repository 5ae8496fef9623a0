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

BF16, WEIGHTS = torch.bfloat16, "model.safetensors"


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
    "bart, one of four tied tables": Setting(
        "bart", [LoraConfig(target_modules=["lm_head"], r=3)], merged={"untie": True}
    ),
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
def test_the_merged_model_is_that_of_a_merge_in_memory(setting: Setting, tmp_path: Path) -> None:
    memory, out, report = both_ways(setting, tmp_path)
    if setting.change is not base_class:  # names and files stay the base's
        assert_same_tensors(memory, out)
    cls: Any = type(models.build(setting.model))
    first, second = (cls.from_pretrained(folder, dtype="auto").eval() for folder in (memory, out))
    for one, other in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    models.assert_same_outputs(models.run(first, setting.model), models.run(second, setting.model))
    assert type(first.config)(**first.config.to_dict()).id2label == second.config.id2label
    assert second.config.architectures == first.config.architectures
    ties = [getattr(m.config, "tie_word_embeddings", None) for m in (first, second)]
    assert ties[0] == ties[1]
    assert sum(report.merged.values()) > 0
    assert not (tmp_path / ".out.partial").exists()


def test_files_names_order_and_metadata_are_the_bases(tmp_path: Path) -> None:
    setting = Setting("llama", [LoraConfig(target_modules=["q_proj"], layers_to_transform=[0], r=2)], BF16, "3KB")
    seen: list[tuple[int, int]] = []
    _, out, report = both_ways(setting, tmp_path, progress=lambda *bytes_: seen.append(bytes_))
    base, merged = Checkpoint.open(tmp_path / "base"), Checkpoint.open(out)
    assert list(merged.shards) == list(base.shards)
    assert sum(report.merged.values()) == 1
    for name, shard in base.shards.items():
        assert merged.shards[name].header == shard.header
        same = (tmp_path / "base" / name).read_bytes() == (out / name).read_bytes()
        assert same == (report.merged[name] == 0)
    index = "model.safetensors.index.json"
    assert (out / index).read_bytes() == (tmp_path / "base" / index).read_bytes()
    # The manifest tells what was merged, and progress reaches all bytes.
    manifest = json.loads((out / "adapterkit_merge.json").read_text())
    assert manifest["files"] == {name: {"size": (out / name).stat().st_size} for name in merged.shards}
    (adapter,) = manifest["inputs"]["adapters"]
    weights = (tmp_path / "a/adapter_model.safetensors").read_bytes()
    assert adapter["files"]["adapter_model.safetensors"]["sha256"] == hashlib.sha256(weights).hexdigest()
    assert adapter["weight"] == 1.0
    assert (seen[0], seen[-1]) == ((0, report.nbytes), (report.nbytes, report.nbytes))
    assert seen == sorted(seen)
    # A second run gives the same bytes.
    ak.merge_checkpoint(tmp_path / "base", tmp_path / "a", tmp_path / "again")
    assert_same_folder(out, tmp_path / "again")


def test_what_is_added_is_in_the_index(tmp_path: Path) -> None:
    setting = Setting("bert", [LINEAR], BF16, "5KB", added={"num_labels": 31}, change=base_class)
    _, out, report = both_ways(setting, tmp_path)
    assert set(report.added) == {"classifier.weight", "classifier.bias"}
    assert report.heads == ("classifier",)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    merged = Checkpoint.open(out)
    assert index["weight_map"] == {n: e.file.name for n, e in merged.entries.items()}
    assert index["metadata"]["total_size"] == sum(e.nbytes for e in merged.entries.values())


def test_every_tensor_of_a_changed_layout_can_be_mapped(tmp_path: Path) -> None:
    """A float32 tensor behind four and one numbers of bf16 could not: wide elements go first."""
    setting = Setting("bert", [LINEAR], BF16, added={"num_labels": 4})
    file = tmp_path / "base" / WEIGHTS
    cls = save_base(setting, tmp_path / "base")
    save_adapters(setting, tmp_path / "base", cls, tmp_path)
    tensors = load_file(file)
    tensors = {"classifier.bias": tensors.pop("classifier.bias"), "more": torch.ones(2, dtype=BF16)[:1], **tensors}
    tensors = {key: tensor.float() if "LayerNorm" in key else tensor for key, tensor in tensors.items()}
    header, data = {}, b""
    for key, tensor in tensors.items():  # an order that safetensors itself would not write
        own = tensor.contiguous().view(torch.uint8).numpy().tobytes()
        dtype = "BF16" if tensor.dtype == BF16 else "F32"
        header[key] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [len(data), len(data) + len(own)]}
        data += own
    text = json.dumps(header).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)
    ak.merge_checkpoint(tmp_path / "base", tmp_path / "a", tmp_path / "out")
    merged = Checkpoint.open(tmp_path / "out")
    assert {entry.start % entry.torch_dtype.itemsize for entry in merged.entries.values()} == {0}
    found = load_file(tmp_path / "out" / WEIGHTS)
    assert found["classifier.bias"].shape == (4,)
    assert all(torch.equal(found[key], tensor) for key, tensor in tensors.items() if "LayerNorm" in key)


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
    for folder in (base, base / "1_Pooling"):
        folder.chmod(0o555)  # which the output does not take over
    report = ak.merge_checkpoint(base, tmp_path / "a", tmp_path / "out")
    assert all((tmp_path / "out" / name).stat().st_mode & 0o200 for name in ("", "1_Pooling"))
    names = sorted(p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*") if p.is_file())
    kept = ["1_Pooling/config.json", "README.md", "config.json", "model.safetensors", "tokenizer.json", "vocab.txt"]
    assert names == sorted([*kept, "adapterkit_merge.json"])
    assert not (tmp_path / "out/README.md").is_symlink()
    assert set(report.not_copied) == {"pytorch_model.bin", ".cache", "onnx/m.onnx", "an adapter", "linked"}
    assert (tmp_path / "out/config.json").read_bytes() == (base / "config.json").read_bytes()
    assert "not copied: " in str(report)


@pytest.mark.parametrize("task", ["SEQ_CLS", None])
def test_a_bare_base_takes_the_class_of_the_adapters_task_or_the_one_that_is_given(
    task: str | None, tmp_path: Path
) -> None:
    setting = Setting("bert", [LINEAR.replace(task_type=task)])
    base, adapter, out = (tmp_path / name for name in ("base", "a", "out"))
    cls = save_base(setting, base)
    save_adapters(setting, base, cls, tmp_path)
    if not task:  # the file of a program that does not say
        file = adapter / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"task_type": None}))
    shutil.rmtree(base)
    model: Any = models.build("bert")
    model.bert.save_pretrained(base)
    architecture = None if task else "BertForSequenceClassification"
    if not task:
        text = re.escape("names BertModel, which has no 'bert', 'classifier', as the adapters have. If they are for")
        refused(ak.CheckpointError, text, base, adapter, out)
        text = "transformers has no model of the class 'BertForNothing'"
        refused(ak.UsageError, text, base, adapter, out, architecture="BertForNothing")
    ak.merge_checkpoint(base, adapter, out, architecture=architecture)
    assert json.loads((out / "config.json").read_text())["architectures"] == ["BertForSequenceClassification"]
    assert not cls.from_pretrained(out, output_loading_info=True)[1]["missing_keys"]


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


# Refusals


def prepared(root: Path, *configs: ak.AdapterConfig, model: str = "bert") -> tuple[Path, Path, Path]:
    """The base, the adapter `a`, and a place for the output."""
    setting = Setting(model, configs or [LINEAR])
    cls = save_base(setting, root / "base")
    save_adapters(setting, root / "base", cls, root)
    return root / "base", root / "a", root / "out"


def refused(error: type[ak.AdapterError], text: str, base: Any, adapters: Any, out: Path, **options: Any) -> None:
    with pytest.raises(error, match=text):
        ak.merge_checkpoint(base, adapters, out, **options)
    assert not out.exists()
    assert not out.with_name(f".{out.name}.partial").exists()


@pytest.mark.parametrize("shift", [0.0, 1.0, None])
def test_a_tied_target_is_refused_unless_the_files_hold_other_values_apart(shift: float | None, tmp_path: Path) -> None:
    setting = Setting("gpt2", [LoraConfig(target_modules=["wte"], r=2)])
    base, adapter, out = (tmp_path / name for name in ("base", "a", "out"))
    cls = save_base(setting, base)
    if shift is not None:
        tensors = load_file(base / WEIGHTS)
        tensors["lm_head.weight"] = tensors["transformer.wte.weight"] + shift
        save_file(tensors, base / WEIGHTS, {"format": "pt"})
    adapters = save_adapters(setting, base, cls, tmp_path)
    if not shift:
        refused(ak.StateError, r"'transformer.wte.weight' is tied", base, adapter, out)
        return
    ak.merge_checkpoint(base, adapter, out)
    adapters.merge_and_detach("a").save_pretrained(tmp_path / "memory")
    assert_same_tensors(tmp_path / "memory", out)


def test_ties_in_code_cannot_be_untied_in_files(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
            self.head.weight = self.embed.weight

    model = Tied()
    (tmp_path / "base").mkdir()
    save_file({"embed.weight": model.embed.weight.detach()}, tmp_path / "base" / WEIGHTS)
    adapters = ak.attach(model)
    adapters.add("a", LoraConfig(target_modules=["embed"], r=2))
    adapters.save("a", tmp_path / "a")
    with torch.device("meta"):
        empty = Tied()
    paths = (tmp_path / "base", tmp_path / "a", tmp_path / "out")
    refused(ak.UnsupportedError, "ties weights in its code", *paths, untie=True, model=empty)


def test_a_fused_target_is_refused_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = MixtralForCausalLM(MixtralConfig(vocab_size=16, num_hidden_layers=1, num_local_experts=2, **sizes))
    model.save_pretrained(tmp_path / "base")
    adapters = ak.attach(model)
    adapters.add("a", LoraConfig(target_modules=["q_proj"], r=2))
    adapters.save("a", tmp_path / "a")
    assert ak.merge_checkpoint(tmp_path / "base", tmp_path / "a", tmp_path / "fine").merged
    key = "model.layers.0.self_attn.q_proj.weight"

    def fused(*given: Any) -> tuple[dict[str, str], dict[str, tuple[str, ...]]]:
        in_file, _ = match_names(*given)
        return {k: v for k, v in in_file.items() if k != key}, {key: ("qkv.weight",)}

    monkeypatch.setattr("adapterkit.disk.model.match_names", fused)
    text = rf"'{key}' is not a tensor of .*: transformers makes it from 1 others"
    refused(ak.UnsupportedError, text, tmp_path / "base", tmp_path / "a", tmp_path / "out")


QUERY = "bert.encoder.layer.0.attention.self.query.weight"
CHANGED: dict[str, tuple[Any, str]] = {
    "gone": (lambda t: None, f"has no tensor for '{QUERY}' of a BertFor"),
    "another shape": (lambda t: t[:-1].contiguous(), "it is quantised, or does not go with the config"),
    "quantised": (lambda t: t.to(torch.int8), "it is quantised, or does not go with the config"),
}


@pytest.mark.parametrize("case", CHANGED)
def test_a_target_that_the_files_do_not_hold_as_it_should_be_is_refused(case: str, tmp_path: Path) -> None:
    base, adapter, out = prepared(tmp_path)
    change, text = CHANGED[case]
    tensors = load_file(base / WEIGHTS)
    tensors[QUERY] = change(tensors[QUERY])
    save_file({key: tensor for key, tensor in tensors.items() if tensor is not None}, base / WEIGHTS)
    refused(ak.CheckpointError, text, base, adapter, out)


def test_what_does_not_go_together_is_refused(tmp_path: Path) -> None:
    base, adapter, out = prepared(tmp_path, LINEAR, LINEAR)
    second, other, link = (tmp_path / name for name in ("b", "other", "link"))
    save_base(Setting("llama", [LINEAR]), other)
    link.symlink_to(adapter)
    labels = {"adapterkit.id2label": json.dumps({"0": "x", "1": "y", "2": "z"}), "format": "pt"}
    save_file(load_file(second / "adapter_model.safetensors"), second / "adapter_model.safetensors", labels)
    damaged = {text: shutil.copytree(base, tmp_path / f"config {i}") for i, text in enumerate(("[", "[]"))}
    for text, folder in damaged.items():
        (folder / "config.json").write_text(text)
    number = "but it must be a finite number of float32"
    cases: list[tuple[type[ak.AdapterError], str, Any, Any]] = [
        (ak.CheckpointError, "names LlamaForCausalLM, which has no 'bert', 'classifier', as", other, adapter),
        (ak.ConfigError, "are one adapter; give it once", base, [adapter, link]),
        (ak.CheckpointError, "It is an adapter; give the model", adapter, base),
        (ak.CheckpointError, "There is no folder", tmp_path / "nowhere", adapter),
        (ak.ConfigError, "'a' and 'b' each have their own 'classifier'", base, [adapter, second]),
        *(
            (ak.ConfigError, number, base, {adapter: weight})
            for weight in (float("nan"), float("inf"), 10**400, True, "1")
        ),
        *((ak.ConfigError, "needs adapters, each once", base, given) for given in ([], {}, [adapter, adapter])),
        *((ak.CheckpointError, "There is no config of a model for", folder, adapter) for folder in damaged.values()),
    ]
    for error, text, given, adapters in cases:
        refused(error, text, given, adapters, out)
    with pytest.raises(ak.CheckpointError, match="is not valid JSON"):
        ak.merge_checkpoint(damaged["["], adapter, out, model=ak.skeleton(base))
    ak.merge_checkpoint(base, [adapter, second], out, heads=str(second))
    head = load_file(second / "adapter_model.safetensors")["base_model.model.classifier.weight"]
    assert torch.equal(load_file(out / WEIGHTS)["classifier.weight"], head)
    assert json.loads((out / "config.json").read_text())["id2label"] == {"0": "x", "1": "y", "2": "z"}
    # Two of one name are told apart.
    same = shutil.copytree(second, tmp_path / "x" / "a")
    report = ak.merge_checkpoint(base, [adapter, same], tmp_path / "two", heads="a_2")
    assert list(report.adapters) == ["a", "a_2"]
    assert_same_tensors(tmp_path / "two", out)


def test_a_multiple_of_what_is_no_sum_is_refused(tmp_path: Path) -> None:
    base, adapter, out = prepared(tmp_path, IA3Config(target_modules=["key"], feedforward_modules=[]))
    text = "cannot act with a strength of 0.5: the method 'ia3' is not additive"
    refused(ak.UnsupportedError, text, base, {adapter: 0.5}, out)


def test_an_added_tensor_that_would_not_be_found_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setting = Setting("bert", [LINEAR], change=base_class)
    cls = save_base(setting, tmp_path / "base")
    save_adapters(setting, tmp_path / "base", cls, tmp_path)
    monkeypatch.setattr("adapterkit.disk.merge.match_names", lambda model, names: match_names(model, []))
    text = "lacks 'classifier.weight', and transformers would not find a tensor of this name among the others"
    refused(ak.UnsupportedError, text, tmp_path / "base", tmp_path / "a", tmp_path / "out")
