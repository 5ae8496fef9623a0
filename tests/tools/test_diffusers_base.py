"""A folder that diffusers wrote is a base: its layers are told from the files, and diffusers loads what is merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from tests.tools.test_diffusers import flux, stable_diffusion
from torch import nn

import adapterkit as ak
from adapterkit_lora import LoraConfig


def saved(folder: Path, model: Any) -> ak.Adapters:
    """Save the model, and an adapter of it; the adapters."""
    model.save_pretrained(folder / "base")
    adapters = ak.attach(model)
    adapters.add("a", LoraConfig(r=2, target_modules=["to_q", "to_out.0", "conv1", "proj_in", "ff.net.2"]))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for parameter in adapters.parameters("a"):
            nn.init.normal_(parameter, std=0.3)
    adapters.save("a", folder / "a")
    return adapters


@pytest.mark.parametrize("make", [lambda: stable_diffusion().unet, lambda: flux().transformer], ids=["SD", "Flux"])
def test_the_skeleton_has_the_layers_of_diffusers(make: Any, tmp_path: Path) -> None:
    model = make()
    model.save_pretrained(tmp_path)
    plain, config = ak.skeleton(tmp_path), LoraConfig(target_modules="all-linear")
    shapes = ({key: (value.shape, value.dtype) for key, value in m.state_dict().items()} for m in (plain, model))
    assert next(shapes) == next(shapes)
    kinds = (
        {match.path: str(match.kind).partition(",")[0] for match in ak.select(m, config).targets}
        for m in (plain, model)
    )
    assert next(kinds) == next(kinds)


def test_diffusers_loads_what_is_merged_on_disk(tmp_path: Path) -> None:
    adapters = saved(tmp_path, stable_diffusion().unet)
    ak.convert_file(tmp_path / "a", tmp_path / "a.safetensors", naming="kohya", as_component="lora_unet")
    given = (torch.randn(1, 4, 8, 8), torch.tensor([3]), torch.randn(1, 4, 16))
    for source in ("a", "a.safetensors"):
        ak.merge_checkpoint(tmp_path / "base", tmp_path / source, tmp_path / "out", overwrite=True)
        merged = UNet2DConditionModel.from_pretrained(tmp_path / "out").eval()
        with torch.no_grad():
            torch.testing.assert_close(merged(*given).sample, adapters.model(*given).sample, atol=1e-4, rtol=1e-4)


def test_a_folder_of_a_pipeline_names_its_models(tmp_path: Path) -> None:
    stable_diffusion().save_pretrained(tmp_path)
    with pytest.raises(ak.CheckpointError, match=r"text_encoder, .*unet, .*vae"):
        ak.skeleton(tmp_path)
