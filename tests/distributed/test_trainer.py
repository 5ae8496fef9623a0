"""A plain `Trainer` on two processes, and `save_pretrained` of a sharded model."""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from tests.core import test_trainer_mixin
from tests.core.test_trainer import adapted, trainer, values
from tests.distributed.conftest import on_two_processes
from tests.models import build, run

import adapterkit as ak
from adapterkit_lora import LoraConfig

CONFIG = LoraConfig(r=2, target_modules=["query", "value"], bias="all")


def scenario(folder: Path) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    rank = dist.get_rank()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511", "ACCELERATE_USE_CPU": "true"}
    model, _ = adapted(CONFIG)
    run_ = trainer(model, folder / "out", ddp_backend="gloo")
    run_.train()
    assert type(run_.model_wrapped).__name__ == "DistributedDataParallel"
    expected = values(model)
    again, _ = adapted(CONFIG)
    trainer(again, folder / "out", ddp_backend="gloo").train(resume_from_checkpoint=str(folder / "out/checkpoint-1"))
    everywhere: list[dict[str, torch.Tensor]] = [{}, {}]
    dist.all_gather_object(everywhere, expected)
    for other in (everywhere[1 - rank], values(again)):
        torch.testing.assert_close(other, expected, rtol=1e-4, atol=1e-4)
    saved = load_file(folder / "out" / "checkpoint-2" / "model.safetensors")
    del saved["adapterkit.setting"]
    assert saved.keys() == expected.keys() - build("bert").state_dict().keys()
    assert all(torch.equal(everywhere[0][key], value) for key, value in saved.items())

    with_mixin, adapters = adapted(CONFIG)
    mixed = test_trainer_mixin.trainer(with_mixin, folder / "mixin", ddp_backend="gloo")
    mixed.train()
    if rank == 0:
        torch.save(adapters.training_state("t"), folder / "state.pt")

    sharded, adapters = adapted(CONFIG)
    output = run(sharded, "bert")
    mesh = init_device_mesh("cpu", (2,))
    for module in (*sharded.bert.encoder.layer, sharded):
        fully_shard(module, mesh=mesh)
    sharded.save_pretrained(folder / f"sharded{rank}")
    sharded.save_pretrained(folder / f"checkpoint{rank}", state_dict=None, is_main_process=rank == 0)
    adapters.activate("t", trainable=False)
    dist.barrier()
    assert not (folder / "sharded1").exists()  # the first process writes, and whole adapters
    assert not (folder / "checkpoint1").exists()
    fresh = build("bert")
    assert ak.attach(fresh).load(folder / "sharded0", "t").ok
    torch.testing.assert_close(run(fresh, "bert"), output)
    shapes = {key: value.shape for key, value in load_file(folder / "checkpoint0" / "model.safetensors").items()}
    assert shapes.pop("adapterkit.setting")
    assert shapes
    assert shapes == {key: expected[key].shape for key in shapes}


def test_trainers_agree_resume_and_write_whole_adapters_once(tmp_path: Path) -> None:
    on_two_processes(scenario, tmp_path)
    # A checkpoint of two processes resumes in one; without a learning rate it stays as it was.
    model, adapters = adapted(CONFIG)
    options = {"max_steps": 3, "learning_rate": 0.0, "save_strategy": "no"}
    run_ = test_trainer_mixin.trainer(model, tmp_path / "mixin", **options)
    run_.train(resume_from_checkpoint=str(tmp_path / "mixin" / "checkpoint-2"))
    expected = torch.load(tmp_path / "state.pt")
    found = adapters.training_state("t")
    assert found.pop("steps") == 3
    assert expected.pop("steps") == 2
    torch.testing.assert_close(found, expected)
