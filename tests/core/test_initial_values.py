"""The initial values of adapters: what they depend on, their dtype, models without values, and `reset`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.core.conftest import set_parameters
from tests.models import build, inputs, run
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


# Their dtype


@pytest.mark.parametrize(
    ("dtype", "layers", "others"),
    [
        (None, torch.float32, torch.float32),
        ("model", torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16, torch.float32),
        (torch.float64, torch.float64, torch.float32),
    ],
)
def test_dtype_is_that_of_the_layers_and_model_that_of_heads_and_biases_too(
    dtype: torch.dtype | str | None, layers: torch.dtype, others: torch.dtype, tmp_path: Path
) -> None:
    adapters = ak.attach(build("bert").to(torch.bfloat16))
    config = LoraConfig(r=2, target_modules=["query"], bias="all", modules_to_save=["classifier"])
    adapters.add("a", config, dtype=dtype)
    adapters.save("a", tmp_path)
    adapters.load(tmp_path, "b", dtype=dtype, activate=False)
    for name in ("a", "b"):
        found = {"lora_" in key: t.dtype for key, t in adapters.named_parameters(name)}
        assert found == {True: layers, False: others}
        dtypes = {t.dtype for key, t in adapters.named_parameters(name)}
        assert dtypes == {layers, others}
    adapters.model(**inputs("bert")).logits.float().square().mean().backward()
    assert all(p.grad is not None for key, p in adapters.named_parameters("a") if "lora_" in key)


def test_other_dtypes_and_devices_are_refused() -> None:
    adapters = ak.attach(build("bert"))
    config = LoraConfig(target_modules=["query"])
    for options, message in (
        ({"dtype": "file"}, "dtype = 'file' must be a floating torch.dtype, 'model' or None"),
        ({"dtype": torch.int8}, "dtype = torch.int8 must be"),
        ({"device": "cpu"}, "device = 'cpu' must be 'meta' or None"),
    ):
        with pytest.raises(ak.ConfigError, match=message):
            adapters.add("a", config, **options)  # type: ignore[arg-type]
    assert adapters.names == ()


# Without values, until something brings them


@pytest.mark.parametrize("name", CONFIGS)
def test_an_adapter_without_values_gets_those_of_a_state_where_its_layers_compute(name: str) -> None:
    config = CONFIGS[name](target_modules=["query"], bias="all", modules_to_save=["classifier"])
    first, second = ak.attach(build("bert")), ak.attach(build("bert"))
    first.add("a", config, num_labels=5)
    set_parameters(first, "a")
    before = torch.random.get_rng_state()
    second.add("a", config, num_labels=5, device="meta")
    assert all(tensor.is_meta for tensor in second.parameters("a"))
    torch.random.set_rng_state(before)
    second.load_training_state("a", first.training_state("a"))
    assert not any(tensor.is_meta for tensor in second.parameters("a"))
    torch.testing.assert_close(run(second.model, "bert"), run(first.model, "bert"))
    assert second.trainable == ("a",)


def test_an_adapter_without_values_gets_those_of_a_file() -> None:
    first, second = ak.attach(build("bert")), ak.attach(build("bert"))
    for adapters, device in ((first, None), (second, "meta")):
        adapters.add("a", LoraConfig(r=2, target_modules=["query"]), device=device)
    set_parameters(first, "a")
    assert second.load_state_dict("a", first.state_dict("a")).ok
    torch.testing.assert_close(run(second.model, "bert"), run(first.model, "bert"))
