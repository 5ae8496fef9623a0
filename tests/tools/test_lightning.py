"""Lightning: checkpoints hold adapters alone, and a resumed fit is the uninterrupted one."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.models import build
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import adapterkit as ak
from adapterkit.integrations.lightning import STATES, AdapterCheckpoints

pytestmark = [
    # Of Lightning itself, about torch's API and about the size of this data.
    pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
]
ADALORA = Path(__file__).parents[2] / "examples" / "thirdparty" / "adapterkit_adalora"
CONFIGS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora", "r": 2, "lora_dropout": 0.2, "bias": "all", "modules_to_save": ["classifier"]},
    "pissa": {"method": "lora", "r": 2, "init_lora_weights": "pissa"},
    "olora": {"method": "lora", "r": 2, "init_lora_weights": "olora", "use_rslora": True},
    "loha": {"method": "loha", "r": 2},
    "vera": {"method": "vera", "r": 4, "save_projection": False},
    "adalora": {"method": "adalora", "init_r": 4, "target_r": 1, "tinit": 1, "tfinal": 1, "total_step": 12},
}


@pytest.fixture(scope="module", autouse=True)
def _adalora() -> Iterator[None]:
    sys.path.insert(0, str(ADALORA))
    ak.register(importlib.import_module("adapterkit_adalora").plugin)
    yield
    sys.path.remove(str(ADALORA))
    ak.default_registry.unregister("adalora")


@pytest.fixture(params=["lightning.pytorch", "pytorch_lightning"])
def lightning(request: pytest.FixtureRequest) -> Any:
    return importlib.import_module(request.param)


def module(pl: Any, *configs: str, **options: Any) -> Any:
    """A module with an adapted BERT inside, and with one more layer of its own."""

    class Classifier(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.model, self.other = build("bert"), build("gpt2")
            self.scale = nn.Linear(3, 3)
            adapters = ak.attach(self.model)
            for name in configs:
                fields = {"target_modules": ["query", "value"], "modules_to_save": None, **CONFIGS[name]}
                adapters.add(name, ak.config(fields.pop("method"), **fields))
            adapters.activate(*configs)
            self.train()
            if options.get("second"):
                ak.attach(self.other).add("o", ak.config("lora", r=2, target_modules=["c_attn"]))

        def training_step(self, batch: Any, index: int) -> Tensor:
            ids, labels = batch
            logits = self.scale(self.model(input_ids=ids).logits)
            loss = nn.functional.cross_entropy(logits, labels)
            if options.get("second"):
                loss = loss + self.other(input_ids=ids).logits.square().mean()
            if self._trainer is not None:
                self.log("loss", loss)
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)

    return Classifier


def data(*, shuffle: bool = True) -> DataLoader[Any]:
    noise = torch.Generator().manual_seed(0)
    ids, labels = torch.randint(1, 30, (12, 7), generator=noise), torch.randint(0, 3, (12,), generator=noise)
    return DataLoader(TensorDataset(ids, labels), batch_size=4, shuffle=shuffle)


def trainer(pl: Any, folder: Path, epochs: int, **options: Any) -> Any:
    every = pl.callbacks.ModelCheckpoint(folder, save_top_k=-1, filename="{epoch}", **options.pop("checkpoint", {}))
    how = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    callbacks = [every, AdapterCheckpoints()]
    return pl.Trainer(max_epochs=epochs, callbacks=callbacks, default_root_dir=folder, **how, **options)


def fit(pl: Any, made: Any, folder: Path, epochs: int = 3, resume: Path | None = None, **options: Any) -> Any:
    torch.manual_seed(1)
    found = made()
    trainer(pl, folder, epochs, **options).fit(found, data(), ckpt_path=resume)
    return found


def beside_merged(made: Any) -> Any:
    adapters = ak.attach(made.model)
    adapters.add("merged", ak.config("lora", r=2, target_modules=["key"], modules_to_save=None), activate=False)
    adapters.merge("merged")
    return made


def at_half(made: Any) -> Any:
    """The module with its adapter at half of its strength."""
    ak.attach(made.model).activate("lora", strengths={"lora": 0.5})
    return made


def assert_same(one: nn.Module, other: nn.Module) -> None:
    """Equal but for what another alignment of memory may change; a step of training changes ten thousand times that."""
    expected, found = one.state_dict(), other.state_dict()
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-6, atol=1e-6, msg=key)


@pytest.mark.parametrize(
    ("configs", "options"),
    [
        *(([name], {}) for name in CONFIGS if name != "lora"),
        (["lora"], {"accumulate_grad_batches": 2}),
        (["adalora"], {"accumulate_grad_batches": 2}),
        (["lora", "vera"], {"precision": "64-true"}),
    ],
)
def test_a_resumed_fit_is_the_uninterrupted_one(configs: list[str], options: dict[str, Any], tmp_path: Path) -> None:
    pl: Any = importlib.import_module("lightning.pytorch")
    made = module(pl, *configs)
    whole = fit(pl, made, tmp_path / "whole", **options)
    fit(pl, made, tmp_path / "part", epochs=1, **options)
    torch.rand(5)
    again = fit(pl, made, tmp_path / "part", resume=tmp_path / "part" / "epoch=0.ckpt", **options)
    assert_same(whole, again)
    for name in configs:
        one, other = (ak.attach(each.model).training_state(name) for each in (whole, again))
        assert one["steps"] == other["steps"] == (6 if options.get("accumulate_grad_batches") else 9)
        for key, value in one.items():
            torch.testing.assert_close(other[key], value, rtol=1e-6, atol=1e-6, msg=key)


def test_both_packages_train_several_models_and_their_checkpoints_hold_no_base(lightning: Any, tmp_path: Path) -> None:
    made = module(lightning, "lora", "loha", second=True)
    whole = fit(lightning, made, tmp_path / "whole", epochs=2)
    file = tmp_path / "whole" / "epoch=0.ckpt"
    again = fit(lightning, made, tmp_path / "whole", epochs=2, resume=file)
    assert_same(whole, again)
    checkpoint = torch.load(file, weights_only=True)
    trained = {key for key, parameter in whole.named_parameters() if parameter.requires_grad}
    assert checkpoint["state_dict"].keys() >= trained
    assert not any(p.requires_grad is False and key in checkpoint["state_dict"] for key, p in whole.named_parameters())
    states = checkpoint[STATES]
    assert {path: set(found) for path, found in states.items()} == {"model.": {"lora", "loha"}, "other.": {"o"}}
    every = [state for found in states.values() for state in found.values()]
    again_in_states = sum(t.numel() for state in every for key, t in state.items() if key != "config")
    biases = sum(b.numel() for name, b in whole.named_buffers() if ".adapter_biases." in name)
    assert again_in_states <= 3 + biases  # the numbers of steps, and what no state dict has


def test_the_best_checkpoint_is_tested_and_loaded(tmp_path: Path) -> None:
    pl: Any = importlib.import_module("lightning.pytorch")
    base = module(pl, "lora", "pissa")

    class Tested(base):
        def test_step(self, batch: Any, index: int) -> None:
            self.log("test", self.training_step_without_log(batch))

        def training_step_without_log(self, batch: Any) -> Tensor:
            return nn.functional.cross_entropy(self.scale(self.model(input_ids=batch[0]).logits), batch[1])

    torch.manual_seed(1)
    found, best = Tested(), pl.callbacks.ModelCheckpoint(tmp_path, monitor="loss", mode="max")  # the first epoch
    how = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    runs = pl.Trainer(max_epochs=3, callbacks=[best, AdapterCheckpoints()], default_root_dir=tmp_path, **how)
    runs.fit(found, data())
    last = {key: value.clone() for key, value in found.state_dict().items()}
    ((result,),) = (runs.test(found, data(shuffle=False), ckpt_path="best"),)
    changed = {key for key, value in found.state_dict().items() if not torch.equal(value, last[key])}
    assert any("lora_B" in key for key in changed)
    loaded = Tested.load_from_checkpoint(best.best_model_path, weights_only=True)
    assert_same(found.eval(), loaded.eval())
    with torch.no_grad():
        total = sum(float(loaded.training_step_without_log(batch)) for batch in data(shuffle=False)) / 3
    assert total == pytest.approx(result["test"], abs=1e-5)


def test_what_else_trains_and_statistics_of_norms_go_on_too(tmp_path: Path) -> None:
    pl: Any = importlib.import_module("lightning.pytorch")

    class Norms(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.model = nn.Sequential(nn.Linear(7, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))
            ak.attach(self.model).add("a", ak.config("lora", r=2, target_modules=["0"]))
            self.model[2].requires_grad_(True)

        def training_step(self, batch: Any, index: int) -> Tensor:
            return nn.functional.cross_entropy(self.model(batch[0].float()), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)

    whole = fit(pl, Norms, tmp_path / "whole", epochs=2)
    again = fit(pl, Norms, tmp_path / "whole", epochs=2, resume=tmp_path / "whole" / "epoch=0.ckpt")
    assert_same(whole, again)
    assert not torch.equal(whole.model[1].running_mean, torch.zeros(6))


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_penalty_is_a_part_of_the_loss(accumulate: int, tmp_path: Path) -> None:
    pl: Any = importlib.import_module("lightning.pytorch")
    base = module(pl, "adalora")
    grads: list[list[Tensor]] = []

    class Watched(base):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            grads.append([p.grad.clone() for p in ak.attach(self.model).parameters("adalora")])

    found = fit(pl, Watched, tmp_path / "one", epochs=1, accumulate_grad_batches=accumulate)
    torch.manual_seed(1)
    plain = base()
    batches = list(data())[:accumulate]
    assert ak.penalty(plain.model) > 0
    assert len(grads) == 3 // accumulate
    assert ak.attach(found.model).training_state("adalora")["steps"] == len(grads)
    total = sum(plain.training_step(batch, 0) / accumulate for batch in batches) + ak.penalty(plain.model)
    expected = torch.autograd.grad(total, [*ak.attach(plain.model).parameters("adalora")])
    for mine, other in zip(grads[0], expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)


def test_a_checkpoint_of_other_adapters_is_refused(tmp_path: Path) -> None:
    pl: Any = importlib.import_module("lightning.pytorch")
    fit(pl, module(pl, "lora"), tmp_path, epochs=1)
    with pytest.raises((ak.CheckpointError, RuntimeError), match="loha"):
        fit(pl, module(pl, "loha"), tmp_path / "other", resume=tmp_path / "epoch=0.ckpt")
    made = module(pl, "lora")
    with pytest.raises(ak.CheckpointError, match=r"'lora' \(strength 0.5\) acted"):
        fit(pl, lambda: at_half(made()), tmp_path / "other", resume=tmp_path / "epoch=0.ckpt")
    with pytest.raises((ak.CheckpointError, RuntimeError), match=r"adapters.merged.lora_A|with 'merged' merged"):
        fit(pl, lambda: beside_merged(made()), tmp_path / "other", resume=tmp_path / "epoch=0.ckpt")
    with pytest.raises(ak.ConfigError, match="no adapters"):
        fit(pl, module(pl), tmp_path / "none")
    with pytest.warns(ak.AdapterWarning, match="save_weights_only"):
        fit(pl, module(pl, "lora"), tmp_path / "whole", epochs=1, checkpoint={"save_weights_only": True})


def test_a_fit_that_resumes_without_the_callback_warns(tmp_path: Path) -> None:
    pl: Any = importlib.import_module("lightning.pytorch")
    made = module(pl, "lora")
    fit(pl, made, tmp_path, epochs=1)
    plain = trainer(pl, tmp_path, epochs=1)
    plain.callbacks[:] = [each for each in plain.callbacks if not isinstance(each, AdapterCheckpoints)]
    with pytest.warns(UserWarning, match=r"Please add the following callbacks: .*AdapterCheckpoints"):
        plain.fit(made(), data(), ckpt_path=tmp_path / "epoch=0.ckpt")
