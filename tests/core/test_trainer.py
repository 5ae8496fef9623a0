"""A plain transformers `Trainer` on an adapted model: what its checkpoints hold, and what it restores from them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from tests.models import LABELS, VOCABULARY, build
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

import adapterkit as ak
from adapterkit_loha import LoHaConfig
from adapterkit_lora import LoraConfig
from adapterkit_vera import VeraConfig

LORA = LoraConfig(r=2, lora_dropout=0.1, target_modules=["query", "value"], bias="all", modules_to_save=["classifier"])
CONFIGS = {
    "lora": LORA,
    "pissa": LoraConfig(r=2, target_modules=["query"], init_lora_weights="pissa"),
    "loha": LoHaConfig(r=2, target_modules=["query", "value"]),
    "vera": VeraConfig(r=2, target_modules=["query"], save_projection=False),
}


class Sentences(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Random words, each with a label."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(index)
        return {
            "input_ids": torch.randint(1, VOCABULARY, (6,), generator=generator),
            "labels": torch.tensor(index % LABELS),
        }


def adapted(config: ak.AdapterConfig = LORA, name: str = "t") -> tuple[nn.Module, ak.Adapters]:
    model = build("bert")
    torch.manual_seed(7)
    adapters = ak.attach(model)
    adapters.add(name, config)
    return model, adapters


def trainer(model: nn.Module, folder: Path, *callbacks: TrainerCallback, **options: Any) -> Trainer:
    given = {"max_steps": 4, "save_steps": 2, "learning_rate": 1e-2, "report_to": "none", "use_cpu": True, **options}
    arguments = TrainingArguments(str(folder), per_device_train_batch_size=4, disable_tqdm=True, **given)
    return Trainer(model, arguments, train_dataset=Sentences(), eval_dataset=Sentences(), callbacks=[*callbacks])


def values(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.detach().clone() for key, value in model.state_dict().items()}


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [key for key in one if not torch.equal(one[key], other[key])] == []


def base_keys() -> set[str]:
    return set(build("bert").state_dict())


def file_keys(folder: Path) -> Iterator[str]:
    for file in folder.rglob("*.safetensors"):
        yield from (key.removeprefix("base_model.model.") for key in safetensors.torch.load_file(file))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_resumed_training_equals_an_uninterrupted_one(name: str, tmp_path: Path) -> None:
    model, _ = adapted(CONFIGS[name])
    trainer(model, tmp_path).train()
    expected = values(model)
    again, _ = adapted(CONFIGS[name])
    start = values(again)
    trainer(again, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_equal(values(again), expected)
    assert any(not torch.equal(start[key], expected[key]) for key in expected)


def test_a_checkpoint_holds_the_adapter_and_nothing_of_the_base(tmp_path: Path) -> None:
    model, adapters = adapted(LoraConfig(r=2, target_modules=["query", "value"]))
    trainer(model, tmp_path, max_steps=2).train()
    keys = set(file_keys(tmp_path / "checkpoint-2"))
    assert keys & base_keys() == {"classifier.weight", "classifier.bias"}  # the adapter's head, by PEFT's keys
    fresh = ak.attach(build("bert"))
    assert fresh.load(tmp_path / "checkpoint-2", name="t").ok
    for (key, value), (_, expected) in zip(fresh.named_parameters("t"), adapters.named_parameters("t"), strict=True):
        assert torch.equal(value, expected), key


class Worse(TrainerCallback):  # type: ignore[misc]
    """Says that the first evaluation is the best one."""

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **_: Any) -> None:
        metrics["eval_loss"] = float(state.global_step)


def test_the_best_model_at_the_end_is_the_one_that_was_saved_then(tmp_path: Path) -> None:
    model, _ = adapted()
    options = {"eval_strategy": "steps", "eval_steps": 2, "metric_for_best_model": "loss"}
    run = trainer(model, tmp_path, load_best_model_at_end=True, greater_is_better=False, **options)
    run.add_callback(Worse())
    evaluate = run._evaluate
    run._evaluate = lambda *args, **kwargs: {**evaluate(*args, **kwargs), "eval_loss": float(run.state.global_step)}
    run.train()
    assert run.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    expected, _ = adapted()
    trainer(expected, tmp_path / "other", lr_scheduler_type="linear").train()
    stopped, _ = adapted()
    stopped.load_state_dict(safetensors.torch.load_file(tmp_path / "checkpoint-2" / "model.safetensors"), strict=False)
    assert_equal(values(model), values(stopped))
    assert not torch.equal(model.classifier.adapter_heads["t"].weight, expected.classifier.adapter_heads["t"].weight)


def test_resuming_with_another_adapter_is_an_error_and_changes_nothing(tmp_path: Path) -> None:
    model, _ = adapted()
    trainer(model, tmp_path, max_steps=2).train()
    other, _ = adapted(name="u")
    before = values(other)
    with pytest.raises(ak.CheckpointError, match=r"trains 'u', and the state dict holds tensors of adapters .*\.t\."):
        trainer(other, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_equal(values(other), before)
