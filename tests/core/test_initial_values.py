"""The initial values of adapters: what they depend on, their dtype, models without values, and `reset`."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tests.models import build
from torch import Tensor

import adapterkit as ak
from adapterkit_loha import LoHaConfig
from adapterkit_lora import LoraConfig
from adapterkit_vera import VeraConfig

# Configs with random numbers in every layer.
CONFIGS: dict[str, Callable[..., ak.AdapterConfig]] = {
    "kaiming": lambda **f: LoraConfig(r=2, **f),
    "gaussian": lambda **f: LoraConfig(r=2, init_lora_weights="gaussian", **f),
    "orthogonal": lambda **f: LoraConfig(r=2, init_lora_weights="orthogonal", **f),  # `torch.randn` in `setup`
    "pissa": lambda **f: LoraConfig(r=2, init_lora_weights="pissa_niter_2", **f),
    "loha": lambda **f: LoHaConfig(r=2, **f),
    "vera": lambda **f: VeraConfig(r=4, init_weights=False, **f),
}
VALUE = "bert.encoder.layer.1.attention.self.value."


def values(config: ak.AdapterConfig, seed: int | None, *, drawn_before: int = 0, **options: int) -> dict[str, Tensor]:
    """The initial values on a new model, after this seed."""
    adapters = ak.attach(build("bert"))
    if seed is not None:
        torch.manual_seed(seed)
    torch.rand(drawn_before)
    adapters.add("a", config, **options)  # type: ignore[arg-type]
    return adapters.training_state("a")


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    keys = a.keys() & b.keys()
    return bool(keys) and all(torch.equal(a[key], b[key]) for key in keys)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_layer_begins_alike_after_a_seed_whatever_else_is_selected(name: str) -> None:
    every = values(CONFIGS[name](target_modules=["query", "value", "output.dense"]), 3)
    one = values(CONFIGS[name](target_modules=[VALUE[:-1]]), 3)
    every, one = ({key: t for key, t in state.items() if key.startswith(VALUE)} for state in (every, one))
    assert every.keys() == one.keys()
    assert same(every, one)
    assert len(every) > 1


@pytest.mark.parametrize("name", sorted(CONFIGS.keys() - {"pissa"}))  # which follows from the weight
def test_another_seed_another_layer_and_another_add_begin_otherwise(name: str) -> None:
    def drawn(state: dict[str, Tensor]) -> list[Tensor]:
        return [t for key, t in state.items() if key.startswith("bert") and t.is_floating_point() and t.std() > 0]

    config = CONFIGS[name](target_modules=["query", "value"])
    first, other, again = drawn(values(config, 3)), drawn(values(config, 4)), drawn(values(config, None))
    for state in (other, again):
        assert not any(torch.equal(a, b) for a, b in zip(first, state, strict=True))
    assert not any(torch.equal(a, b) for i, a in enumerate(first) for b in first[:i] if a.shape == b.shape)


def test_rows_of_a_new_head_follow_from_the_seed() -> None:
    small = values(LoraConfig(target_modules=["query"]), 3, num_labels=5)
    large = values(LoraConfig(target_modules=["query", "value"]), 3, num_labels=5)
    assert same(small, large)
    assert small["classifier.adapter_heads.weight"].shape == (5, 16)
    assert not same(small, values(LoraConfig(target_modules=["query"]), 4, num_labels=5))


def test_add_draws_one_number_from_the_global_generator_whatever_its_size() -> None:
    after = []
    for targets in (["query"], "all-linear"):
        adapters = ak.attach(build("bert"))
        torch.manual_seed(5)
        adapters.add("a", LoraConfig(r=4, target_modules=targets), num_labels=7)
        after.append(torch.rand(3))
    assert torch.equal(*after)
    torch.manual_seed(5)
    assert not torch.equal(torch.rand(3), after[0])


def test_the_global_generator_is_as_before_if_add_fails() -> None:
    adapters = ak.attach(build("bert"))
    state = torch.random.get_rng_state()
    with pytest.raises(ak.StateError, match="r <= min"):
        adapters.add("a", LoraConfig(r=60, init_lora_weights="pissa", target_modules=["query"]))
    torch.random.set_rng_state(state)
    torch.randint(2**63 - 1, ())
    expected = torch.rand(2)
    torch.random.set_rng_state(state)
    with pytest.raises(ak.StateError, match="r <= min"):
        adapters.add("a", LoraConfig(r=60, init_lora_weights="pissa", target_modules=["query"]))
    assert torch.equal(torch.rand(2), expected)
