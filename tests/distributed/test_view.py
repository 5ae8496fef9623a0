"""`ak.as_peft(model)` on two processes, as TRL's trainers use it under DDP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tests.distributed.conftest import on_two_processes, refused
from tests.models import MODELS, build
from torch.nn.parallel import DistributedDataParallel

import adapterkit as ak
from adapterkit_lora import LoraConfig


def a_reference_adapter_acts_in_turn_with_the_one_that_trains(folder: Path) -> None:
    model = build("llama")
    adapters = ak.attach(model)
    adapters.add("default", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    view: Any = ak.as_peft(model)
    view.add_adapter("ref", view.peft_config["default"])
    wrapped = DistributedDataParallel(view)
    rows = {name: tensor + dist.get_rank() for name, tensor in MODELS["llama"].inputs().items()}
    expected = [parameter.detach().clone() for parameter in adapters.parameters("ref")]
    optimizer = torch.optim.SGD(adapters.parameters("default"), lr=0.1)
    for _ in range(2):
        with torch.no_grad():
            view.set_adapter("ref")
            reference = view(**rows).logits
            view.set_adapter("default")
        assert adapters.trainable == ("default",)
        (wrapped(**rows).logits - reference + 1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    for parameter in adapters.parameters("default"):
        others = [torch.empty_like(parameter) for _ in range(2)]
        dist.all_gather(others, parameter.detach())
        assert torch.equal(*others)
    assert all(torch.equal(p, q) for p, q in zip(adapters.parameters("ref"), expected, strict=True))
    refused(lambda: view.set_adapter("ref"), "'ref'", "DistributedDataParallel")


def test_a_reference_adapter_acts_under_ddp(tmp_path: Path) -> None:
    on_two_processes(a_reference_adapter_acts_in_turn_with_the_one_that_trains, tmp_path)
