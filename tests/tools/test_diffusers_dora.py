"""DoRA that diffusers saves loads with the plugin for DoRA, and diffusers loads what is written for it."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig as PeftLora
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.contract import default_registry

sys.path.append(str(Path(__file__).parents[2] / "examples" / "thirdparty" / "adapterkit_dora"))
FILE = "pytorch_lora_weights.safetensors"


@pytest.fixture(autouse=True)
def dora() -> Iterator[None]:
    ak.register(importlib.import_module("adapterkit_dora").plugin)
    yield
    default_registry.unregister("dora")


def unet() -> Any:
    torch.manual_seed(0)
    model = UNet2DConditionModel(
        block_out_channels=(8,),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
    )
    return model.eval()


@torch.no_grad()
def output(model: nn.Module) -> Tensor:
    noise = torch.Generator().manual_seed(1)
    found: Tensor = model(torch.randn(1, 4, 8, 8, generator=noise), 3, torch.randn(1, 5, 8, generator=noise)).sample
    return found


@pytest.mark.parametrize("names", [["to_q", "to_out.0"], ["conv1", "to_v"]])
def test_each_reads_what_the_other_writes(tmp_path: Path, names: list[str]) -> None:
    theirs = unet()
    before = output(theirs)
    theirs.add_adapter(PeftLora(r=2, lora_alpha=6, use_dora=True, target_modules=names))
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            parameter.data += torch.randn_like(parameter) * 0.1
    wanted = output(theirs)
    theirs.save_lora_adapter(tmp_path / "theirs")
    model = unet()
    assert ak.attach(model).load(tmp_path / "theirs" / FILE, "a").ok
    assert (wanted - before).abs().max() > 0.01
    torch.testing.assert_close(output(model), wanted, rtol=0, atol=1e-5)
    ak.attach(model).save("a", tmp_path / "a")
    (tmp_path / "ours").mkdir()
    target = tmp_path / "ours" / FILE
    ak.convert_file(tmp_path / "a", target, to="dora", naming="diffusers", as_component="unet", base=unet())
    again = unet()
    again.load_lora_adapter(tmp_path / "ours", weight_name=FILE, prefix="unet")
    torch.testing.assert_close(output(again), wanted, rtol=0, atol=1e-5)
