"""Merging adapters whose vocabulary was resized: the output has their embeddings, size and tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from tests import models

import adapterkit as ak
from adapterkit_lora import LoraConfig

SIZES = {**models.SIZES, "num_key_value_heads": 1, "vocab_size": models.VOCABULARY}
ROWS = models.VOCABULARY + 8


def qwen2_vl(*, tied: bool) -> Any:
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    text = {**SIZES, "rope_parameters": rope, "bos_token_id": 1, "eos_token_id": 1, "tie_word_embeddings": tied}
    vision = {"depth": 1, "embed_dim": 16, "num_heads": 2, "hidden_size": 16, "patch_size": 4, "mlp_ratio": 2}
    config = transformers.Qwen2VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied)
    return transformers.Qwen2VLForConditionalGeneration(config).eval()


def resized(folder: Path, base: Any, **fields: Any) -> torch.Tensor:
    """Save the base and, as PEFT does, an adapter that was trained with more tokens; its logits for a new token."""
    base.save_pretrained(folder / "base")
    model = type(base).from_pretrained(folder / "base").eval()
    model.resize_token_embeddings(ROWS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model.get_input_embeddings().weight.data.normal_(std=0.5)
        config = peft.LoraConfig(r=2, init_lora_weights=False, **fields)
        adapted: Any = peft.get_peft_model(model, config)
    adapted.save_pretrained(folder / "a", save_embedding_layers=True)
    return logits(adapted)


def logits(model: Any) -> torch.Tensor:
    ids = torch.tensor([[1, ROWS - 1, 2]])
    given = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=ids, **given).logits


CASES: dict[str, tuple[Any, dict[str, Any], bool]] = {
    "untied": (lambda: models.build("llama"), {"target_modules": ["q_proj"]}, False),
    "tied": (lambda: models.build("gemma3"), {"target_modules": ["q_proj"]}, True),
    "in full": (
        lambda: models.build("llama"),
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
        False,
    ),
    "tied, with a change of one of them": (
        lambda: models.build("gemma3"),
        {"target_modules": ["q_proj", "embed_tokens"]},
        False,
    ),
    "a bias of the logits": (lambda: models.build("bart"), {"target_modules": ["q_proj"]}, True),
    "fields of the text in the config itself": (lambda: qwen2_vl(tied=True), {"target_modules": ["q_proj"]}, True),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore::UserWarning:peft")
def test_the_output_has_the_larger_embeddings(case: str, tmp_path: Path) -> None:
    make, fields, tied = CASES[case]
    expected = resized(tmp_path, make(), **fields)
    if case.startswith("fields"):  # as transformers 4 wrote them
        config = json.loads((tmp_path / "base/config.json").read_text())
        text = config.pop("text_config")
        (tmp_path / "base/config.json").write_text(json.dumps({**text, **config}))
    report = ak.merge_checkpoint(tmp_path / "base", tmp_path / "a", tmp_path / "out", untie="change" in case)
    assert report.vocabulary == ROWS
    merged = type(make()).from_pretrained(tmp_path / "out").eval()
    assert merged.config.get_text_config().vocab_size == ROWS
    assert merged.config.tie_word_embeddings is tied
    models.assert_same_outputs(logits(merged), expected)


def test_the_tokenizer_beside_the_adapter_is_the_outputs(tmp_path: Path) -> None:
    resized(tmp_path, models.build("llama"), target_modules=["q_proj"])
    for folder in ("base", "a"):
        (tmp_path / folder / "tokenizer_config.json").write_text(json.dumps({"of": folder}))
    ak.merge_checkpoint(tmp_path / "base", tmp_path / "a", tmp_path / "out")
    assert json.loads((tmp_path / "out/tokenizer_config.json").read_text()) == {"of": "a"}


def test_rows_that_no_file_holds_are_refused(tmp_path: Path) -> None:
    resized(tmp_path, models.build("llama"), target_modules=["q_proj", "embed_tokens"])  # PEFT leaves the head out
    with pytest.raises(ak.UnsupportedError, match=r"40 tokens.*new rows of 'lm_head\.weight'"):
        ak.merge_checkpoint(tmp_path / "base", tmp_path / "a", tmp_path / "out")


def test_two_sizes_are_refused(tmp_path: Path) -> None:
    resized(tmp_path / "one", models.build("llama"), target_modules=["q_proj"])
    other: Any = models.build("llama")
    other.resize_token_embeddings(ROWS + 1)
    ak.attach(other).add("b", LoraConfig(target_modules=["q_proj"]))
    ak.attach(other).save("b", tmp_path / "b")
    with pytest.raises(ak.UnsupportedError, match="one vocabulary"):
        ak.merge_checkpoint(tmp_path / "one/base", [tmp_path / "one/a", tmp_path / "b"], tmp_path / "out")
