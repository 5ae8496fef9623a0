"""Merging where some layers are quantised: refused before anything is written, and the model is as it was."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import adapterkit as ak
from adapterkit_lora import LoraConfig

X = torch.randn(3, 32, generator=torch.Generator().manual_seed(1))


def int8_of_torchao(model: nn.Module) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(model.second, quantization.Int8WeightOnlyConfig())


def int8_of_quanto(model: nn.Module) -> None:
    quanto = pytest.importorskip("optimum.quanto")
    quanto.quantize(model, weights=quanto.qint8, include=["second"])
    quanto.freeze(model)


def int8_of_quanto_in_each_forward(model: nn.Module) -> None:
    quanto = pytest.importorskip("optimum.quanto")
    quanto.quantize(model, weights=quanto.qint8, include=["second"])


@pytest.mark.parametrize("keep_base", [True, False], ids=["base kept", "base not kept"])
@pytest.mark.parametrize("quantise", [int8_of_torchao, int8_of_quanto, int8_of_quanto_in_each_forward])
def test_one_quantised_layer_refuses_the_whole_merge(quantise: Callable[[nn.Module], None], keep_base: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("first", nn.Linear(32, 32))
    model.add_module("second", nn.Linear(32, 32))
    quantise(model.eval())
    adapters = ak.attach(model)
    adapters.add("a", LoraConfig(target_modules=["first", "second"], init_lora_weights=False))
    expected, flags = output(model), [p.requires_grad for p in model.parameters()]
    for merge in (lambda: adapters.merge("a", keep_base=keep_base), lambda: adapters.merge_and_detach("a")):
        with pytest.raises(ak.UnsupportedError, match="Nothing can be merged into 'second'"):
            merge()
        assert torch.equal(output(model), expected)
        assert adapters.active == ("a",)
        assert adapters.merged == ()
        assert [p.requires_grad for p in model.parameters()] == flags


@torch.no_grad()
def output(model: nn.Module) -> Tensor:
    return model(X)


QUANTISED = [int8_of_torchao, int8_of_quanto]


def quantised(quantise: Callable[[nn.Module], None]) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("first", nn.Linear(32, 32))
    model.add_module("second", nn.Linear(32, 32))
    quantise(model.eval())
    return model


@pytest.mark.parametrize("quantise", QUANTISED)
def test_a_report_has_the_size_of_a_quantised_weight(quantise: Callable[[nn.Module], None]) -> None:
    adapters = ak.attach(quantised(quantise))
    adapters.add("a", LoraConfig(r=2, target_modules=["first", "second"], init_lora_weights=False))
    layers = adapters.report().findings.adapters[0].layers.values()
    assert [layer.base_norm for layer in layers] == [pytest.approx(3.27, rel=0.05)] * 2


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("quantise", QUANTISED)
def test_an_adapter_begins_with_the_leading_part_of_a_quantised_weight(
    quantise: Callable[[nn.Module], None], init: str
) -> None:
    model = quantised(quantise)
    expected = model(X)
    ak.attach(model).add("a", LoraConfig(r=4, target_modules=["second"], init_lora_weights=init))
    torch.testing.assert_close(model(X), expected, rtol=1e-4, atol=1e-4)
    assert model.second.adapters["a"].lora_A.weight.abs().max() > 0


@pytest.mark.parametrize("quantise", QUANTISED)
def test_a_quantised_module_is_not_trained_as_a_copy(quantise: Callable[[nn.Module], None]) -> None:
    adapters = ak.attach(quantised(quantise))
    with pytest.raises(ak.UnsupportedError, match=r"'second' cannot be trained as a copy: its weight is a .*Tensor"):
        adapters.add("a", LoraConfig(r=2, target_modules=["first"], modules_to_save=["second"]))
    assert adapters.names == ()
