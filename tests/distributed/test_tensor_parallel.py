"""Adapters on a Llama whose layers tensor parallelism splits between two processes."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tests.distributed.conftest import InTurn, assert_alike, copies, on_two_processes, refused
from torch import Tensor

import adapterkit as ak
from adapterkit_loha import LoHaConfig
from adapterkit_lora import LoraConfig
from adapterkit_vera import VeraConfig

# All of them act and train together.
CONFIGS: dict[str, ak.AdapterConfig] = {
    "lora": LoraConfig(r=2, target_modules=".*(proj|embed_tokens|lm_head)", bias="all"),
    "pissa": LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights="pissa"),
    "loha": LoHaConfig(r=2, target_modules="all-linear"),
    "vera": VeraConfig(r=2, target_modules=["q_proj", "o_proj"]),
}
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
WORDS = torch.arange(1, 13).view(2, 6)


def llama(width: int = 24) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, vocab_size=32, attention_bias=True, intermediate_size=width)
    return LlamaForCausalLM(config).eval()


def by_transformers(folder: Path, width: int = 24) -> Any:
    """Loaded with `tp_plan="auto"`, whose styles give the layers local tensors."""
    from transformers import AutoModelForCausalLM

    rank = dist.get_rank()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    if rank == 0:
        llama(width).save_pretrained(folder / "base")
    dist.barrier()
    warnings.simplefilter("ignore", FutureWarning)  # newer releases of transformers have another way to write it
    return AutoModelForCausalLM.from_pretrained(folder / "base", tp_plan="auto").eval()


def by_torch() -> Any:
    """Split by `parallelize_module`, whose styles give the layers `DTensor`s."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    columns = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
    plan: Any = {f"model.layers.*.{name}": ColwiseParallel() for name in columns}
    plan |= {f"model.layers.*.{name}": RowwiseParallel() for name in ("self_attn.o_proj", "mlp.down_proj")}
    return parallelize_module(llama(), init_device_mesh("cpu", (2,)), plan)


def adapted(model: Any, seed: int) -> ak.Adapters:
    torch.manual_seed(seed)
    adapters = ak.attach(model)
    for name, config in CONFIGS.items():
        adapters.add(name, config)
    adapters.activate(*CONFIGS)
    return adapters


def gradients(adapters: ak.Adapters) -> dict[str, Tensor]:
    """Those of a step, which is made."""
    named = {f"{name} {key}": p for name in CONFIGS for key, p in adapters.named_parameters(name)}
    optimizer, model = torch.optim.AdamW(named.values(), 1e-2), adapters.model
    model(input_ids=WORDS, labels=WORDS).loss.backward()
    found = {key: p.grad.clone() for key, p in named.items() if p.grad is not None}
    assert found.keys() == named.keys()
    optimizer.step()
    return found


def close(given: Any, expected: Any) -> None:
    torch.testing.assert_close(given, expected, atol=1e-5, rtol=1e-4)


def compare(folder: Path, split: Any, whole: Any) -> None:
    """The split model acts, trains and saves as the whole one."""
    assert split.model.layers[0].mlp.up_proj.weight.to_local().shape[0] < whole.model.layers[0].mlp.up_proj.out_features
    one, other = adapted(whole, seed=1), adapted(split, seed=dist.get_rank())
    generator = torch.Generator().manual_seed(2)
    for name in CONFIGS:
        assert_alike(copies(other.state_dict(name)))  # whatever each process's random state is
        values = {k: t + 0.1 * torch.randn(t.shape, generator=generator) for k, t in one.state_dict(name).items()}
        for adapters in (one, other):
            adapters.load_state_dict(name, values)
    with torch.no_grad():
        close(split(WORDS).logits, whole(WORDS).logits)
    close(gradients(other), gradients(one))
    close(split(WORDS).logits, whole(WORDS).logits)
    other.activate("lora")
    other.save("lora", folder / str(dist.get_rank()))
    again = llama(whole.config.intermediate_size)
    assert ak.attach(again).load(folder / str(dist.get_rank()), "a").ok
    close(again(WORDS).logits, split(WORDS).logits)
    with one.disabled(), other.disabled():
        close(split(WORDS).logits, whole(WORDS).logits)


def transformers_splits(folder: Path) -> None:
    width = 25  # transformers can split this between two processes, torch's styles cannot
    compare(folder, by_transformers(folder, width), llama(width))


def torch_splits(folder: Path) -> None:
    compare(folder, by_torch(), llama())


@dataclass(frozen=True)
class DoublingConfig(ak.AdapterConfig):
    method = "doubling"


class DoublingLayer(ak.AdapterLayer):
    """Multiplies the weight."""

    def setup(self, target: ak.Target, config: DoublingConfig) -> None:
        self.doubling = target.new(1, init=2.0)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight * self.doubling, bias


def what_cannot_follow_is_refused(folder: Path) -> None:
    ak.register(ak.plugin(DoublingConfig, DoublingLayer, prefix="doubling"))
    for model in (by_transformers(folder), by_torch()):
        refuses(model, ak.attach(model))


def refuses(model: Any, adapters: ak.Adapters) -> None:
    for config, words in (
        (LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["o_proj"]), "no copy of it"),
        (DoublingConfig(target_modules=["q_proj"]), "'doubling' computes the output"),
    ):
        refused(partial(adapters.add, "a", config), "_proj'", words, error=ak.UnsupportedError)
    assert adapters.names == ()
    adapters.add("a", LoraConfig(r=2, target_modules=["q_proj"]))
    refused(lambda: adapters.merge("a"), "sharded", error=ak.UnsupportedError)
    with adapters.per_sample(["a", None]):
        refused(lambda: model(WORDS), "one adapter at a time", error=ak.UnsupportedError)


def test_adapters_act_train_and_are_saved_on_a_split_model(tmp_path: Path) -> None:
    on_two_processes(InTurn(transformers_splits, torch_splits, what_cannot_follow_is_refused), tmp_path)
