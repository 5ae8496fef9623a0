"""LoRA's mathematics: scaling, initial values, dropout and biases."""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from typing import Any

import pytest
import torch
from tests.models import MODELS, build, run
from tests.plugins.one_layer import LAYERS, one
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import adapterkit as ak
from adapterkit.forward import delta
from adapterkit.forward.arithmetic import add
from adapterkit_lora import LoraConfig

RESIDUAL = ("pissa", "olora", "pissa_niter_4")


def adapt(model: nn.Module, **fields: Any) -> ak.Adapters:
    adapters = ak.attach(model)
    adapters.add("a", LoraConfig(**fields))
    return adapters


def layer_of(model: nn.Module, path: str = "fc") -> Any:
    return model.get_submodule(f"{path}.adapters.a")


def randomise(adapters: ak.Adapters) -> None:
    with torch.no_grad():
        for parameter in adapters.parameters("a"):
            parameter.normal_(std=0.5)


def matrices(layer: Any) -> tuple[Tensor, Tensor]:
    """A and B, flat: those that train."""
    if layer.kind.lookup:
        return layer.lora_embedding_A.detach(), layer.lora_embedding_B.detach()
    return layer.lora_A.weight.detach().flatten(1), layer.lora_B.weight.detach().flatten(1)


# Scaling


@pytest.mark.parametrize(
    ("fields", "rank", "scaling"),
    [
        ({}, 8, 1.0),
        ({"r": 4, "lora_alpha": 6}, 4, 1.5),
        ({"r": 4, "lora_alpha": 0.5}, 4, 0.125),
        ({"r": 4, "lora_alpha": 6, "use_rslora": True}, 4, 3.0),
        ({"r": 4, "lora_alpha": 6, "rank_pattern": {"fc": 2}}, 2, 3.0),
        ({"r": 4, "lora_alpha": 6, "alpha_pattern": {"fc": 2}}, 4, 0.5),
        ({"r": 4, "rank_pattern": {"^fc": 16}, "use_rslora": True}, 16, 2.0),
        ({"r": 4, "rank_pattern": {"c": 5, "f.": 2, "fc": 3}, "alpha_pattern": {".*c": 5}}, 2, 2.5),
    ],
)
@pytest.mark.filterwarnings("ignore:These entries of the config matched nothing:adapterkit.AdapterWarning")
def test_the_scaling_is_alpha_over_r_or_its_root_with_patterns(
    fields: dict[str, Any], rank: int, scaling: float
) -> None:
    model = one(nn.Linear(6, 5))
    randomise(adapt(model, target_modules=["fc"], **fields))
    down, up = matrices(layer_of(model))
    x = torch.randn(3, 6)
    assert down.shape == (rank, 6)
    torch.testing.assert_close(delta(layer_of(model), x), scaling * x @ down.t() @ up.t())


def test_a_pattern_ends_a_path_at_a_dot_only() -> None:
    model = nn.Sequential(OrderedDict(fc=nn.Linear(4, 4), lfc=nn.Linear(4, 4)))
    adapt(model, target_modules=["fc", "lfc"], r=4, rank_pattern={"fc": 2})
    assert (layer_of(model).r, layer_of(model, "lfc").r) == (2, 4)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


# The delta


@pytest.mark.parametrize("kind", [kind for kind in LAYERS if kind != "Embedding"])
def test_lora_bias_is_added_with_the_scaling_of_b(kind: str) -> None:
    make, inputs = LAYERS[kind]
    model, x = one(make().double()), inputs().double()
    randomise(adapt(model, target_modules=["fc"], r=2, lora_alpha=6, lora_bias=True))
    layer = layer_of(model)
    whole = delta(layer, x)
    bias = layer.lora_B.bias.detach().clone()
    with torch.no_grad():
        layer.lora_B.bias.zero_()
    torch.testing.assert_close(whole - delta(layer, x), 3 * layer.kind.spread(bias).expand_as(whole))


@pytest.mark.parametrize("init", RESIDUAL)
def test_the_factors_of_a_trained_residual_are_its_exact_delta(init: str) -> None:
    model, x = one(nn.Linear(6, 5, dtype=torch.float64)), torch.randn(3, 6, dtype=torch.float64)
    randomise(adapt(model, target_modules=["fc"], r=2, init_lora_weights=init))
    factors = layer_of(model).factors()
    assert factors.rank == 4
    found = model(x) - nn.Linear.forward(model.fc, x)
    torch.testing.assert_close(found, x @ factors.delta().t())


@pytest.mark.parametrize("tokens", [3, 600])
def test_autocast_adds_in_the_outputs_dtype(tokens: int) -> None:
    model = one(nn.Linear(96, 128))
    randomise(adapt(model, target_modules=["fc"], r=8))
    x, expected = torch.randn(tokens, 96), model(torch.randn(0, 96))
    with torch.autocast("cpu", torch.bfloat16):
        low = nn.Linear.forward(model.fc, x)
        assert add(layer_of(model), low, x).dtype == torch.bfloat16
        assert add(layer_of(model), low.float(), x).dtype == expected.dtype == torch.float32


def test_a_parametrized_factor_acts_as_parametrized() -> None:
    class Twice(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    model, x = one(nn.Linear(6, 5)), torch.randn(2, 6)
    randomise(adapt(model, target_modules=["fc"], r=2))
    layer = layer_of(model)
    once = delta(layer, x)
    nn.utils.parametrize.register_parametrization(layer.lora_B, "weight", Twice())
    torch.testing.assert_close(model(x), nn.Linear.forward(model.fc, x) + 2 * once)


def test_lora_bias_is_refused_on_an_embedding() -> None:
    with pytest.raises(ak.ConfigError, match="lora_bias has no meaning at 'fc': an embedding has no bias"):
        adapt(one(nn.Embedding(4, 3)), target_modules=["fc"], lora_bias=True)


# Initial values


@pytest.mark.parametrize(("layer", "fan_in"), [(nn.Linear(400, 3), 400), (nn.Conv2d(40, 3, 3), 360)], ids=str)
def test_the_default_a_is_drawn_as_torch_draws_the_layers_weight(layer: nn.Module, fan_in: int) -> None:
    model = one(copy.deepcopy(layer))
    adapt(model, target_modules=["fc"], r=50)
    down, _ = matrices(layer_of(model))
    bound = 1 / math.sqrt(fan_in)
    assert 0.95 * bound < down.abs().max() <= bound
    assert down.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)


def test_gaussian_draws_a_with_deviation_one_over_r() -> None:
    model = one(nn.Linear(2000, 3))
    adapt(model, target_modules=["fc"], r=4, init_lora_weights="gaussian")
    assert matrices(layer_of(model))[0].std().item() == pytest.approx(0.25, rel=0.05)


def test_orthogonal_gives_both_factors_values_and_needs_an_even_rank() -> None:
    model = one(nn.Linear(6, 5))
    adapt(model, target_modules=["fc"], r=4, init_lora_weights="orthogonal")
    assert all(matrix.norm() > 0 for matrix in matrices(layer_of(model)))
    with pytest.raises(ak.ConfigError, match="init_lora_weights='orthogonal' needs an even rank"):
        LoraConfig(r=3, init_lora_weights="orthogonal")


def test_an_embedding_starts_with_a_zero_and_b_normal() -> None:
    model = one(nn.Embedding(5, 400))
    adapt(model, target_modules=["fc"], r=4)
    down, up = matrices(layer_of(model))
    assert down.count_nonzero() == 0
    assert up.std().item() == pytest.approx(1.0, rel=0.1)


@pytest.mark.parametrize("fields", [{}, {"use_rslora": True}, {"rank_pattern": {"fc": 3}}])
@pytest.mark.parametrize("make", [lambda: nn.Linear(6, 5), lambda: Conv1D(5, 6)], ids=["Linear", "Conv1D"])
def test_pissa_takes_the_best_approximation_of_its_rank(make: Any, fields: dict[str, Any]) -> None:
    model = one(make().double())
    nn.init.normal_(model.fc.weight)
    adapt(model, target_modules=["fc"], r=2, lora_alpha=5, init_lora_weights="pissa", **fields)
    layer = layer_of(model)
    weight = layer.kind.read(model.fc)
    taken = layer.scaling * matrices(layer)[1] @ matrices(layer)[0]
    assert torch.linalg.matrix_rank(taken) == layer.r
    rest = torch.linalg.svdvals(weight)[layer.r :]
    torch.testing.assert_close((weight - taken).norm(), rest.norm())  # Eckart and Young


def test_pissa_niter_comes_near_the_best_approximation() -> None:
    model = one(nn.Linear(30, 20, dtype=torch.float64))
    nn.init.normal_(model.fc.weight)
    adapt(model, target_modules=["fc"], r=4, init_lora_weights="pissa_niter_8")
    down, up = matrices(layer_of(model))
    best = torch.linalg.svdvals(model.fc.weight.detach())[4:].norm()
    rest = (model.fc.weight.detach() - 2 * up @ down).norm()
    assert best <= rest * (1 + 1e-9)
    assert rest <= best * 1.02


def test_olora_starts_from_the_leading_parts_of_the_weights_qr() -> None:
    model = one(nn.Linear(6, 5, dtype=torch.float64))
    adapt(model, target_modules=["fc"], r=5, init_lora_weights="olora")
    down, up = matrices(layer_of(model))
    torch.testing.assert_close(up.t() @ up, torch.eye(5, dtype=torch.float64))
    assert torch.equal(down, down.triu())
    torch.testing.assert_close(up @ down, model.fc.weight.detach())


@pytest.mark.parametrize("init", [True, "gaussian", *RESIDUAL])
@pytest.mark.parametrize("name", ["gpt2", "llama", "t5"])
def test_a_new_adapter_is_the_identity(name: str, init: Any) -> None:
    model = build(name)
    before = run(model, name)
    targets = list(MODELS[name].targets)
    adapt(model, target_modules=targets, r=2, init_lora_weights=init)
    assert torch.equal(run(model, name), before)


@pytest.mark.parametrize("init", RESIDUAL)
def test_initialisations_from_the_weight_say_when_the_rank_is_too_large(init: str) -> None:
    with pytest.raises(ak.StateError, match=r"takes r <= min\(in, out\) = 5 at 'fc', not 6"):
        adapt(one(nn.Linear(6, 5)), target_modules=["fc"], r=6, init_lora_weights=init)


@pytest.mark.parametrize("kind", ["Conv2d", "Embedding"])
def test_initialisations_from_the_weight_are_for_linear_layers(kind: str) -> None:
    with pytest.raises(ak.StateError, match=f"init_lora_weights='pissa' is for linear layers; 'fc' is a {kind}"):
        adapt(one(LAYERS[kind][0]()), target_modules=["fc"], r=1, init_lora_weights="pissa")


# Dropout


@pytest.mark.parametrize("kind", LAYERS)
def test_dropout_is_unbiased_and_leaves_the_base_path_alone(kind: str) -> None:
    make, inputs = LAYERS[kind]
    model, x = one(make()), inputs()[:1]
    randomise(adapt(model, target_modules=["fc"], r=2, lora_dropout=0.3))
    many = x.repeat(4000, *(1,) * (x.dim() - 1))
    with torch.no_grad():
        dropped, whole = model.train()(many), model.eval()(x)[0]
    spread = dropped.std(0)
    assert spread.max() > 0.01
    error = (dropped.mean(0) - whole).abs()
    assert (error <= 5 * spread / math.sqrt(4000) + 1e-5).all()


@pytest.mark.parametrize("init", RESIDUAL)
def test_the_subtracted_start_of_pissa_is_not_dropped(init: str) -> None:
    model, x = one(nn.Linear(6, 5)), torch.randn(1, 6)
    adapt(model, target_modules=["fc"], r=2, lora_dropout=0.3, init_lora_weights=init)
    with torch.no_grad():
        base = model.eval()(x)
        dropped = model.train()(x.expand(4000, 6))
    torch.testing.assert_close(dropped.mean(0), base[0], rtol=0, atol=0.1 * dropped.std().item())


# Biases


@pytest.mark.parametrize("mode", ["none", "lora_only", "all"])
def test_bias_says_which_biases_train(mode: str) -> None:
    model = build("bert")
    adapters = adapt(model, target_modules=["query"], bias=mode, modules_to_save=None)
    found = {name for name, _ in adapters.named_parameters("a") if name.endswith(".bias")}
    every = {name for name, _ in build("bert").named_parameters() if name.endswith(".bias")}
    assert found == {"none": set(), "all": every, "lora_only": {n for n in every if n.endswith("query.bias")}}[mode]


@pytest.mark.parametrize("kind", [k for k in LAYERS if k != "Embedding"])
def test_a_trained_bias_stands_in_for_the_layers_own(kind: str) -> None:
    make, inputs = LAYERS[kind]
    model, x = one(make()), inputs()
    base = copy.deepcopy(model)
    adapters = adapt(model, target_modules=["fc"], bias="lora_only")
    own = torch.randn_like(base.fc.bias)
    with torch.no_grad():
        dict(adapters.named_parameters("a"))["fc.bias"].copy_(own)
        base.fc.bias.copy_(own)
        torch.testing.assert_close(model(x), base(x))


@pytest.mark.parametrize("name", ["bert", "convnet", "gpt2"])
def test_all_trained_biases_stand_in_for_the_models_own(name: str) -> None:
    model, changed = build(name), build(name)
    adapters = adapt(model, target_modules=MODELS[name].targets[:1], bias="all", modules_to_save=None)
    own = {n: p for n, p in adapters.named_parameters("a") if n.endswith(".bias")}
    with torch.no_grad():
        for key, bias in own.items():
            bias.add_(torch.randn_like(bias))
            changed.get_parameter(key).copy_(bias)
    torch.testing.assert_close(run(model, name), run(changed, name))


def test_disabling_gives_the_bases_biases_back() -> None:
    model = build("bert")
    before = run(model, "bert")
    adapters = adapt(model, target_modules=["query"], bias="all")
    randomise(adapters)
    with adapters.disabled():
        assert torch.equal(run(model, "bert"), before)
