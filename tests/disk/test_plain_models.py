"""Bases that no config of transformers describes: diffusers' folders, and safetensors files alone."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests import diffusion, models
from tests.command.conftest import run
from torch import Tensor, nn

import adapterkit as ak
from adapterkit_lora import LoraConfig

TARGETS = ["to_q", "to_out.0", "proj_in", "conv1", "conv_in"]
ORIGINAL = "model.diffusion_model."


def write_base(place: Path, form: str) -> Path:
    """The U-Net in a folder or a file of this form; what users give as the base."""
    tensors, file = dict(diffusion.unet().state_dict()), "diffusion_pytorch_model.safetensors"
    place.mkdir()
    if form == "diffusers":
        (place / "config.json").write_text(json.dumps({"_class_name": "UNet2DConditionModel", "sample_size": 8}))
    if form in ("a folder without config", "a file", "a pipeline in one file"):
        file = "sd15.safetensors"
    if form == "a pipeline in one file":
        tensors = {ORIGINAL + key: tensor for key, tensor in tensors.items()}
        tensors["first_stage_model.conv_in.weight"] = torch.zeros(2, 2, 3, 3)
    if form == "shards":
        first, shards = sorted(tensors)[:20], {}
        shards["a.safetensors"] = {key: tensors[key] for key in first}
        shards["b.safetensors"] = {key: tensor for key, tensor in tensors.items() if key not in first}
        for name, held in shards.items():
            save_file(held, place / name)
        index = {"metadata": {}, "weight_map": {key: name for name, held in shards.items() for key in held}}
        (place / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
        (place / "config.json").write_text(json.dumps({"_class_name": "UNet2DConditionModel"}))
    else:
        save_file(tensors, place / file, {"format": "pt"})
    return place / file if form.endswith("file") else place


def adapter(folder: Path) -> nn.Module:
    """Save an adapter of the U-Net as ours and as kohya's, from the live model; the model with it merged."""
    adapters = ak.attach(diffusion.unet())
    adapters.add("a", LoraConfig(r=2, target_modules=TARGETS, lora_alpha=3))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for parameter in adapters.parameters("a"):
            nn.init.normal_(parameter, std=0.3)
    adapters.save("a", folder / "a")
    ak.convert_file(folder / "a", folder / "kohya.safetensors", naming="kohya", as_component="lora_unet")
    return adapters.merge_and_detach("a")


@pytest.mark.parametrize("source", ["a", "kohya.safetensors"])
@pytest.mark.parametrize("form", ["diffusers", "shards", "a folder without config", "a file", "a pipeline in one file"])
def test_adapters_merge_into_such_a_base_as_in_memory(form: str, source: str, tmp_path: Path) -> None:
    base, expected = write_base(tmp_path / "base", form), dict(adapter(tmp_path).state_dict())
    (tmp_path / "base/another.txt").write_text("not of the model")
    ak.merge_checkpoint(base, tmp_path / source, tmp_path / "out")
    found: dict[str, Tensor] = {}
    for file in (tmp_path / "out").glob("*.safetensors"):
        found |= load_file(file)
    prefix = ORIGINAL if form == "a pipeline in one file" else ""
    assert found.keys() - {"first_stage_model.conv_in.weight"} == {prefix + key for key in expected}
    for key, tensor in expected.items():
        torch.testing.assert_close(found[prefix + key], tensor, atol=1e-6, rtol=1e-5)
    assert (tmp_path / "out/another.txt").exists() is not form.endswith("file")


def test_the_skeleton_has_the_models_layers(tmp_path: Path) -> None:
    base, real = write_base(tmp_path / "unet", "diffusers"), diffusion.unet()
    plain = ak.skeleton(base)
    assert type(plain).__name__ == "UNet2DConditionModel"
    shapes = ({k: (v.shape, v.dtype) for k, v in m.state_dict().items()} for m in (plain, real))
    assert next(shapes) == next(shapes)
    config = LoraConfig(target_modules=TARGETS)
    assert sorted(ak.select(plain, config).paths) == sorted(ak.select(real, config).paths)


def test_the_commands_take_a_folder_of_diffusers(tmp_path: Path) -> None:
    base = write_base(tmp_path / "unet", "diffusers")
    adapter(tmp_path)
    file = str(tmp_path / "kohya.safetensors")
    assert run("convert", file, "--base", str(base), "--out", str(tmp_path / "b")).exit_code == 0
    assert run("inspect", file, "--base", str(base)).exit_code == 0
    assert run("diff", str(tmp_path / "a"), str(tmp_path / "b"), "--base", str(base)).exit_code == 0
    shown = run("targets", str(base), "--target-modules", "to_q")
    assert "down_blocks.{0-1}.attn1.to_q" in shown.output
    assert run("report", file, "--base", str(base), "--out", str(tmp_path / "page.html")).exit_code == 0


def test_an_adapter_is_extracted_from_two_folders(tmp_path: Path) -> None:
    base, tuned = write_base(tmp_path / "base", "diffusers"), write_base(tmp_path / "tuned", "diffusers")
    save_file(dict(adapter(tmp_path).state_dict()), tuned / "diffusion_pytorch_model.safetensors")
    ak.extract_files(base, tuned, tmp_path / "b", rank=2, target_modules=TARGETS)
    assert ak.diff_adapters(tmp_path / "a", tmp_path / "b", base=base, tolerance=1e-3).same_function


def test_a_whole_pipeline_is_refused_with_its_parts(tmp_path: Path) -> None:
    write_base(tmp_path / "unet", "diffusers")
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    adapter(tmp_path / "adapters")
    for call in (
        lambda: ak.skeleton(tmp_path),
        lambda: ak.merge_checkpoint(tmp_path, tmp_path / "adapters/a", tmp_path.with_name("out")),
    ):
        with pytest.raises(ak.CheckpointError, match=r"whole pipeline.*one of its models: .*unet"):
            call()


def test_an_adapter_in_the_names_of_diffusers_needs_a_base_with_these_names(tmp_path: Path) -> None:
    blocks = [
        f"double_blocks.{i}.{part}_{layer}.weight"
        for i in range(2)
        for part in ("img", "txt")
        for layer in ("attn.qkv", "attn.proj", "mlp.0", "mlp.2")
    ]
    save_file({ORIGINAL + name: torch.zeros(12, 4) for name in blocks}, tmp_path / "flux.safetensors")
    factors = {"lora_A.weight": torch.ones(2, 4), "lora_B.weight": torch.ones(4, 2)}
    of_diffusers = {f"transformer.transformer_blocks.0.attn.to_q.{name}": t for name, t in factors.items()}
    save_file(of_diffusers, tmp_path / "of_diffusers.safetensors")
    with pytest.raises(ak.CheckpointError, match=r"original names of Flux.*give its diffusers folder"):
        ak.merge_checkpoint(tmp_path / "flux.safetensors", tmp_path / "of_diffusers.safetensors", tmp_path / "out")
    original = {f"diffusion_model.double_blocks.0.img_attn.proj.{name}": t for name, t in factors.items()}
    original["diffusion_model.double_blocks.0.img_attn.proj.lora_B.weight"] = torch.ones(12, 2)
    save_file(
        original | {"diffusion_model.double_blocks.0.img_attn.proj.alpha": torch.tensor(2.0)},
        tmp_path / "o.safetensors",
    )
    ak.merge_checkpoint(tmp_path / "flux.safetensors", tmp_path / "o.safetensors", tmp_path / "out")
    merged = load_file(tmp_path / "out/flux.safetensors")
    assert torch.equal(merged[f"{ORIGINAL}double_blocks.0.img_attn.proj.weight"], torch.full((12, 4), 2.0))


def test_one_of_several_variants_has_to_be_chosen(tmp_path: Path) -> None:
    base = write_base(tmp_path / "unet", "diffusers")
    adapter(tmp_path)
    (base / "diffusion_pytorch_model.safetensors").rename(base / "diffusion_pytorch_model.fp16.safetensors")
    ak.merge_checkpoint(base, tmp_path / "a", tmp_path / "out")
    assert (tmp_path / "out/diffusion_pytorch_model.fp16.safetensors").is_file()
    shutil.copy(base / "diffusion_pytorch_model.fp16.safetensors", base / "diffusion_pytorch_model.non_ema.safetensors")
    with pytest.raises(ak.CheckpointError, match=r"fp16\.safetensors, .*non_ema.*give the path of the right one"):
        ak.skeleton(base)
    assert ak.skeleton(base / "diffusion_pytorch_model.fp16.safetensors") is not None


@pytest.mark.parametrize("name", ["a\0b", "\ud800", "\x1b[31m", ["x"]])
def test_names_from_files_are_no_names_of_a_modules_own(name: object, tmp_path: Path) -> None:
    keys = ("ok", "training", "_modules", "forward", "x.__class__", "a..b", "a." * 70 + "b")
    save_file({f"{key}.weight": torch.zeros(2, 2) for key in keys}, tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": name}))
    plain = ak.skeleton(tmp_path)
    assert [path for path, _ in plain.named_modules()] == ["", "ok"]
    assert type(plain).__name__ == "Model"


def test_weights_that_may_be_transposed_are_refused(tmp_path: Path) -> None:
    model: Any = copy.deepcopy(models.build("gpt2"))
    model.save_pretrained(tmp_path / "base")
    (tmp_path / "base/config.json").unlink()
    with pytest.raises(ak.CheckpointError, match=r"stored \(in, out\)"):
        ak.skeleton(tmp_path / "base")


def test_a_matrix_with_the_name_of_a_table_and_without_a_bias_is_an_embedding(tmp_path: Path) -> None:
    tensors = {f"{name}.weight": torch.zeros(5, 2) for name in ("token_embedding", "wte", "embedder", "embeddings")}
    save_file(tensors | {"embeddings.bias": torch.zeros(5)}, tmp_path / "model.safetensors")
    found = {path: type(module) for path, module in ak.skeleton(tmp_path).named_children()}
    tables = dict.fromkeys(("token_embedding", "wte"), nn.Embedding)
    assert found == tables | dict.fromkeys(("embedder", "embeddings"), nn.Linear)
