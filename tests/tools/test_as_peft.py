"""TRL's trainers on `ak.as_peft(model)`, unchanged: they train what PEFT would, and save and resume it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tests.models import WORDS, build
from transformers import LlamaConfig, LlamaForSequenceClassification, TrainerCallback

import adapterkit as ak
from adapterkit_loha import LoHaConfig
from adapterkit_lora import LoraConfig
from adapterkit_vera import VeraConfig

from .words import datasets, sentence, texts, tokenizer

pytest.importorskip("trl")

TARGETS = ["q_proj", "v_proj"]
OPTIONS = {
    "learning_rate": 1e-2,
    "weight_decay": 0.1,
    "max_steps": 4,
    "save_steps": 2,
    "logging_steps": 1,
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
}


def sft(model: Any, folder: Path, *, peft_config: Any = None, **options: Any) -> Any:
    from trl import SFTConfig, SFTTrainer

    arguments, data = SFTConfig(str(folder), **OPTIONS | options), {"train_dataset": texts(), "eval_dataset": texts(4)}
    return SFTTrainer(model, arguments, **data, processing_class=tokenizer(), peft_config=peft_config)


def pairs() -> dict[str, list[str]]:
    return {
        "prompt": [sentence(i, count=4) for i in range(16)],
        "chosen": [" " + sentence(i + 1, count=4) for i in range(16)],
        "rejected": [" " + sentence(i, 5, count=4) for i in range(16)],
    }


def dpo(model: Any, folder: Path, *, reference: Any = None, **options: Any) -> Any:
    from trl import DPOConfig, DPOTrainer

    arguments = DPOConfig(str(folder), **OPTIONS | options)
    data = datasets.Dataset.from_dict(pairs())
    return DPOTrainer(model, reference, args=arguments, train_dataset=data, processing_class=tokenizer())


def kto(model: Any, folder: Path, **options: Any) -> Any:
    from trl import KTOConfig, KTOTrainer

    given = pairs()
    rows = {"prompt": given["prompt"] * 2, "completion": given["chosen"] + given["rejected"]}
    data = datasets.Dataset.from_dict({**rows, "label": [True] * 16 + [False] * 16})
    arguments = KTOConfig(str(folder), **OPTIONS | options)
    return KTOTrainer(model, args=arguments, train_dataset=data, processing_class=tokenizer())


def reward(model: Any, folder: Path, **options: Any) -> Any:
    from trl import RewardConfig, RewardTrainer

    arguments = RewardConfig(str(folder), **OPTIONS | options)
    data = datasets.Dataset.from_dict(pairs())
    return RewardTrainer(model, args=arguments, train_dataset=data, processing_class=tokenizer())


def grpo(model: Any, folder: Path, **options: Any) -> Any:
    from trl import GRPOConfig, GRPOTrainer

    def score(completions: list[str], **_: Any) -> list[float]:
        return [float(len(set(text.split()))) + 0.1 * i for i, text in enumerate(completions)]

    sizes = {"num_generations": 2, "max_completion_length": 4, "per_device_train_batch_size": 4, "beta": 0.1}
    arguments = GRPOConfig(str(folder), **OPTIONS | sizes | options)
    data = datasets.Dataset.from_dict({"prompt": pairs()["prompt"]})
    words = tokenizer(padding_side="left", model_max_length=None)
    return GRPOTrainer(model, score, args=arguments, train_dataset=data, processing_class=words)


TRAINERS: list[Callable[..., Any]] = [sft, dpo, kto, reward, grpo]


@dataclass(frozen=True, kw_only=True)
class OuterConfig(ak.AdapterConfig):
    """A method that PEFT lacks."""

    method = "outer"


class OuterLayer(ak.LowRankLayer):
    """`dW = up @ down`, of rank one."""

    def setup(self, target: ak.Target, config: OuterConfig) -> None:
        self.outer_up = target.new(target.out_features, 1, init=0.0)
        self.outer_down = target.new(1, target.in_features, init=ak.kaiming)

    def factors(self) -> ak.Factors:
        return ak.Factors(self.outer_up, self.outer_down)


@pytest.fixture(autouse=True, scope="module")
def outer() -> Iterator[None]:
    ak.register(ak.plugin(OuterConfig, OuterLayer, prefix="outer_"))
    yield
    ak.default_registry.unregister("outer")


CONFIGS: dict[str, ak.AdapterConfig] = {
    "lora": LoraConfig(r=2, target_modules=TARGETS, lora_dropout=0.1),
    "pissa": LoraConfig(r=2, target_modules=TARGETS, init_lora_weights="pissa"),
    "loha": LoHaConfig(r=2, target_modules=TARGETS),
    "vera": VeraConfig(r=2, target_modules=["q_proj"], save_projection=False),
    "outer": OuterConfig(target_modules=TARGETS),
}


def base(make: Callable[..., Any]) -> Any:
    """A tiny model for this trainer."""
    if make is not reward:
        return build("llama")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(num_key_value_heads=1, num_labels=1, pad_token_id=3, **WORDS)
        return LlamaForSequenceClassification(config).eval()


def adapted(make: Callable[..., Any], config: ak.AdapterConfig) -> tuple[Any, ak.Adapters]:
    model = base(make)
    torch.manual_seed(3)
    adapters = ak.attach(model)
    adapters.add("default", config)
    return ak.as_peft(model), adapters


def log(trainer: Any) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step."""
    return [(entry["loss"], entry["grad_norm"]) for entry in trainer.state.log_history if "loss" in entry]


def disturb(model: Any) -> None:
    """Give every LoRA parameter a value that does not depend on who made it."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "lora_" in name:
                parameter.normal_(std=0.3, generator=generator)


@pytest.mark.parametrize("make", TRAINERS)
def test_losses_and_parameters_are_those_of_peft(make: Callable[..., Any], tmp_path: Path) -> None:
    fields: dict[str, Any] = {"r": 2, "target_modules": TARGETS}
    if make is reward:
        fields["modules_to_save"] = ["score"]
    if make in (dpo, kto):  # which switch dropout off
        fields["lora_dropout"] = 0.5
    ours, _ = adapted(make, LoraConfig(**fields))
    theirs = peft.get_peft_model(base(make), peft.LoraConfig(**fields))
    logs = []
    for name, model in (("ours", ours), ("theirs", theirs)):
        disturb(model)
        torch.manual_seed(0)
        trainer = make(model, tmp_path / name, save_strategy="no")
        assert getattr(trainer, "ref_model", None) is None
        trainer.train()
        logs.append(log(trainer))
    assert len(logs[0]) == OPTIONS["max_steps"]
    torch.testing.assert_close(torch.tensor(logs[0]), torch.tensor(logs[1]), rtol=0, atol=1e-6)
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter, expected[name], rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("method", ["loha", "vera", "outer"])
@pytest.mark.parametrize("make", TRAINERS)
def test_every_method_trains_and_nothing_else_does(make: Callable[..., Any], method: str, tmp_path: Path) -> None:
    view, adapters = adapted(make, CONFIGS[method])
    before = {name: value.clone() for name, value in view.state_dict().items()}
    make(view, tmp_path, max_steps=2).train()
    moved = {
        name for name, value in view.state_dict().items() if name in before and not torch.equal(value, before[name])
    }
    assert moved == {name for name, p in view.named_parameters() if p.requires_grad}
    assert moved
    assert adapters.active == adapters.trainable == ("default",)
    saved = ak.attach(base(make)).load(tmp_path / "checkpoint-2", "default")
    assert saved.ok


def assert_equal(one: Any, other: Any) -> None:
    """Within what another alignment of memory may change; a step of training changes a hundred times that."""
    expected, found = one.state_dict(), other.state_dict()
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-6, atol=1e-6, msg=key)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("make", [sft, dpo])
def test_a_resumed_training_equals_an_uninterrupted_one(
    make: Callable[..., Any], config: ak.AdapterConfig, tmp_path: Path
) -> None:
    whole, _ = adapted(make, config)
    make(whole, tmp_path).train()
    again, _ = adapted(make, config)
    make(again, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_equal(whole, again)


class Kill(TrainerCallback):  # type: ignore[misc]
    """Kill the process after a step of training."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 3:
            os.kill(os.getpid(), signal.SIGKILL)


KILLED = """
import sys
from pathlib import Path
from tests.tools.test_as_peft import CONFIGS, Kill, adapted, dpo

run = dpo(adapted(dpo, CONFIGS["lora"])[0], Path(sys.argv[1]))
run.add_callback(Kill())
run.train()
"""


def test_a_training_that_was_killed_goes_on_as_if_it_was_not(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path / "killed")]
    killed = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    whole, _ = adapted(dpo, CONFIGS["lora"])
    dpo(whole, tmp_path / "whole").train()
    again, _ = adapted(dpo, CONFIGS["lora"])
    dpo(again, tmp_path / "killed").train(resume_from_checkpoint=True)
    assert_equal(whole, again)


def test_weight_decay_is_for_the_parameters_that_peft_decays(tmp_path: Path) -> None:
    names = []
    for model in (adapted(sft, LoraConfig(r=2, target_modules=TARGETS, bias="none"))[0], peft_model()):
        trainer = sft(model, tmp_path)
        decayed = set(map(id, trainer.create_optimizer().param_groups[0]["params"]))
        names.append({name for name, p in model.named_parameters() if id(p) in decayed})
    assert names[0] == names[1]
    assert names[0]


def peft_model() -> Any:
    return peft.get_peft_model(build("llama"), peft.LoraConfig(r=2, target_modules=TARGETS))


def test_the_best_model_at_the_end_is_the_one_that_was_saved_then(tmp_path: Path) -> None:
    view, adapters = adapted(sft, CONFIGS["pissa"])
    options = {"eval_strategy": "steps", "eval_steps": 2, "metric_for_best_model": "eval_loss"}
    run = sft(view, tmp_path, load_best_model_at_end=True, greater_is_better=True, **options)
    run.train()
    assert run.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")  # the loss falls
    other, others = adapted(sft, CONFIGS["pissa"])
    other.load_adapter(tmp_path / "checkpoint-2", "default", is_trainable=True)
    for one, two in zip(adapters.parameters("default"), others.parameters("default"), strict=True):
        assert torch.equal(one, two)


def test_a_trainer_makes_the_adapter_itself_from_a_config(tmp_path: Path) -> None:
    config = OuterConfig(target_modules=TARGETS)
    run = sft(build("llama"), tmp_path, peft_config=ak.as_peft(config))
    run.train()
    assert ak.attach(run.model).config("default").target_modules == config.target_modules
    assert ak.attach(build("llama")).load(tmp_path / "checkpoint-4", "default").ok


def test_with_the_mixin_a_trainer_takes_a_config_as_it_is(tmp_path: Path) -> None:
    from trl import SFTConfig, SFTTrainer

    from adapterkit.integrations.transformers import AdapterTrainerMixin

    class Mixed(AdapterTrainerMixin, SFTTrainer):  # type: ignore[misc]
        pass

    config, arguments = OuterConfig(target_modules=TARGETS), SFTConfig(str(tmp_path), **OPTIONS)
    data = {"train_dataset": texts(), "processing_class": tokenizer()}
    run = Mixed(build("llama"), arguments, **data, peft_config=config)
    run.train()
    again = Mixed(build("llama"), arguments, **data, peft_config=config)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_equal(run.model, again.model)


def test_an_adapter_at_the_output_layer_trains(tmp_path: Path) -> None:
    view, adapters = adapted(dpo, LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    before = [parameter.detach().clone() for parameter in adapters.parameters("default")]
    dpo(view, tmp_path, max_steps=2).train()
    pairs = zip(before, adapters.parameters("default"), strict=True)
    assert not any(torch.equal(one, other) for one, other in pairs)
