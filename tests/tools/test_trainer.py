"""Trainers of other libraries on an adapted model: train, save, kill, resume, compare."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.models import VOCABULARY, build

import adapterkit as ak
from adapterkit_lora import LoraConfig

pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")


def tokenizer() -> Any:
    """Words `w0`, `w1`, ... of the tiny models' vocabulary."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="w0", bos_token="w1", eos_token="w2", pad_token="w3"
    )


def sentences(count: int = 16) -> Any:
    """A data set of texts in which each word follows from the one before."""
    texts = [" ".join(f"w{4 + (start + 3 * i) % (VOCABULARY - 4)}" for i in range(8)) for start in range(count)]
    return datasets.Dataset.from_dict({"text": texts})


def test_sft_trains_the_adapter_alone(tmp_path: Path) -> None:
    from trl import SFTConfig, SFTTrainer

    model = build("llama")
    adapters = ak.attach(model)
    adapters.add("t", LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    arguments = SFTConfig(
        str(tmp_path / "out"), max_steps=2, report_to="none", use_cpu=True, bf16=False, save_strategy="no"
    )
    SFTTrainer(model, arguments, train_dataset=sentences(), processing_class=tokenizer()).train()
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed
    assert changed == {key for key in changed if ".adapters.t." in key}
