"""mlx-lm trains adapters that load here, and loads those that are written for it: the same outputs in both."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers
import numpy as np
import pytest
import torch
from mlx_lm.tuner.datasets import CacheDataset
from mlx_lm.tuner.trainer import TrainingArgs, train
from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters
from mlx_lm.utils import load_model, save_config
from tests.formats.dora import dora
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import adapterkit as ak

mx.disable_compile()  # with a compiler each kernel takes seconds
TOKENS = list(range(3, 19))
KEYS = ["self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A tiny Llama in Hugging Face's folder, which both read."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def of_mlx(model: Any) -> Tensor:
    return torch.from_numpy(np.array(model(mx.array([TOKENS])).astype(mx.float32)))


def of_torch(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(torch.tensor([TOKENS])).logits
    return found


class Rows:
    """What mlx-lm's trainer takes: tokens, and where the answer begins."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> list[int]:
        return [(token * (index + 1)) % 29 + 3 for token in TOKENS]

    def process(self, row: list[int]) -> tuple[list[int], int]:
        return row, 0


def trained(base: Path, place: Path, kind: str) -> Tensor:
    """Train with mlx-lm as its command does, and what the model computes then."""
    place.mkdir()
    model, _ = load_model(base)
    model.freeze()
    parameters = {"rank": 4, "scale": 5.0, "dropout": 0.0, "keys": KEYS}
    mx.random.seed(1)
    linear_to_lora_layers(model, 2, parameters, use_dora=kind == "dora")
    config = {"fine_tune_type": kind, "num_layers": 2, "lora_parameters": parameters, "model": str(base)}
    save_config(config, place / "adapter_config.json")
    file = str(place / "adapters.safetensors")
    arguments = TrainingArgs(
        batch_size=2, iters=6, val_batches=0, max_seq_length=32, adapter_file=file, steps_per_save=6
    )
    rows = CacheDataset(Rows())
    train(model, mlx.optimizers.Adam(learning_rate=0.05), rows, rows, arguments)
    model.eval()
    return of_mlx(model)


@pytest.fixture(autouse=True)
def with_dora() -> Iterator[None]:
    with dora():
        yield


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_what_mlx_lm_trained_computes_the_same_here(kind: str, base: Path, tmp_path: Path) -> None:
    expected = trained(base, tmp_path / "a", kind)
    model = LlamaForCausalLM.from_pretrained(base)
    before = of_torch(model)
    assert (expected - before).abs().max() > 0.1
    assert ak.attach(model).load(tmp_path / "a", "x") == ak.LoadReport()
    torch.testing.assert_close(of_torch(model), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_mlx_lm_computes_the_same_with_what_is_written_for_it(kind: str, base: Path, tmp_path: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(base).eval()
    adapters = ak.attach(model)
    ranks = {"v_proj": 3} if kind == "lora" else {}
    adapters.add(
        "a", ak.config(kind, r=2, lora_alpha=6, rank_pattern=ranks, target_modules=["q_proj", "v_proj", "up_proj"])
    )
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in adapters.parameters("a"):
            parameter.add_(torch.randn(parameter.shape) * 0.3)
    expected = of_torch(model)
    adapters.save("a", tmp_path / "a")
    ak.convert_file(tmp_path / "a", tmp_path / "mlx", to=kind, naming="mlx", base=base)
    assert json.loads((tmp_path / "mlx" / "adapter_config.json").read_text())["num_layers"] == 3
    theirs, _ = load_model(base)
    found = of_mlx(load_adapters(theirs, str(tmp_path / "mlx")))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
