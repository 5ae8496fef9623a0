"""How an adapter layer is made: what it has, what its parameters begin with, and that it is an ordinary module."""

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.kinds import BUILTIN


class OuterConfig(ak.AdapterConfig):
    """The config of a layer for these tests alone."""

    method = "outer"


class OuterLayer(ak.LowRankLayer):
    """`dW = u v^T`."""

    def setup(self, target: ak.Target, config: OuterConfig) -> None:
        """Make u and v."""
        self.outer_u = target.new(target.out_features)
        self.outer_v = ak.Holder(weight=target.new(target.in_features, init=nn.init.normal_), bias=None)

    def factors(self) -> ak.Factors:
        """See `LowRankLayer.factors`."""
        return ak.Factors(self.outer_u[:, None], self.outer_v.weight[None])


def target(module: nn.Module, dtype: torch.dtype = torch.float32, **changes: Any) -> ak.Target:
    kind = next(found for found in (cls.of(module) for cls in BUILTIN) if found is not None)
    return ak.Target("fc", module, kind, **{"dtype": dtype, "device": torch.device("cpu"), **changes})


def test_a_layer_has_its_kind_its_config_and_what_is_shared_and_registers_none_of_it() -> None:
    shared, config, at = nn.Linear(2, 2), OuterConfig(target_modules=["fc"]), target(nn.Linear(3, 2))
    layer = OuterLayer(at, config, shared)
    assert layer.kind is at.kind
    assert layer.config is config
    assert layer.shared is shared
    assert dict(layer.named_parameters()).keys() == {"outer_u", "outer_v.weight"}
    assert list(layer.children()) == [layer.outer_v]
    for again in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(again.outer_v.weight, layer.outer_v.weight)
        assert (again.kind, again.config) == (layer.kind, layer.config)
    assert OuterLayer(at, config).shared is None


def test_a_new_parameter_has_the_dtype_of_the_target_and_begins_as_it_is_told() -> None:
    at = target(nn.Linear(3, 2), torch.float64)
    made = at.new(2, 3)
    assert isinstance(made, nn.Parameter)
    assert (made.dtype, made.device) == (torch.float64, torch.device("cpu"))
    assert torch.equal(made, torch.zeros(2, 3, dtype=torch.float64))
    assert torch.equal(at.new(2, init=0.5), torch.full((2,), 0.5, dtype=torch.float64))
    found: list[Tensor] = []
    filled = at.new(4, init=lambda p: found.append(p.fill_(3.0)))
    assert filled.requires_grad
    assert torch.equal(filled, torch.full((4,), 3.0, dtype=torch.float64))


@pytest.mark.parametrize("place", [{"file": {}}, {"device": torch.device("meta")}], ids=["load", "meta"])
def test_nothing_is_filled_where_values_are_to_come_or_there_is_no_memory(place: Any) -> None:
    def refuse(parameter: Tensor) -> None:
        raise AssertionError

    made = target(nn.Linear(3, 2), **place).new(2, 3, init=refuse)
    assert made.is_meta
    assert (made.shape, made.requires_grad) == ((2, 3), True)


@pytest.mark.parametrize("shape", [(4, 7), (3, 5, 2, 2), (2, 2, 3)], ids=str)
def test_kaiming_is_what_a_linear_layer_starts_with(shape: tuple[int, ...]) -> None:
    ours, torchs = torch.empty(shape), torch.empty(shape)
    torch.manual_seed(3)
    ak.kaiming(ours)
    torch.manual_seed(3)
    nn.init.kaiming_uniform_(torchs, a=math.sqrt(5))
    assert torch.equal(ours, torchs)
    assert float(ours.abs().max()) <= 1 / math.sqrt(math.prod(shape[1:]))


def test_the_weight_and_the_bias_of_a_target_are_wide_copies() -> None:
    module = nn.Linear(3, 2).to(torch.bfloat16)
    at = target(module)
    bias = at.bias()
    assert bias is not None
    assert (at.weight().dtype, bias.dtype) == (torch.float32, torch.float32)
    assert torch.equal(bias.to(torch.bfloat16), module.bias)
    bias.add_(1)
    assert not torch.equal(bias.to(torch.bfloat16), module.bias)
    assert target(nn.Linear(3, 2, bias=False)).bias() is None
