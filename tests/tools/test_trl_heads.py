"""TRL's losses multiply by `lm_head.weight` and never call `lm_head`: an adapter or a trained copy there trains."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.models import VOCABULARY, build

import adapterkit as ak
from adapterkit_lora import LoraConfig

pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

ARGUMENTS = {"max_steps": 2, "report_to": "none", "use_cpu": True, "bf16": False, "save_strategy": "no"}
ARGUMENTS |= {"learning_rate": 0.05, "disable_tqdm": True, "logging_steps": 1}


def tokenizer() -> Any:
    """Words `w0`, `w1`, ... of the tiny models' vocabulary."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = WhitespaceSplit()
    special = {"unk_token": "w0", "bos_token": "w1", "eos_token": "w2", "pad_token": "w3"}
    return PreTrainedTokenizerFast(tokenizer_object=words, padding_side="left", **special)


def words(start: int, count: int = 4) -> str:
    return " ".join(f"w{4 + (start + 3 * i) % (VOCABULARY - 4)}" for i in range(count))


def sft(model: Any, folder: Path) -> Any:
    from trl import SFTConfig, SFTTrainer

    rows = datasets.Dataset.from_dict({"text": [words(i, 8) for i in range(8)]})
    return SFTTrainer(model, SFTConfig(str(folder), **ARGUMENTS), train_dataset=rows, processing_class=tokenizer())


def dpo(model: Any, folder: Path) -> Any:
    from trl import DPOConfig, DPOTrainer

    rows = {"prompt": [words(i) for i in range(8)]}
    rows |= {"chosen": [" " + words(i + 1) for i in range(8)], "rejected": [" " + words(i + 5) for i in range(8)]}
    rows = datasets.Dataset.from_dict(rows)
    return DPOTrainer(
        model, copy.deepcopy(build("llama")), DPOConfig(str(folder), **ARGUMENTS), train_dataset=rows,
        processing_class=tokenizer(),
    )  # fmt: skip


def grpo(model: Any, folder: Path) -> Any:
    from trl import GRPOConfig, GRPOTrainer

    def reward(completions: list[str], **_: Any) -> list[float]:
        return [float(len(set(text.split()))) + 0.1 * i for i, text in enumerate(completions)]

    rows = datasets.Dataset.from_dict({"prompt": [words(i) for i in range(8)]})
    sizes = {"num_generations": 2, "max_completion_length": 4, "per_device_train_batch_size": 4}
    arguments = GRPOConfig(str(folder), **ARGUMENTS, **sizes)
    return GRPOTrainer(model, reward, args=arguments, train_dataset=rows, processing_class=tokenizer())


TRAINERS: list[Callable[[Any, Path], Any]] = [sft, dpo, grpo]
WHERE: dict[str, dict[str, Any]] = {
    "adapter": {"target_modules": ["q_proj", "lm_head"]},
    "trained copy": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("fields", WHERE.values(), ids=WHERE.keys())
@pytest.mark.parametrize("make", TRAINERS)
def test_what_is_at_the_output_layer_trains(make: Callable[..., Any], fields: dict[str, Any], tmp_path: Path) -> None:
    model: Any = build("llama")
    adapters = ak.attach(model)
    adapters.add("t", LoraConfig(r=2, **fields))
    before = {name: p.detach().clone() for name, p in adapters.named_parameters("t")}
    base = model.lm_head.weight.detach().clone()
    trainer = make(model, tmp_path)
    trainer.train()
    moved = {name for name, p in adapters.named_parameters("t") if not torch.equal(p, before[name])}
    assert moved == set(before)
    assert torch.equal(model.lm_head.weight, base)
    model.eval()
    rows = torch.arange(4, 16).view(2, 6)
    with torch.no_grad():
        fused = model(input_ids=rows, labels=rows, fused_lm_head=True).log_probs
        logits = model(input_ids=rows).logits
    plain = logits[:, :-1].log_softmax(-1).gather(-1, rows[:, 1:, None]).squeeze(-1)
    temperature = getattr(trainer, "temperature", 1.0)
    assert temperature == 1.0
    torch.testing.assert_close(fused, plain, atol=1e-5, rtol=1e-4)
    assert not any(row.notes for row in adapters.status().rows)
