"""Names that users of PEFT type: each error tells what does the same here, and what it tells exists."""

from __future__ import annotations

import re

import peft
import pytest
from tests.combining import outer_method, registered
from torch import nn

import adapterkit as ak
from adapterkit.migration import COMBINATIONS, FUNCTIONS, METHODS
from adapterkit_loha import LoHaConfig
from adapterkit_lora import LoraConfig
from adapterkit_vera import VeraConfig


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))


def adapted(*names: str) -> ak.Adapters:
    adapters = ak.attach(mlp())
    for name in names:
        adapters.add(name, LoraConfig(r=2, target_modules=["0"]))
    return adapters


@pytest.mark.parametrize("own", [LoraConfig, LoHaConfig, VeraConfig], ids=lambda own: own.__name__)
def test_config_classes_are_names_of_the_package(own: type[ak.AdapterConfig]) -> None:
    assert getattr(ak, own.__name__) is own


def test_a_registered_method_s_config_class_is_a_name_of_the_package() -> None:
    with pytest.raises(AttributeError, match="No installed method has a config class 'OuterConfig'"):
        _ = ak.OuterConfig
    with registered(outer_method()) as plugin:
        assert ak.OuterConfig is plugin.config


def test_dir_lists_public_names_only() -> None:
    assert set(dir(ak)) == set(ak.__all__)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_peft_s_functions_name_ours(name: str) -> None:
    with pytest.raises(AttributeError, match=re.escape(FUNCTIONS[name])):
        getattr(ak, name)


@pytest.mark.parametrize("name", METHODS)
def test_peft_s_methods_name_ours(name: str) -> None:
    with pytest.raises(AttributeError, match=re.escape(METHODS[name])):
        getattr(adapted("a"), name)


@pytest.mark.parametrize("name", COMBINATIONS)
def test_peft_s_combinations_name_ours(name: str) -> None:
    with pytest.raises(ak.UnknownNameError, match=re.escape(COMBINATIONS[name])) as caught:
        adapted("a").combine("c", {"a": 1.0}, method=name)
    assert "Did you mean" not in str(caught.value)


@pytest.mark.parametrize("text", [*FUNCTIONS.values(), *METHODS.values()])
def test_what_is_named_exists(text: str) -> None:
    for name in re.findall(r"\bak\.(\w+)", text):
        getattr(ak, name)
    for name in re.findall(r"\badapters\.(\w+)", text):
        getattr(ak.Adapters, name)


def test_peft_s_config_is_refused_with_ours() -> None:
    with pytest.raises(ak.ConfigError, match=r"This LoraConfig is PEFT's.*ak\.LoraConfig\(\.\.\.\)"):
        adapted().add("a", peft.LoraConfig(r=2, target_modules=["0"]))
