"""Adapters of the real PEFT and of ours, as files, on the tiny models."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import peft
import torch
from tests.models import MODELS, build, run
from torch import Tensor, nn

import adapterkit as ak
from adapterkit_loha import LoHaConfig
from adapterkit_lora import LoraConfig
from adapterkit_vera import VeraConfig

CONFIGS: dict[str, tuple[type[ak.AdapterConfig], Any]] = {
    "lora": (LoraConfig, peft.LoraConfig),
    "loha": (LoHaConfig, peft.LoHaConfig),
    "vera": (VeraConfig, peft.VeraConfig),
}
# Layers that PEFT's class knows; for LoRA all that the tiny models have.
TARGETS: dict[str, dict[str, list[str]]] = {
    "lora": {name: list(tiny.targets) for name, tiny in MODELS.items()},
    "loha": {
        "bert": ["query", "value", "intermediate.dense"],
        "convnet": ["conv1d", "conv2d", "grouped", "dilated", "fc"],
        "llama": ["q_proj", "v_proj", "down_proj"],
        "vit": ["q_proj", "projection"],
    },
    "vera": {
        "bert": ["query", "value", "intermediate.dense"],
        "llama": ["q_proj", "v_proj", "down_proj"],
        "gpt2": ["c_attn", "mlp.c_proj"],
        "t5": ["q", "wo"],
    },
}


def fields_for(method: str, name: str, fields: dict[str, Any]) -> dict[str, Any]:
    return {"target_modules": TARGETS[method].get(name), **({"r": 6} if method == "vera" else {}), **fields}


def perturb(parameters: Iterable[nn.Parameter]) -> None:
    """As training would: every trained number moves."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.25 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))


def saved_by_peft(method: str, base: nn.Module, folder: Path, name: str, **fields: Any) -> Tensor:
    """Train a PEFT adapter on `base`, save it, and give its outputs."""
    torch.manual_seed(3)
    model = peft.get_peft_model(base, CONFIGS[method][1](**fields_for(method, name, fields))).eval()
    perturb(p for p in model.parameters() if p.requires_grad)
    model.save_pretrained(folder)
    return run(model, name)


def saved_by_us(method: str, base: nn.Module, folder: Path, name: str, **fields: Any) -> Tensor:
    torch.manual_seed(3)
    adapters = ak.attach(base)
    adapters.add("mine", CONFIGS[method][0](**{"modules_to_save": None, **fields_for(method, name, fields)}))
    perturb(adapters.parameters("mine"))
    adapters.save("mine", folder)
    return run(base, name)


def loaded_here(base: nn.Module, folder: Path, name: str) -> Tensor:
    assert ak.attach(base).load(folder, name="loaded").ok
    return run(base, name)


def loaded_in_peft(base: nn.Module, folder: Path, name: str) -> Tensor:
    return run(peft.PeftModel.from_pretrained(base, folder).eval(), name)


def assert_same(found: Tensor, expected: Tensor, base: Tensor | str) -> None:
    """The same outputs, and none of the bare model's."""
    bare = run(build(base), base) if isinstance(base, str) else base
    assert (expected - bare).abs().max() > 1e-3, "the adapter changes nothing, so the test shows nothing"
    # Starts from an SVD are the most sensitive: singular vectors turn by a rounding over the gap of their values.
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=3e-5)
