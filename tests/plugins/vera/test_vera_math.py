"""VeRA's mathematics against literal oracles in float64, and its shared projections: one copy, always."""

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
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

import adapterkit as ak
from adapterkit.contract import twin
from adapterkit.forward import delta
from adapterkit.forward.arithmetic import add
from adapterkit_vera import VeraConfig, VeraLayer
from adapterkit_vera.layer import projections

LAYERS: dict[str, tuple[Any, Any]] = {
    "Linear": (lambda: nn.Linear(6, 5), lambda: torch.randn(2, 3, 6)),
    "Conv1D": (lambda: Conv1D(5, 6), lambda: torch.randn(2, 3, 6)),
    "Conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1, groups=2), lambda: torch.randn(2, 4, 7)),
    "Conv2d": (lambda: nn.Conv2d(3, 4, (2, 3), 2, padding=1, padding_mode="circular"), lambda: torch.randn(2, 3, 6, 6)),
    "Conv3d": (lambda: nn.Conv3d(2, 3, 2, dilation=2), lambda: torch.randn(1, 2, 4, 4, 4)),
    "Embedding": (lambda: nn.Embedding(7, 5), lambda: torch.randint(0, 7, (2, 3))),
}
every_layer = pytest.mark.parametrize("sort", LAYERS)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def one(layer: nn.Module) -> nn.Module:
    """A model of one layer."""
    return nn.Sequential(OrderedDict([("fc", layer)]))


def adapted(sort: str, **fields: Any) -> tuple[Any, VeraLayer, Tensor]:
    """A float64 model of one layer, its adapter layer with random values, and an input."""
    make, inputs = LAYERS[sort]
    model = one(make()).double().eval()
    ak.attach(model).add("a", VeraConfig(**{"r": 4, "target_modules": ["fc"], **fields}))
    randomise(model, "a")
    layer: Any = model.get_submodule("fc.adapters.a")
    x = inputs()
    return model, layer, x.double() if x.is_floating_point() else x


def randomise(model: nn.Module, *names: str) -> None:
    for name in names:
        for parameter in ak.attach(model).parameters(name):
            nn.init.normal_(parameter)


def oracle(layer: Any) -> Tensor:
    """`diag(b) B diag(d) A`, element by element."""
    up, down = (t.double() for t in layer.factors()[:2])
    d, b = layer.vera_lambda_d.detach(), layer.vera_lambda_b.detach()
    return torch.diag(b) @ up @ torch.diag(d) @ down


@every_layer
def test_the_factors_are_the_change_by_its_definition(sort: str) -> None:
    _, layer, _ = adapted(sort)
    found = ak.method("vera").factors(layer)
    assert found is not None
    assert found.rank == 4
    torch.testing.assert_close(found.delta(), oracle(layer))


@every_layer
def test_the_output_is_that_of_the_changed_weight(sort: str) -> None:
    model, layer, x = adapted(sort)
    found = model(x)
    with torch.no_grad():
        inference = model(x)
    delta = oracle(layer)
    bare: Any = ak.attach(model).detach()
    with torch.no_grad():
        delta = delta.t() if sort in ("Conv1D", "Embedding") else delta.reshape(bare.fc.weight.shape)
        bare.fc.weight.add_(delta)
    torch.testing.assert_close(found, bare(x))
    torch.testing.assert_close(inference, bare(x))


@every_layer
def test_gradients(sort: str) -> None:
    model, layer, x = adapted(sort)
    names = [name for name, _ in layer.named_parameters()]
    assert names == ["vera_lambda_d", "vera_lambda_b"]
    values = tuple(p.detach().clone().requires_grad_() for p in layer.parameters())
    out = ak.attach(model).detach()(x).detach()

    def call(given: Tensor, *parameters: Tensor) -> Tensor:
        table = dict(zip(map(id, layer.parameters()), parameters, strict=True))
        return add(twin(layer, lambda tensor: table.get(id(tensor), tensor)), out, given)

    if x.is_floating_point():
        assert torch.autograd.gradcheck(call, (x.requires_grad_(), *values), fast_mode=True)
    else:
        assert torch.autograd.gradcheck(lambda *v: call(x, *v), values, fast_mode=True)


@pytest.mark.parametrize("tokens", [2, 5])
def test_its_second_derivative(tokens: int) -> None:
    model, layer, _ = adapted("Linear")
    x = torch.randn(tokens, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x, *_: model(x), (x, *layer.parameters()))


@pytest.mark.parametrize("reentrant", [True, False])
def test_its_backward_under_gradient_checkpointing(reentrant: bool) -> None:
    model, layer, x = adapted("Linear")
    x.requires_grad_()
    wanted = (x, layer.vera_lambda_d, layer.vera_lambda_b)
    expected = torch.autograd.grad(model(x).square().sum(), wanted)
    checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
    for tensor, grad in zip(wanted, expected, strict=True):
        torch.testing.assert_close(tensor.grad, grad)


def test_dropout_acts_on_the_input_in_training_only() -> None:
    model, layer, _ = adapted("Linear", vera_dropout=0.5)
    x = torch.ones(4000, 6, dtype=torch.float64)
    whole = delta(layer, x)
    assert torch.equal(delta(layer, x), whole)
    model.train()
    assert not torch.equal(delta(layer, x), delta(layer, x))
    with torch.no_grad():
        torch.testing.assert_close(delta(layer, x).mean(0), whole[0], rtol=0.3, atol=0.2)


@every_layer
@pytest.mark.parametrize("init", [True, False])
def test_a_new_adapter_is_the_identity_unless_asked_otherwise(sort: str, init: bool) -> None:
    make, inputs = LAYERS[sort]
    model, x = one(make()), inputs()
    before = model(x)
    ak.attach(model).add("a", VeraConfig(r=3, target_modules=["fc"], init_weights=init, d_initial=0.3))
    assert torch.equal(model(x), before) == init
    layer: Any = model.get_submodule("fc.adapters.a")
    assert bool((layer.vera_lambda_d == 0.3).all()) == init


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


def kept_bytes(step: Any, known: Any) -> int:
    """What autograd keeps for the backward, the tensors in `known` apart."""
    own = {t.untyped_storage().data_ptr() for t in known}
    storages = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = step()
    del out
    return sum(s.nbytes() for s in storages.values())


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


@every_layer
@pytest.mark.parametrize("grad", [True, False])
def test_the_change_is_added_in_the_wider_dtype(sort: str, grad: bool) -> None:
    model, layer, x = adapted(sort)
    with torch.set_grad_enabled(grad):
        out = type(model.fc).__base__.forward(model.fc, x)
        torch.testing.assert_close(add(layer, out, x), out + delta(layer, x))
        rough = add(layer, out.bfloat16(), x)
    assert rough.dtype == torch.float64
    torch.testing.assert_close(rough, out.bfloat16() + delta(layer, x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_adding_in_one_pass_is_no_less_exact_than_adding_the_delta(dtype: torch.dtype) -> None:
    model = one(nn.Linear(96, 128))
    ak.attach(model).add("a", VeraConfig(r=16, target_modules=["fc"]))
    randomise(model, "a")
    layer: Any = model.fc.adapters["a"]
    model.to(dtype)
    x = torch.randn(300, 96, dtype=dtype)
    out = nn.Linear.forward(model.fc, x)
    up, down = (t.double() for t in layer.factors()[:2])
    d, b = layer.vera_lambda_d.double(), layer.vera_lambda_b.double()
    exact = out.double() + (((x.double() @ down.t()) * d) @ up.t()) * b
    plain, found = ((y.double() - exact).norm() for y in (out + delta(layer, x), add(layer, out, x)))
    assert found <= 1.02 * plain


def test_functorch_differentiates_and_maps() -> None:
    model, layer, x = adapted("Linear")
    parameters = dict(layer.named_parameters())

    def loss(given: Any, row: Tensor) -> Tensor:
        changed = {f"fc.adapters.a.{name}": value for name, value in given.items()}
        return torch.func.functional_call(model, changed, (row,)).square().sum()

    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    for i, row in enumerate(x):
        expected = torch.autograd.grad(model(row).square().sum(), list(parameters.values()))
        for value, gradient in zip(found.values(), expected, strict=True):
            torch.testing.assert_close(value[i], gradient)
