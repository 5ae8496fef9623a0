"""Plugins that fail late, while something is merged or loaded: the error says who and where, the model is untouched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.core.broken_methods import MergedLayer, Outer, OuterConfig, OuterLayer
from tests.core.test_errors import unchanged
from torch import Tensor, nn

import adapterkit as ak
from adapterkit_lora import LoraConfig

WHO = "The method 'broken_outer'"


def raises(**arguments: Any) -> Any:
    raise ZeroDivisionError("by zero")


def with_layer(layer: type[ak.AdapterLayer]) -> Outer:
    plugin: Outer = type("Faulty", (Outer,), {"layer": layer})()
    return plugin


def model_with_both() -> ak.Adapters:
    torch.manual_seed(0)
    adapters = ak.attach(nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 4)))
    adapters.add("good", LoraConfig(r=2, target_modules=["0", "1"], init_lora_weights=False))
    adapters.add("bad", OuterConfig(target_modules=["0", "1"]))
    for parameter in adapters.parameters("bad"):
        nn.init.ones_(parameter)
    return adapters


FAULTS: list[tuple[Any, str]] = [
    (raises, "raised ZeroDivisionError: by zero."),
    (lambda **_: torch.zeros(1), "returned shape (1,); it must return (weight, bias)."),
    (lambda **_: (torch.zeros(1), None), "gave '1' a weight of shape (1,); it must be shape (4, 5)."),
    (lambda **_: (None, None), "returned a tuple; it must return (weight, bias)."),
    (
        lambda weight, **_: (weight, None),
        "gave '1' a bias of a NoneType; it must be shape (4,).",
    ),
]


@pytest.mark.parametrize("keep_base", [True, False])
@pytest.mark.parametrize(("wrong", "message"), FAULTS)
def test_merge_rule_that_fails_half_way_changes_nothing(wrong: Any, message: str, keep_base: bool) -> None:
    """It is right at the first of two layers."""

    class layer(MergedLayer):
        def merged(self, weight: Tensor, bias: Tensor | None) -> Any:
            if not weight.any() or weight.shape == (5, 4):  # it is asked with zeros before
                return weight + self.dense(), bias
            return wrong(weight=weight, bias=bias)

    ak.register(with_layer(layer))
    adapters = model_with_both()
    with unchanged(adapters.model), pytest.raises(ak.PluginError) as caught:
        adapters.merge("bad", keep_base=keep_base)
    assert str(caught.value) == f"{WHO} (Faulty): layer.merged {message}"
    adapters.merge("good")  # the other method goes on working
    adapters.unmerge()


def up_and_down_swapped(layer: Any) -> ak.Factors:
    return ak.Factors(layer.outer_v[:, None], layer.outer_u[None])


WRONG_SHAPES: list[tuple[Any, str, Any, str]] = [
    (
        ak.LowRankLayer,
        "factors",
        up_and_down_swapped,
        "gave for '0' of (5, 4) (out, in): up shape (4, 1), down shape (1, 5), scale a float. up must be (out, r),",
    ),
    (
        ak.LowRankLayer,
        "factors",
        lambda layer: ak.Factors(layer.outer_u[:, None], layer.outer_v[None], 0.5),  # type: ignore[arg-type]
        "gave for '0' of (5, 4) (out, in): up shape (5, 1), down shape (1, 4), bias a float",
    ),
    (
        ak.LowRankLayer,
        "factors",
        lambda layer: ak.Factors(layer.outer_u[:, None], layer.outer_v[None], mid=torch.eye(2)),
        "gave for '0' of (5, 4) (out, in): up shape (5, 1), down shape (1, 4), scale a float, mid shape (2, 2)",
    ),
    (ak.LowRankLayer, "factors", lambda layer: None, "returned None; it must return a Factors."),
    (ak.DenseLayer, "change", lambda layer: layer.outer_u[None], "gave '0' shape (1, 5); it must be shape (5, 4)."),
    (
        ak.AdapterLayer,
        "merged",
        lambda layer, weight, bias: (weight.t(), bias),
        "gave '0' a weight of shape (4, 5); it must be shape (5, 4).",
    ),
    (
        ak.AdapterLayer,
        "merged",
        lambda layer, weight, bias: (weight, weight),
        "gave '0' a bias of shape (5, 4); it must be shape (5,).",
    ),
    (
        ak.AdapterLayer,
        "merged",
        lambda layer, weight, bias: weight,
        "returned shape (5, 4); it must return (weight, bi",
    ),
]


@pytest.mark.parametrize(
    ("base", "name", "function", "message"), WRONG_SHAPES, ids=[row[3][:30] for row in WRONG_SHAPES]
)
def test_shapes_are_checked_when_an_adapter_is_added(base: Any, name: str, function: Any, message: str) -> None:
    layer = type("Layer", (base,), {"setup": OuterLayer.setup, name: function})
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 4))
    ak.register(with_layer(layer))
    with unchanged(model), pytest.raises(ak.PluginError) as caught:
        ak.attach(model).add("a", OuterConfig(target_modules=["0", "1"]))
    assert f"{WHO} (Faulty): Layer.{name} {message}" in str(caught.value)


def test_a_function_that_needs_values_is_not_asked_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adapterkit.contract.method._LARGE", 0)

    class Values(OuterLayer):
        def factors(self) -> ak.Factors:
            right = super().factors()
            return right._replace(scale=1.0 if float(self.outer_v.sum()) < 1e9 else 2.0)

    ak.register(with_layer(Values))
    model_with_both()


def test_a_bias_where_the_layer_has_none_acts_and_is_not_merged() -> None:
    class layer(MergedLayer):
        forward = ak.AdapterLayer.forward

        def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
            return weight + self.dense(), self.outer_u if bias is None else bias + self.outer_u

    ak.register(with_layer(layer))
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 4, bias=False))
    adapters = ak.attach(model)
    adapters.add("a", OuterConfig(target_modules=["0", "1"]))
    for parameter in adapters.parameters("a"):
        nn.init.ones_(parameter)
    x = torch.randn(3, 5)
    torch.testing.assert_close(model[1](x), x @ (model[1].weight + 0.5).t() + 1)
    writes = model[0].weight._version
    with unchanged(model), pytest.raises(ak.UnsupportedError, match="'1' has no bias to merge the adapter's into"):
        adapters.merge("a", keep_base=False)
    assert model[0].weight._version == writes


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (raises, "from_file raised ZeroDivisionError: by zero."),
        (lambda **_: 3, "from_file returned a int; it must return a tuple or None."),
    ],
)
def test_load_that_fails_in_the_plugin_changes_nothing(wrong: Any, message: str, tmp_path: Path) -> None:
    class Reads(Outer):
        def from_file(self, config: Any, tensors: Any) -> Any:
            return wrong(config=config, tensors=tensors)

    ak.register(Outer())
    adapters = model_with_both()
    folders = {name: adapters.save(name, tmp_path / name) for name in ("bad", "good")}
    adapters.remove("bad")
    ak.default_registry.unregister(OuterConfig.method)
    ak.register(Reads())
    with unchanged(adapters.model), pytest.raises(ak.PluginError) as caught:
        adapters.load(folders["bad"], name="again")
    assert str(caught.value) == f"{WHO} (Reads): its hook {message}"
    adapters.load(folders["good"], name="again")


def test_merge_with_a_method_that_has_no_merge_rule() -> None:
    class layer(ak.AdapterLayer):
        setup, forward = OuterLayer.setup, MergedLayer.forward

    ak.register(with_layer(layer))
    adapters = model_with_both()
    message = "Adapter 'bad' cannot be merged: its layer at '0' has no change"
    with unchanged(adapters.model), pytest.raises(ak.UnsupportedError, match=message):
        adapters.merge("bad")
