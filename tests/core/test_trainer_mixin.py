"""`AdapterTrainerMixin` before transformers' `Trainer`: what its checkpoints hold, and what it restores from them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from accelerate import cpu_offload
from tests.core.test_trainer import Wrapped, assert_equal, values
from tests.core.test_trainer import trainer as plain_trainer
from tests.models import LABELS, VOCABULARY, build
from torch import Tensor, nn
from transformers import Trainer

import adapterkit as ak
from adapterkit.contract.registry import default_registry
from adapterkit.integrations.distributed import TrainingState
from adapterkit.integrations.models import adapters_in
from adapterkit.integrations.transformers import AdapterTrainerMixin
from adapterkit_loha import LoHaConfig
from adapterkit_lora import LoraConfig
from adapterkit_vera import VeraConfig

TARGETS = ["query", "value"]


class AdapterTrainer(AdapterTrainerMixin, Trainer):
    """As users write it."""


@pytest.fixture(scope="module", autouse=True)
def adalora() -> Iterator[None]:
    """The example's package, which is not installed here."""
    folder = str(Path(__file__).parents[2] / "examples" / "thirdparty" / "adapterkit_adalora")
    sys.path.insert(0, folder)
    import adapterkit_adalora

    ak.register(adapterkit_adalora.plugin)
    yield
    sys.path.remove(folder)
    default_registry.unregister("adalora")


def adapted(config: ak.AdapterConfig, name: str = "t", **options: Any) -> Any:
    model = build("bert")
    torch.manual_seed(7)
    ak.attach(model).add(name, config, **options)
    return model


def two() -> Any:
    model = adapted(LoraConfig(r=2, target_modules=TARGETS))
    adapters = ak.attach(model)
    adapters.add("s", LoHaConfig(r=2, target_modules=["value"], modules_to_save=None))
    adapters.activate("t", "s")
    return model


def resized() -> nn.Module:
    """New rows of the vocabulary are random, and an adapter changes the table, too."""
    model: Any = build("bert")
    model.resize_token_embeddings(VOCABULARY + 8, mean_resizing=False)
    torch.manual_seed(7)
    ak.attach(model).add("t", LoraConfig(r=2, target_modules=["word_embeddings", "query"]))
    return model  # type: ignore[no-any-return]


def lora(**fields: Any) -> Callable[[], nn.Module]:
    return lambda: adapted(LoraConfig(r=2, target_modules=TARGETS, **fields))


def budget() -> nn.Module:
    fields = {"init_r": 4, "target_r": 2, "total_step": 20, "beta1": 0.5, "beta2": 0.5, "lora_dropout": 0.1}
    return adapted(ak.config("adalora", target_modules=TARGETS, **fields))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "dropout": lora(lora_dropout=0.1),
    "biases": lora(bias="all"),
    "rsLoRA": lora(use_rslora=True),
    "PiSSA": lora(init_lora_weights="pissa"),
    "OLoRA": lora(init_lora_weights="olora"),
    "LoHa": lambda: adapted(LoHaConfig(r=2, target_modules=TARGETS, rank_dropout=0.1)),
    "VeRA": lambda: adapted(VeraConfig(r=2, target_modules=["query"], save_projection=False)),
    "AdaLoRA": budget,
    "two adapters": two,
    "a resized vocabulary": resized,
    "a head of another size": lambda: adapted(LoraConfig(r=2, target_modules=TARGETS), num_labels=5),
    "not transformers'": lambda: Wrapped(inside=False),
    "inside a model that is not transformers'": lambda: Wrapped(inside=True),
}
PLAIN = ("biases", "PiSSA", "LoHa", "VeRA", "two adapters", "a resized vocabulary", *[*MODELS][-2:])
CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    **{name: (make, {}) for name, make in MODELS.items()},
    **{f"{name}, plain": (MODELS[name], {"cls": Trainer}) for name in PLAIN},
    "gradient accumulation": (budget, {"gradient_accumulation_steps": 2}),
    "gradient checkpointing": (MODELS["dropout"], {"activation_checkpointing": True}),
}


def trainer(model: nn.Module, folder: Path, *, cls: type[Trainer] = AdapterTrainer, **options: Any) -> Any:
    return plain_trainer(model, folder, cls=cls, **options)


def state(model: nn.Module) -> dict[str, Tensor]:
    """Everything of every adapter with which its training goes on."""
    adapters = adapters_in(model)
    return {
        f"{name}: {key}": tensor.clone() for name in adapters for key, tensor in adapters.training_state(name).items()
    }


@pytest.mark.parametrize(("make", "options"), CASES.values(), ids=CASES.keys())
def test_a_resumed_training_equals_an_uninterrupted_one(
    make: Callable[[], nn.Module], options: dict[str, Any], tmp_path: Path
) -> None:
    whole = make()
    start = state(whole)
    trainer(whole, tmp_path, **options).train()
    again = make()
    trainer(again, tmp_path, **options).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    found, expected = state(again), state(whole)
    assert_equal(found, expected)
    assert any(not torch.equal(start[key], tensor) for key, tensor in expected.items())


def weights(folder: Path) -> dict[str, int]:
    """The files of tensors in a folder and below, with their sizes."""
    return {str(file.relative_to(folder)): file.stat().st_size for file in sorted(folder.rglob("*.safetensors"))}


def test_a_checkpoint_holds_the_adapter_once(tmp_path: Path) -> None:
    model = adapted(LoraConfig(r=8, target_modules="all-linear"))
    run = trainer(model, tmp_path)
    run.train()
    run.save_model(str(tmp_path / "final"))
    for folder in (tmp_path / "checkpoint-2", tmp_path / "final"):
        found = weights(folder)
        assert found.keys() == {"adapter_model.safetensors", "adapter_state.safetensors"}
        assert sum(found.values()) <= 1.2 * found["adapter_model.safetensors"]
        assert ak.attach(build("bert")).load(folder, name="t").ok


@pytest.mark.parametrize("name", ["PiSSA", "OLoRA", "VeRA"])
def test_a_checkpoint_holds_nothing_twice_and_nothing_that_is_made_again(name: str, tmp_path: Path) -> None:
    run = trainer(MODELS[name](), tmp_path)
    run.train()
    for file in (tmp_path / "checkpoint-2").glob("adapter_*.safetensors"):
        held = safetensors.torch.load_file(file)
        assert ("lora_A" in str(held.keys())) == (name != "VeRA" and file.name == "adapter_model.safetensors")
        assert not [key for key in held if "vera_A" in key or "vera_B" in key or "lora_init" in key]


def test_projections_that_are_not_made_again_are_refused() -> None:
    saved = TrainingState(MODELS["VeRA"]()).state_dict()
    del saved["setting"]  # which says the dtype
    assert not [key for key in saved if "vera_A" in key]
    other = adapted(VeraConfig(r=2, target_modules=["query"], save_projection=False), dtype=torch.float64)
    with pytest.raises(ak.CheckpointError, match=r"does not fit adapter 't' on this model: adapter_shared.vera_A diff"):
        TrainingState(other).load_state_dict(saved)


def test_projections_of_another_seed_are_in_the_checkpoint(tmp_path: Path) -> None:
    """A resumed training has them, although its own config makes others."""
    models = [MODELS["VeRA"](), MODELS["VeRA"]()]
    for seed, model in enumerate(models):
        shared = next(iter(ak.attach(model).layers("t").values())).shared
        assert shared is not None
        torch.manual_seed(seed)
        shared.get_buffer("vera_A").normal_()
    trainer(models[0], tmp_path).train()
    trainer(models[1], tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert_equal(state(models[1]), state(models[0]))


def test_a_checkpoint_holds_the_adapters_that_train_and_save_model_all(tmp_path: Path) -> None:
    model = two()
    adapters = ak.attach(model)
    adapters.add("frozen", LoraConfig(r=2, target_modules=["key"], modules_to_save=None), activate=False)
    run = trainer(model, tmp_path)
    run.train()
    both = {f"{name}/adapter_{part}.safetensors" for name in ("s", "t") for part in ("model", "state")}
    assert weights(tmp_path / "checkpoint-2").keys() == both
    run.save_model(str(tmp_path / "final"))
    assert weights(tmp_path / "final").keys() == both | {
        "frozen/adapter_model.safetensors",
        "frozen/adapter_state.safetensors",
    }


def test_an_adapter_that_trains_and_is_not_active_is_saved_and_restored(tmp_path: Path) -> None:
    model = two()
    adapters = ak.attach(model)
    adapters.activate("t")
    for parameter in adapters.parameters("s"):
        parameter.requires_grad_(True)
    trainer(model, tmp_path).train()
    assert "s/adapter_state.safetensors" in weights(tmp_path / "checkpoint-2")


class Normed(nn.Module):
    """A batch norm counts, and a layer of the base trains, beside an adapter."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.norm, self.head = nn.Embedding(VOCABULARY, 8), nn.BatchNorm1d(8), nn.Linear(8, LABELS)
        ak.attach(self).add("t", LoraConfig(r=2, target_modules=["head"], modules_to_save=None))
        self.norm.weight.requires_grad_()

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.head(self.norm(self.embed(input_ids).mean(1)))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


@pytest.mark.filterwarnings("ignore:Parameters train that belong to no adapter:adapterkit.AdapterWarning")
def test_what_trains_beside_the_adapters_resumes_too(tmp_path: Path) -> None:
    model, again = Normed(), Normed()
    start = values(model)
    trainer(model, tmp_path).train()
    trainer(again, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert_equal(values(again), values(model))
    changed = {key for key, value in values(model).items() if not torch.equal(value, start[key])}
    assert {"norm.weight", "norm.running_mean"} < changed


def test_a_warning_names_what_trains_beside_the_adapters(tmp_path: Path) -> None:
    with pytest.warns(ak.AdapterWarning, match=r"such as 'norm.weight' \(1 in all\)"):
        trainer(Normed(), tmp_path).save_model()


@pytest.mark.filterwarnings("ignore:Parameters train that belong to no adapter:adapterkit.AdapterWarning")
def test_a_model_that_does_not_train_what_was_trained_is_refused(tmp_path: Path) -> None:
    trainer(Normed(), tmp_path).train()
    other = Normed()
    other.norm.weight.requires_grad_(False)
    before = values(other)
    with pytest.raises(ak.CheckpointError, match=r"checkpoint-1 and the model differ in 'norm.weight'"):
        trainer(other, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert_equal(values(other), before)


def test_an_adapter_that_was_trained_and_frozen_is_saved_once(tmp_path: Path) -> None:
    model = MODELS["dropout"]()
    run = trainer(model, tmp_path)
    ak.attach(model).activate("t", trainable=False)
    run.save_model(str(tmp_path / "final"))
    assert weights(tmp_path / "final").keys() == {"adapter_model.safetensors", "adapter_state.safetensors"}


def test_a_merged_model_is_saved_whole(tmp_path: Path) -> None:
    model = MODELS["dropout"]()
    run = trainer(model, tmp_path, save_strategy="no")
    run.train()
    ak.attach(model).merge("t")
    run.save_model(str(tmp_path / "final"))
    assert weights(tmp_path / "final").keys() == {"model.safetensors"}


def test_a_folder_with_a_whole_model_gets_no_adapter(tmp_path: Path) -> None:
    build("bert").save_pretrained(tmp_path / "base")
    before = weights(tmp_path / "base")
    with pytest.raises(ak.SaveError, match="base holds a whole model"):
        trainer(MODELS["dropout"](), tmp_path).save_model(str(tmp_path / "base"))
    assert weights(tmp_path / "base") == before


def test_the_best_model_at_the_end_has_the_state_of_then(tmp_path: Path) -> None:
    model = budget()
    options = {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "eval_loss"}
    run = trainer(model, tmp_path, load_best_model_at_end=True, greater_is_better=True, save_total_limit=1, **options)
    run.train()
    assert run.state.best_model_checkpoint == str(tmp_path / "checkpoint-1")  # the loss falls
    assert ak.attach(model).training_state("t")["steps"] == 1
    once = budget()
    trainer(once, tmp_path / "once", max_steps=1).train()
    assert_equal(state(model), state(once))


def test_checkpoints_without_the_optimizer_resume(tmp_path: Path) -> None:
    model = MODELS["PiSSA"]()
    trainer(model, tmp_path, save_only_model=True).train()
    assert not (tmp_path / "checkpoint-2" / "optimizer.pt").exists()
    again = MODELS["PiSSA"]()
    options = {"learning_rate": 0.0, "save_strategy": "no"}
    trainer(again, tmp_path, **options).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_equal(values(again), values(model))


def test_a_checkpoint_of_a_plain_trainer_resumes(tmp_path: Path) -> None:
    model = MODELS["dropout"]()
    trainer(model, tmp_path, cls=Trainer).train()
    again = MODELS["dropout"]()
    trainer(again, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert_equal(values(again), values(model))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("training")
    trainer(lora()(), folder).train()
    return folder / "checkpoint-2"


def test_a_head_of_another_size_is_refused_and_nothing_changes(checkpoint: Path) -> None:
    model = adapted(LoraConfig(r=2, target_modules=TARGETS), num_labels=5)
    before = values(model)
    with pytest.raises(
        ak.CheckpointError, match=r"another config than adapter 't' has.*classifier.*, \(5, 16\) on this"
    ):
        trainer(model, checkpoint.parent).train(resume_from_checkpoint=str(checkpoint))
    assert_equal(values(model), before)


def test_an_optimizer_of_other_groups_is_not_resumed(checkpoint: Path) -> None:
    run = trainer(lora()(), checkpoint.parent, lora_plus_ratio=16)
    with pytest.raises(ak.CheckpointError, match=r"checkpoint-2 does not fit the optimizer here: .* lora_plus_ratio"):
        run.train(resume_from_checkpoint=str(checkpoint))


def test_an_optimizer_of_parameters_in_another_order_is_not_resumed(tmp_path: Path) -> None:
    runs = [trainer(lora()(), tmp_path), trainer(lora()(), tmp_path)]
    for order, run in zip((1, -1), runs, strict=True):
        run.optimizer = torch.optim.AdamW([*run.adapters.parameters("t")][::order])
    runs[0].train()
    with pytest.raises(
        ak.CheckpointError, match="does not fit the optimizer here: its parameters are in another order"
    ):
        runs[1].train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_a_checkpoint_without_a_state_is_refused(tmp_path: Path) -> None:
    model = MODELS["dropout"]()
    ak.attach(model).save("t", tmp_path / "checkpoint-1")
    with pytest.raises(ak.CheckpointError, match=r"no state of a training.*as_peft\(model\).*adapters.load"):
        trainer(model, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_a_training_in_which_nothing_trains_is_refused(tmp_path: Path) -> None:
    model = MODELS["dropout"]()
    adapters = ak.attach(model)
    adapters.activate("t", trainable=False)
    with pytest.raises(ak.StateError, match=r"No parameter requires a gradient.*call adapters.activate\(name\)"):
        trainer(model, tmp_path).train()
    adapters.activate("t")
    adapters.merge("t")
    with pytest.raises(ak.StateError, match=r"'t' is merged: call adapters.unmerge\(\)"):
        trainer(model, tmp_path).train()


def test_a_name_that_no_folder_can_have_is_refused_before_the_training(tmp_path: Path) -> None:
    model = two()
    ak.attach(model).rename("s", "v1/s")
    run = trainer(model, tmp_path)
    with pytest.raises(ak.SaveError, match=r"Adapter 'v1/s' cannot have a subfolder of that name. Rename it"):
        run.train()
    assert run.state.global_step == 0


def test_an_offloaded_model_that_would_be_moved_is_refused(tmp_path: Path) -> None:
    model = cpu_offload(build("bert"), execution_device="cpu")
    ak.attach(model).add("t", LoraConfig(r=2, target_modules=TARGETS))
    with pytest.raises(ak.StateError, match=r"offloaded or on the meta device.*dispatch_model\(model, device_map\)"):
        trainer(model, tmp_path).train()


def test_a_model_without_adapters_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ak.ConfigError, match=r"BertForSequenceClassification has no adapters. Add adapters"):
        trainer(build("bert"), tmp_path).train()


@pytest.mark.parametrize("scaled", [False, True], ids=["mean of each batch", "mean of what is accumulated"])
@pytest.mark.parametrize("parts", [1, 2])
def test_the_penalty_counts_once_in_each_step_of_the_optimizer(parts: int, scaled: bool, tmp_path: Path) -> None:
    """With a penalty the step of SGD differs from that without by the penalty's gradient, times the learning rate."""
    after, gradients = [], []
    for weight in (0.5, 0.0):
        fields = {"init_r": 4, "target_r": 2, "total_step": 20, "orth_reg_weight": weight}
        model = adapted(ak.config("adalora", target_modules=TARGETS, **fields))
        adapters = ak.attach(model)
        factors = [p for name, p in adapters.named_parameters("t") if name.endswith(("lora_A", "lora_B"))]
        gradients.append(torch.autograd.grad(ak.penalty(model), factors))
        options = {"optim": "sgd", "max_grad_norm": 0.0, "gradient_accumulation_steps": parts, "save_strategy": "no"}
        run = trainer(model, tmp_path, max_steps=1, learning_rate=1.0, lr_scheduler_type="constant", **options)
        run.loss_is_scaled_for_ga = scaled
        run.train()
        after.append(factors)
    for with_it, without, gradient in zip(*after, gradients[0], strict=True):
        torch.testing.assert_close(with_it - without, -gradient, rtol=1e-4, atol=1e-6)


def test_the_method_steps_once_for_each_step_of_the_optimizer(tmp_path: Path) -> None:
    model = budget()
    trainer(model, tmp_path, gradient_accumulation_steps=2, save_strategy="no").train()
    assert ak.attach(model).training_state("t")["steps"] == 2


def test_a_plain_trainer_says_what_the_method_lacks(tmp_path: Path) -> None:
    model = budget()
    with pytest.warns(
        ak.AdapterWarning, match=r"'t' trains without a part of its method 'adalora'.*AdapterTrainerMixin"
    ):
        trainer(model, tmp_path, cls=Trainer, save_strategy="no").train()


def test_each_adapter_has_its_learning_rate_and_b_that_of_lora_plus(tmp_path: Path) -> None:
    model = adapted(LoraConfig(r=2, target_modules=TARGETS))
    adapters = ak.attach(model)
    adapters.add("s", LoraConfig(r=2, target_modules=["key"], modules_to_save=None))
    adapters.activate("t", "s")
    norm = model.bert.embeddings.LayerNorm.weight.requires_grad_()
    run = trainer(model, tmp_path, adapter_options={"s": {"lr": 1e-4}}, lora_plus_ratio=16, weight_decay=0.1)
    rates = {
        id(p): (group["lr"], group["weight_decay"])
        for group in run.create_optimizer().param_groups
        for p in group["params"]
    }
    for name, plain in (("t", 1e-2), ("s", 1e-4)):
        for key, parameter in adapters.named_parameters(name):
            assert rates.pop(id(parameter)) == pytest.approx((plain * (16 if "lora_B" in key else 1), 0.1))
    assert rates == {id(norm): (1e-2, 0.1)}
    norm.requires_grad_(False)
    run = trainer(model, tmp_path, adapter_options={"s": {"lr": 1e-4}}, lora_plus_ratio=16)
    run.train()
    run = trainer(model, tmp_path, adapter_options={"s": {"lr": 1e-4}}, lora_plus_ratio=16, max_steps=3)
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert run.state.global_step == 3
