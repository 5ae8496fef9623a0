"""VeRA's config, memory and shared projections: one copy, always."""

from __future__ import annotations

import copy
import gc
import math
import pickle
import weakref
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.models import assert_same_outputs, build, run
from tests.plugins.one_layer import kept_bytes, one
from torch import nn

import adapterkit as ak
from adapterkit_vera import VeraConfig, VeraLayer
from adapterkit_vera.layer import projections


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def randomise(model: nn.Module, *names: str) -> None:
    for name in names:
        for parameter in ak.attach(model).parameters(name):
            nn.init.normal_(parameter)


@pytest.mark.parametrize(("fields", "value"), [({}, 0.1), ({"d_initial": 0.3}, 0.3)])
def test_d_starts_at_its_initial_value(fields: dict[str, Any], value: float) -> None:
    model: Any = one(nn.Linear(6, 5))
    ak.attach(model).add("a", VeraConfig(r=3, target_modules=["fc"], **fields))
    assert bool((model.fc.adapters["a"].vera_lambda_d == value).all())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 0}, "r = 0: a rank must be at least 1."),
        ({"vera_dropout": 1.0}, "vera_dropout = 1.0 must be a probability, at least 0 and below 1."),
        ({"projection_prng_key": 2**64}, f"projection_prng_key = {2**64} must be a seed of 64 bits."),
    ],
)
def test_what_a_config_refuses(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ak.ConfigError) as error:
        VeraConfig(**fields)
    assert str(error.value) == message


# Memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_linear_layer_keeps_hidden_tensors_and_nothing_as_wide_as_the_output(dtype: torch.dtype) -> None:
    model = one(nn.Linear(512, 512, dtype=dtype))
    ak.attach(model).add("a", VeraConfig(r=16, target_modules=["fc"], init_weights=False))
    layer: Any = model.get_submodule("fc.adapters.a")
    x = torch.randn(256, 512, dtype=dtype, requires_grad=True)
    known = [x, *model.parameters(), *layer.shared.buffers()]
    hidden, up, rounded = 4 * 256 * 16, 4 * 512 * 16, 4 * 256 * 512 * (dtype != torch.float32)
    assert kept_bytes(lambda: model(x), known) <= 2 * hidden + up + rounded


# Projections


@pytest.mark.parametrize(("r", "width", "out"), [(1, 1, 1), (4, 7, 3), (256, 33, 65)])
def test_projections_are_uniform_within_the_bound_of_their_columns(r: int, width: int, out: int) -> None:
    down, up = projections(r, width, out, 5, torch.device("cpu"))
    assert (down.shape, up.shape) == ((r, width), (out, r))
    assert down.abs().max() <= math.sqrt(6 / width)
    assert up.abs().max() <= math.sqrt(6 / r)
    again = projections(r, width, out, 5, torch.device("cpu"))
    assert torch.equal(down, again[0])
    assert torch.equal(up, again[1])
    assert not torch.equal(down, projections(r, width, out, 6, torch.device("cpu"))[0])


def test_projections_do_not_touch_the_global_stream_nor_follow_the_default_dtype_and_device() -> None:
    state = torch.get_rng_state()
    expected = projections(4, 5, 6, 0, torch.device("cpu"))
    assert torch.equal(state, torch.get_rng_state())
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            found = projections(4, 5, 6, 0, torch.device("cpu"))
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def vera(model: nn.Module, name: str, **fields: Any) -> ak.Adapters:
    adapters = ak.attach(model)
    targets = ["query", "intermediate.dense"]
    adapters.add(name, VeraConfig(**{"r": 4, "target_modules": targets, "modules_to_save": None, **fields}))
    randomise(model, name)
    return adapters


def copies(model: nn.Module) -> int:
    """How many different tensors in memory are `vera_A`."""
    layers = [m for m in model.modules() if isinstance(m, VeraLayer)]
    assert layers
    return len({layer.shared.vera_A.untyped_storage().data_ptr() for layer in layers} | buffers(model))


def buffers(model: nn.Module) -> set[int]:
    found = model.named_buffers(remove_duplicate=False)
    return {b.untyped_storage().data_ptr() for name, b in found if name.endswith("vera_A")}


def test_all_targets_use_parts_of_one_copy_as_large_as_the_largest_needs() -> None:
    model = build("bert")
    vera(model, "a")
    layers = [m for m in model.modules() if isinstance(m, VeraLayer)]
    assert len(layers) == 4
    assert layers[0].shared.vera_A.shape == (4, 16)
    assert layers[0].shared.vera_B.shape == (24, 4)
    assert {tuple(layer.factors().up.shape) for layer in layers} == {(16, 4), (24, 4)}
    assert copies(model) == 1


@pytest.mark.parametrize("change", ["bfloat16", "double", "copy", "pickle", "save", "assign"])
def test_there_is_one_copy_after(change: str, tmp_path: Path) -> None:
    model = build("bert")
    vera(model, "a")
    vera(model, "b")
    before = run(model, "bert")
    tolerance = {"rtol": 0.0, "atol": 0.0}
    if change in ("bfloat16", "double"):
        model.to(getattr(torch, change))
        before, tolerance = before.to(getattr(torch, change)), {"rtol": 0.1, "atol": 0.1}
    elif change == "copy":
        model = copy.deepcopy(model)
    elif change == "pickle":
        model = pickle.loads(pickle.dumps(model))
    elif change == "save":
        torch.save(model, tmp_path / "model.pt")
        model = torch.load(tmp_path / "model.pt", weights_only=False)
    else:
        model.load_state_dict(copy.deepcopy(model.state_dict()))
    assert copies(model) == 1
    torch.testing.assert_close(run(model, "bert"), before, **tolerance)
    model(input_ids=torch.ones(1, 3, dtype=torch.long)).logits.sum().backward()


def test_adapters_with_equal_projections_share_them_until_one_changes() -> None:
    model = build("bert")
    adapters = vera(model, "a")
    vera(model, "b")
    assert copies(model) == 1
    adapters.activate("a")
    before = run(model, "bert")
    state = adapters.state_dict("b")
    state["base_model.vera_A"] = state["base_model.vera_A"] * 2
    adapters.load_state_dict("b", state)
    assert copies(model) == 2
    assert torch.equal(run(model, "bert"), before), "loading b changed a"
    adapters.activate("b")
    assert not torch.equal(run(model, "bert"), before)
    state["base_model.vera_A"] = state["base_model.vera_A"] / 2
    adapters.load_state_dict("b", state)
    assert copies(model) == 1


def test_a_load_that_fails_leaves_shared_projections_shared() -> None:
    model = build("bert")
    adapters = vera(model, "a")
    vera(model, "b")
    state = {k: v * 2 for k, v in adapters.state_dict("b").items() if "lambda_d" not in k}
    before = run(model, "bert")
    with pytest.raises(ak.CheckpointError):
        adapters.load_state_dict("b", state)
    assert copies(model) == 1
    assert torch.equal(run(model, "bert"), before)


@pytest.mark.parametrize(
    "other", [{"projection_prng_key": 1}, {"r": 3}, {"r": 9}, {"target_modules": ["output.dense", "pooler.dense"]}]
)
def test_adapters_with_other_projections_each_have_their_own(other: dict[str, Any], tmp_path: Path) -> None:
    model = build("bert")
    adapters = vera(model, "a")
    first = run(model, "bert")
    vera(model, "b", **other)
    second = run(model, "bert")
    assert copies(model) == 2
    adapters.activate("a")
    assert torch.equal(run(model, "bert"), first)
    adapters.activate("b")
    assert torch.equal(run(model, "bert"), second)
    for name in ("a", "b"):
        adapters.save(name, tmp_path / name)
    again = build("bert")
    for name, expected in (("b", second), ("a", first)):
        ak.attach(again).load(tmp_path / name, name)
        torch.testing.assert_close(run(again, "bert"), expected)


def test_loading_and_copying_share_too(tmp_path: Path) -> None:
    model = build("bert")
    adapters = vera(model, "a")
    adapters.save("a", tmp_path)
    adapters.load(tmp_path, "b")
    adapters.copy("a", "c")
    adapters.rename("b", "d")
    assert copies(model) == 1
    adapters.remove("a")
    adapters.activate("c", "d")
    run(model, "bert")
    adapters.remove("c")
    adapters.activate("d")
    run(model, "bert")
    assert copies(model) == 1


def test_the_last_adapters_removal_frees_the_projections() -> None:
    model = build("bert")
    before = set(model.state_dict())
    adapters = vera(model, "a")
    vera(model, "b")
    layer = next(m for m in model.modules() if isinstance(m, VeraLayer))
    alive = weakref.ref(layer.shared.vera_A)
    del layer
    adapters.remove("a")
    gc.collect()
    assert alive() is not None
    adapters.detach()
    gc.collect()
    assert alive() is None
    assert set(model.state_dict()) == before


@pytest.mark.parametrize("saved", [True, False])
def test_a_full_state_dict_gives_back_an_adapter_and_has_its_projections_as_a_file_does(saved: bool) -> None:
    model = build("bert")
    adapters = vera(model, "a", save_projection=saved)
    full = {k: v.clone() for k, v in model.state_dict().items()}
    assert ("adapter_shared.a.vera_A" in full) == ("base_model.vera_A" in adapters.state_dict("a")) == saved
    other = build("bert")
    vera(other, "a", save_projection=saved)
    randomise(other, "a")
    assert ak.attach(other).load_state_dict("a", full).ok
    assert_same_outputs(run(other, "bert"), run(model, "bert"))
    assert adapters.state_dict("a", full).keys() == adapters.state_dict("a").keys()


def test_a_model_on_the_meta_device_can_be_adapted() -> None:
    with torch.device("meta"):
        model = nn.Sequential(OrderedDict([("fc", nn.Linear(4, 4)), ("out", nn.Linear(4, 4))]))
    adapters = ak.attach(model)
    for name in ("a", "b"):
        adapters.add(name, VeraConfig(r=2, target_modules=["fc", "out"]))
    assert all(t.is_meta for t in (*adapters.parameters("a"), *model.buffers()))
    assert model(torch.empty(2, 4, device="meta")).shape == (2, 4)
    with pytest.raises(ak.AdapterError, match="meta device"):
        adapters.save("a", "unused")
