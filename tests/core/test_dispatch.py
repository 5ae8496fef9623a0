"""What acts at a module, kept from one forward to the next: never another state's, another module's, an old part's."""

from __future__ import annotations

import copy
import functools
import gc
import weakref
from typing import Any

import pytest
import torch
from tests.core.conftest import set_parameters
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.forward import delta
from adapterkit_lora import LoraConfig
from adapterkit_lora.layer import LoraLayer


def single(*names: str) -> tuple[nn.Linear, ak.Adapters]:
    """One adapted linear layer, 3 -> 2, and its adapters, each with other values."""
    layer = nn.Linear(3, 2)
    adapters = ak.attach(nn.Sequential(layer))
    for i, name in enumerate(names):
        adapters.add(name, LoraConfig(r=2, target_modules=["0"]), activate=False)
        set_parameters(adapters, name, seed=i)
    return layer, adapters


def test_a_forward_after_a_switch_has_the_other_adapter() -> None:
    layer, adapters = single("a", "b")
    x = torch.ones(1, 3)
    base = layer(x)
    found = {}
    for name in ("a", "b", "a", "b"):
        adapters.activate(name, trainable=False)
        expected = base + delta(layer.adapters[name], x)
        torch.testing.assert_close(layer(x), expected)
        assert torch.equal(layer(x), found.setdefault(name, layer(x)))
    assert not torch.equal(found["a"], found["b"])


def test_renaming_copying_and_removing_while_active_keeps_what_acts() -> None:
    layer, adapters = single("a", "b")
    adapters.activate("a", "b", trainable=False)
    x = torch.ones(1, 3)
    both = layer(x)
    adapters.rename("a", "c")
    assert torch.equal(layer(x), both)
    adapters.copy("c", "a")
    assert torch.equal(layer(x), both)
    adapters.remove("b")
    torch.testing.assert_close(layer(x), nn.Linear.forward(layer, x) + delta(layer.adapters["c"], x))


def test_a_shallow_copy_of_a_layer_has_its_own_parts() -> None:
    layer, adapters = single("a")
    adapters.activate("a", trainable=False)
    x = torch.ones(1, 3)
    expected = layer(x)
    replica = layer._replicate_for_data_parallel()
    for name, module in replica._modules.items():
        replica._modules[name] = copy.deepcopy(module)
    replica._parameters.update({name: p.clone() for name, p in layer._parameters.items()})
    for parameter in replica._modules["adapters"].parameters():
        parameter.data.zero_()
    assert torch.equal(replica(x), nn.Linear.forward(layer, x))
    assert torch.equal(layer(x), expected)


def test_a_data_parallel_replica_is_not_kept() -> None:
    layer, adapters = single("a")
    adapters.activate("a", trainable=False)
    replica = layer._replicate_for_data_parallel()
    replica._parameters.update(layer._parameters)
    replica(torch.ones(1, 3))
    gone = weakref.ref(replica)
    del replica
    gc.collect()
    assert gone() is None


def test_a_subclass_with_other_factors_does_what_they_say() -> None:
    class Doubled(LoraLayer):
        def factors(self) -> ak.Factors:
            return super().factors()._replace(scale=2 * self.scaling)

    layer, adapters = single("a")
    adapters.activate("a", trainable=False)
    x = torch.ones(1, 3)
    change = delta(layer.adapters["a"], x)
    layer.adapters["a"].__class__ = Doubled
    torch.testing.assert_close(layer(x), nn.Linear.forward(layer, x) + 2 * change)


# Changes between forwards


@pytest.mark.parametrize("methods", [("lora", "lora"), ("vera", "loha")], ids=str)
@pytest.mark.parametrize("change", ["behind torch's back", "parameter", "fused step"])
def test_a_change_is_seen_at_the_next_forward(change: str, methods: tuple[str, ...]) -> None:
    layer: Any = nn.Linear(48, 40).double()
    adapters = ak.attach(nn.Sequential(layer))
    for i, method in enumerate(methods):
        adapters.add(str(i), ak.config(method, r=2, target_modules=["0"]))
        set_parameters(adapters, str(i), seed=i)
    adapters.activate(*adapters.names)
    x = torch.randn(3, 48, dtype=torch.float64)
    with torch.no_grad():
        before = [layer(x) for _ in range(3)][-1]
        first = layer.adapters["0"]
        owner, name, own = next((m, n, p) for m in first.modules() for n, p in m.named_parameters(recurse=False))
        if change == "behind torch's back":
            own.data.mul_(2)
        elif change == "parameter":
            setattr(owner, name, nn.Parameter(own * 2))
        else:
            own.grad = torch.ones_like(own)
            torch.optim.Adam([own], lr=0.1, fused=True).step()
        found = layer(x)
        expected = nn.Linear.forward(layer, x) + sum(delta(layer.adapters[n], x) for n in adapters.names)
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, before)


# Inputs by keyword


class Gated(nn.Linear):
    """A linear layer with a scale, which may come before its input."""

    def forward(self, input: Tensor, scale: Tensor | float = 1.0) -> Tensor:
        return super().forward(input) * scale


def wrapped(layer: nn.Linear) -> None:
    forward = layer.forward
    layer.forward = functools.update_wrapper(functools.partial(forward), forward)  # type: ignore[method-assign]


@pytest.mark.parametrize("first", ["adapter", "wrapper", None])
def test_the_input_is_found_among_keywords_by_the_forwards_own_name(first: str | None) -> None:
    layer: Any = Gated(4, 4)
    if first == "wrapper":
        wrapped(layer)
    adapters = ak.attach(nn.Sequential(layer))
    adapters.add("a", LoraConfig(r=2, target_modules=["0"]))
    set_parameters(adapters, "a")
    if first == "adapter":
        wrapped(layer)
    x, scale = torch.randn(3, 4), torch.randn(3, 4)
    expected = layer(x, scale)
    torch.testing.assert_close(layer(scale=scale, input=x), expected)
    torch.testing.assert_close(layer(input=x, scale=scale), expected)
    torch.testing.assert_close(layer(x, scale=scale), expected)


def test_an_input_that_cannot_be_found_among_keywords_is_refused() -> None:
    class Anything(nn.Linear):
        def forward(self, **tensors: Tensor) -> Tensor:
            return super().forward(tensors["x"]) * tensors.get("scale", 1.0)

    layer = Anything(4, 4)
    ak.attach(nn.Sequential(layer)).add("a", LoraConfig(r=2, target_modules=["0"]))
    x = torch.randn(3, 4)
    layer(x=x)
    with pytest.raises(ak.UnsupportedError, match=r"several tensors by keyword \(scale, x\)"):
        layer(scale=x, x=x)
