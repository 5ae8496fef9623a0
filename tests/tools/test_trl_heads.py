"""TRL's losses multiply by `lm_head.weight` and never call `lm_head`: an adapter or a trained copy there trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.models import build

import adapterkit as ak
from adapterkit_lora import LoraConfig

from .test_as_peft import dpo, grpo, sft

OPTIONS = {"max_steps": 2, "save_strategy": "no", "learning_rate": 0.05, "weight_decay": 0.0}
TRAINERS = {
    "sft": lambda model, folder: sft(model, folder, **OPTIONS),
    "dpo": lambda model, folder: dpo(model, folder, reference=build("llama"), **OPTIONS),
    "grpo": lambda model, folder: grpo(model, folder, beta=0.0, **OPTIONS),
}
WHERE: dict[str, dict[str, Any]] = {
    "adapter": {"target_modules": ["q_proj", "lm_head"]},
    "trained copy": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("fields", WHERE.values(), ids=WHERE.keys())
@pytest.mark.parametrize("make", TRAINERS.values(), ids=TRAINERS)
def test_what_is_at_the_output_layer_trains(make: Any, fields: dict[str, Any], tmp_path: Path) -> None:
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
