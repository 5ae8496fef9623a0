"""accelerate's `save_state` and `load_state` with adapters alone, and two prepared models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from tests.models import build, inputs, run
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.integrations.accelerate import save_adapters_alone
from adapterkit_loha import LoHaConfig
from adapterkit_lora import LoraConfig
from adapterkit_vera import VeraConfig

CONFIGS = {
    "lora": LoraConfig(r=2, lora_dropout=0.3, target_modules=["query"], bias="all", modules_to_save=["classifier"]),
    "pissa": LoraConfig(r=2, target_modules=["query"], init_lora_weights="pissa"),
    "loha": LoHaConfig(r=2, target_modules=["query", "value"]),
    "vera": VeraConfig(r=2, target_modules=["query"], save_projection=False),
}


class Script:
    """A training script: a model with adapters, and a small model that trains itself."""

    def __init__(self, *configs: str, seed: int) -> None:
        self.accelerator = Accelerator(cpu=True)
        model = build("bert")
        self.adapters = ak.attach(model)
        torch.manual_seed(seed)
        for name in configs:
            self.adapters.add(name, CONFIGS[name])
        self.adapters.activate(*configs, heads=configs[0])
        self.critic: Any = nn.Linear(3, 1)
        parameters = [p for name in configs for p in self.adapters.parameters(name)]
        optimizer = torch.optim.AdamW([*parameters, *self.critic.parameters()], 1e-2)
        model.train()
        self.model, self.critic, self.optimizer = self.accelerator.prepare(model, self.critic, optimizer)
        save_adapters_alone(self.accelerator)

    def step(self) -> None:
        self.accelerator.backward(self.critic(self.model(**inputs("bert")).logits).square().mean())
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.adapters.step()

    def values(self) -> dict[str, Tensor]:
        states = {name: self.adapters.training_state(name) for name in self.adapters}
        found = {f"{name} {key}": tensor.clone() for name, state in states.items() for key, tensor in state.items()}
        return found | {key: tensor.clone() for key, tensor in self.critic.state_dict().items()}


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert torch.equal(value, other[key]), key


@pytest.mark.parametrize("configs", [*((name,) for name in CONFIGS), ("pissa", "vera")], ids="+".join)
def test_a_training_goes_on_from_a_state_without_the_base(configs: tuple[str, ...], tmp_path: Path) -> None:
    script = Script(*configs, seed=1)
    script.step()
    script.accelerator.save_state(str(tmp_path))
    saved = script.values()
    script.step()
    after = script.values()
    again = Script(*configs, seed=2)
    again.accelerator.load_state(str(tmp_path))
    assert_equal(again.values(), saved)
    again.step()
    torch.testing.assert_close(again.values(), after, rtol=1e-5, atol=1e-6)
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.safetensors")}
    written = {"model.safetensors", *(f"adapters/{name}/adapter_model.safetensors" for name in configs)}
    assert files - {f"adapters/{name}/adapter_state.safetensors" for name in configs} == written
    assert (tmp_path / "model.safetensors").stat().st_size < 400  # the other model's


def test_an_adapter_of_a_state_is_loaded_as_any_other(tmp_path: Path) -> None:
    script = Script("loha", seed=1)
    script.step()
    script.accelerator.save_state(str(tmp_path))
    fresh = build("bert")
    assert ak.attach(fresh).load(tmp_path / "adapters" / "loha", "loha").ok
    torch.testing.assert_close(run(fresh, "bert"), run(script.model.eval(), "bert"))


def test_a_state_of_other_adapters_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    Script("pissa", "loha", seed=1).accelerator.save_state(str(tmp_path))
    script = Script("pissa", seed=2)
    before = script.values()
    with pytest.raises(ak.CheckpointError, match=r"holds the adapters .*'loha'.*the model trains 'pissa'"):
        script.accelerator.load_state(str(tmp_path))
    assert_equal(script.values(), before)


def test_models_in_another_order_are_refused_and_change_nothing(tmp_path: Path) -> None:
    Script("loha", seed=1).accelerator.save_state(str(tmp_path))
    accelerator, script = Accelerator(cpu=True), Script("loha", seed=2)
    before = script.values()
    accelerator.prepare(script.critic, script.model)
    save_adapters_alone(accelerator)
    with pytest.raises(ak.CheckpointError, match=r"adapters holds adapters, and here that model has none.* same order"):
        accelerator.load_state(str(tmp_path))
    assert_equal(script.values(), before)


def test_a_state_of_a_training_in_which_adapters_acted_otherwise_is_refused(tmp_path: Path) -> None:
    script = Script("lora", "loha", seed=1)
    script.adapters.activate("lora", "loha", heads="lora", trainable=["loha"])
    script.accelerator.save_state(str(tmp_path))
    again = Script("lora", "loha", seed=1)
    for strength in (0.5, {"bert.encoder.layer.0": 0.5, "bert.encoder.layer.1": None}):
        again.adapters.activate("lora", "loha", heads="lora", trainable=["loha"], strengths={"loha": strength})
        with pytest.raises(ak.CheckpointError, match=r"activate\('lora', 'loha', trainable=\['loha'\]\)"):
            again.accelerator.load_state(str(tmp_path))
    other = Script("lora", "loha", seed=2)
    other.adapters.activate("lora", "loha", heads="lora", trainable=["loha"])
    with pytest.raises(ak.CheckpointError, match="adapter 'lora' acted with other values"):
        other.accelerator.load_state(str(tmp_path))


def test_a_base_that_trains_too_is_saved_with_its_adapters(tmp_path: Path) -> None:
    script = Script("loha", seed=1)
    weight = script.model.bert.pooler.dense.weight.requires_grad_(True)
    script.accelerator.save_state(str(tmp_path))
    with torch.no_grad():
        changed = weight.detach().clone()
        weight.zero_()
    script.accelerator.load_state(str(tmp_path))
    assert torch.equal(weight, changed)


def test_statistics_of_batch_norms_go_on_too(tmp_path: Path) -> None:
    accelerator, model = Accelerator(cpu=True), build("convnet").train()
    adapters = ak.attach(model)
    adapters.add("a", LoraConfig(r=2, target_modules=["fc"]))
    prepared = accelerator.prepare(model)
    save_adapters_alone(accelerator)
    prepared(**inputs("convnet"))
    accelerator.save_state(str(tmp_path))
    saved = {key: value.clone() for key, value in model.state_dict().items()}
    prepared(**inputs("convnet"))
    assert not torch.equal(model.norm.running_mean, saved["norm.running_mean"])
    accelerator.load_state(str(tmp_path))
    assert_equal(model.state_dict(), saved)


def test_a_state_with_the_whole_model_is_loaded_too(tmp_path: Path) -> None:
    accelerator, model = Accelerator(cpu=True), build("bert")
    adapters = ak.attach(model)
    adapters.add("a", CONFIGS["loha"])
    accelerator.prepare(model)
    saved = {key: value.clone() for key, value in model.state_dict().items()}
    accelerator.save_state(str(tmp_path))
    save_adapters_alone(accelerator)
    with torch.no_grad():
        next(adapters.parameters("a")).zero_()
    accelerator.load_state(str(tmp_path))
    assert_equal(model.state_dict(), saved)
