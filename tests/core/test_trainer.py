"""A plain transformers `Trainer` on an adapted model: what its checkpoints hold, and what it restores from them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from tests.models import LABELS, VOCABULARY, build
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

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


def trainer(model: nn.Module, folder: Path, **options: Any) -> Trainer:
    given = {"max_steps": 4, "save_steps": 2, "learning_rate": 1e-2, "report_to": "none", "use_cpu": True, **options}
    arguments = TrainingArguments(str(folder), per_device_train_batch_size=4, disable_tqdm=True, **given)
    return Trainer(model, arguments, train_dataset=Sentences(), eval_dataset=Sentences())


def values(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.detach().clone() for key, value in model.state_dict().items()}


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """Within what another alignment of memory may change; a step of training changes a hundred times that."""
    assert one.keys() == other.keys()
    for key, value in one.items():
        torch.testing.assert_close(value, other[key], rtol=1e-4, atol=1e-4, msg=key)


def base_keys() -> set[str]:
    return set(build("bert").state_dict())


def file_keys(folder: Path) -> Iterator[str]:
    for file in folder.rglob("*.safetensors"):
        yield from (key.removeprefix("base_model.model.") for key in safetensors.torch.load_file(file))


class Wrapped(nn.Module):
    """A model that is not transformers', around one that is."""

    def __init__(self, *, inside: bool) -> None:
        super().__init__()
        self.inner = build("bert")
        torch.manual_seed(7)
        ak.attach(self.inner if inside else self).add("t", LORA)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
        return self.inner(input_ids=input_ids, labels=labels)


def with_two() -> nn.Module:
    model, adapters = adapted()
    adapters.add("s", LoraConfig(r=2, target_modules=["value"], modules_to_save=None))
    adapters.activate("t", "s")
    return model


def resized() -> nn.Module:
    model: Any = build("bert")
    model.resize_token_embeddings(VOCABULARY + 8, mean_resizing=False)  # new rows are random
    ak.attach(model).add("t", LORA)
    return model  # type: ignore[no-any-return]


RESUMED: dict[str, Callable[[], nn.Module]] = {
    **{name: lambda config=config: adapted(config)[0] for name, config in CONFIGS.items()},  # type: ignore[misc]
    "two adapters": with_two,
    "a resized vocabulary": resized,
    "not transformers'": lambda: Wrapped(inside=False),
    "inside a model that is not transformers'": lambda: Wrapped(inside=True),
}


@pytest.mark.parametrize("make", RESUMED.values(), ids=RESUMED.keys())
def test_a_resumed_training_equals_an_uninterrupted_one(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    results = []
    for checkpoint in (None, str(tmp_path / "checkpoint-1")):
        model = make()
        start = values(model)
        trainer(model, tmp_path, max_steps=2, save_steps=1).train(resume_from_checkpoint=checkpoint)
        results.append(values(model))
        assert any(not torch.equal(start[key], value) for key, value in results[-1].items())
    assert_equal(*results)
    if make is with_two:
        assert {"s", "t"} < {path.name for path in (tmp_path / "checkpoint-1").iterdir()}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two steps of a training wrote, and a file of the values then."""
    folder = tmp_path_factory.mktemp("training")
    model, adapters = adapted(LoraConfig(r=2, target_modules=["query"]))
    trainer(model, folder, max_steps=2).train()
    torch.save(dict(adapters.named_parameters("t")), folder / "values.pt")
    return folder / "checkpoint-2"


def test_a_checkpoint_holds_the_adapter_and_nothing_of_the_base(checkpoint: Path) -> None:
    keys = set(file_keys(checkpoint))
    assert keys & base_keys() == {"classifier.weight", "classifier.bias"}  # the adapter's head, by PEFT's keys
    fresh = ak.attach(build("bert"))
    assert fresh.load(checkpoint, name="t").ok
    expected = torch.load(checkpoint.parent / "values.pt", weights_only=True)
    found = dict(fresh.named_parameters("t"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in found.items())


def test_save_model_after_a_merge_writes_the_whole_model(tmp_path: Path) -> None:
    model, adapters = adapted()
    run = trainer(model, tmp_path / "out", save_strategy="no")
    run.train()
    batch = {"input_ids": torch.arange(1, 13).view(2, 6)}
    expected = model.eval()(**batch).logits
    adapters.merge("t")
    run.save_model()
    again = type(model).from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(again(**batch).logits, expected)


def test_accelerate_saves_and_loads_the_state(tmp_path: Path) -> None:
    from accelerate import Accelerator

    model, adapters = adapted()
    accelerator = Accelerator(cpu=True)
    wrapped, optimizer = accelerator.prepare(model.eval(), torch.optim.AdamW(adapters.parameters("t"), 1e-2))
    batch = {"input_ids": torch.arange(1, 13).view(2, 6), "labels": torch.tensor([0, 1])}

    def step() -> dict[str, Tensor]:
        accelerator.backward(wrapped(**batch).loss)
        optimizer.step()
        optimizer.zero_grad()
        return values(model)

    step()
    accelerator.save_state(str(tmp_path / "state"))
    accelerator.save_model(wrapped, str(tmp_path / "model"))
    saved = safetensors.torch.load_file(tmp_path / "model" / "model.safetensors")
    assert set(values(model)) == set(saved)
    expected = step()
    accelerator.load_state(str(tmp_path / "state"))
    assert_equal(step(), expected)


def test_the_best_model_at_the_end_is_the_one_that_was_saved_then(tmp_path: Path) -> None:
    model, _ = adapted()
    options = {"eval_strategy": "steps", "eval_steps": 2, "metric_for_best_model": "eval_loss"}
    run = trainer(model, tmp_path, load_best_model_at_end=True, greater_is_better=True, **options)
    run.train()
    assert run.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")  # the loss falls
    own = {key: value for key, value in values(model).items() if key not in base_keys()}
    best, last = (safetensors.torch.load_file(tmp_path / f"checkpoint-{n}" / "model.safetensors") for n in (2, 4))
    for held in (best, last):
        del held["adapterkit.setting"]
    assert_equal(own, best)
    assert any(not torch.equal(own[key], last[key]) for key in own)


@pytest.mark.parametrize(
    ("name", "rank", "message"),
    [
        ("u", 2, r"trains 'u', and the state dict holds tensors of adapters .*\.t\."),
        ("t", 1, r"'t' was saved with another config .*lora_A.*' is \(2, \d+\) .*, and \(1, \d+\) here"),
        ("t", 3, r"'t' was saved with another config .*lora_A.*' is \(2, \d+\) .*, and \(3, \d+\) here"),
    ],
)
def test_resuming_with_another_adapter_or_rank_is_an_error_and_changes_nothing(
    name: str, rank: int, message: str, checkpoint: Path
) -> None:
    other, _ = adapted(LoraConfig(r=rank, target_modules=["query"]), name)
    before = values(other)
    with pytest.raises(ak.CheckpointError, match=message):
        trainer(other, checkpoint.parent).train(resume_from_checkpoint=str(checkpoint))
    assert_equal(values(other), before)


def test_a_warning_names_parameters_that_train_and_are_not_written(tmp_path: Path) -> None:
    model, _ = adapted()
    model.bert.embeddings.LayerNorm.weight.requires_grad_()
    with pytest.warns(ak.AdapterWarning, match=r"such as 'bert.embeddings.LayerNorm.weight' \(1 in all\), and are not"):
        trainer(model, tmp_path).save_model()
