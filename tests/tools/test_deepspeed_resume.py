"""DeepSpeed trainings with ZeRO-2 and ZeRO-3 that other processes resume: by hand, with accelerate and Trainer."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from tests.distributed.conftest import on_two_processes
from tests.models import build, inputs
from torch import Tensor

import adapterkit as ak
from adapterkit_lora import LoraConfig
from adapterkit_vera import VeraConfig

pytest.importorskip("deepspeed")

CONFIGS = {
    "pissa": LoraConfig(r=2, target_modules=["query", "value"], init_lora_weights="pissa"),
    "vera": VeraConfig(r=2, target_modules=["query"], save_projection=False),
}
State = dict[str, Tensor]


def adapted(seed: int) -> tuple[Any, ak.Adapters]:
    """The same base each time, and adapters that depend on the seed."""
    model = build("bert")
    adapters = ak.attach(model)
    torch.manual_seed(seed)
    for name, config in CONFIGS.items():
        adapters.add(name, config.replace(modules_to_save=None))
    adapters.activate(*CONFIGS)
    return model, adapters


def values(adapters: ak.Adapters) -> State:
    return {f"{n} {k}": t.clone() for n in CONFIGS for k, t in adapters.training_state(n).items()}


def optimizer_of(adapters: ak.Adapters) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for name in CONFIGS for p in adapters.parameters(name)], 1e-2)


def batch() -> dict[str, Tensor]:
    """The row of this process."""
    rank = dist.get_rank()
    return {"input_ids": inputs("bert")["input_ids"][rank : rank + 1], "labels": torch.tensor([rank])}


def config_of(stage: int) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
    }


def by_hand(folder: Path, stage: int, *, resumed: bool) -> list[State]:
    """The states after the first step, or as it was restored, and after the second."""
    import deepspeed

    model, adapters = adapted(seed=int(resumed))
    engine: Any = deepspeed.initialize(model=model, optimizer=optimizer_of(adapters), config=config_of(stage))[0]

    def step() -> State:
        engine.backward(engine(**batch()).loss)
        engine.step()
        return values(adapters)

    if resumed:
        engine.load_checkpoint(str(folder), load_module_strict=False)
    else:
        step()
        engine.save_checkpoint(str(folder), exclude_frozen_parameters=True)
    return [values(adapters), step()]


def by_accelerate(folder: Path, stage: int, *, resumed: bool) -> list[State]:
    from accelerate import Accelerator, DeepSpeedPlugin
    from accelerate.state import AcceleratorState

    from adapterkit.integrations.accelerate import save_adapters_alone

    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config_of(stage)))
    save_adapters_alone(accelerator)
    model, adapters = adapted(seed=int(resumed))
    engine, optimizer = accelerator.prepare(model, optimizer_of(adapters))

    def step() -> State:
        accelerator.backward(engine(**batch()).loss)
        optimizer.step()
        optimizer.zero_grad()
        return values(adapters)

    if resumed:
        accelerator.load_state(str(folder), load_module_strict=False)
    else:
        step()
        accelerator.save_state(str(folder), exclude_frozen_parameters=True)
    return [values(adapters), step()]


def by_trainer(folder: Path, stage: int, *, resumed: bool) -> list[State]:
    """The state at the end of two steps."""
    from accelerate.state import AcceleratorState
    from transformers import Trainer, TrainingArguments

    from adapterkit.integrations.transformers import AdapterTrainerMixin

    class AdapterTrainer(AdapterTrainerMixin, Trainer): ...

    AcceleratorState._reset_state(reset_partial_state=True)
    arguments = TrainingArguments(
        str(folder),
        max_steps=2,
        save_steps=1,
        learning_rate=1e-2,
        report_to="none",
        disable_tqdm=True,
        per_device_train_batch_size=1,
        deepspeed=config_of(stage),
    )
    model, adapters = adapted(seed=int(resumed))
    rows = [{"input_ids": inputs("bert")["input_ids"][i % 2], "labels": torch.tensor(i % 2)} for i in range(4)]
    trainer = AdapterTrainer(model, arguments, train_dataset=rows)  # type: ignore[arg-type]
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-1") if resumed else None)
    return [values(adapters)]


Way = Callable[..., list[State]]
WAYS: tuple[Way, ...] = (by_hand, by_accelerate, by_trainer)


def scenario(folder: Path, *, resumed: bool) -> None:
    rank = str(dist.get_rank())
    os.environ.update(DS_ACCELERATOR="cpu", RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29513", ACCELERATE_USE_DEEPSPEED="true")
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled
    deepspeed.init_distributed("gloo", dist_init_required=False)
    found = {}
    for way in WAYS:
        for stage in (2, 3):
            found[f"{way.__name__} {stage}"] = way(folder / f"{way.__name__}{stage}", stage, resumed=resumed)
    torch.save(found, folder / f"{'resumed' if resumed else 'first'}{rank}.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With what two trainings found: one that was saved and went on, and one of new processes that resumed it."""
    folder = tmp_path_factory.mktemp("resumed")
    for resumed in (False, True):
        on_two_processes(partial(scenario, resumed=resumed), folder)
        (folder / "store").unlink(missing_ok=True)
    return folder


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_a_resumed_training_equals_an_uninterrupted_one(folder: Path, way: Way, stage: int) -> None:
    for rank in range(2):
        first, resumed = (
            torch.load(folder / f"{run}{rank}.pt")[f"{way.__name__} {stage}"] for run in ("first", "resumed")
        )
        if len(first) == 2:
            assert all(torch.equal(resumed[0][key], value) for key, value in first[0].items())
        torch.testing.assert_close(resumed[-1], first[-1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("place", ["by_accelerate{}/adapters", "by_trainer{}/checkpoint-2"])
def test_a_checkpoint_has_whole_adapters_in_files_of_their_own(folder: Path, place: str, stage: int) -> None:
    _, adapters = adapted(seed=0)
    for name in CONFIGS:
        saved = load_file(folder / place.format(stage) / name / "adapter_model.safetensors")
        assert {k: v.shape for k, v in saved.items()} == {k: v.shape for k, v in adapters.state_dict(name).items()}
