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
from transformers import Trainer, TrainingArguments

import adapterkit as ak
from adapterkit_lora import LoraConfig

LORA = LoraConfig(r=2, lora_dropout=0.1, target_modules=["query", "value"], bias="all", modules_to_save=["classifier"])


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


def trainer(model: nn.Module, folder: Path, *, cls: type[Trainer] = Trainer, **options: Any) -> Any:
    """Two steps with a checkpoint at each. Options of the class itself go there, the others to the arguments.

    With an epsilon that keeps Adam from blowing up what another alignment of memory changes in small gradients."""
    own = {name: options.pop(name) for name in ("adapter_options", "lora_plus_ratio") if name in options}
    given = {"max_steps": 2, "save_steps": 1, "learning_rate": 1e-2, "adam_epsilon": 1e-3, "report_to": "none"}
    arguments = TrainingArguments(
        str(folder), per_device_train_batch_size=4, use_cpu=True, disable_tqdm=True, **{**given, **options}
    )
    return cls(model, arguments, train_dataset=Sentences(), eval_dataset=Sentences(), **own)


def values(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.detach().clone() for key, value in model.state_dict().items()}


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """Bit for bit where memory is aligned alike; a step of training changes ten thousand times the tolerance."""
    assert one.keys() == other.keys()
    for key, value in one.items():
        torch.testing.assert_close(value, other[key], rtol=0, atol=1e-6, msg=key)


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


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two steps of a training wrote, and a file of the values then."""
    folder = tmp_path_factory.mktemp("training")
    model, adapters = adapted(LoraConfig(r=2, target_modules=["query"]))
    trainer(model, folder).train()
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


def test_the_best_model_at_the_end_is_the_one_that_was_saved_then(tmp_path: Path) -> None:
    model, _ = adapted()
    options = {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "eval_loss"}
    run = trainer(model, tmp_path, load_best_model_at_end=True, greater_is_better=True, **options)
    run.train()
    assert run.state.best_model_checkpoint == str(tmp_path / "checkpoint-1")  # the loss falls
    own = {key: value for key, value in values(model).items() if key not in base_keys()}
    best, last = (safetensors.torch.load_file(tmp_path / f"checkpoint-{n}" / "model.safetensors") for n in (1, 2))
    for held in (best, last):
        del held["adapterkit.setting"]
    assert_equal(own, best)
    assert any(not torch.equal(own[key], last[key]) for key in own)


def test_a_warning_names_parameters_that_train_and_are_not_written(tmp_path: Path) -> None:
    model, _ = adapted()
    model.bert.embeddings.LayerNorm.weight.requires_grad_()
    with pytest.warns(ak.AdapterWarning, match=r"such as 'bert.embeddings.LayerNorm.weight' \(1 in all\), and are not"):
        trainer(model, tmp_path).save_model()
