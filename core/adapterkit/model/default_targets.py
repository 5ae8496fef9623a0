"""The layers to adapt if a config names no `target_modules`: PEFT's table, by `model_type`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

# The names of layers, and the models that call them so.
_QV = ("q_proj", "v_proj")
_GROUPS: Mapping[Sequence[str] | str, str] = {
    _QV: "bart gemma gemma2 gemma3_text gpt_neo gptj llama llama4 mistral mixtral opt qwen2 qwen3 stablelm",
    ("query", "value"): "bert electra layoutlm roberta xlm-roberta",
    ("q", "v", "q_proj", "v_proj"): "blip-2",
    ("query_key_value",): "bloom chatglm falcon gpt_neox RefinedWeb RefinedWebModel",
    ("c_proj", "c_attn"): "btlm",
    ("qkv_proj",): "codegen",
    ("in_proj",): "deberta",
    ("query_proj", "value_proj"): "deberta-v2",
    r".*language_model\..*\.(q_proj|v_proj)": "gemma4",
    ("c_attn",): "gpt2 gpt_bigcode",
    ("Wqkv",): "mpt",
    ("q", "v"): "mt5 t5",
    ("q_proj", "k_proj", "v_proj", "o_proj"): "nemotron_h",
    ("q_proj", "v_proj", "fc1", "fc2"): "phi",
    ("key", "value", "receptance", "output"): "rwkv",
    ("r_proj", "k_proj", "v_proj", "o_proj", "key", "value"): "rwkv7",
}
TARGETS = {model_type: names for names, models in _GROUPS.items() for model_type in models.split()}
