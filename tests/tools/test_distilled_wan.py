"""Distilled models of Wan are LoRA beside changes of biases and norms, under the names of the original code."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import save_file
from torch import Tensor, nn

import adapterkit as ak

ATTENTION = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0"}
LAYERS = {f"blocks.0.self_attn.{old}": f"blocks.0.attn1.{new}" for old, new in ATTENTION.items()}
LAYERS |= {f"blocks.0.cross_attn.{old}": f"blocks.0.attn2.{new}" for old, new in ATTENTION.items()}
BIASES = {"time_projection.1": "condition_embedder.time_proj", "head.head": "proj_out"}
NORMS = ("blocks.0.norm3.diff", "blocks.0.norm3.diff_b", "blocks.0.self_attn.norm_q.diff")


def wan() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "text_dim": 16}
    other = {"freq_dim": 16, "ffn_dim": 32, "num_layers": 1, "rope_max_seq_len": 32}
    return WanTransformer3DModel(patch_size=(1, 2, 2), **sizes, **other).eval()  # type: ignore[no-any-return]


@torch.no_grad()
def output(model: nn.Module) -> Tensor:
    noise = torch.Generator().manual_seed(1)
    latents, text = (torch.randn(shape, generator=noise) for shape in ((1, 4, 1, 4, 4), (1, 5, 16)))
    found: Tensor = model(latents, torch.tensor([3]), text, return_dict=False)[0]
    return found


def test_biases_are_changed_beside_the_factors_and_norms_of_zeros_are_ignored(tmp_path: Path) -> None:
    model, changed = wan(), wan()
    tensors = {f"diffusion_model.{key}": torch.zeros(24) for key in NORMS}
    for old, new in (LAYERS | BIASES).items():
        layer = changed.get_submodule(new)
        diff = tensors[f"diffusion_model.{old}.diff_b"] = torch.randn_like(layer.bias) * 0.3  # type: ignore[arg-type]
        with torch.no_grad():
            layer.get_parameter("bias").add_(diff)
            if old in LAYERS:
                down, up = torch.randn(2, 24) * 0.3, torch.randn(24, 2) * 0.3
                tensors[f"diffusion_model.{old}.lora_down.weight"] = down
                tensors[f"diffusion_model.{old}.lora_up.weight"] = up
                layer.get_parameter("weight").add_(up @ down)
    save_file(tensors, tmp_path / "a.safetensors")
    before, wanted, adapters = output(model), output(changed), ak.attach(model)
    report = adapters.load(tmp_path / "a.safetensors", "a")
    assert set(report.ignored) == {f"diffusion_model.{key}" for key in NORMS}
    assert (wanted - before).abs().max() > 0.1
    torch.testing.assert_close(output(model), wanted, rtol=0, atol=1e-5)
    adapters.merge("a")
    torch.testing.assert_close(output(model), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("prefix", ["", "pipe.dit.", "module."])
def test_state_dict_that_diffsynth_dumps(prefix: str, tmp_path: Path) -> None:
    """PEFT's names with the adapter's, on the names of the original code; alpha is the rank, which no file says."""
    model = wan()
    weight = model.get_submodule("blocks.0.attn1.to_q").weight
    down, up = torch.randn(2, weight.shape[1]), torch.randn(weight.shape[0], 2)
    name = f"{prefix}blocks.0.self_attn.q"
    tensors = {f"{name}.lora_A.default.weight": down, f"{name}.lora_B.default.weight": up}
    save_file(tensors, tmp_path / "a.safetensors")
    expected = weight.detach() + up @ down
    adapters = ak.attach(model)
    with pytest.warns(ak.AdapterWarning, match="does not say how its layers are scaled"):
        adapters.load(tmp_path / "a.safetensors", "a")
    adapters.merge("a")
    torch.testing.assert_close(model.get_submodule("blocks.0.attn1.to_q").weight, expected, rtol=0, atol=1e-5)
