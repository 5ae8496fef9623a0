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
