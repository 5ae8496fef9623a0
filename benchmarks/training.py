"""What do training and generation cost, with all that a whole language model does beside its adapted layers?

A Llama with SmolLM2-135M's sizes and random weights, LoRA of rank 16 or another method on each of its linear layers. A
training step is a forward, a backward and a step of AdamW, on 4 rows of 128 tokens. `base` has no adapters, so it has
no training step. `hand` adds two products to each layer and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from tempfile import TemporaryDirectory
from typing import Any

import peft
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adapterkit as ak
from benchmarks.check import same, within
from benchmarks.memory import PEAK
from benchmarks.models import NAMES
from benchmarks.runner import Case, Goal, Run, repeated

TARGETS = [f"{name}_proj" for name in NAMES]
SMOLLM2 = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
CONFIGS = {
    "LoRA": ak.config("lora", r=16, lora_alpha=16, target_modules=TARGETS),
    "LoHa": ak.config("loha", r=8, alpha=8, target_modules=TARGETS),
    "VeRA": ak.config("vera", r=256, target_modules=["q_proj", "o_proj"]),
}


def cases(tiny: bool) -> Iterator[Case]:
    """Steps of training in time and memory for each method, and generation."""
    shape = (2, 8) if tiny else (4, 128)
    for method, config in CONFIGS.items():
        models = adapted(decoder(tiny, layers=6), config)
        step = f"training step of {method}, 6 layers, {shape[0]} x {shape[1]} tokens"
        steps = {way: repeated(training(model, shape)) for way, model in models.items()}
        goals = (Goal(1.05, beside="peft"),)
        yield Case(step, steps, goals, within(1e-3, 1e-4), rounds=5, warm_up=False, seconds=30.0)
        yield Case(f"{step}: memory at its highest", steps, goals, within(1e-3, 1e-3), PEAK, rounds=1, warm_up=False)
    base = decoder(tiny, layers=30)
    models = {"hand": by_hand(base), **adapted(base, CONFIGS["LoRA"]), "base": base}
    with_values(models)
    runs = {way: repeated(generation(model, 4 if tiny else 24)) for way, model in models.items()}
    goal = (Goal(1.05, beside="base"),)
    yield Case("generation of 24 tokens, LoRA, 30 layers, one row", runs, goal, adapted_same, rounds=7, seconds=60.0)


def decoder(tiny: bool, layers: int) -> nn.Module:
    """The language model, with the same values each time."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {**SMOLLM2, "vocab_size": 49152, "num_hidden_layers": layers}
    if tiny:
        sizes |= {"hidden_size": 18, "intermediate_size": 24, "vocab_size": 64, "num_hidden_layers": 1}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True)).eval().requires_grad_(False)


def twin(base: nn.Module) -> Any:
    """Another model on the same weights."""
    with torch.device("meta"):
        model = type(base)(base.config)
    model.load_state_dict(base.state_dict(), assign=True)
    model.model.rotary_emb = base.model.rotary_emb
    model.tie_weights()
    return model.eval().requires_grad_(False)


def adapted(base: nn.Module, config: ak.AdapterConfig) -> dict[str, Any]:
    """The same adapter in each library."""
    ours = twin(base)
    adapters = ak.attach(ours)
    torch.manual_seed(1)
    adapters.add("a", config)
    with TemporaryDirectory() as folder:
        adapters.save("a", folder)
        theirs = peft.PeftModel.from_pretrained(twin(base), folder, adapter_name="a", is_trainable=True)
    return {"adapterkit": ours, "peft": theirs.eval()}


def training(model: nn.Module, shape: tuple[int, int]) -> Run:
    """A step, which returns its loss."""
    ids = torch.arange(shape[0] * shape[1]).view(shape) % 61
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step() -> Tensor:
        loss: Tensor = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def generation(model: Any, count: int) -> Run:
    """Greedy, which returns the tokens."""
    prompt = torch.arange(8)[None]
    options = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 0}

    @torch.no_grad()
    def run() -> Tensor:
        found: Tensor = model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **options)
        return found

    return run


class HandLinear(nn.Linear):
    """`x W^T + x A^T B^T`."""

    def forward(self, x: Tensor) -> Tensor:
        """Three products and a sum."""
        return torch.add(F.linear(x, self.weight), F.linear(F.linear(x, self.lora_A), self.lora_B))


def by_hand(base: nn.Module) -> Any:
    """LoRA on each layer with nothing but its arithmetic."""
    model = twin(base)
    for path, layer in list(model.named_modules()):
        if path.rpartition(".")[2] in TARGETS:
            layer.__class__ = HandLinear
            layer.lora_A = nn.Parameter(torch.empty(16, layer.in_features))
            layer.lora_B = nn.Parameter(torch.empty(layer.out_features, 16))
    return model


@torch.no_grad()
def with_values(models: dict[str, Any]) -> None:
    """Give the adapters of all ways the same random values, small enough for all to choose the same tokens."""
    for model in models.values():
        generator = torch.Generator().manual_seed(2)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.01)


def adapted_same(results: dict[str, Any]) -> None:
    """All ways but `base`, which has no adapter, choose the same tokens."""
    same({name: result for name, result in results.items() if name != "base"})
