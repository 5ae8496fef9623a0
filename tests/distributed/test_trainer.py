"""A plain `Trainer` on two processes, and `save_pretrained` of a sharded model."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from tests.core.test_trainer import adapted, trainer, values
from tests.distributed.conftest import Found, on_two_processes
from tests.models import build, run

import adapterkit as ak
from adapterkit_lora import LoraConfig

CONFIG = LoraConfig(r=2, target_modules=["query", "value"], bias="all")


def scenario(folder: Path) -> Found:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    rank = dist.get_rank()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511", "ACCELERATE_USE_CPU": "true"}
    found = Found()
    model, _ = adapted(CONFIG)
    run_ = trainer(model, folder / "out", ddp_backend="gloo")
    run_.train()
    found["wrapped"] = type(run_.model_wrapped).__name__
    found["expected"] = values(model)
    again, _ = adapted(CONFIG)
    trainer(again, folder / "out", ddp_backend="gloo").train(resume_from_checkpoint=str(folder / "out/checkpoint-2"))
    found["resumed"] = values(again)

    sharded, adapters = adapted(CONFIG)
    found["output"] = run(sharded, "bert")
    mesh = init_device_mesh("cpu", (2,))
    for module in (*sharded.bert.encoder.layer, sharded):
        fully_shard(module, mesh=mesh)
    sharded.save_pretrained(folder / f"sharded{rank}")
    sharded.save_pretrained(folder / f"checkpoint{rank}", state_dict=None, is_main_process=rank == 0)
    adapters.activate("t", trainable=False)
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Found, Found]:
    folder = tmp_path_factory.mktemp("trainer")
    return folder, *on_two_processes(scenario, folder)


Ran = tuple[Path, Found, Found]


def test_processes_agree_and_resume_as_if_never_stopped(found: Ran) -> None:
    _, one, other = found
    assert one["wrapped"] == "DistributedDataParallel"
    for key, value in one["expected"].items():
        torch.testing.assert_close(other["expected"][key], value, rtol=1e-4, atol=1e-4, msg=key)
        torch.testing.assert_close(one["resumed"][key], value, rtol=1e-4, atol=1e-4, msg=key)


def test_a_checkpoint_of_two_processes_holds_the_adapter(found: Ran) -> None:
    folder, one, _ = found
    saved = load_file(folder / "out" / "checkpoint-4" / "model.safetensors")
    assert saved.keys() == {key for key in one["expected"] if key not in build("bert").state_dict()}
    assert all(torch.equal(one["expected"][key], value) for key, value in saved.items())


def test_a_sharded_model_writes_whole_adapters_once(found: Ran) -> None:
    folder, one, _ = found
    assert not (folder / "sharded1").exists()
    assert not (folder / "checkpoint1").exists()
    fresh = build("bert")
    assert ak.attach(fresh).load(folder / "sharded0", "t").ok
    torch.testing.assert_close(run(fresh, "bert"), one["output"])
    shapes = {key: value.shape for key, value in load_file(folder / "checkpoint0" / "model.safetensors").items()}
    assert shapes == {key: one["expected"][key].shape for key in shapes}
    assert shapes
