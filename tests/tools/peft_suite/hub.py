"""A hub on the disk: tiny models under the ids that PEFT's tests ask for, in huggingface_hub's cache.

They are made from configs, with random values. Whatever asks the hub while `HF_HUB_OFFLINE=1` finds them in the cache,
so nothing has to be patched.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

REVISION = "0" * 40
VOCABULARY = 300  # the bytes, and some room
_SMALL = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_attention_heads": 4, "num_hidden_layers": 2}
_LLAMA = {**_SMALL, "intermediate_size": 64, "num_key_value_heads": 4, "max_position_embeddings": 2048}
_GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_head": 4, "n_layer": 5, "n_positions": 512}
_OPT = {**_SMALL, "ffn_dim": 64, "word_embed_proj_dim": 16, "max_position_embeddings": 512, "pad_token_id": 1}
_BERT = {**_SMALL, "hidden_size": 32, "intermediate_size": 37, "max_position_embeddings": 512}
_MOE = {**_LLAMA, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_T5 = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 37, "num_layers": 5, "num_heads": 4}
_T5 |= {"decoder_start_token_id": 0}
_BART = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "max_position_embeddings": 512,
    "encoder_ffn_dim": 4,
    "decoder_ffn_dim": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
}
_BLOOM = {"vocab_size": VOCABULARY, "hidden_size": 32, "n_head": 4, "n_layer": 5}
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 30,
}
_LLAVA = {
    "text_config": {**_LLAMA, "model_type": "llama"},
    "vision_config": {**_VISION, "patch_size": 2, "projection_dim": 32, "model_type": "clip_vision_model"},
    "image_token_index": 10,
}

_WHISPER = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "pad_token_id": 0,
}

# Id: the model's class and the fields of its config.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert-base-uncased": ("BertModel", _BERT),
    "google/flan-t5-small": ("T5ForConditionalGeneration", _T5),
    "gpt2": ("GPT2LMHeadModel", _GPT2),
    "hf-internal-testing/Mixtral-tiny": ("MixtralForCausalLM", _MOE),
    "hf-internal-testing/tiny-qwen3-moe": ("Qwen3MoeForCausalLM", {**_MOE, "head_dim": 4}),
    "hf-internal-testing/tiny-random-BertModel": ("BertModel", _BERT),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": ("Gemma3ForCausalLM", {**_LLAMA, "head_dim": 4}),
    "hf-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", _LLAMA),
    "hf-internal-testing/tiny-random-LlavaForConditionalGeneration": ("LlavaForConditionalGeneration", _LLAVA),
    "hf-internal-testing/tiny-random-MistralForCausalLM": ("MistralForCausalLM", {**_LLAMA, "num_key_value_heads": 2}),
    "hf-internal-testing/tiny-random-gpt2": ("GPT2LMHeadModel", _GPT2),
    "openai/whisper-tiny": ("WhisperForConditionalGeneration", _WHISPER),
    "peft-internal-testing/opt-125m": ("OPTForCausalLM", {**_OPT, "num_hidden_layers": 12}),
    "peft-internal-testing/tiny-LlavaForConditionalGeneration": ("LlavaForConditionalGeneration", _LLAVA),
    "peft-internal-testing/tiny-clip-text-2": ("CLIPTextModel", {**_BERT, "vocab_size": VOCABULARY}),
    "peft-internal-testing/tiny-dummy-qwen2": ("Qwen2ForCausalLM", {**_LLAMA, "num_key_value_heads": 2}),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": ("BartForConditionalGeneration", _BART),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": ("BertForSequenceClassification", _BERT),
    "peft-internal-testing/tiny-random-BertModel": ("BertModel", _BERT),
    "peft-internal-testing/tiny-random-BloomForCausalLM": ("BloomForCausalLM", _BLOOM),
    "peft-internal-testing/tiny-random-DebertaModel": ("DebertaModel", {**_BERT, "pos_att_type": ["p2c", "c2p"]}),
    "peft-internal-testing/tiny-random-DebertaV2Model": ("DebertaV2Model", _BERT),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": ("GPT2LMHeadModel", _GPT2),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": ("GPTJForCausalLM", {**_GPT2, "rotary_dim": 4}),
    "peft-internal-testing/tiny-random-GPTNeoXForCausalLM": ("GPTNeoXForCausalLM", {**_BERT, "num_hidden_layers": 5}),
    "peft-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", _LLAMA),
    "peft-internal-testing/tiny-random-OPTForCausalLM": ("OPTForCausalLM", {**_OPT, "num_hidden_layers": 5}),
    "peft-internal-testing/tiny-random-ResNetForImageClassification": (
        "ResNetForImageClassification",
        {"embedding_size": 10, "hidden_sizes": [10, 20, 30, 40], "depths": [1, 1, 2, 1], "num_labels": 3},
    ),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": ("RobertaForSequenceClassification", _BERT),
    "peft-internal-testing/tiny-random-RobertaModel": ("RobertaModel", _BERT),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration": ("T5ForConditionalGeneration", _T5),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": ("T5ForConditionalGeneration", _T5),
    "peft-internal-testing/tiny-random-gpt2": ("GPT2LMHeadModel", _GPT2),
    "peft-internal-testing/tiny-random-t5": ("T5ForConditionalGeneration", _T5),
    "tiiuae/falcon-mamba-tiny-dev": (
        "FalconMambaForCausalLM",
        {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4},
    ),
    "trl-internal-testing/tiny-GptOssForCausalLM": ("GptOssForCausalLM", {**_MOE, "head_dim": 4}),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": (
        "LlamaForSequenceClassification",
        {**_LLAMA, "pad_token_id": 0},
    ),
    "trl-internal-testing/tiny-Qwen3ForCausalLM": ("Qwen3ForCausalLM", {**_LLAMA, "head_dim": 4}),
    "trl-internal-testing/tiny-Qwen3MoeForCausalLM": ("Qwen3MoeForCausalLM", {**_MOE, "head_dim": 4}),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", _LLAMA),
}

_TINY = "peft-internal-testing/tiny"
# Adapters of PEFT's own: the id, the class and the id of the model that they are for, and the config.
ADAPTERS: dict[str, tuple[str, str, LoraConfig]] = {
    "peft-internal-testing/gpt2-lora-random": ("GPT2LMHeadModel", "hf-internal-testing/tiny-random-gpt2", LoraConfig()),
    f"{_TINY}_WhisperForConditionalGeneration-lora": (
        "WhisperForConditionalGeneration",
        "openai/whisper-tiny",
        LoraConfig(target_modules=["q_proj"]),
    ),
} | {
    f"{_TINY}{name}-lora": (class_name, f"{_TINY}-random-{base}", LoraConfig(task_type=task))
    for name, class_name, base, task in (
        ("-OPTForCausalLM", "OPTForCausalLM", "OPTForCausalLM", "CAUSAL_LM"),
        ("_T5ForSeq2SeqLM", "T5ForConditionalGeneration", "t5", "SEQ_2_SEQ_LM"),
        ("_OPTForSequenceClassification", "OPTForSequenceClassification", "OPTForCausalLM", "SEQ_CLS"),
        ("_GPT2ForTokenClassification", "GPT2ForTokenClassification", "gpt2", "TOKEN_CLS"),
        ("_OPTForQuestionAnswering", "OPTForQuestionAnswering", "OPTForCausalLM", "QUESTION_ANS"),
        ("_OPTForFeatureExtraction", "OPTModel", "OPTForCausalLM", "FEATURE_EXTRACTION"),
    )
}


def make(root: Path) -> None:
    """Fill the cache folder `root`, which `HF_HUB_CACHE` names. Does nothing if that was done already."""
    done = root / "made"
    if done.exists():
        return
    tokenizer = _tokenizer()
    for model_id, (class_name, fields) in MODELS.items():
        model_class = getattr(transformers, class_name)
        torch.manual_seed(0)
        model = model_class(model_class.config_class(**fields)).eval()
        folder = _repository(root, model_id)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    for adapter_id, (class_name, model_id, config) in ADAPTERS.items():
        model = getattr(transformers, class_name).from_pretrained(_repository(root, model_id))
        model.name_or_path = model_id
        get_peft_model(model, config).save_pretrained(_repository(root, adapter_id))
    _pipeline(_repository(root, "hf-internal-testing/tiny-sd-pipe"), tokenizer)
    done.touch()


def _repository(root: Path, repository: str) -> Path:
    """The folder of the files of a repository in the cache."""
    place = root / f"models--{repository.replace('/', '--')}"
    (place / "refs").mkdir(parents=True, exist_ok=True)
    (place / "refs" / "main").write_text(REVISION)
    folder = place / "snapshots" / REVISION
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Each byte is a token; `<pad>`, `<s>`, `</s>` and `<unk>` come first."""
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    tokens = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    made = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, [], unk_token="<unk>"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=512,
    )


def _pipeline(folder: Path, tokenizer: transformers.PreTrainedTokenizerFast) -> None:
    """Stable Diffusion with random parts of a few thousand numbers."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        block_out_channels=(32, 64),
        layers_per_block=2,
        sample_size=32,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
    )
    vae = AutoencoderKL(
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    text = transformers.CLIPTextModel(transformers.CLIPTextConfig(**_BERT))
    parts = {"safety_checker": None, "feature_extractor": None, "image_encoder": None}
    made = StableDiffusionPipeline(
        vae=vae, text_encoder=text, tokenizer=tokenizer, unet=unet, scheduler=DDIMScheduler(), **parts
    )
    made.save_pretrained(folder)
