"""What the layers of image and video models are called in the original code, and what diffusers calls them.

Each table maps an original name to diffusers' path; `{}` stands for the number of a block. Where diffusers has several
layers for one of the original's, they are named in the order of its rows: `"to_q to_k to_v mlp*4"` has four times as
many rows of the last.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, eq=False)
class Family:
    """Models of one architecture.

    Attributes:
        model: what the models are called.
        names: for each name of a layer in the original code, with dots, what diffusers has. `{}` stands for a number.
            Of several names for the same layer the first is written.
        swapped: original names of layers that give the shift and the scale of a normalisation, which diffusers has in
            the other order. A layer that gives more than these two has the same order in both.
        told_by: an expression that a path of the model must match before its adapters are written in the original
            names. Stable Diffusion 1 and 2 have SDXL's names, but kohya's programs train them in diffusers'.
        rare: files are of these models only if the model is at hand and has the layers.
    """

    model: str
    names: Mapping[str, str]
    swapped: frozenset[str] = frozenset()
    told_by: str = ""
    rare: bool = False

    def layers(self, original: str) -> dict[str, int]:
        """The layers of diffusers that have the rows of one of the original's, in order, with their shares of these."""
        pairs = (layer.partition("*") for layer in self.names[original].split())
        return {path: int(share or 1) for path, _, share in pairs}


def _inside(theirs: str, ours: str, names: Mapping[str, str]) -> dict[str, str]:
    """The names of a block's layers, with the block's own before them."""
    return {f"{theirs}.{n}": " ".join(f"{ours}.{path}" for path in layers.split()) for n, layers in names.items()}


def _fused(name: str, layers: str) -> dict[str, str]:
    """A fused layer; the Open Model Initiative's names have a number for each of its parts."""
    return {name: layers, **{f"{name}.{n}": path.partition("*")[0] for n, path in enumerate(layers.split())}}


def _stable_diffusion(depth: int) -> dict[str, str]:
    """UNets with so many residual blocks at each resolution on the way down, and one more on the way up."""
    resnet = {
        "in_layers.2": "conv1",
        "emb_layers.1": "time_emb_proj",
        "out_layers.3": "conv2",
        "skip_connection": "conv_shortcut",
    }
    inner = [f"attn{n}.to_{part}" for n in (1, 2) for part in ("q", "k", "v", "out.0")]
    inner = [f"transformer_blocks.{{}}.{name}" for name in (*inner, "ff.net.0.proj", "ff.net.2")]
    attention = {name: name for name in ("proj_in", "proj_out", *inner)}
    names: dict[str, str] = {
        "time_embed.0": "time_embedding.linear_1",
        "time_embed.2": "time_embedding.linear_2",
        "label_emb.0.0": "add_embedding.linear_1",
        "label_emb.0.2": "add_embedding.linear_2",
        "input_blocks.0.0": "conv_in",
        "out.2": "conv_out",
        **_inside("middle_block.0", "mid_block.resnets.0", resnet),
        **_inside("middle_block.1", "mid_block.attentions.0", attention),
        **_inside("middle_block.2", "mid_block.resnets.1", resnet),
    }
    for level in range(4):
        first = level * (depth + 1)  # of the blocks on the way up; on the way down there is one before them
        for n in range(depth):
            names |= _inside(f"input_blocks.{first + n + 1}.0", f"down_blocks.{level}.resnets.{n}", resnet)
            names |= _inside(f"input_blocks.{first + n + 1}.1", f"down_blocks.{level}.attentions.{n}", attention)
        for n in range(depth + 1):
            names |= _inside(f"output_blocks.{first + n}.0", f"up_blocks.{level}.resnets.{n}", resnet)
            names |= _inside(f"output_blocks.{first + n}.1", f"up_blocks.{level}.attentions.{n}", attention)
        names[f"input_blocks.{first + depth + 1}.0.op"] = f"down_blocks.{level}.downsamplers.0.conv"
        # Behind the attention, where there is one.
        names[f"output_blocks.{first + depth}.2.conv"] = f"up_blocks.{level}.upsamplers.0.conv"
        names[f"output_blocks.{first + depth}.1.conv"] = f"up_blocks.{level}.upsamplers.0.conv"
    return names


_IMAGE = "attn.to_q attn.to_k attn.to_v"
_TEXT = "attn.add_q_proj attn.add_k_proj attn.add_v_proj"
_LAST = "final_layer.adaLN_modulation.1"
_STREAMS = {
    **_inside(
        "double_blocks.{}",
        "transformer_blocks.{}",
        {
            **_fused("img_attn.qkv", _IMAGE),
            **_fused("txt_attn.qkv", _TEXT),
            "img_attn.proj": "attn.to_out.0",
            "txt_attn.proj": "attn.to_add_out",
        },
    ),
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "final_layer.linear": "proj_out",
}
_MLP = {
    "img_mlp.0": "ff.net.0.proj",
    "img_mlp.2": "ff.net.2",
    "txt_mlp.0": "ff_context.net.0.proj",
    "txt_mlp.2": "ff_context.net.2",
}
_MODULATION = {"img_mod.lin": "norm1.linear", "txt_mod.lin": "norm1_context.linear"}
_SINGLES = _inside(
    "single_blocks.{}",
    "single_transformer_blocks.{}",
    {**_fused("linear1", f"{_IMAGE} proj_mlp*4"), "linear2": "proj_out"},
)


def _embedder(theirs: str, ours: str, first: str = "in_layer", second: str = "out_layer") -> dict[str, str]:
    return {f"{theirs}.{first}": f"{ours}.linear_1", f"{theirs}.{second}": f"{ours}.linear_2"}


_FLUX = {
    **_STREAMS,
    **_SINGLES,
    **_inside("double_blocks.{}", "transformer_blocks.{}", _MLP | _MODULATION),
    "single_blocks.{}.modulation.lin": "single_transformer_blocks.{}.norm.linear",
    **_embedder("time_in", "time_text_embed.timestep_embedder"),
    **_embedder("vector_in", "time_text_embed.text_embedder"),
    **_embedder("guidance_in", "time_text_embed.guidance_embedder"),
    _LAST: "norm_out.linear",
}

_CHROMA = {
    **_STREAMS,
    **_SINGLES,
    **_inside("double_blocks.{}", "transformer_blocks.{}", _MLP),
    "img_in.proj": "x_embedder",
    "distilled_guidance_layer.in_proj": "distilled_guidance_layer.in_proj",
    "distilled_guidance_layer.out_proj": "distilled_guidance_layer.out_proj",
    **_embedder("distilled_guidance_layer.layers.{}", "distilled_guidance_layer.layers.{}"),
}

_FLUX2 = {
    **_STREAMS,
    **_inside(
        "double_blocks.{}",
        "transformer_blocks.{}",
        {
            "img_mlp.0": "ff.linear_in",
            "img_mlp.2": "ff.linear_out",
            "txt_mlp.0": "ff_context.linear_in",
            "txt_mlp.2": "ff_context.linear_out",
        },
    ),
    # diffusers keeps this one whole: q, k, v, and two hidden layers of three times the input.
    "single_blocks.{}.linear1": "single_transformer_blocks.{}.attn.to_qkv_mlp_proj*9",
    "single_blocks.{}.linear2": "single_transformer_blocks.{}.attn.to_out",
    **{
        f"{name}.lin": f"{name}.linear"
        for name in ("double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation")
    },
    **_embedder("time_in", "time_guidance_embed.timestep_embedder"),
    **_embedder("guidance_in", "time_guidance_embed.guidance_embedder"),
    _LAST: "norm_out.linear",
}

_HUNYUAN_VIDEO = {
    **_inside(
        "double_blocks.{}",
        "transformer_blocks.{}",
        {
            "img_attn_qkv": _IMAGE,
            "img_attn_proj": "attn.to_out.0",
            "txt_attn_qkv": _TEXT,
            "txt_attn_proj": "attn.to_add_out",
            "img_mlp.fc1": "ff.net.0.proj",
            "img_mlp.fc2": "ff.net.2",
            "txt_mlp.fc1": "ff_context.net.0.proj",
            "txt_mlp.fc2": "ff_context.net.2",
            "img_mod.linear": "norm1.linear",
            "txt_mod.linear": "norm1_context.linear",
        },
    ),
    **_SINGLES,
    "single_blocks.{}.modulation.linear": "single_transformer_blocks.{}.norm.linear",
    "img_in.proj": "x_embedder.proj",
    **_embedder("time_in", "time_text_embed.timestep_embedder", "mlp.0", "mlp.2"),
    **_embedder("guidance_in", "time_text_embed.guidance_embedder", "mlp.0", "mlp.2"),
    **_embedder("vector_in", "time_text_embed.text_embedder"),
    _LAST: "norm_out.linear",
    "final_layer.linear": "proj_out",
    "txt_in.input_embedder": "context_embedder.proj_in",
    **_embedder("txt_in.t_embedder", "context_embedder.time_text_embed.timestep_embedder", "mlp.0", "mlp.2"),
    **_embedder("txt_in.c_embedder", "context_embedder.time_text_embed.text_embedder", "linear_1", "linear_2"),
    **_inside(
        "txt_in.individual_token_refiner.blocks.{}",
        "context_embedder.token_refiner.refiner_blocks.{}",
        {
            "self_attn_qkv": _IMAGE,
            "self_attn_proj": "attn.to_out.0",
            "mlp.fc1": "ff.net.0.proj",
            "mlp.fc2": "ff.net.2",
            "adaLN_modulation.1": "norm_out.linear",
            # From here on names of the Open Model Initiative and of ComfyUI.
            **_fused("self_attn.qkv", _IMAGE),
            "self_attn.proj": "attn.to_out.0",
            "mlp.0": "ff.net.0.proj",
            "mlp.2": "ff.net.2",
        },
    ),
    **_STREAMS,
    **_inside("double_blocks.{}", "transformer_blocks.{}", _MLP | _MODULATION),
    "single_blocks.{}.modulation.lin": "single_transformer_blocks.{}.norm.linear",
    **_embedder("time_in", "time_text_embed.timestep_embedder"),
    **_embedder("guidance_in", "time_text_embed.guidance_embedder"),
    **_embedder("txt_in.t_embedder", "context_embedder.time_text_embed.timestep_embedder"),
    **_embedder("txt_in.c_embedder", "context_embedder.time_text_embed.text_embedder"),
}

_SD3 = {
    **_inside(
        "joint_blocks.{}",
        "transformer_blocks.{}",
        {
            "x_block.attn.qkv": _IMAGE,
            "x_block.attn.proj": "attn.to_out.0",
            "x_block.attn2.qkv": "attn2.to_q attn2.to_k attn2.to_v",
            "x_block.attn2.proj": "attn2.to_out.0",
            "x_block.mlp.fc1": "ff.net.0.proj",
            "x_block.mlp.fc2": "ff.net.2",
            "x_block.adaLN_modulation.1": "norm1.linear",
            "context_block.attn.qkv": _TEXT,
            "context_block.attn.proj": "attn.to_add_out",
            "context_block.mlp.fc1": "ff_context.net.0.proj",
            "context_block.mlp.fc2": "ff_context.net.2",
            "context_block.adaLN_modulation.1": "norm1_context.linear",
        },
    ),
    "x_embedder.proj": "pos_embed.proj",
    "context_embedder": "context_embedder",
    **_embedder("t_embedder", "time_text_embed.timestep_embedder", "mlp.0", "mlp.2"),
    **_embedder("y_embedder", "time_text_embed.text_embedder", "mlp.0", "mlp.2"),
    "final_layer.linear": "proj_out",
    _LAST: "norm_out.linear",
}

_WAN_ATTENTION = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0"}
_WAN_BLOCK = {
    **_inside("self_attn", "attn1", _WAN_ATTENTION),
    **_inside("cross_attn", "attn2", _WAN_ATTENTION | {"k_img": "add_k_proj", "v_img": "add_v_proj"}),
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
}
_WAN = {
    **_inside("blocks.{}", "blocks.{}", _WAN_BLOCK),
    **_inside("vace_blocks.{}", "vace_blocks.{}", _WAN_BLOCK),
    "vace_blocks.{}.before_proj": "vace_blocks.{}.proj_in",
    "vace_blocks.{}.after_proj": "vace_blocks.{}.proj_out",
    "patch_embedding": "patch_embedding",
    **_embedder("time_embedding", "condition_embedder.time_embedder", "0", "2"),
    **_embedder("text_embedding", "condition_embedder.text_embedder", "0", "2"),
    "time_projection.1": "condition_embedder.time_proj",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "head.head": "proj_out",
}

_TO = ("to_q", "to_k", "to_v", "to_out.0")


def _ltx(*attentions: str, streams: tuple[str, ...] = ("",)) -> dict[str, str]:
    """LTX-Video, and LTX-2, which has a stream for sound beside that for images."""
    blocks = [f"{attention}.{name}" for attention in attentions for name in _TO]
    blocks += [f"{stream}ff.net.{name}" for stream in streams for name in ("0.proj", "2")]
    names: dict[str, str] = {f"transformer_blocks.{{}}.{name}": f"transformer_blocks.{{}}.{name}" for name in blocks}
    for stream in streams:
        names[f"{stream}patchify_proj"] = f"{stream}proj_in"
        names[f"{stream}proj_out"] = f"{stream}proj_out"
        names |= _embedder(f"{stream}caption_projection", f"{stream}caption_projection", "linear_1", "linear_2")
        names |= _modulation(f"{stream}adaln_single", f"{stream}time_embed")
    return names


def _modulation(theirs: str, ours: str) -> dict[str, str]:
    """A modulation by the time."""
    inner = "emb.timestep_embedder"
    return {
        **_embedder(f"{theirs}.{inner}", f"{ours}.{inner}", "linear_1", "linear_2"),
        f"{theirs}.linear": f"{ours}.linear",
    }


_LTX = _ltx("attn1", "attn2")
_LTX2 = {
    **_ltx(
        *("attn1", "attn2", "audio_attn1", "audio_attn2", "audio_to_video_attn", "video_to_audio_attn"),
        streams=("", "audio_"),
    ),
    **_modulation("av_ca_video_scale_shift_adaln_single", "av_cross_attn_video_scale_shift"),
    **_modulation("av_ca_audio_scale_shift_adaln_single", "av_cross_attn_audio_scale_shift"),
    **_modulation("av_ca_a2v_gate_adaln_single", "av_cross_attn_video_a2v_gate"),
    **_modulation("av_ca_v2a_gate_adaln_single", "av_cross_attn_audio_v2a_gate"),
    **_modulation("prompt_adaln_single", "prompt_adaln"),
    **_modulation("audio_prompt_adaln_single", "audio_prompt_adaln"),
}


def _with_refiners(block: Mapping[str, str]) -> dict[str, str]:
    """The blocks of Lumina and its relatives, which have the same layers."""
    stacks = ("layers.{}", "noise_refiner.{}", "context_refiner.{}")
    return {name: target for stack in stacks for name, target in _inside(stack, stack, block).items()}


_LUMINA2 = {
    **_with_refiners(
        {
            "attention.qkv": "attn.to_q*3 attn.to_k attn.to_v",
            "attention.out": "attn.to_out.0",
            **{f"feed_forward.w{n}": f"feed_forward.linear_{n}" for n in (1, 2, 3)},
            "adaLN_modulation.1": "norm1.linear",
        }
    ),
    "x_embedder": "x_embedder",
    "cap_embedder.1": "time_caption_embed.caption_embedder.1",
    **_embedder("t_embedder", "time_caption_embed.timestep_embedder", "mlp.0", "mlp.2"),
    "final_layer.adaLN_modulation.1": "norm_out.linear_1",
    "final_layer.linear": "norm_out.linear_2",
}

_Z_IMAGE = {
    **_with_refiners(
        {
            **{f"attention.to_{part}": f"attention.to_{part}" for part in ("q", "k", "v", "out.0")},
            "attention.qkv": "attention.to_q attention.to_k attention.to_v",
            "attention.out": "attention.to_out.0",
            **{f"feed_forward.w{n}": f"feed_forward.w{n}" for n in (1, 2, 3)},
            "adaLN_modulation.0": "adaLN_modulation.0",
        }
    ),
    "x_embedder": "all_x_embedder.2-1",
    "cap_embedder.1": "cap_embedder.1",
    "t_embedder.mlp.0": "t_embedder.mlp.0",
    "t_embedder.mlp.2": "t_embedder.mlp.2",
    "final_layer.adaLN_modulation.1": "all_final_layer.2-1.adaLN_modulation.1",
    "final_layer.linear": "all_final_layer.2-1.linear",
}

_QWEN_BLOCK = (
    *(f"attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0", "to_add_out")),
    *(f"attn.add_{name}_proj" for name in ("q", "k", "v")),
    *(f"{stream}_mlp.net.{name}" for stream in ("img", "txt") for name in ("0.proj", "2")),
    *("img_mod.1", "txt_mod.1"),
)
_QWEN_IMAGE = {
    name: name
    for name in (
        *(f"transformer_blocks.{{}}.{name}" for name in _QWEN_BLOCK),
        *("img_in", "txt_in", "proj_out", "norm_out.linear"),
        *(f"time_text_embed.timestep_embedder.linear_{n}" for n in (1, 2)),
    )
}

_AURA_FF = {"c_fc1": "linear_1", "c_fc2": "linear_2", "c_proj": "out_projection"}
_AURA_OWN = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "o"}
_AURA_TEXT = {"add_q_proj": "q", "add_k_proj": "k", "add_v_proj": "v", "to_add_out": "o"}
_AURA_FLOW = {
    **_inside(
        "double_layers.{}",
        "joint_transformer_blocks.{}",
        {
            **{f"attn.w2{name}": f"attn.{path}" for path, name in _AURA_OWN.items()},
            **{f"attn.w1{name}": f"attn.{path}" for path, name in _AURA_TEXT.items()},
            **_inside("mlpX", "ff", _AURA_FF),
            **_inside("mlpC", "ff_context", _AURA_FF),
            "modX.1": "norm1.linear",
            "modC.1": "norm1_context.linear",
        },
    ),
    **_inside(
        "single_layers.{}",
        "single_transformer_blocks.{}",
        {
            **{f"attn.w1{name}": f"attn.{path}" for path, name in _AURA_OWN.items()},
            **_inside("mlp", "ff", _AURA_FF),
            "modCX.1": "norm1.linear",
        },
    ),
    **_embedder("t_embedder", "time_step_proj", "mlp.0", "mlp.2"),
    "cond_seq_linear": "context_embedder",
    "init_x_linear": "pos_embed.proj",
    "modF.1": "norm_out.linear",
    "final_linear": "proj_out",
}

_COSMOS_ATTENTION = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "output_proj": "to_out.0"}
_COSMOS = {
    **_inside(
        "blocks.{}",
        "transformer_blocks.{}",
        {
            **_inside("self_attn", "attn1", _COSMOS_ATTENTION),
            **_inside("cross_attn", "attn2", _COSMOS_ATTENTION),
            "mlp.layer1": "ff.net.0.proj",
            "mlp.layer2": "ff.net.2",
            **_embedder("adaln_modulation_self_attn", "norm1", "1", "2"),
            **_embedder("adaln_modulation_cross_attn", "norm2", "1", "2"),
            **_embedder("adaln_modulation_mlp", "norm3", "1", "2"),
        },
    ),
    "x_embedder.proj.1": "patch_embed.proj",
    **_embedder("t_embedder.1", "time_embed.t_embedder", "linear_1", "linear_2"),
    **_embedder("final_layer.adaln_modulation", "norm_out", "1", "2"),
    "final_layer.linear": "proj_out",
}

_SANA = {
    **_inside(
        "blocks.{}",
        "transformer_blocks.{}",
        {
            "attn.qkv": "attn1.to_q attn1.to_k attn1.to_v",
            "attn.proj": "attn1.to_out.0",
            "cross_attn.q_linear": "attn2.to_q",
            "cross_attn.kv_linear": "attn2.to_k attn2.to_v",
            "cross_attn.proj": "attn2.to_out.0",
            "mlp.inverted_conv.conv": "ff.conv_inverted",
            "mlp.depth_conv.conv": "ff.conv_depth",
            "mlp.point_conv.conv": "ff.conv_point",
        },
    ),
    "x_embedder.proj": "patch_embed.proj",
    **_embedder("t_embedder", "time_embed.emb.timestep_embedder", "mlp.0", "mlp.2"),
    "t_block.1": "time_embed.linear",
    **_embedder("y_embedder.y_proj", "caption_projection", "fc1", "fc2"),
    "final_layer.linear": "proj_out",
}

_KREA_BLOCK = {
    **{f"attn.w{name[-1]}": f"attn.{name}" for name in ("to_q", "to_k", "to_v")},
    "attn.wo": "attn.to_out.0",
    "attn.gate": "attn.to_gate",
    **{f"mlp.{name}": f"ff.{name}" for name in ("gate", "up", "down")},
}
_KREA2 = {
    **_inside("blocks.{}", "transformer_blocks.{}", _KREA_BLOCK),
    **_inside("txtfusion.layerwise_blocks.{}", "text_fusion.layerwise_blocks.{}", _KREA_BLOCK),
    **_inside("txtfusion.refiner_blocks.{}", "text_fusion.refiner_blocks.{}", _KREA_BLOCK),
    "txtfusion.projector": "text_fusion.projector",
    "first": "img_in",
    "last.linear": "final_layer.linear",
    "tproj.1": "time_mod_proj",
    **_embedder("tmlp", "time_embed", "0", "2"),
    **_embedder("txtmlp", "txt_in", "1", "3"),
}

_XL = r"add_embedding|transformer_blocks\.[1-9]"
FAMILIES = (
    Family("Stable Diffusion", _stable_diffusion(2), told_by=_XL),
    Family("Flux", _FLUX, frozenset({_LAST})),
    Family("Wan", _WAN),
    Family("HunyuanVideo", _HUNYUAN_VIDEO, frozenset({_LAST})),
    Family("Qwen-Image", _QWEN_IMAGE),
    Family("Stable Diffusion 3", _SD3, frozenset({_LAST, "joint_blocks.{}.context_block.adaLN_modulation.1"})),
    Family("Chroma", _CHROMA),
    Family("Flux 2", _FLUX2, frozenset({_LAST})),
    Family("Z-Image", _Z_IMAGE),
    Family("Lumina 2", _LUMINA2),
    Family("LTX-Video", _LTX),
    Family("LTX-2", _LTX2),
    Family("Krea 2", _KREA2),
    Family("AuraFlow", _AURA_FLOW, frozenset({"modF.1"})),
    Family("Cosmos 2 and Anima", _COSMOS),
    Family("Sana", _SANA),
    Family("Stable Diffusion with one layer a block", _stable_diffusion(1), told_by=_XL, rare=True),
)
