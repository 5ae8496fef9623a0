"""Layers that add as one in inference: the same outputs, whatever happens to their parameters between forwards."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.core.conftest import set_parameters
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import adapterkit as ak
from adapterkit.joint import Joint

LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "Linear": (lambda: nn.Linear(48, 40), lambda: torch.randn(2, 3, 48)),
    "Conv1D": (lambda: Conv1D(40, 48), lambda: torch.randn(2, 48)),
    "Conv2d": (lambda: nn.Conv2d(16, 24, 3, padding=1, groups=2), lambda: torch.randn(2, 16, 4, 4)),
    "Embedding": (lambda: nn.Embedding(80, 48), lambda: torch.randint(0, 80, (2, 3))),
}
FIELDS: dict[str, dict[str, Any]] = {"lora": {"lora_alpha": 5}, "loha": {"alpha": 5}}


def adapted(sort: str = "Linear", *methods: str, **fields: Any) -> tuple[Any, ak.Adapters, Tensor]:
    """One layer with an active adapter of each of these methods, `a0`, `a1`, ..., and an input."""
    torch.manual_seed(0)
    make, inputs = LAYERS[sort]
    layer, x = make().double(), inputs()
    adapters = ak.attach(nn.Sequential(layer))
    for i, method in enumerate(methods or ("lora", "lora")):
        config = ak.config(method, r=2, target_modules=["0"], **FIELDS[method], **fields)
        adapters.add(f"a{i}", config, activate=False)
        set_parameters(adapters, f"a{i}", seed=i)
    adapters.activate(*adapters.names, trainable=False)
    return layer, adapters, x.double() if x.is_floating_point() else x


def expected(layer: Any, x: Tensor) -> Tensor:
    """The literal sum."""
    names = layer._adapter_active.names
    total = type(layer).__base__.forward(layer, x)
    for name in names:
        total = total + layer.adapters[name].delta(x)
    return total


def joints(layer: Any) -> list[Joint]:
    adders = layer._adapter_active.state.plan(layer).adders
    return [adder for adder in adders if isinstance(adder, Joint)]


def kept(layer: Any) -> list[ak.Factors]:
    """The factors that are kept for a layer now."""
    held = [joint._kept for joint in joints(layer)]
    return [state[1][0] for state in held if state is not None and state[1] is not None]


@torch.no_grad()
def warm(layer: Any, x: Tensor) -> None:
    """Forwards until the factors are kept."""
    for _ in range(2):
        layer(x)
    assert kept(layer)


@pytest.mark.parametrize("sort", LAYERS)
@pytest.mark.parametrize("methods", [("lora", "lora"), ("loha",), ("lora", "loha", "lora")], ids=str)
@torch.no_grad()
def test_joint_layers_add_the_sum_of_what_each_adds(sort: str, methods: tuple[str, ...]) -> None:
    layer, _, x = adapted(sort, *methods)
    warm(layer, x)
    torch.testing.assert_close(layer(x), expected(layer, x))
    assert len(kept(layer)) == len(set(methods))


@settings(max_examples=30, deadline=None)
@given(
    ranks=st.lists(st.integers(1, 3), min_size=2, max_size=4),
    shares=st.lists(st.sampled_from((0.5, 1.0, 4.0)), min_size=4, max_size=4),
    biased=st.booleans(),
    lead=st.lists(st.integers(0, 3), max_size=2),
)
def test_any_ranks_and_scalings_at_powers_of_two_are_joined(
    ranks: list[int], shares: list[float], biased: bool, lead: list[int]
) -> None:
    layer = nn.Linear(64, 64, dtype=torch.float64)  # half of its weight has room for a rank of 16
    adapters = ak.attach(nn.Sequential(layer))
    for i, (r, share) in enumerate(zip(ranks, shares, strict=False)):
        fields = {"lora_bias": biased and i % 2 == 0, "bias": "lora_only" if biased else "none"}
        adapters.add(str(i), ak.config("lora", r=r, lora_alpha=3 * r * share, target_modules=["0"], **fields))
        set_parameters(adapters, str(i), seed=i)
    adapters.activate(*adapters.names, trainable=False)
    x = torch.randn(*lead, 64, dtype=torch.float64)
    with torch.no_grad():
        first = layer(x)
        warm(layer, x)
        torch.testing.assert_close(layer(x), first)


# Changes between forwards


def in_place(adapters: ak.Adapters) -> None:
    with torch.no_grad():
        next(adapters.parameters("a0")).mul_(3)


def part_in_place(adapters: ak.Adapters) -> None:
    with torch.inference_mode():
        next(adapters.parameters("a1"))[0, 0] = 7


def other_data(adapters: ak.Adapters) -> None:
    parameter = next(adapters.parameters("a0"))
    for factor in (2, 3, 4, 5):  # memory that is given back would be used again at once
        parameter.data = parameter.data * factor


def other_parameter(adapters: ak.Adapters) -> None:
    factor = adapters.model[0].adapters["a0"].lora_A
    factor.weight = nn.Parameter(factor.weight * 2, requires_grad=False)


def other_module(adapters: ak.Adapters) -> None:
    layer = adapters.model[0].adapters["a0"]
    layer.lora_A = copy.deepcopy(layer.lora_A)
    with torch.no_grad():
        layer.lora_A.weight.mul_(2)


def loaded(adapters: ak.Adapters) -> None:
    adapters.load_state_dict("a0", {key: value * 2 for key, value in adapters.state_dict("a0").items()})


def loaded_by_torch(adapters: ak.Adapters, assign: bool = False) -> None:
    own = adapters.model.state_dict()
    adapters.model.load_state_dict({k: v * 2 if "lora_" in k else v for k, v in own.items()}, assign=assign)


def trained(adapters: ak.Adapters, **fields: Any) -> None:
    adapters.activate("a0", "a1")
    optimizer = torch.optim.AdamW(adapters.parameters("a0"), lr=0.1, **fields)
    adapters.model(torch.ones(3, 48, dtype=torch.float64)).square().sum().backward()
    optimizer.step()
    adapters.model.requires_grad_(False)


CHANGES: dict[str, Callable[[ak.Adapters], object]] = {
    "in place": in_place,
    "a part, in inference mode": part_in_place,
    "other data": other_data,
    "another parameter": other_parameter,
    "another module": other_module,
    "load_state_dict": loaded,
    "torch's load_state_dict": loaded_by_torch,
    "torch's load_state_dict, assigning": lambda adapters: loaded_by_torch(adapters, assign=True),
    "a step": trained,
    "a fused step, which torch does not count": lambda adapters: trained(adapters, fused=True),
    "another dtype and back": lambda adapters: adapters.model.float().double(),
    "another scaling": lambda adapters: setattr(adapters.model[0].adapters["a0"], "scaling", 3.0),
    "a parameter where none was": lambda adapters: setattr(
        adapters.model[0].adapters["a0"].lora_B, "bias", nn.Parameter(torch.ones(40).double(), requires_grad=False)
    ),
    "another name": lambda adapters: adapters.rename("a0", "x"),
    "one of them removed": lambda adapters: adapters.remove("a1"),
    "another order": lambda adapters: adapters.activate("a1", "a0", trainable=False),
    "a third": lambda adapters: (adapters.copy("a0", "c"), adapters.activate("a0", "a1", "c", trainable=False)),
    "merged and unmerged": lambda adapters: (adapters.merge("a0"), adapters.unmerge()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen_at_the_next_forward(change: str) -> None:
    layer, adapters, x = adapted()
    warm(layer, x)
    CHANGES[change](adapters)
    for _ in range(3):
        with torch.no_grad():
            torch.testing.assert_close(layer(x), expected(layer, x))


def test_a_dropout_in_training_mode_acts_on_each_layer() -> None:
    layer, adapters, x = adapted()
    warm(layer, x)
    adapters.model[0].adapters["a0"].dropout = 1.0
    adapters.model.train()
    for _ in range(3):
        with torch.no_grad():
            torch.testing.assert_close(layer(x), nn.Linear.forward(layer, x) + layer.adapters["a1"].delta(x))


def test_another_parameter_for_one_call_acts_in_that_call() -> None:
    layer, _, x = adapted()
    warm(layer, x)
    doubled = {"adapters.a0.lora_A.weight": layer.adapters["a0"].lora_A.weight * 2}
    change = layer.adapters["a0"].delta(x)
    with torch.no_grad():
        found = torch.func.functional_call(layer, doubled, (x,))
        torch.testing.assert_close(found, expected(layer, x) + change)
        torch.testing.assert_close(layer(x), expected(layer, x))


def test_it_maps_and_differentiates_under_functorch() -> None:
    layer, _, x = adapted()
    warm(layer, x)
    rows = x.flatten(0, 1)
    with torch.no_grad():
        torch.testing.assert_close(torch.vmap(layer)(rows), layer(rows))
    scales = torch.tensor([1.0, 2.0], dtype=torch.float64)
    value = layer.adapters["a0"].lora_A.weight

    def scaled(scale: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"adapters.a0.lora_A.weight": value * scale}, (rows,))

    with torch.no_grad():
        first, second = torch.vmap(scaled)(scales)
    torch.testing.assert_close(first, expected(layer, rows))
    torch.testing.assert_close(second, expected(layer, rows) + layer.adapters["a0"].delta(rows))


# When factors are kept, and how long


def test_nothing_is_kept_while_gradients_are_recorded_or_parameters_train() -> None:
    layer, adapters, x = adapted()
    warm(layer, x)
    layer(x)
    assert not kept(layer)
    adapters.activate("a0", "a1")
    with torch.no_grad():
        for _ in range(3):
            layer(x)
    assert not kept(layer)


def test_gradients_of_the_input_flow_after_inference() -> None:
    layer, _, x = adapted()
    warm(layer, x)
    x.requires_grad_()
    (found,) = torch.autograd.grad(layer(x).square().sum(), x)
    (wanted,) = torch.autograd.grad(expected(layer, x).square().sum(), x)
    torch.testing.assert_close(found, wanted)


def test_what_inference_mode_kept_serves_no_grad() -> None:
    layer, _, x = adapted()
    with torch.inference_mode():
        for _ in range(3):
            layer(x)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected(layer, x))
    assert not any(t.is_inference() for factors in kept(layer) for t in factors[:2])


def test_nothing_is_kept_of_tensors_that_do_not_count_their_changes() -> None:
    with torch.inference_mode():
        layer, _, x = adapted()
        for _ in range(3):
            torch.testing.assert_close(layer(x), expected(layer, x))
    assert not kept(layer)


def test_nothing_is_kept_of_one_forward_or_of_one_lora() -> None:
    layer, adapters, x = adapted()
    with torch.no_grad():
        layer(x)
    assert not kept(layer)
    adapters.activate("a0", trainable=False)
    layer(x)
    assert not joints(layer)


def test_factors_that_are_large_beside_the_weight_are_not_kept() -> None:
    layer = nn.Linear(8, 8)
    adapters = ak.attach(nn.Sequential(layer))
    for name in "ab":
        adapters.add(name, ak.config("lora", r=4, target_modules=["0"]))
    adapters.activate("a", "b", trainable=False)
    with torch.no_grad():
        for _ in range(3):
            layer(torch.ones(1, 8))
    assert joints(layer)
    assert not kept(layer)


@torch.no_grad()
def test_what_cannot_be_joined_exactly_is_added_one_by_one() -> None:
    for methods, fields in ((("lora", "lora"), {"init_lora_weights": "pissa"}), (("loha", "loha"), {})):
        layer, _, x = adapted("Linear", *methods, **fields)
        for _ in range(3):
            torch.testing.assert_close(layer(x), expected(layer, x))
        assert not kept(layer)


@torch.no_grad()
def test_scalings_that_would_round_the_factors_are_added_one_by_one() -> None:
    layer, adapters, x = adapted("Linear", "lora")
    adapters.add("b", ak.config("lora", r=2, lora_alpha=3, target_modules=["0"]))
    set_parameters(adapters, "b")
    adapters.activate("a0", "b", trainable=False)
    for _ in range(3):
        torch.testing.assert_close(layer(x), expected(layer, x))
    assert not kept(layer)


def test_kept_factors_are_freed_when_other_adapters_act() -> None:
    layer, adapters, x = adapted()
    warm(layer, x)
    gone = weakref.ref(kept(layer)[0].up)
    adapters.activate("a1", trainable=False)
    gc.collect()
    assert gone() is None


def test_kept_factors_are_in_no_copy_and_no_file() -> None:
    layer, adapters, x = adapted()

    def size() -> int:
        buffer = io.BytesIO()
        torch.save(adapters.model, buffer)
        return buffer.getbuffer().nbytes

    before, keys = size(), set(adapters.model.state_dict())
    warm(layer, x)
    assert size() == before
    assert set(adapters.model.state_dict()) == keys
    assert not kept(copy.deepcopy(adapters.model)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [2, 700])
@torch.no_grad()
def test_low_precision_is_no_less_exact_jointly(tokens: int, dtype: torch.dtype) -> None:
    layer = nn.Linear(128, 96)
    adapters = ak.attach(nn.Sequential(layer))
    for i in range(4):
        adapters.add(f"a{i}", ak.config("lora", r=4, lora_alpha=5, target_modules=["0"]))
        set_parameters(adapters, f"a{i}", seed=i)
    adapters.activate(*adapters.names, trainable=False)
    layer.to(dtype)
    x = torch.randn(tokens, 128, dtype=dtype)
    plain = expected(layer, x)
    warm(layer, x)
    found = layer(x)
    exact = expected(copy.deepcopy(layer).double(), x.double())
    # One sum of 16 products is rounded a little otherwise than four sums of 4.
    assert (found - exact).norm() <= 1.25 * (plain - exact).norm()
