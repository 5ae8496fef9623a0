"""What all layers of an adapter share and what trains in it; and which of a layer's tensors a file holds."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.core.conftest import assert_as_before, snapshot
from tests.models import EmbeddingNet, tokens
from torch import Tensor, nn

import adapterkit as ak


class BankConfig(ak.AdapterConfig):
    """A bank of vectors `(entries, size)` that trains, and from which each layer's factors are mixed."""

    method = "bank"


class BankLayer(ak.LowRankLayer):
    """`dW = scale * (u B) (v B)^T`: two mixtures of the bank's vectors; a fixed sign is in the file, a scale is not."""

    bank_sign: Tensor
    bank_scale: Tensor

    def setup(self, target: ak.Target, config: BankConfig) -> None:
        self.bank_u, self.bank_v = target.new(ENTRIES, init=nn.init.normal_), target.new(ENTRIES)
        self.register_buffer("bank_sign", torch.ones(1, dtype=target.dtype, device=target.device))
        scale = torch.full((1,), 0.5, dtype=target.dtype, device=target.device)
        self.register_buffer("bank_scale", scale, persistent=False)

    def factors(self) -> ak.Factors:
        bank = self.shared.bank_store.bank_vectors
        up, down = self.bank_u @ bank[:, : self.kind.out_features], self.bank_v @ bank[:, : self.kind.in_features]
        return ak.Factors(up[:, None] * self.bank_scale * self.bank_sign, down[None])


ENTRIES = 3


class BankShared(ak.Shared):
    def setup(self, targets: Sequence[ak.Target], config: BankConfig, root: ak.Target) -> None:
        size = max(n for t in targets for n in (t.in_features, t.out_features))
        self.bank_store = ak.Holder(bank_vectors=root.new(ENTRIES, size, init=nn.init.normal_))
        self.register_buffer("bank_note", torch.arange(3.0, device=root.device))


@pytest.fixture(autouse=True)
def registered() -> None:
    ak.register(ak.plugin(BankConfig, BankLayer, prefix="bank_", shared=BankShared))


def model(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return EmbeddingNet().double().eval()


TARGETS = ["layers.0", "layers.1", "embed"]


def trained(name: str = "a", steps: int = 3, net: nn.Module | None = None) -> ak.Adapters:
    adapters = ak.attach(model() if net is None else net)
    adapters.add(name, ak.config("bank", target_modules=TARGETS, modules_to_save=None))
    return train(adapters, name, steps)


def train(adapters: ak.Adapters, name: str, steps: int) -> ak.Adapters:
    optimizer = torch.optim.SGD(adapters.parameters(name), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        adapters.model(tokens()).pow(2).sum().backward()
        optimizer.step()
    return adapters


def bank(adapters: ak.Adapters, name: str = "a") -> Tensor:
    return dict(adapters.named_parameters(name))["bank_store.bank_vectors"]


def test_the_bank_trains_and_counts() -> None:
    adapters = trained(steps=0)
    before = bank(adapters).detach().clone()
    train(adapters, "a", 2)
    assert not torch.equal(bank(adapters), before)
    row = adapters.status().rows[0]
    assert row.parameters == sum(p.numel() for p in adapters.parameters("a")) == ENTRIES * (32 + 2 * 3)
    assert ak.preview(model(), adapters.config("a")).parameters == row.parameters
    adapters.activate("a", trainable=False)
    assert not bank(adapters).requires_grad
    adapters.activate("a")
    assert bank(adapters).requires_grad


def test_it_is_saved_loaded_and_swapped_in(tmp_path: Path) -> None:
    adapters = trained()
    ids = tokens()
    expected = adapters.model(ids).detach()
    folder = adapters.save("a", tmp_path / "a")
    again = ak.attach(model())
    assert again.load(folder, "b") == ak.LoadReport()
    torch.testing.assert_close(again.model(ids), expected)
    other = trained("c", steps=1)
    place = bank(other, "c")
    other.swap("c", folder)
    assert bank(other, "c") is place
    torch.testing.assert_close(other.model(ids), expected)
    full = adapters.model.state_dict()
    other = trained("a", steps=1)
    other.load_state_dict("a", full)
    torch.testing.assert_close(other.model(ids), expected)
    torch.testing.assert_close(adapters.state_dict("a", full), adapters.state_dict("a"))


def test_each_adapter_has_its_own() -> None:
    adapters = trained()
    expected = adapters.model(tokens()).detach()
    adapters.copy("a", "b")
    assert bank(adapters, "b").data_ptr() != bank(adapters).data_ptr()
    with torch.no_grad():
        for parameter in adapters.parameters("b"):
            parameter.mul_(2)
    torch.testing.assert_close(adapters.model(tokens()), expected)
    deep = copy.deepcopy(adapters.model)
    assert bank(ak.attach(deep)).data_ptr() != bank(adapters).data_ptr()
    adapters.rename("a", "c")
    torch.testing.assert_close(adapters.model(tokens()), expected)
    assert "adapter_shared.c.bank_store.bank_vectors" in adapters.model.state_dict()
    assert "bank_note" not in dict(adapters.named_parameters("c"))  # it is fixed, and in the file
    assert {"base_model.bank_note", "base_model.bank_store.bank_vectors"} <= adapters.state_dict("c").keys()


def test_it_moves_with_the_model() -> None:
    adapters = trained()
    expected = adapters.model(tokens()).float()
    adapters.model.to(torch.float32)
    assert bank(adapters).dtype == torch.float32
    torch.testing.assert_close(adapters.model(tokens()), expected, rtol=1e-4, atol=1e-5)


def test_it_is_merged_combined_and_chosen_by_row() -> None:
    adapters = trained()
    ids = tokens()
    expected = adapters.model(ids).detach()
    adapters.copy("a", "b")
    with torch.no_grad():
        bank(adapters, "b").mul_(-1.5)
    adapters.activate("b")
    second = adapters.model(ids).detach()
    with adapters.disabled():
        bare = adapters.model(ids)
    with adapters.per_sample(["a", None]):
        rows = adapters.model(ids)
    torch.testing.assert_close(rows, torch.stack([expected[0], bare[1]]))
    adapters.combine("sum", {"a": 1.0})
    adapters.activate("sum")
    torch.testing.assert_close(adapters.model(ids), expected)
    adapters.activate()
    adapters.merge("b")
    torch.testing.assert_close(adapters.model(ids), second)
    adapters.unmerge()
    torch.testing.assert_close(adapters.model(ids), bare)


def test_detach_takes_it_away() -> None:
    net = model()
    before = snapshot(net)
    trained(net=net).detach()
    assert_as_before(net, before)


def test_of_a_layer_s_buffers_a_file_holds_the_persistent_ones(tmp_path: Path) -> None:
    adapters = trained()
    layer: Any = adapters.model.get_submodule("layers.0.adapters.a")
    layer.bank_sign.fill_(-1.0)
    expected = adapters.model(tokens()).detach()
    folder = adapters.save("a", tmp_path / "a")
    names = {key.rpartition(".")[2] for key in adapters.state_dict("a")}
    assert {"bank_sign"} == names & {"bank_sign", "bank_scale"}
    adapters.swap("a", folder)
    torch.testing.assert_close(adapters.model(tokens()), expected)
    other = trained(steps=1)
    other.swap("a", folder)
    torch.testing.assert_close(other.model(tokens()), expected)


def test_layers_penalty_and_steps_are_public(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, list[str]]] = []

    def penalty(self: Any, layers: Mapping[str, Any]) -> Tensor:
        return sum((layer.bank_u.square().sum() for layer in layers.values()), torch.zeros((), dtype=torch.float64))

    def step(self: Any, number: int, layers: Mapping[str, Any]) -> None:
        seen.append((number, list(layers)))

    monkeypatch.setattr(BankShared, "penalty", penalty)
    monkeypatch.setattr(BankShared, "step", step)
    adapters = trained(steps=0)
    layers = adapters.layers("a")
    assert all(isinstance(layer, BankLayer) for layer in layers.values())
    expected = sum(layer.bank_u.square().sum() for layer in layers.values())
    assert torch.equal(ak.penalty(adapters.model), expected)
    ak.penalty(adapters.model).backward()
    assert all(layer.bank_u.grad is not None for layer in layers.values())
    adapters.step()
    adapters.step()
    with adapters.disabled():
        adapters.step()
        assert float(ak.penalty(adapters.model)) == 0.0
    assert seen == [(1, list(layers)), (2, list(layers))]
    with pytest.raises(TypeError):
        layers["x"] = None  # type: ignore[index]


@pytest.mark.parametrize(
    ("part", "message"),
    [("step", r"call adapters.step\(\) after each"), ("penalty", r"add ak.penalty\(model\) to the loss")],
)
def test_a_training_that_leaves_out_a_part_of_the_method_is_warned_once(
    part: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BankShared, part, lambda self, *_: torch.zeros(()))
    with pytest.warns(ak.AdapterWarning, match=f"'a' trains without a part of its method 'bank': {message}") as warned:
        trained(steps=4)
    assert len(warned) == 1


def test_a_training_that_calls_step_and_penalty_gets_no_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BankShared, "step", lambda self, *_: None)
    monkeypatch.setattr(BankShared, "penalty", lambda self, *_: torch.zeros(()))
    adapters = trained(steps=0)
    optimizer = torch.optim.SGD(list(adapters.parameters("a")), lr=0.1)
    for _ in range(3):
        (adapters.model(tokens()).square().sum() + ak.penalty(adapters.model)).backward()
        optimizer.step()
        adapters.step()


def test_an_adapter_that_acts_and_does_not_train_makes_no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    monkeypatch.setattr(BankShared, "step", lambda self, number, layers: seen.append(number))
    adapters = trained(steps=0)
    adapters.activate("a", trainable=False)
    adapters.step()
    assert seen == []


def test_a_shared_tensor_with_another_prefix_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def setup(self: Any, targets: Any, config: Any, root: ak.Target) -> None:
        self.vectors = root.new(3)

    monkeypatch.setattr(BankShared, "setup", setup)
    with pytest.raises(
        ak.PluginError, match="its BankShared made 'vectors'; every shared tensor's name must begin with"
    ):
        trained(steps=0)
