"""torch.distributed.checkpoint with adapters: saved by two processes and restored by one, and the other way round."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tests.distributed.conftest import InTurn, on_two_processes, refused
from tests.models import build, inputs
from torch import Tensor, nn

import adapterkit as ak
from adapterkit_lora import LoraConfig
from adapterkit_vera import VeraConfig

CONFIGS = {
    "pissa": LoraConfig(r=3, target_modules=["0", "1"], modules_to_save=["head"], init_lora_weights="pissa"),
    "vera": VeraConfig(r=2, target_modules=["overhead"], save_projection=False),
}


class Training:
    """A model with two adapters and their optimizer, shared between two processes or in one."""

    def __init__(self, seed: int, *, sharded: bool) -> None:
        self.model, self.sharded = build("embednet"), sharded
        self.adapters = ak.attach(self.model)
        torch.manual_seed(seed)
        for name, config in CONFIGS.items():
            self.adapters.add(name, config)
        self.adapters.activate(*CONFIGS)
        if sharded:
            shard(self.model)
        self.optimizer = torch.optim.AdamW([p for name in CONFIGS for p in self.adapters.parameters(name)], 1e-2)

    def step(self) -> None:
        """Each process has one of two rows, or the only one has both."""
        x = inputs("embednet")["x"]
        self.model(x[dist.get_rank() :][:1] if self.sharded else x).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.adapters.step()

    def values(self) -> dict[str, Tensor]:
        return {f"{n} {k}": t.clone() for n in CONFIGS for k, t in self.adapters.training_state(n).items()}

    def save(self, folder: Path) -> None:
        import torch.distributed.checkpoint as dcp

        dcp.save(self._state(), checkpoint_id=folder, no_dist=not self.sharded)

    def load(self, folder: Path) -> None:
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict

        state = self._state()
        dcp.load(state, checkpoint_id=folder, no_dist=not self.sharded)
        set_optimizer_state_dict(self.model, self.optimizer, state["optimizer"])

    def _state(self) -> dict[str, Any]:
        from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

        from adapterkit.integrations.distributed import TrainingState

        optimizer = get_optimizer_state_dict(self.model, self.optimizer)
        return {"adapters": TrainingState(self.model), "optimizer": optimizer}


def shard(model: nn.Module) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    layers: Any = model.layers
    for module in (*layers, model):
        fully_shard(module, mesh=init_device_mesh("cpu", (2,)))


def close(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def by_torch(folder: Path) -> None:
    from torch.distributed.checkpoint import FileSystemReader

    from adapterkit.integrations.distributed import TrainingState

    two = Training(1, sharded=True)
    two.step()
    two.save(folder / "two")
    saved = two.values()
    keys = FileSystemReader(folder / "two").read_metadata().state_dict_metadata
    held = {key.removeprefix("adapters.").replace(".", " ", 1) for key in keys if not key.startswith("optimizer.")}
    made = {key for key in saved if "vera_A" in key or "vera_B" in key}  # by the config
    assert held == {"setting", "vera made_again", *saved.keys() - made}  # nothing of the base
    two.step()
    after = two.values()
    again = Training(2, sharded=True)
    again.load(folder / "two")
    assert all(torch.equal(value, saved[key]) for key, value in again.values().items())
    again.step()
    close(again.values(), after)
    if dist.get_rank() == 0:
        one = Training(3, sharded=False)
        one.load(folder / "two")
        assert all(torch.equal(value, saved[key]) for key, value in one.values().items())
        one.step()
        close(one.values(), after)
        one.save(folder / "one")
    dist.barrier()
    again.step()
    two.step()
    two.load(folder / "one")
    close(two.values(), after)
    two.step()
    close(two.values(), again.values())

    state = TrainingState(two.model).state_dict()
    ak.attach(two.model).activate("vera")
    refused(lambda: TrainingState(two.model).load_state_dict(state), "'pissa'", "'vera'", error=ak.CheckpointError)
    refused(lambda: TrainingState(build("embednet")), "no adapters", error=ak.ConfigError)
    ak.attach(two.model).activate(*CONFIGS)
    state["vera.steps"] = state["vera.steps"].float()
    before = two.values()
    loading = TrainingState(two.model, "pissa", "vera").load_state_dict
    state |= {key: value * 2 for key, value in state.items() if key.startswith("pissa") and value.is_floating_point()}
    refused(lambda: loading(state), "number of steps", error=ak.CheckpointError)
    assert all(torch.equal(value, before[key]) for key, value in two.values().items())


def whole_models(folder: Path) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict

    model, options = Training(1, sharded=True).model, StateDictOptions(full_state_dict=True)
    saved = get_model_state_dict(model, options=options)
    dcp.save(get_model_state_dict(model), checkpoint_id=folder / "model")
    again = Training(2, sharded=True)
    for strength, refuses in ((1.0, False), (0.5, True)):
        again.adapters.activate(*CONFIGS, strengths={"vera": strength})
        state = get_model_state_dict(again.model)
        dcp.load(state, checkpoint_id=folder / "model")
        for load in (
            lambda state=state: set_model_state_dict(again.model, state),
            lambda: set_model_state_dict(again.model, dict(saved), options=options),
        ):
            if refuses:
                refused(load, "'vera' (strength 0.5)", error=ak.CheckpointError)
            else:
                load()
                best = copy.deepcopy(again.model.state_dict())
    again.model.load_state_dict(best)  # its own


def with_accelerate(folder: Path) -> None:
    from accelerate import Accelerator

    from adapterkit.integrations.accelerate import save_adapters_alone

    rank = dist.get_rank()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29512", "ACCELERATE_USE_CPU": "true"}
    accelerator = Accelerator(cpu=True)
    save_adapters_alone(accelerator)
    training = Training(1, sharded=False)
    training.sharded = True  # each process has rows of its own
    training.model, training.optimizer = accelerator.prepare(training.model, training.optimizer)
    assert type(training.model).__name__ == "DistributedDataParallel"
    training.step()
    accelerator.save_state(str(folder / "state"))
    accelerator.wait_for_everyone()
    saved = training.values()
    assert not [*(folder / "state").glob("*.safetensors")]  # nothing of the base
    training.step()
    after = training.values()
    accelerator.load_state(str(folder / "state"))
    assert all(torch.equal(value, saved[key]) for key, value in training.values().items())
    training.step()
    close(training.values(), after)


def test_a_training_goes_on_in_another_number_of_processes_and_with_accelerate(tmp_path: Path) -> None:
    on_two_processes(InTurn(by_torch, whole_models, with_accelerate), tmp_path)
