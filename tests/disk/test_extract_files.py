"""Extraction from two checkpoints, against `ak.extract` and `save` on the loaded models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.disk.merging import peak
from tests.disk.test_combine_files import equal, read
from tests.models import build, run
from torch import nn

import adapterkit as ak

MODEL = "model.safetensors"


def tuned(model: nn.Module) -> nn.Module:
    """A full fine-tune: every parameter changed."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter), alpha=0.1)
    return model


def stored(model: nn.Module, folder: Path, **options: Any) -> Path:
    model.save_pretrained(folder, **options)  # type: ignore[operator]
    return folder


def in_memory(base: Path, other: Path, folder: Path, **fields: Any) -> tuple[Path, ak.CombineReport]:
    from transformers import AutoConfig
    from transformers import __dict__ as classes

    models = []
    for place in (base, other):
        cls = classes[AutoConfig.from_pretrained(other).architectures[0]]
        models.append(cls.from_pretrained(place, dtype="auto"))
    report = ak.extract(*models, **fields)
    return ak.attach(models[0]).save("extracted", folder), report


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "bart", "vit"])
def test_the_adapter_is_that_of_the_loaded_models(name: str, tmp_path: Path) -> None:
    size: dict[str, Any] = {"energy": 0.6} if name in ("bert", "gpt2") else {"rank": 2}
    base, other = stored(build(name), tmp_path / "base"), stored(tuned(build(name)), tmp_path / "tuned")
    report = ak.extract_files(base, other, tmp_path / "files", **size)
    memory, wanted = in_memory(base, other, tmp_path / "memory", **size)
    equal(tmp_path / "files", memory)
    assert (dict(report.ranks), dict(report.errors), report.heads) == (
        dict(wanted.ranks),
        dict(wanted.errors),
        wanted.heads,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_dtypes_and_shards_and_other_classes(dtype: torch.dtype, tmp_path: Path) -> None:
    base = stored(build("bert").to(dtype), tmp_path / "base", max_shard_size="8KB")
    assert len(list(base.glob("*.safetensors"))) > 1
    big = tuned(build("bert"))
    big.classifier = nn.Linear(16, 5)
    big.config.num_labels = 5
    other = stored(big.to(dtype), tmp_path / "tuned")
    ak.extract_files(base, other, tmp_path / "files", rank=2)
    tensors, metadata, fields = read(tmp_path / "files")
    assert tensors["base_model.model.classifier.weight"].shape == (5, 16)
    assert "LABEL_4" in metadata["adapterkit.id2label"]
    assert fields["base_model_name_or_path"] == str(base)
    wide = torch.promote_types(dtype, torch.float32)
    assert {t.dtype for k, t in tensors.items() if "lora" in k} == {wide}
    model = build("bert").to(dtype)
    ak.attach(model).load(tmp_path / "files", "x")
    assert run(model, "bert").shape == (2, 5)


def test_the_base_may_lack_the_head_and_have_another_dtype(tmp_path: Path) -> None:
    base = stored(build("bert").bert.half(), tmp_path / "base")
    other = stored(tuned(build("bert").half().float()), tmp_path / "tuned")
    ak.extract_files(base, other, tmp_path / "files", rank=16)
    wanted = tuned(build("bert").half().float())
    from transformers import BertForSequenceClassification

    model = BertForSequenceClassification.from_pretrained(base, dtype=torch.float32).eval()
    ak.attach(model).load(tmp_path / "files", "x")
    for path in ("bert.encoder.layer.0.attention.self.query", "bert.encoder.layer.1.output.dense"):
        layer = wanted.get_submodule(path)
        x = torch.randn(3, layer.in_features)
        torch.testing.assert_close(model.get_submodule(path)(x), layer(x), rtol=1e-3, atol=1e-4)


def test_tied_weights_and_chosen_layers(tmp_path: Path) -> None:
    base, other = stored(build("gpt2"), tmp_path / "base"), stored(tuned(build("gpt2")), tmp_path / "tuned")
    assert "lm_head.weight" not in load_file(base / MODEL)
    fields = {"target_modules": ["lm_head", "c_attn"], "exclude_modules": ["h.1.attn.c_attn"], "rank": 3}
    ak.extract_files(base, other, tmp_path / "files", **fields)
    equal(tmp_path / "files", in_memory(base, other, tmp_path / "memory", **fields)[0])


def test_bad_input_is_refused(tmp_path: Path) -> None:
    base, other = stored(build("bert"), tmp_path / "base"), stored(tuned(build("bert")), tmp_path / "tuned")
    gpt2 = stored(build("gpt2"), tmp_path / "gpt2")
    held = load_file(base / MODEL)
    key = "bert.encoder.layer.0.attention.self.query.weight"
    for name, changed in (
        ("lacks", {k: v for k, v in held.items() if k != key}),
        ("wide", held | {key: torch.zeros(16, 17)}),
        ("nan", held | {key: torch.full((16, 16), float("nan"))}),
    ):
        folder = stored(build("bert"), tmp_path / name)
        save_file(changed, folder / MODEL, {"format": "pt"})
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"rank": None}, ak.ConfigError, "extract needs rank= or energy="),
        ({"rank": 0}, ak.ConfigError, "rank = 0 must be a whole number"),
        ({"rank": 99}, ak.ConfigError, "rank = 99 is larger than"),
        ({"dtype": "half"}, ak.ConfigError, "dtype = 'half' must be a floating"),
        ({"base": gpt2}, ak.CheckpointError, r"gpt2 has no tensor for 'bert\..*' of a BertForSequenceClassification"),
        ({"base": tmp_path / "lacks"}, ak.CheckpointError, rf"lacks has no tensor for '{key}'"),
        (
            {"base": tmp_path / "wide"},
            ak.CheckpointError,
            rf"wide: '{key}' is F32 of shape \(16, 17\), and \(16, 16\) in plain floating numbers is needed",
        ),
        (
            {"base": tmp_path / "nan"},
            ak.StateError,
            "The difference of the models at '.*' has values that are not finite",
        ),
        ({"base": tmp_path / "none"}, ak.CheckpointError, "none"),
        ({"target_modules": ["nothing"]}, ak.SelectionError, "matched none"),
        ({"to": "vera"}, ak.UsageError, "The method 'vera' cannot be a result"),
        ({"out": base}, ak.ConfigError, "is an input"),
        ({"out": base / "adapter"}, ak.ConfigError, "adapter is inside one of the models; give the output another"),
    ]
    for given, kind, message in cases:
        with pytest.raises(kind, match=message):
            ak.extract_files(**{"base": base, "tuned": other, "out": tmp_path / "out", "rank": 2, **given})
    assert not (tmp_path / "out").exists()
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    found, sizes = [], []
    for layers in (1, 8):
        config = LlamaConfig(
            vocab_size=8, hidden_size=64, intermediate_size=4096, num_hidden_layers=layers, num_attention_heads=1
        )
        model = LlamaForCausalLM(config)
        base = stored(model, tmp_path / f"base{layers}")
        other = stored(tuned(model), tmp_path / f"tuned{layers}")
        sizes.append(2 * (base / MODEL).stat().st_size)
        del model

        def work(base: Path = base, other: Path = other) -> None:
            fields: dict[str, Any] = {"modules_to_save": None, "target_modules": ["gate_proj"]}
            ak.extract_files(base, other, tmp_path / "out", rank=2, overwrite=True, **fields)

        found.append(peak(work, tmp_path / "peak"))
    assert sizes[1] - sizes[0] > 40 << 20
    assert found[1] - found[0] < (sizes[1] - sizes[0]) / 4, found
