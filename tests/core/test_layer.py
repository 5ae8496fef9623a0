"""Modules that are made without nn.Module's own constructor are modules like all others."""

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import adapterkit as ak
from adapterkit.contract.layers import AdapterLayer, Holder
from adapterkit_lora.layer import kaiming_uniform


class Plain(nn.Module):
    """What a Holder stands for, as torch makes it."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.register_parameter("weight", weight)
        self.register_parameter("bias", bias)


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))


def test_a_holder_has_the_state_of_a_module_that_torch_makes() -> None:
    weight = parameter(2, 3)
    ours, torchs = Holder(weight=weight, bias=None), Plain(weight, None)
    assert {name: (type(v), v) for name, v in vars(ours).items()} == {
        name: (type(v), v) for name, v in vars(torchs).items()
    }
    assert ours.state_dict().keys() == torchs.state_dict().keys()
    assert ours.weight is weight


def test_holders_share_nothing() -> None:
    first, second = Holder(), Holder()
    containers = {id(v) for v in vars(first).values() if isinstance(v, dict | set | list)}
    assert not containers & {id(v) for v in vars(second).values()}
    first.register_forward_hook(lambda *_: None)
    first.register_parameter("weight", parameter(1))
    assert not second._forward_hooks
    assert not list(second.parameters())


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_a_holder_is_copied_and_pickled(again: Any) -> None:
    holder = Holder(weight=parameter(2))
    assert torch.equal(again(holder).weight, holder.weight)


def test_a_holder_moves_as_a_module_does() -> None:
    holder = Holder(weight=parameter(2), bias=None).to(torch.float64)
    assert holder.weight.dtype == torch.float64
    assert holder.bias is None


def test_what_a_layer_holds_is_as_if_assigned() -> None:
    kind = ak.default_registry.kind_of(nn.Linear(2, 2))
    assert kind is not None
    layer = AdapterLayer(kind, r=3)
    part, weight = nn.Linear(2, 2), parameter(1)
    layer.hold(part=part, weight=weight)
    assert (layer.r, layer.kind) == (3, kind)
    assert layer.part is part
    assert dict(layer.named_parameters()) == {"weight": weight, "part.weight": part.weight, "part.bias": part.bias}


@pytest.mark.parametrize("shape", [(4, 7), (16, 300), (1, 1)])
def test_initial_values_are_those_of_torch_bit_for_bit(shape: tuple[int, int]) -> None:
    ours, torchs = torch.empty(shape), torch.empty(shape)
    torch.manual_seed(0)
    kaiming_uniform(ours)
    torch.manual_seed(0)
    nn.init.kaiming_uniform_(torchs, a=math.sqrt(5))
    assert torch.equal(ours, torchs)
