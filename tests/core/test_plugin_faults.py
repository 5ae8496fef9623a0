"""Plugins that fail late, while something is merged or loaded: the error says who and where, the model is untouched."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.core.broken_methods import MergedLayer, Outer, OuterConfig, OuterLayer
from torch import nn

import adapterkit as ak
from adapterkit_lora import LoraConfig

WHO = "The method 'broken_outer'"


def raises(**arguments: Any) -> Any:
    raise ZeroDivisionError("by zero")


FAULTS: list[tuple[str, Any, str]] = [
    ("merged", raises, "merged raised ZeroDivisionError: by zero."),
    ("merged", lambda **_: torch.zeros(1), "merged returned a Tensor; it must return a tuple."),
    (
        "merged",
        lambda **_: (torch.zeros(1), None),
        "merged must return (weight, bias), the weight of the shape it was given.",
    ),
    ("merged", lambda **_: (None, None), "merged must return (weight, bias), the weight of the shape it was given."),
    (
        "merged",
        lambda weight, bias, **_: (weight, torch.zeros(1) if bias is None else None),
        "merged must return as the bias of '1' a tensor of shape (4,).",
    ),
]


class Counting:
    """Answers as the right method does, and at the second call as the faulty one: half-way through two targets."""

    def __init__(self, right: Any, wrong: Any) -> None:
        self.right, self.wrong, self.calls = right, wrong, 0

    def __call__(self, **arguments: Any) -> Any:
        self.calls += 1
        return (self.right if self.calls == 1 else self.wrong)(**arguments)


@contextmanager
def registered(plugin: Outer) -> Iterator[None]:
    ak.register(plugin)
    try:
        yield
    finally:
        ak.default_registry.unregister(OuterConfig.method)


def faulty(hook: str, wrong: Any) -> Outer:
    """A plugin whose `hook` is right at first and then wrong."""

    def merged(layer: Any, weight: torch.Tensor, bias: torch.Tensor | None) -> Any:
        return weight + layer.dense(), bias

    answer = Counting(merged, wrong)

    class Merges(Outer):
        class layer(MergedLayer):
            def merged(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Any:
                return answer(layer=self, weight=weight, bias=bias)

    class Reads(Outer):
        def from_file(self, config, tensors):
            return wrong(config=config, tensors=tensors)

    return Merges() if hook == "merged" else Reads()


def model_with_both() -> tuple[nn.Module, ak.Adapters]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 4))
    adapters = ak.attach(model)
    adapters.add("good", LoraConfig(r=2, target_modules=["0", "1"], init_lora_weights=False))
    adapters.add("bad", OuterConfig(target_modules=["0", "1"]))
    for parameter in adapters.parameters("bad"):
        nn.init.ones_(parameter)
    return model, adapters


@pytest.mark.parametrize("keep_base", [True, False])
@pytest.mark.parametrize(("hook", "wrong", "message"), FAULTS)
def test_merge_rule_that_fails_half_way_changes_nothing(hook: str, wrong: Any, message: str, keep_base: bool) -> None:
    with registered(faulty(hook, wrong)):
        model, adapters = model_with_both()
        x = torch.randn(3, 4)
        before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        out = model(x)
        with pytest.raises(ak.PluginError) as caught:
            adapters.merge("bad", keep_base=keep_base)
        assert str(caught.value) == f"{WHO} (Merges): layer.{message}"
        assert adapters.merged == ()
        assert adapters.active == ("bad",)
        assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
        torch.testing.assert_close(model(x), out)
        adapters.merge("good")  # the other method goes on working
        adapters.unmerge()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (raises, "from_file raised ZeroDivisionError: by zero."),
        (lambda **_: 3, "from_file returned a int; it must return a tuple or None."),
    ],
)
def test_load_that_fails_in_the_plugin_changes_nothing(wrong: Any, message: str, tmp_path: Path) -> None:
    with registered(Outer()):
        model, adapters = model_with_both()
        adapters.save("bad", tmp_path / "bad")
        adapters.save("good", tmp_path / "good")
        adapters.remove("bad")
    with registered(faulty("from_file", wrong)):
        keys = set(model.state_dict())
        with pytest.raises(ak.PluginError) as caught:
            adapters.load(tmp_path / "bad", name="again")
        assert str(caught.value) == f"{WHO} (Reads): its hook {message}"
        assert adapters.names == ("good",)
        assert set(model.state_dict()) == keys
        adapters.load(tmp_path / "good", name="again")


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (raises, "layer.factors raised ZeroDivisionError: by zero."),
        (lambda *_: 3, "layer.factors returned a int; it must return a Factors."),
    ],
)
def test_factors_that_are_wrong_are_named(answer: Any, message: str) -> None:
    class layer(OuterLayer):
        def factors(self) -> Any:
            return answer()

        def forward(self, base: ak.Base, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = base(x)
            return out

    with registered(type("Plugin", (Outer,), {"layer": layer})()):
        _, adapters = model_with_both()
        with pytest.raises(ak.PluginError) as caught:
            adapters.merge("bad")
        assert str(caught.value) == f"{WHO} (Plugin): {message}"


def test_merge_with_a_method_that_has_no_merge_rule() -> None:
    class layer(ak.AdapterLayer):
        setup, forward = OuterLayer.setup, MergedLayer.forward

    with registered(type("Plugin", (Outer,), {"layer": layer})()):
        model, adapters = model_with_both()
        with pytest.raises(
            ak.UnsupportedError, match=r"Adapter 'bad' cannot be merged: its layer at '0' has no change"
        ):
            adapters.merge("bad")
        assert adapters.active == ("bad",)
        assert model(torch.randn(2, 4)).shape == (2, 4)
