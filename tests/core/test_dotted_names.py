"""An adapter may be called `v1.0`: everything that goes by its name finds it."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.models import build
from torch import nn

import adapterkit as ak
from adapterkit_lora import LoraConfig

IDS = torch.tensor([[1, 2, 3, 4]])


def adapted(method: str = "lora") -> ak.Adapters:
    torch.manual_seed(0)
    adapters = ak.attach(build("bert").eval())
    adapters.add("v1.0", ak.config(method, r=2, target_modules=["query"], bias="all" if method != "loha" else "none"))
    with torch.no_grad():
        for parameter in adapters.parameters("v1.0"):
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return adapters


def outputs(model: nn.Module) -> Any:
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("method", ["lora", "loha", "vera"])
def test_it_saves_loads_and_swaps(method: str, tmp_path: Path) -> None:
    adapters = adapted(method)
    expected = outputs(adapters.model)
    folder = adapters.save("v1.0", tmp_path / "v1.0")
    other = ak.attach(build("bert").eval())
    other.load(folder)
    assert other.names == ("v1.0",)
    torch.testing.assert_close(outputs(other.model), expected)
    adapters.swap("v1.0", folder)
    torch.testing.assert_close(outputs(adapters.model), expected)


@pytest.mark.parametrize("method", ["lora", "vera"])
def test_a_state_dict_of_the_model_holds_it_and_brings_it_back(method: str) -> None:
    adapters, other = adapted(method), adapted(method)
    expected = outputs(adapters.model)
    state = {key: tensor.clone() for key, tensor in adapters.model.state_dict().items()}
    with torch.no_grad():
        for parameter in other.parameters("v1.0"):
            parameter.zero_()
    other.model.load_state_dict(state)
    torch.testing.assert_close(outputs(other.model), expected)
    other.load_state_dict("v1.0", state)
    assert other.state_dict("v1.0", source=state).keys() == adapters.state_dict("v1.0").keys()


def test_model_s_paths_find_its_modules_and_parameters() -> None:
    model = adapted().model
    for path, module in model.named_modules():
        assert model.get_submodule(path) is module
    for path, parameter in model.named_parameters():
        assert model.get_parameter(path) is parameter


def test_it_is_renamed_copied_merged_pickled_and_removed(tmp_path: Path) -> None:
    adapters = adapted()
    expected = outputs(adapters.model)
    torch.testing.assert_close(outputs(pickle.loads(pickle.dumps(adapters.model))), expected)
    torch.testing.assert_close(outputs(copy.deepcopy(adapters.model)), expected)
    adapters.rename("v1.0", "v1.1")
    adapters.copy("v1.1", "v1.2")
    adapters.activate("v1.2")
    torch.testing.assert_close(outputs(adapters.model), expected)
    adapters.merge("v1.2")
    torch.testing.assert_close(outputs(adapters.model), expected)
    adapters.unmerge()
    adapters.load_training_state("v1.1", adapters.training_state("v1.2"))
    adapters.remove("v1.1")
    adapters.model.save_pretrained(tmp_path)
    torch.testing.assert_close(outputs(adapters.model), expected)
    adapters.detach()


def test_two_names_that_differ_in_a_dot_s_place_alone_are_two() -> None:
    adapters = adapted()
    adapters.add("v10.", ak.config("lora", r=2, target_modules=["query"]))
    with pytest.raises(ak.ConfigError, match=r"There is an adapter 'v1\.0' already"):
        adapters.add("v1·0", ak.config("lora", r=2, target_modules=["query"]))


def test_a_module_may_be_called_as_the_adapters_are_kept() -> None:
    model = nn.Module()
    model.adapters = nn.ModuleDict({"a": nn.Sequential(nn.Linear(4, 4))})
    adapters = ak.attach(model)
    adapters.add("a", LoraConfig(r=2, target_modules=["adapters.a.0"]))
    found, expected = adapters.state_dict("a", model.state_dict()), adapters.state_dict("a")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
