"""Files with the names of a model's original code mean what diffusers takes them for, and load onto its models."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.loaders import single_file_utils
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import adapterkit as ak
from adapterkit_lora import LoraConfig

pytestmark = pytest.mark.filterwarnings("ignore:.*FluxPosEmbed:FutureWarning")  # diffusers' own

Sizes = Mapping[str, tuple[int, int]]
R = 2


def blocks(prefix: str, names: Sizes) -> dict[str, tuple[int, int]]:
    return {prefix + name: size for name, size in names.items()}


def flux(h: int = 3072) -> Sizes:  # diffusers' conversion has this number in its code
    double = {f"{s}_attn.qkv": (3 * h, h) for s in ("img", "txt")} | {f"{s}_attn.proj": (h, h) for s in ("img", "txt")}
    double |= {f"{s}_mlp.0": (4 * h, h) for s in ("img", "txt")} | {f"{s}_mlp.2": (h, 4 * h) for s in ("img", "txt")}
    double |= {f"{s}_mod.lin": (6 * h, h) for s in ("img", "txt")}
    single = {"linear1": (7 * h, h), "linear2": (h, 5 * h), "modulation.lin": (3 * h, h)}
    embedders = {f"{name}.in_layer": (h, n) for name, n in (("time_in", 256), ("vector_in", 5), ("guidance_in", 256))}
    embedders |= {f"{name}.out_layer": (h, h) for name in ("time_in", "vector_in", "guidance_in")}
    ends = {"img_in": (h, 4), "txt_in": (h, 6), "final_layer.linear": (4, h)}
    ends["final_layer.adaLN_modulation.1"] = (2 * h, h)
    return blocks("double_blocks.0.", double) | blocks("single_blocks.1.", single) | embedders | ends


def hunyuan_video(h: int = 3072) -> Sizes:
    double = {f"{s}_attn_qkv": (3 * h, h) for s in ("img", "txt")} | {f"{s}_attn_proj": (h, h) for s in ("img", "txt")}
    double |= {f"{s}_mlp.fc1": (4 * h, h) for s in ("img", "txt")} | {
        f"{s}_mlp.fc2": (h, 4 * h) for s in ("img", "txt")
    }
    double |= {f"{s}_mod.linear": (6 * h, h) for s in ("img", "txt")}
    single = {"linear1": (7 * h, h), "linear2": (h, 5 * h), "modulation.linear": (3 * h, h)}
    return blocks("double_blocks.0.", double) | blocks("single_blocks.1.", single)


def wan() -> Sizes:
    h, cross = 24, {f"cross_attn.{name}": (24, 24) for name in ("q", "k", "v", "o", "k_img", "v_img")}
    block = cross | {f"self_attn.{name}": (h, h) for name in "qkvo"} | {"ffn.0": (40, h), "ffn.2": (h, 40)}
    ends = {"time_projection.1": (6 * h, h), "head.head": (16, h), "img_emb.proj.1": (7, 7), "img_emb.proj.3": (h, 7)}
    ends |= {"time_embedding.0": (h, 8), "time_embedding.2": (h, h)}
    ends |= {"text_embedding.0": (h, 6), "text_embedding.2": (h, h)}
    return blocks("blocks.0.", block) | blocks("blocks.1.", block) | ends


def wan_blocks() -> Sizes:
    return {name: size for name, size in wan().items() if name.startswith("blocks.")}


def qwen_image() -> Sizes:
    h, streams = 16, ("img", "txt")
    block = {f"attn.{n}": (h, h) for n in ("to_q", "to_k", "to_v", "to_out.0", "to_add_out")}
    block |= {f"attn.add_{n}_proj": (h, h) for n in "qkv"} | {f"{s}_mod.1": (6 * h, h) for s in streams}
    block |= {f"{s}_mlp.net.0.proj": (4 * h, h) for s in streams} | {f"{s}_mlp.net.2": (h, 4 * h) for s in streams}
    return blocks("transformer_blocks.10.", block) | {"img_in": (h, 4), "txt_in": (h, 6), "proj_out": (4, h)}


def z_image() -> Sizes:
    h = 16
    attention = {f"attention.to_{name}": (h, h) for name in ("q", "k", "v", "out.0")}
    block = attention | {"feed_forward.w1": (40, h), "feed_forward.w2": (h, 40), "feed_forward.w3": (40, h)}
    return blocks("layers.3.", block | {"adaLN_modulation.0": (64, h)}) | blocks("context_refiner.0.", block)


def lumina2() -> Sizes:
    h = 2304
    block = {"attention.qkv": (3840, h), "attention.out": (h, h)}
    block |= {f"feed_forward.w{n}": (60, h) if n != 2 else (h, 60) for n in (1, 2, 3)}
    stacks = [blocks(f"{s}.0.", block) for s in ("layers", "noise_refiner", "context_refiner")]
    return {name: size for stack in stacks for name, size in stack.items()} | {
        f"{stack}.0.adaLN_modulation.1": (80, h) for stack in ("layers", "noise_refiner")
    }


def flux2() -> Sizes:
    h = 16
    double = {f"{s}_attn.qkv": (3 * h, h) for s in ("img", "txt")} | {f"{s}_attn.proj": (h, h) for s in ("img", "txt")}
    double |= {f"{s}_mlp.0": (6 * h, h) for s in ("img", "txt")} | {f"{s}_mlp.2": (h, 3 * h) for s in ("img", "txt")}
    ends = {f"double_stream_modulation_{s}.lin": (6 * h, h) for s in ("img", "txt")}
    ends |= {
        "single_stream_modulation.lin": (3 * h, h),
        "img_in": (h, 4),
        "txt_in": (h, 6),
        "final_layer.linear": (4, h),
    }
    return (
        blocks("double_blocks.0.", double)
        | blocks("single_blocks.0.", {"linear1": (9 * h, h), "linear2": (h, 4 * h)})
        | ends
    )


def stable_diffusion_3() -> Sizes:
    """Two blocks, the first with a second attention, the last without outputs for the text."""
    h, ends = 16, {"x_embedder.proj": (16, 4), "context_embedder": (16, 6), "final_layer.linear": (16, 16)}
    x = {"attn.qkv": (3 * h, h), "attn.proj": (h, h), "mlp.fc1": (4 * h, h), "mlp.fc2": (h, 4 * h)}
    text = x | {"adaLN_modulation.1": (6 * h, h)}
    found = ends | {"final_layer.adaLN_modulation.1": (2 * h, h)}
    found |= {f"{name}.mlp.{n}": (h, size) for name, size in (("t_embedder", 256), ("y_embedder", 5)) for n in (0, 2)}
    found |= {f"{name}.mlp.2": (h, h) for name in ("t_embedder", "y_embedder")}
    found |= blocks("joint_blocks.0.x_block.", x | {"attn2.qkv": (3 * h, h), "attn2.proj": (h, h)})
    found |= {"joint_blocks.0.x_block.adaLN_modulation.1": (9 * h, h)} | blocks("joint_blocks.0.context_block.", text)
    found |= blocks("joint_blocks.1.x_block.", x | {"adaLN_modulation.1": (6 * h, h)})
    last = {"attn.qkv": (3 * h, h), "adaLN_modulation.1": (2 * h, h)}
    return found | blocks("joint_blocks.1.context_block.", last)


def ltx() -> Sizes:
    h, names = 16, ("q", "k", "v", "out.0")
    block = {f"attn{n}.to_{name}": (h, h) for n in (1, 2) for name in names}
    return blocks("transformer_blocks.7.", block | {"ff.net.0.proj": (4 * h, h), "ff.net.2": (h, 4 * h)})


def stable_diffusion_xl() -> Sizes:
    """The modules of the original's block 4, the middle and block 5, and outside."""
    resnet = {"in_layers.2": (8, 8), "emb_layers.1": (8, 16), "out_layers.3": (8, 8), "skip_connection": (8, 8)}
    attention = {f"transformer_blocks.1.attn{n}.to_{x}": (8, 8) for n in (1, 2) for x in ("q", "k", "v", "out.0")}
    attention |= {"proj_in": (8, 8), "proj_out": (8, 8)}
    attention |= {"transformer_blocks.1.ff.net.0.proj": (64, 8), "transformer_blocks.1.ff.net.2": (8, 32)}
    places = {"input_blocks.4.0.": resnet, "input_blocks.4.1.": attention, "middle_block.2.": resnet}
    places |= {"middle_block.1.": attention, "output_blocks.5.1.": attention, "output_blocks.0.0.": resnet}
    found = {name: size for place, names in places.items() for name, size in blocks(place, names).items()}
    return (
        found
        | {"input_blocks.3.0.op": (8, 8), "output_blocks.5.2.conv": (8, 8), "time_embed.0": (16, 8)}
        | {"label_emb.0.2": (16, 16), "out.2": (4, 8), "input_blocks.0.0": (8, 4)}
    )


def lora(names: Sizes, prefix: str, style: str, alpha: float | None) -> dict[str, Tensor]:
    """Random factors under these names: `kohya`'s have `_` for `.`, `lora_down` and an alpha."""
    noise, tensors = torch.Generator().manual_seed(0), dict[str, Tensor]()
    for name, (outputs, inputs) in names.items():
        module = prefix + (name.replace(".", "_") if prefix.endswith("_") else name)
        for local, shape in zip(style.split(), ((R, inputs), (outputs, R)), strict=True):
            tensors[f"{module}.{local}.weight"] = torch.randn(shape, generator=noise)
        if alpha is not None:
            tensors[f"{module}.alpha"] = torch.tensor(alpha)
    return tensors


KOHYA, PEFT = "lora_down lora_up", "lora_A lora_B"
FILES: dict[str, tuple[Any, Any, str, str, float | None]] = {
    "Flux, kohya": (flux, diffusers.FluxPipeline, "lora_unet_", KOHYA, R),
    "SDXL, kohya": (stable_diffusion_xl, diffusers.StableDiffusionXLPipeline, "lora_unet_", KOHYA, 1.0),
    "HunyuanVideo": (hunyuan_video, diffusers.HunyuanVideoPipeline, "diffusion_model.", PEFT, None),
    "Wan, musubi": (wan_blocks, diffusers.WanPipeline, "lora_unet_", KOHYA, 1.0),
    "Wan, ComfyUI": (wan, diffusers.WanPipeline, "diffusion_model.", PEFT, None),
    "Qwen-Image, musubi": (qwen_image, diffusers.QwenImagePipeline, "lora_unet_", KOHYA, 1.0),
    "Qwen-Image, ComfyUI": (qwen_image, diffusers.QwenImagePipeline, "diffusion_model.", PEFT, None),
    "Z-Image, musubi": (z_image, diffusers.ZImagePipeline, "lora_unet_", KOHYA, 1.0),
    "Z-Image, ComfyUI": (z_image, diffusers.ZImagePipeline, "diffusion_model.", PEFT, None),
    "Lumina 2": (lumina2, diffusers.Lumina2Pipeline, "diffusion_model.", PEFT, None),
    "Flux 2, ComfyUI": (flux2, diffusers.Flux2Pipeline, "diffusion_model.", PEFT, None),
    "LTX-Video": (ltx, diffusers.LTXPipeline, "diffusion_model.", PEFT, None),
}


def read_by_diffusers(pipeline: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by the keys that diffusers gives them, without the part of the pipeline, alphas worked in."""
    options = {}
    if pipeline is diffusers.StableDiffusionXLPipeline:
        options = {"unet_config": FrozenDict(layers_per_block=2)}
    found, alphas = pipeline.lora_state_dict(dict(tensors), **options), {}
    if options:
        found, alphas = found
    read = {}
    for key, tensor in found.items():
        name = key.replace(".processor.to_out_lora.", ".to_out.0.lora.").replace("_lora.", ".lora.")
        name = name.replace(".processor", "").replace(".lora.down.", ".lora_A.").replace(".lora.up.", ".lora_B.")
        scale = next(iter(alphas.values())) / R if "lora_B" in name and alphas else 1.0  # one alpha for all
        read[name.removeprefix("transformer.").removeprefix("unet.")] = tensor * scale
    return read


def folder_of(file: Path, **options: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors, without PEFT's prefix, and the config of the file as a PEFT folder."""
    ak.convert_file(file, file.with_suffix(""), **options)
    tensors = load_file(file.with_suffix("") / "adapter_model.safetensors")
    config = json.loads((file.with_suffix("") / "adapter_config.json").read_text())
    return {key.removeprefix("base_model.model."): tensor for key, tensor in tensors.items()}, config


@pytest.mark.parametrize(("names", "pipeline", "prefix", "style", "alpha"), FILES.values(), ids=FILES.keys())
def test_without_a_model_layers_and_changes_are_those_of_diffusers(
    names: Any, pipeline: Any, prefix: str, style: str, alpha: float | None, tmp_path: Path
) -> None:
    tensors = lora(names(), prefix, style, alpha)
    save_file(tensors, tmp_path / "x.safetensors", {"lora_adapter_metadata": "{}"} if alpha is None else None)
    expected = read_by_diffusers(pipeline, tensors)
    found, config = folder_of(tmp_path / "x.safetensors")
    assert found.keys() == expected.keys()
    scale = config["lora_alpha"] / config["r"]
    for key in (key for key in expected if "lora_A" in key):
        probe = torch.randn(expected[key].shape[1], 2)
        other = key.replace("lora_A", "lora_B")
        change = expected[other] @ (expected[key] @ probe)
        torch.testing.assert_close(scale * (found[other] @ (found[key] @ probe)), change, rtol=1e-5, atol=1e-3)


SMALL = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4}
STREAMS = {"num_layers": 1, "num_single_layers": 1, "joint_attention_dim": 6}
UNET = {
    "block_out_channels": (8, 16, 16),
    "norm_num_groups": 4,
    "cross_attention_dim": 12,
    "attention_head_dim": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 1, 2),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 30,
}
# Each model, and diffusers' conversion of the original's checkpoints.
MODELS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "SDXL": (diffusers.UNet2DConditionModel, UNET, "ldm_unet_checkpoint"),
    "Flux": (
        diffusers.FluxTransformer2DModel,
        {**SMALL, **STREAMS, "pooled_projection_dim": 5, "guidance_embeds": True, "axes_dims_rope": (2, 2, 4)},
        "flux_transformer_checkpoint_to_diffusers",
    ),
    "HunyuanVideo": (
        diffusers.HunyuanVideoTransformer3DModel,
        {"num_layers": 1, "num_single_layers": 1, "num_refiner_layers": 1, **SMALL, "out_channels": 4}
        | {"text_embed_dim": 6, "pooled_projection_dim": 5, "rope_axes_dim": (2, 2, 4)},
        "hunyuan_video_transformer_to_diffusers",
    ),
    "Wan": (
        diffusers.WanTransformer3DModel,
        {"num_layers": 2, **SMALL, "attention_head_dim": 12, "out_channels": 4, "text_dim": 6, "freq_dim": 8}
        | {"ffn_dim": 40, "image_dim": 7, "added_kv_proj_dim": 24},
        "wan_transformer_to_diffusers",
    ),
    "SD3": (
        diffusers.SD3Transformer2DModel,
        {"sample_size": 8, "num_layers": 2, **SMALL, "out_channels": 4, "joint_attention_dim": 6}
        | {"pooled_projection_dim": 5, "caption_projection_dim": 16, "pos_embed_max_size": 8}
        | {"dual_attention_layers": (0,)},
        "sd3_transformer_checkpoint_to_diffusers",
    ),
    "Chroma": (
        diffusers.ChromaTransformer2DModel,
        {**SMALL, **STREAMS, "axes_dims_rope": (2, 2, 4), "approximator_num_channels": 8}
        | {"approximator_hidden_dim": 10, "approximator_layers": 1},
        "chroma_transformer_checkpoint_to_diffusers",
    ),
    "Flux 2": (
        diffusers.Flux2Transformer2DModel,
        {**SMALL, **STREAMS, "axes_dims_rope": (2, 2, 2, 2), "timestep_guidance_channels": 8},
        "flux2_transformer_checkpoint_to_diffusers",
    ),
    "Z-Image": (
        diffusers.ZImageTransformer2DModel,
        {"n_layers": 1, "n_refiner_layers": 1, "dim": 16, "n_heads": 2, "n_kv_heads": 2, "in_channels": 4}
        | {"cap_feat_dim": 6, "axes_dims": [4, 2, 2], "axes_lens": [8, 8, 8]},
        "z_image_transformer_checkpoint_to_diffusers",
    ),
    "LTX-Video": (
        diffusers.LTXVideoTransformer3DModel,
        {"num_layers": 1, **SMALL, "out_channels": 4, "cross_attention_dim": 16, "caption_channels": 6},
        "ltx_transformer_checkpoint_to_diffusers",
    ),
    "Lumina 2": (
        diffusers.Lumina2Transformer2DModel,
        {"num_layers": 1, "num_refiner_layers": 1, "hidden_size": 24, "num_attention_heads": 3, "num_kv_heads": 1}
        | {"in_channels": 4, "cap_feat_dim": 6, "axes_dim_rope": (4, 2, 2), "axes_lens": (8, 8, 8)},
        "lumina2_to_diffusers",
    ),
    "LTX-2": (
        diffusers.LTX2VideoTransformer3DModel,
        {"num_layers": 1, **SMALL, "out_channels": 4, "cross_attention_dim": 16, "caption_channels": 6}
        | {"audio_in_channels": 4, "audio_out_channels": 4, "audio_num_attention_heads": 2}
        | {"audio_attention_head_dim": 4, "audio_cross_attention_dim": 8},
        "ltx2_transformer_to_diffusers",
    ),
    "Krea 2": (
        diffusers.Krea2Transformer2DModel,
        {"in_channels": 4, "num_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2}
        | {"num_key_value_heads": 1, "intermediate_size": 24, "timestep_embed_dim": 8, "text_hidden_dim": 16}
        | {"num_text_layers": 2, "text_num_attention_heads": 2, "text_num_key_value_heads": 2}
        | {"text_intermediate_size": 24, "axes_dims_rope": (2, 2, 4)},
        "krea2_transformer_checkpoint_to_diffusers",
    ),
    "AuraFlow": (
        diffusers.AuraFlowTransformer2DModel,
        {"sample_size": 8, "num_mmdit_layers": 1, "num_single_dit_layers": 1, **SMALL, "out_channels": 4}
        | {"joint_attention_dim": 6, "caption_projection_dim": 16, "pos_embed_max_size": 16},
        "auraflow_transformer_checkpoint_to_diffusers",
    ),
    "Cosmos 2": (
        diffusers.CosmosTransformer3DModel,
        {"num_layers": 1, **SMALL, "attention_head_dim": 16, "out_channels": 4, "text_embed_dim": 6}
        | {"adaln_lora_dim": 4, "max_size": (4, 4, 4), "extra_pos_embed_type": None},
        "cosmos_transformer_checkpoint_to_diffusers",
    ),
    "Sana": (
        diffusers.SanaTransformer2DModel,
        {"num_layers": 1, **SMALL, "out_channels": 4, "num_cross_attention_heads": 2}
        | {"cross_attention_head_dim": 8, "cross_attention_dim": 16, "caption_channels": 6, "sample_size": 8},
        "sana_transformer_to_diffusers",
    ),
}
SINGLE = [f"single_transformer_blocks.0.{name}" for name in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")]
# diffusers splits these by the sizes of the published models, which are numbers in its code.
FIXED = {
    **{case: {"single_blocks.0.linear1": SINGLE} for case in ("Flux", "HunyuanVideo", "Chroma")},
    "Lumina 2": {
        f"{stack}.0.attention.qkv": [f"{stack}.0.attn.to_{name}" for name in "qkv"]
        for stack in ("layers", "noise_refiner", "context_refiner")
    },
}


class Checkpoint(dict[str, Tensor]):
    """An original checkpoint, as far as an adapter changes it; the rest is zeros of some size."""

    def __missing__(self, key: str) -> Tensor:
        return torch.zeros(7 * 3072)

    def pop(self, key: str, *default: Any) -> Tensor:
        return super().pop(key, self[key])


def adapted(case: str) -> tuple[Any, dict[str, Tensor]]:
    """A model with a LoRA `x` on all its linear layers and convolutions, and the changes of their weights."""
    cls, sizes, _ = MODELS[case]
    torch.manual_seed(0)
    model = cls(**sizes).eval()
    layers = [p for p, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d, nn.Conv3d))]
    adapters = ak.attach(model)
    adapters.add("x", LoraConfig(r=R, lora_alpha=3, target_modules=layers, init_lora_weights=False))
    return model, changes(model, "x", layers)


def changes(model: Any, name: str, layers: list[str]) -> dict[str, Tensor]:
    """How an adapter changes the weights of these layers."""
    before = {path: model.get_submodule(path).weight.detach().clone() for path in layers}
    ak.attach(model).merge(name)
    found = {path: model.get_submodule(path).weight.detach() - weight for path, weight in before.items()}
    ak.attach(model).unmerge()
    return found


def changes_in(file: Path) -> dict[str, Tensor]:
    """The change of each module in a file of ComfyUI's, by kohya's formula `alpha / r * up @ down`."""
    tensors, found = load_file(file), {}
    for key in (key for key in tensors if key.endswith(".lora_down.weight")):
        down, up = tensors[key], tensors[key.replace("lora_down", "lora_up")]
        scale = float(tensors[key.replace("lora_down.weight", "alpha")]) / len(down)
        name = key.removeprefix("diffusion_model.").removesuffix(".lora_down.weight")
        found[name] = (scale * up.flatten(1) @ down.flatten(1)).reshape(len(up), *down.shape[1:])
    return found


@pytest.mark.parametrize("case", MODELS)
def test_written_names_and_rows_are_those_of_the_original(case: str, tmp_path: Path) -> None:
    model, expected = adapted(case)
    ak.attach(model).save("x", tmp_path / "x")
    ak.convert_file(tmp_path / "x", tmp_path / "x.safetensors", naming="comfyui", base=model)
    written = changes_in(tmp_path / "x.safetensors")
    for name, paths in FIXED.get(case, {}).items():
        whole = torch.cat([expected.pop(path) for path in paths])
        torch.testing.assert_close(written.pop(name), whole, rtol=0, atol=1e-5)
    prefix = "model.diffusion_model." if case == "SDXL" else ""
    biases = {f"{prefix}{name}.bias": torch.zeros(1) for name in written} if prefix else {}
    checkpoint = Checkpoint({f"{prefix}{name}.weight": change for name, change in written.items()} | biases)
    found = getattr(single_file_utils, f"convert_{MODELS[case][2]}")(checkpoint, config=dict(model.config))
    for path, change in expected.items():
        torch.testing.assert_close(found[f"{path}.weight"], change, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", MODELS)
def test_written_file_is_read_back_onto_the_model_and_without_it(case: str, tmp_path: Path) -> None:
    model, expected = adapted(case)
    adapters, file = ak.attach(model), tmp_path / "x.safetensors"
    adapters.save("x", tmp_path / "x")
    ak.convert_file(tmp_path / "x", file, naming="kohya", base=model)
    adapters.remove("x")
    ak.convert_file(file, tmp_path / "y")
    for source in (file, tmp_path / "y"):
        adapters.load(source, "y")
        if source == file:
            adapters.reset("y")
            adapters.load_state_dict("y", load_file(file))
        found = changes(model, "y", [*expected])
        adapters.remove("y")
        for path, change in expected.items():
            torch.testing.assert_close(found[path], change, rtol=0, atol=1e-5)


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("case", ["Flux", "Wan"])
def test_a_folder_of_pefts_under_original_names_is_read_onto_the_model(
    case: str, use_rslora: bool, tmp_path: Path
) -> None:
    model, expected = adapted(case)
    ak.attach(model).save("x", tmp_path / "x")
    ak.convert_file(tmp_path / "x", tmp_path / "x.safetensors", naming="comfyui", base=model)
    ak.attach(model).remove("x")
    file = load_file(tmp_path / "x.safetensors")
    alphas = {key.removesuffix(".alpha"): float(file.pop(key)) for key in [*file] if key.endswith(".alpha")}
    ranks = {name: len(file[f"{name}.lora_down.weight"]) for name in alphas}
    own = {name: name.removeprefix("diffusion_model.") for name in alphas}
    root = {name: rank**0.5 if use_rslora else 1.0 for name, rank in ranks.items()}
    config = {"peft_type": "LORA", "r": 99, "lora_alpha": 99, "target_modules": [*own.values()]}
    config |= {"use_rslora": use_rslora, "rank_pattern": {own[name]: rank for name, rank in ranks.items()}}
    config |= {"alpha_pattern": {own[name]: alpha / root[name] for name, alpha in alphas.items()}}
    (tmp_path / "y").mkdir()
    (tmp_path / "y" / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    names = {"diffusion_model.": "base_model.model.", "lora_down": "lora_A", "lora_up": "lora_B"}
    for before, after in names.items():
        file = {key.replace(before, after): tensor for key, tensor in file.items()}
    save_file(file, tmp_path / "y" / "adapter_model.safetensors")
    assert "original names" in ak.inspect_adapter(tmp_path / "y", base=model).layout
    ak.attach(model).load(tmp_path / "y", "y")
    found = changes(model, "y", [*expected])
    ak.attach(model).detach().save_pretrained(tmp_path / "base")
    ak.merge_checkpoint(tmp_path / "base", tmp_path / "y", tmp_path / "merged")
    before, merged = (load_file(next((tmp_path / name).glob("*.safetensors"))) for name in ("base", "merged"))
    for path, change in expected.items():
        torch.testing.assert_close(found[path], change, rtol=0, atol=1e-5)
        torch.testing.assert_close(merged[f"{path}.weight"] - before[f"{path}.weight"], change, rtol=0, atol=1e-5)
