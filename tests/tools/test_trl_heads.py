"""TRL's losses multiply by `lm_head.weight` and never call `lm_head`: an adapter or a trained copy there trains."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.models import build

import adapterkit as ak
from adapterkit_lora import LoraConfig

from .words import datasets, sentence, texts, tokenizer

pytest.importorskip("trl")

ARGUMENTS = {"max_steps": 2, "report_to": "none", "use_cpu": True, "bf16": False, "save_strategy": "no"}
ARGUMENTS |= {"learning_rate": 0.05, "disable_tqdm": True, "logging_steps": 1}


def sft(model: Any, folder: Path) -> Any:
    from trl import SFTConfig, SFTTrainer

    return SFTTrainer(model, SFTConfig(str(folder), **ARGUMENTS), train_dataset=texts(8), processing_class=words())


def dpo(model: Any, folder: Path) -> Any:
    from trl import DPOConfig, DPOTrainer

    rows = {"prompt": PROMPTS}
    rows |= {key: [" " + sentence(i + n, count=4) for i in range(8)] for key, n in (("chosen", 1), ("rejected", 5))}
    arguments, data = DPOConfig(str(folder), **ARGUMENTS), datasets.Dataset.from_dict(rows)
    return DPOTrainer(model, build("llama"), arguments, train_dataset=data, processing_class=words())


def grpo(model: Any, folder: Path) -> Any:
    from trl import GRPOConfig, GRPOTrainer

    def reward(completions: list[str], **_: Any) -> list[float]:
        return [float(len(set(text.split()))) + 0.1 * i for i, text in enumerate(completions)]

    sizes = {"num_generations": 2, "max_completion_length": 4, "per_device_train_batch_size": 4}
    arguments, data = GRPOConfig(str(folder), **ARGUMENTS, **sizes), datasets.Dataset.from_dict({"prompt": PROMPTS})
    return GRPOTrainer(model, reward, args=arguments, train_dataset=data, processing_class=words())


PROMPTS = [sentence(i, count=4) for i in range(8)]
words = partial(tokenizer, padding_side="left", model_max_length=None)
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
