"""Layers that give `merged` alone: the forward that the core derives, its dtypes, dropouts and order among others."""

import itertools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from tests.core.conftest import set_parameters
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import adapterkit as ak


@dataclass(frozen=True, kw_only=True)
class TwistConfig(ak.AdapterConfig):
    """The config of a method that is no sum."""

    method = "twist"

    p: float = 0.0
    rows: float = 0.0
    module: float = 0.0


class TwistLayer(ak.AdapterLayer):
    """`W' = diag(s) W`, and a bias of its own where the layer has none."""

    def setup(self, target: ak.Target, config: TwistConfig) -> None:
        """Make the scales and the shifts."""
        self.twist_s = target.new(target.out_features, init=1.0)
        self.twist_b = target.new(target.out_features)
        self.dropout, self.row_dropout, self.module_dropout = config.p, config.rows, config.module

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """See `AdapterLayer.merged`."""
        shift = None if self.kind.lookup else self.twist_b if bias is None else bias + self.twist_b
        return weight * self.twist_s[:, None], shift


LAYERS: dict[str, tuple[Any, Any]] = {
    "Linear": (lambda: nn.Linear(6, 5), lambda: torch.randn(2, 3, 6)),
    "Conv1D": (lambda: Conv1D(5, 6), lambda: torch.randn(2, 3, 6)),
    "Conv2d": (lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2), lambda: torch.randn(2, 4, 5, 5)),
    "Embedding": (lambda: nn.Embedding(7, 5), lambda: torch.randint(0, 7, (2, 3))),
}


@pytest.fixture(autouse=True)
def registered() -> None:
    torch.manual_seed(0)
    ak.register(ak.plugin(TwistConfig, TwistLayer, prefix="twist_"))


def adapted(layer: nn.Module, **fields: Any) -> tuple[Any, ak.Adapters]:
    model = nn.Sequential(layer)
    adapters = ak.attach(model)
    adapters.add("a", TwistConfig(target_modules=["0"], **fields))
    set_parameters(adapters, "a")
    return model, adapters


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sort", LAYERS)
def test_the_forward_is_that_of_the_merged_weight_computed_in_float32(sort: str, dtype: torch.dtype) -> None:
    make, inputs = LAYERS[sort]
    model, adapters = adapted(make().to(dtype))
    x = inputs()
    x = x.to(dtype) if x.is_floating_point() else x
    layer, seen = model[0].adapters["a"], set()
    merged = layer.merged

    def watched(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        seen.update({weight.dtype, *([] if bias is None else [bias.dtype])})
        return merged(weight, bias)

    layer.merged = watched
    found = model(x)
    found.float().sum().backward()
    assert found.dtype == dtype
    assert seen == {torch.float32} == {p.dtype for p in adapters.parameters("a")}
    used = list(adapters.parameters("a"))[: 1 if sort == "Embedding" else 2]
    assert all(p.grad is not None and p.grad.any() for p in used)
    adapters.merge("a")
    torch.testing.assert_close(model(x), found, **({} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.05}))


def test_a_layer_that_is_not_plain_gets_the_change_added() -> None:
    class Louder(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 3 * super().forward(x)

    model, adapters = adapted(Louder(6, 5))
    x = torch.randn(2, 6)
    with adapters.disabled():
        base = model(x)
    layer, weight, bias = model[0].adapters["a"], model[0].weight, model[0].bias
    changed, shifted = layer.merged(weight, bias)
    torch.testing.assert_close(model(x), base + nn.functional.linear(x, changed - weight, shifted - bias))


@pytest.mark.parametrize("order", list(itertools.permutations("abc")), ids="".join)
def test_of_several_adapters_the_first_is_innermost_as_in_a_merge(order: tuple[str, ...]) -> None:
    model, adapters = adapted(nn.Linear(6, 5, dtype=torch.float64))
    adapters.add("b", ak.config("lora", r=2, target_modules=["0"], init_lora_weights=False))
    adapters.add("c", ak.config("loha", r=2, target_modules=["0"], init_weights=False))
    adapters.activate(*order)
    x = torch.randn(3, 6, dtype=torch.float64)
    found = model(x)
    adapters.merge(*order)
    torch.testing.assert_close(model(x), found)


def test_a_bias_where_the_layer_has_none_acts_and_is_not_merged() -> None:
    model, adapters = adapted(nn.Linear(6, 5, bias=False))
    x, before = torch.randn(2, 6), model[0].weight.detach().clone()
    out = model(x)
    layer = model[0].adapters["a"]
    torch.testing.assert_close(out, x @ (before * layer.twist_s[:, None]).t() + layer.twist_b)
    with pytest.raises(ak.UnsupportedError, match="'0' has no bias to merge the adapter's into"):
        adapters.merge("a")
    assert torch.equal(model[0].weight, before)
    assert torch.equal(model(x), out)


def test_dropout_acts_on_the_input_of_the_change_in_training() -> None:
    model, adapters = adapted(nn.Linear(6, 5), p=0.5)
    x = torch.ones(4000, 6)
    whole = model.eval()(x)
    with adapters.disabled():
        base = model(x)
    model.train()
    found = model(x)
    assert not torch.allclose(found, whole)
    shift = model[0].adapters["a"].twist_b
    dropped = (found - base - shift).detach()
    torch.testing.assert_close(dropped.mean(0), (whole - base - shift)[0].detach(), rtol=0.2, atol=0.2)
    assert torch.equal(model.eval()(x), whole)


@pytest.mark.parametrize("fields", [{"rows": 0.5}, {"module": 0.5}], ids=str)
def test_rows_and_the_whole_change_are_left_out_in_training(fields: dict[str, float]) -> None:
    model, adapters = adapted(nn.Linear(6, 5), **fields)
    x = torch.randn(3, 6)
    whole = model.eval()(x)
    with adapters.disabled():
        base = model(x)
    model.train()
    kept = [((model(x) - base).abs() > 1e-6).any(0) for _ in range(40)]
    if "module" in fields:
        assert {bool(rows.all()) for rows in kept} == {bool(rows.any()) for rows in kept} == {True, False}
    else:
        assert len({int(rows.sum()) for rows in kept}) > 2
    assert torch.equal(model.eval()(x), whole)


def test_rows_of_a_batch_may_have_it_and_others_not() -> None:
    model, adapters = adapted(nn.Linear(6, 5))
    x = torch.randn(4, 6)
    adapted_rows = model(x)
    with adapters.disabled():
        base = model(x)
    with adapters.per_sample(["a", None, "a", None]):
        found = model(x)
    torch.testing.assert_close(found, torch.stack([adapted_rows[0], base[1], adapted_rows[2], base[3]]))
