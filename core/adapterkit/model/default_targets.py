"""The layers to adapt if a config names no `target_modules`: PEFT's table, by `model_type`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

_QV = ("q_proj", "v_proj")
_QUERY_VALUE = ("query", "value")

TARGETS: Mapping[str, Sequence[str] | str] = {
    "bart": _QV,
    "bert": _QUERY_VALUE,
    "blip-2": ("q", "v", "q_proj", "v_proj"),
    "bloom": ("query_key_value",),
    "btlm": ("c_proj", "c_attn"),
    "chatglm": ("query_key_value",),
    "codegen": ("qkv_proj",),
    "deberta": ("in_proj",),
    "deberta-v2": ("query_proj", "value_proj"),
    "electra": _QUERY_VALUE,
    "falcon": ("query_key_value",),
    "gemma": _QV,
    "gemma2": _QV,
    "gemma3_text": _QV,
    "gemma4": r".*language_model\..*\.(q_proj|v_proj)",
    "gpt2": ("c_attn",),
    "gpt_bigcode": ("c_attn",),
    "gpt_neo": _QV,
    "gpt_neox": ("query_key_value",),
    "gptj": _QV,
    "layoutlm": _QUERY_VALUE,
    "llama": _QV,
    "llama4": _QV,
    "mistral": _QV,
    "mixtral": _QV,
    "mpt": ("Wqkv",),
    "mt5": ("q", "v"),
    "nemotron_h": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "opt": _QV,
    "phi": (*_QV, "fc1", "fc2"),
    "qwen2": _QV,
    "qwen3": _QV,
    "RefinedWeb": ("query_key_value",),
    "RefinedWebModel": ("query_key_value",),
    "roberta": _QUERY_VALUE,
    "rwkv": ("key", "value", "receptance", "output"),
    "rwkv7": ("r_proj", "k_proj", "v_proj", "o_proj", "key", "value"),
    "stablelm": _QV,
    "t5": ("q", "v"),
    "xlm-roberta": _QUERY_VALUE,
}
