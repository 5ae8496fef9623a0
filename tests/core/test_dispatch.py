"""What acts at a module, kept from one forward to the next: never another state's, another module's, an old part's."""

from __future__ import annotations

import functools
import gc
import weakref
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from tests.core.conftest import set_parameters
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.forward import delta
from adapterkit_lora import LoraConfig


def test_a_data_parallel_replica_is_not_kept() -> None:
    layer = nn.Linear(3, 2)
    ak.attach(nn.Sequential(layer)).add("a", LoraConfig(r=2, target_modules=["0"]))
    replica = layer._replicate_for_data_parallel()
    replica._parameters.update(layer._parameters)
    replica(torch.ones(1, 3))
    gone = weakref.ref(replica)
    del replica
    gc.collect()
    assert gone() is None


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


def test_a_head_acts_beside_merged_adapters_and_again_after_unmerge() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    adapters = ak.attach(model)
    for name, heads in (("a", ["1"]), ("b", None)):
        adapters.add(name, LoraConfig(r=2, target_modules=["0"], modules_to_save=heads))
        set_parameters(adapters, name)
    x, outputs = torch.randn(2, 4), {}
    for names in (("b", "a"), ("a",)):
        adapters.activate(*names)
        outputs[names] = model(x)
    for merged in ("b", "a"):
        adapters.merge(merged)
        torch.testing.assert_close(model(x), outputs["b", "a"])
    adapters.unmerge()
    assert adapters.active == ("a",)
    torch.testing.assert_close(model(x), outputs["a",])


def test_a_hook_of_accelerate_that_came_after_the_adapter_goes_on_without_it() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4)), torch.ones(1, 4)
    base = model(x)
    adapters = ak.attach(model)
    adapters.add("a", LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    add_hook_to_module(model[0], AlignDevicesHook("cpu"))
    assert not torch.allclose(model(x), base)
    torch.testing.assert_close(adapters.detach()(x), base)
