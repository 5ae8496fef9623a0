"""TRL's trainers on an adapted model, as they are and with the mixin: train, save, resume, compare."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from tests.core import test_trainer_mixin
from tests.models import build
from torch import Tensor

import adapterkit as ak
from adapterkit.integrations.transformers import AdapterTrainerMixin
from adapterkit_lora import LoraConfig
from adapterkit_vera import VeraConfig

from .words import datasets, sentence, texts, tokenizer

pytest.importorskip("trl")

LORA = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0.1)
OPTIONS = {
    "learning_rate": 1e-2,
    "max_steps": 4,
    "save_steps": 2,
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
}


def adapted(config: ak.AdapterConfig = LORA) -> tuple[Any, ak.Adapters]:
    model = build("llama")
    torch.manual_seed(3)
    adapters = ak.attach(model)
    adapters.add("t", config)
    return model, adapters


def sft(model: Any, folder: Path, cls: Any = None, **options: Any) -> Any:
    from trl import SFTConfig, SFTTrainer

    arguments = SFTConfig(str(folder), **{**OPTIONS, **options})
    data = {"train_dataset": texts(), "eval_dataset": texts(4), "processing_class": tokenizer()}
    return (cls or SFTTrainer)(model, arguments, **data)


def sft_with_mixin(model: Any, folder: Path, **options: Any) -> Any:
    from trl import SFTTrainer

    class AdapterSFTTrainer(AdapterTrainerMixin, SFTTrainer):
        pass

    return sft(model, folder, AdapterSFTTrainer, **options)


def dpo(model: Any, folder: Path, **options: Any) -> Any:
    from trl import DPOConfig, DPOTrainer

    rows = {
        "prompt": [sentence(i) for i in range(16)],
        "chosen": [sentence(i + 1) for i in range(16)],
        "rejected": [sentence(i, 5) for i in range(16)],
    }
    arguments = DPOConfig(str(folder), **{**OPTIONS, **options})
    data = datasets.Dataset.from_dict(rows)
    return DPOTrainer(model, build("llama"), arguments, train_dataset=data, processing_class=tokenizer())


def assert_equal(one: Any, other: Any) -> None:
    """Within what another alignment of memory may change; a step of training changes a hundred times that."""
    expected, found = values(one), values(other)
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-4, msg=key)


TRAINERS = pytest.mark.parametrize("trainer", [sft, sft_with_mixin, dpo])


def values(model: Any) -> dict[str, Tensor]:
    return {key: value.detach().clone() for key, value in model.state_dict().items()}


def changed(one: dict[str, Tensor], other: dict[str, Tensor]) -> set[str]:
    assert one.keys() == other.keys()
    return {key for key in one if not torch.equal(one[key], other[key])}


@TRAINERS
def test_the_adapter_alone_is_trained_and_saved(trainer: Any, tmp_path: Path) -> None:
    model, adapters = adapted()
    before = values(model)
    trainer(model, tmp_path).train()
    trained = changed(values(model), before)
    assert trained == {key for key in before if ".adapters.t." in key}
    saved = safetensors.torch.load_file(tmp_path / "checkpoint-4" / "adapter_model.safetensors")
    assert saved.keys() == adapters.state_dict("t").keys()
    assert all(torch.equal(saved[key], value) for key, value in adapters.state_dict("t").items())


@TRAINERS
@pytest.mark.parametrize("config", [LORA, VeraConfig(r=2, target_modules=["q_proj"])], ids=["lora", "vera"])
def test_a_resumed_training_equals_an_uninterrupted_one(config: ak.AdapterConfig, trainer: Any, tmp_path: Path) -> None:
    model, _ = adapted(config)
    trainer(model, tmp_path).train()
    again, _ = adapted(config)
    assert changed(values(again), values(model))
    trainer(again, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_equal(model, again)


def test_a_compiled_training_resumes(tmp_path: Path) -> None:
    options = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    model, again = (test_trainer_mixin.MODELS["PiSSA"]() for _ in range(2))
    test_trainer_mixin.trainer(model, tmp_path, **options).train()
    run = test_trainer_mixin.trainer(again, tmp_path, **options)
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert_equal(model, again)


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from tests.tools.test_trainer import adapted, sft_with_mixin
from transformers import TrainerCallback

torch.set_num_threads(1)

class Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        if state.global_step == 3:
            os.kill(os.getpid(), signal.SIGKILL)

run = sft_with_mixin(adapted()[0], Path(sys.argv[1]))
run.add_callback(Kill())
run.train()
"""


def test_a_training_that_was_killed_goes_on_as_if_it_was_not(tmp_path: Path) -> None:
    root = str(Path(__file__).parents[2])
    command = [sys.executable, "-c", KILLED, str(tmp_path / "killed")]
    killed = subprocess.run(command, cwd=root, capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    model, _ = adapted()
    sft_with_mixin(model, tmp_path / "whole").train()
    again, _ = adapted()
    sft_with_mixin(again, tmp_path / "killed").train(resume_from_checkpoint=True)
    assert_equal(model, again)


def test_the_best_model_at_the_end_is_the_one_that_was_saved_then(tmp_path: Path) -> None:
    model, adapters = adapted()
    options = {"eval_strategy": "steps", "eval_steps": 2, "metric_for_best_model": "eval_loss"}
    run = sft(model, tmp_path, load_best_model_at_end=True, greater_is_better=True, **options)
    run.train()
    assert run.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")  # the loss falls
    saved = [safetensors.torch.load_file(tmp_path / f"checkpoint-{n}" / "adapter_model.safetensors") for n in (2, 4)]
    assert not changed(adapters.state_dict("t"), saved[0])
    assert changed(adapters.state_dict("t"), saved[1])
