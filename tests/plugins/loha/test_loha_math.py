"""LoHa: the forms in which the core computes it, its dropouts, and its memory."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace
from typing import Any

import accelerate
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.plugins.one_layer import LAYERS, check_functorch, check_gradients, kept_bytes, one
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils import prune

import adapterkit as ak
from adapterkit.forward import arithmetic, delta
from adapterkit_loha import LoHaConfig, LoHaLayer

FORMS = ("factored", "dense", "whole")
EVERY = [(sort, e) for sort in LAYERS for e in (False, True) if not e or (sort.startswith("Conv") and sort != "Conv1D")]


@pytest.fixture(autouse=True)
def _exact() -> Any:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def adapted(sort: str, **fields: Any) -> tuple[nn.Module, LoHaLayer, Tensor]:
    """A model of one layer, its adapter layer with random values, and an input."""
    torch.manual_seed(0)
    make, inputs = LAYERS[sort]
    model = one(make())
    adapters = ak.attach(model)
    adapters.add("a", LoHaConfig(**{"r": 3, "alpha": 5, "init_weights": False, "target_modules": ["fc"], **fields}))
    with torch.no_grad():
        for parameter in adapters.parameters("a"):
            parameter.normal_(std=0.7)
    layer: Any = model.get_submodule("fc.adapters.a")
    return model, layer, inputs()


def choose(monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    """Have the cost rule say this; where the weight cannot be used, "whole" stands for "dense"."""

    def chosen(layer: object, x: Tensor, *, weight: bool) -> str:
        return form if weight or form != "whole" else "dense"

    monkeypatch.setattr(arithmetic, "_cheapest", chosen)
    monkeypatch.setattr(arithmetic, "_is_few", lambda kind, x: False)


def cheapest(kind: ak.LayerKind, x: Tensor, rank: int, weight: bool = False, trains: bool = False) -> str:
    layer: Any = SimpleNamespace(kind=kind, rank=rank**2, parameters=list)
    return arithmetic._cheapest(layer, x.detach().requires_grad_(trains), weight=weight)


@pytest.mark.parametrize(("sort", "effective"), EVERY)
@pytest.mark.parametrize("small", [0, 2**60], ids=["functions", "autograd"])
@pytest.mark.parametrize("form", ["factored", "dense", "whole"])
def test_the_output_is_that_of_the_changed_weight_in_every_form(
    sort: str, effective: bool, small: int, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arithmetic, "REBUILT", small)
    choose(monkeypatch, form)
    model, layer, x = adapted(sort, use_effective_conv2d=effective)
    found, inference = model(x), torch.no_grad()(model)(x)
    change = layer.change().detach()
    bare = ak.attach(model).detach()
    layer.kind.write(bare.fc, layer.kind.read(bare.fc) + change)
    torch.testing.assert_close(found, bare(x), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(inference, bare(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("sort", "effective"), EVERY)
@pytest.mark.parametrize("form", ["factored", "dense"])
def test_gradients_of_every_form(sort: str, effective: bool, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arithmetic, "REBUILT", 0)
    choose(monkeypatch, form)
    model, layer, x = adapted(sort, r=2, use_effective_conv2d=effective)
    check_gradients(layer, ak.attach(model).detach()(x).detach(), x)


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=25, deadline=None)
@given(
    sizes=st.tuples(*[st.integers(1, 5)] * 3),
    shape=st.sampled_from([(1,), (2, 3), ()]),
    frozen=st.integers(0, 31),
    biased=st.booleans(),
)
def test_the_own_backwards_are_autograds(
    form: str, sizes: tuple[int, ...], shape: tuple[int, ...], frozen: int, biased: bool
) -> None:
    r, width, out = sizes
    model = one(nn.Linear(width, out, bias=biased, dtype=torch.float64))
    ak.attach(model).add("a", LoHaConfig(r=r, alpha=1.5 * r, init_weights=False, target_modules=["fc"]))
    layer, weight, bias = model.fc.adapters["a"], model.fc.weight, model.fc.bias
    x = torch.randn(*shape, width, dtype=torch.float64)
    tensors = [x, *layer.parameters()]
    for i, tensor in enumerate(tensors):
        tensor.requires_grad_(not frozen >> i & 1)
    trained = [t for t in tensors if t.requires_grad]
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(arithmetic, "REBUILT", -1)
        choose(monkeypatch, form)
        own = model(x)
        x, a1, b1, a2, b2 = tensors
        plain = F.linear(x, weight + 1.5 * (a1 @ b1) * (a2 @ b2), bias)
        torch.testing.assert_close(own, plain)
        if trained:
            weights = torch.randn_like(plain)
            found = torch.autograd.grad(own, trained, weights)
            for ours, theirs in zip(found, torch.autograd.grad(plain, trained, weights), strict=True):
                torch.testing.assert_close(ours, theirs)


# Scaling, initial values, fields


@pytest.mark.parametrize(
    ("fields", "rank", "scaling"),
    [
        ({"r": 8, "alpha": 8}, 8, 1.0),
        ({"r": 4, "alpha": 6}, 4, 1.5),
        ({"r": 4, "alpha": 0.5}, 4, 0.125),
        ({"r": 4, "alpha": 6, "rank_pattern": {"fc": 2}}, 2, 3.0),
        ({"r": 4, "alpha": 6, "alpha_pattern": {"f.": 2}}, 4, 0.5),
    ],
)
def test_the_scaling_is_alpha_over_r_with_patterns(fields: dict[str, Any], rank: int, scaling: float) -> None:
    _, layer, _ = adapted("Linear", **fields)
    assert (layer.r, layer.scaling, layer.hada_w1_a.shape[1]) == (rank, scaling, rank)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 0}, "r = 0: a rank must be at least 1."),
        ({"rank_pattern": {"fc": 0}}, "rank_pattern: r = 0: a rank must be at least 1."),
        ({"rank_dropout": 1.5}, "rank_dropout = 1.5 must be a probability, from 0 to 1."),
        ({"module_dropout": -0.1}, "module_dropout = -0.1 must be a probability, from 0 to 1."),
    ],
)
def test_what_a_config_refuses(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ak.ConfigError) as error:
        LoHaConfig(**fields)
    assert str(error.value) == message


# Dropouts


def test_rank_dropout_drops_rows_and_rescales_by_the_share_left() -> None:
    model, _, x = adapted("Linear", rank_dropout=0.5)
    with ak.attach(model).disabled():
        base = model(x)
    whole = model(x) - base
    model.train()
    counts = set()
    for _ in range(30):
        part = model(x) - base
        kept = (part.abs() > 1e-12).any(0).any(0)
        counts.add(int(kept.sum()))
        if kept.any():
            torch.testing.assert_close(part[..., kept], whole[..., kept] * 5 / kept.sum())
        assert not part[..., ~kept].any()
    assert len(counts) > 2
    model.eval()
    assert torch.equal(model(x) - base, whole)


@pytest.mark.parametrize("probability", [0.9, 1.0])
def test_rank_dropout_of_every_row_gives_no_change_and_finite_gradients(probability: float) -> None:
    model, layer, x = adapted("Linear", rank_dropout=probability)
    model.train()
    for _ in range(50):
        out = model(x)
        out.sum().backward()
        assert out.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("sort", ["Linear", "Conv2d", "Embedding"])
def test_module_dropout_leaves_the_whole_change_out_or_in(sort: str) -> None:
    model, _, x = adapted(sort, module_dropout=0.5)
    with ak.attach(model).disabled():
        base = model(x)
    whole = model(x)
    model.train()
    seen = [(torch.equal(out, base), torch.allclose(out, whole, rtol=1e-12)) for out in (model(x) for _ in range(40))]
    assert set(seen) == {(True, False), (False, True)}
    model.eval()
    assert torch.equal(model(x), whole)


def test_module_dropout_of_one_is_never_in() -> None:
    model, layer, x = adapted("Linear", module_dropout=1.0)
    with ak.attach(model).disabled():
        base = model(x)
    model.train()
    out = model(x)
    assert torch.equal(out, base)
    out.sum().backward()
    assert all(not p.grad.any() for p in layer.parameters())


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 40), rank=st.floats(0, 1), module=st.floats(0, 1))
def test_kept_rows_have_a_mean_of_one_or_are_none(rows: int, rank: float, module: float) -> None:
    kind = ak.kinds.Linear(rows, 1)
    layer: Any = SimpleNamespace(kind=kind, row_dropout=rank, module_dropout=module, row_dropout_rescales=True)
    found = arithmetic.kept_rows(layer, torch.zeros(1, dtype=torch.float64))
    assert found.shape == (rows,)
    assert math.isclose(float(found.mean()), 1.0) or not found.any()


# The cost rule and memory


def shape_of(hidden: int, rank: int, tokens: int) -> tuple[Any, Tensor]:
    torch.set_default_dtype(torch.float32)
    model = one(nn.Linear(hidden, hidden, bias=False))
    ak.attach(model).add("a", LoHaConfig(r=rank, init_weights=False, target_modules=["fc"]))
    return model, torch.randn(tokens, hidden, requires_grad=True)


@pytest.mark.parametrize(("rank", "tokens"), [(4, 256), (8, 256), (16, 128)])
def test_the_factored_form_keeps_nothing_but_the_hidden_tensor(rank: int, tokens: int) -> None:
    model, x = shape_of(1024, rank, tokens)
    layer = model.fc.adapters["a"]
    assert cheapest(layer.kind, x, rank) == "factored"
    found = kept_bytes(lambda: model(x), [x, *model.parameters()])
    scaled_up = 4 * 1024 * rank
    assert found <= 4 * tokens * rank**2 + scaled_up


def test_the_dense_form_keeps_no_matrix_either() -> None:
    model, x = shape_of(512, 32, 256)
    layer = model.fc.adapters["a"]
    assert cheapest(layer.kind, x, 32) == "dense"
    assert kept_bytes(lambda: model(x), [x, *model.parameters()]) <= 4 * 512 * 32


def test_the_whole_form_keeps_no_matrix_either() -> None:
    model, x = shape_of(512, 32, 256)
    assert cheapest(model.fc.adapters["a"].kind, x, 32, weight=True, trains=True) == "whole"
    assert kept_bytes(lambda: model(x), [x, *model.parameters()]) == 0


@pytest.mark.parametrize(
    ("hidden", "rank", "tokens", "added", "infers", "trains"),
    [
        (2048, 8, 8, "factored", "factored", "factored"),
        (2048, 8, 1024, "factored", "factored", "factored"),
        (2048, 16, 1024, "factored", "whole", "factored"),
        (2048, 32, 8, "factored", "factored", "factored"),
        (2048, 32, 1024, "factored", "whole", "whole"),
        (768, 8, 128, "factored", "factored", "factored"),
        (768, 8, 1024, "factored", "whole", "factored"),
        (768, 16, 1024, "factored", "whole", "whole"),
        (768, 32, 1024, "dense", "whole", "whole"),
        (256, 4, 1024, "factored", "whole", "factored"),
        (256, 8, 128, "factored", "whole", "factored"),
        (256, 16, 128, "dense", "whole", "whole"),
        (256, 32, 8, "dense", "whole", "whole"),
    ],
)
def test_the_cost_rule_chooses_what_the_benchmark_measured(
    hidden: int, rank: int, tokens: int, added: str, infers: str, trains: str
) -> None:
    kind, x = ak.kinds.Linear(hidden, hidden), torch.empty(tokens, hidden, device="meta")
    assert cheapest(kind, x, rank) == cheapest(kind, x, rank, trains=True) == added
    assert cheapest(kind, x, rank, weight=True) == infers
    assert cheapest(kind, x, rank, weight=True, trains=True) == trains


def test_a_depthwise_convolution_is_dense_and_a_lookup_never_makes_a_table() -> None:
    kind = ak.kinds.Conv2d.of(nn.Conv2d(64, 64, 3, groups=64))
    assert kind is not None
    assert cheapest(kind, torch.empty(4, 64, 32, 32, device="meta"), 8) == "dense"
    model = one(nn.Embedding(5000, 16))
    ak.attach(model).add("a", LoHaConfig(r=2, init_weights=False, target_modules=["fc"]))
    layer: Any = model.fc.adapters["a"]
    rows = torch.arange(4)
    assert kept_bytes(lambda: model(rows), [rows, *model.parameters()]) < 5000
    assert not layer.summed


@pytest.mark.parametrize("small", [0, 2**60])
@pytest.mark.parametrize("rank", [2, 8])
def test_autocast_gives_the_gradients_of_float32_up_to_its_rounding(
    small: int, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arithmetic, "REBUILT", small)
    torch.set_default_dtype(torch.float32)
    model = one(nn.Linear(16, 16))
    adapters = ak.attach(model)
    adapters.add("a", LoHaConfig(r=rank, target_modules=["fc"], init_weights=False))
    x = torch.randn(64, 16, requires_grad=True)
    grads = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = model(x)
        assert out.dtype == (torch.bfloat16 if enabled else torch.float32)
        grads.append(torch.autograd.grad(out.float().square().sum(), [x, *adapters.parameters("a")]))
    for exact, rough in zip(*grads, strict=True):
        assert rough.dtype == torch.float32
        assert (exact - rough).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize("form", ["factored", "dense", "whole"])
def test_functorch_differentiates_and_maps_every_form(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arithmetic, "REBUILT", 0)
    choose(monkeypatch, form)
    model, layer, x = adapted("Linear")
    check_functorch(model, layer, x)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch's own call
@pytest.mark.parametrize("form", FORMS)
def test_forward_mode_differentiates_every_form(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arithmetic, "REBUILT", 0)
    choose(monkeypatch, form)
    model, layer, x = adapted("Linear")
    tangent = torch.randn_like(x)
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(model(forward_ad.make_dual(x, tangent))).tangent
    torch.testing.assert_close(found, tangent @ (model.fc.weight + layer.change()).t())


class Twice(nn.Module):
    """A parametrization."""

    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


class Louder(nn.Linear):
    """It does not compute as its parent does."""

    def forward(self, x: Tensor) -> Tensor:
        return 3 * super().forward(x)


NOT_PLAIN: dict[str, Any] = {
    "a trainable weight": lambda model: model.fc.weight.requires_grad_(True),
    "a trainable bias": lambda model: model.fc.bias.requires_grad_(True),
    "half precision": lambda model: model.bfloat16(),
    "an adapter of another dtype": lambda model: model.fc.adapters["a"].bfloat16(),
    "a parametrized weight": lambda model: nn.utils.parametrize.register_parametrization(model.fc, "weight", Twice()),
    "a pruned weight": lambda model: prune.l1_unstructured(model.fc, "weight", 0.5),
    "two adapters": lambda model: ak.attach(model).copy("a", "b") or ak.attach(model).activate("a", "b"),
    "offloading": lambda model: (
        ak.attach(model).activate("a", trainable=False) or accelerate.cpu_offload(model, execution_device="cpu")
    ),
}


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("how", NOT_PLAIN)
def test_the_weight_is_changed_only_where_the_layer_is_plain(
    how: str, before: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _, x = adapted("Linear")
    if before:  # what acts at the layer has been decided by then
        model(x)
    NOT_PLAIN[how](model)
    choose(monkeypatch, "dense")
    x = x.to(model.fc.weight.dtype)
    expected = model(x)
    choose(monkeypatch, "whole")
    monkeypatch.setattr(LoHaLayer, "merged", lambda *_: pytest.fail("the weight was used"))
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("replaced", ["of the layer", "of torch's class", ""])
def test_a_layer_with_a_forward_of_its_own_is_added_to(replaced: str, monkeypatch: pytest.MonkeyPatch) -> None:
    choose(monkeypatch, "whole")
    monkeypatch.setattr(LoHaLayer, "merged", lambda *_: pytest.fail("the weight was used"))
    model, x = one(nn.Linear(6, 5) if replaced else Louder(6, 5)), torch.randn(2, 6)
    if replaced == "of the layer":
        forward = model.fc.forward
        model.fc.forward = lambda x: 3 * forward(x)
    if replaced == "of torch's class":
        of_class = nn.Linear.forward
        monkeypatch.setattr(nn.Linear, "forward", lambda self, x: 3 * of_class(self, x))
    base = model(x)
    ak.attach(model).add("a", LoHaConfig(r=2, init_weights=False, target_modules=["fc"]))
    torch.testing.assert_close(model(x), base + delta(model.fc.adapters["a"], x))


CONVOLVE = {
    "by its class": lambda model: None,
    "by a method put on the layer": lambda model: setattr(model.fc, "_conv_forward", lambda x, *_: x.new_ones(1)),
}


class Centred(nn.Conv2d):
    """Its class changes the weight before it convolves, below `forward`."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x, weight - weight.mean((1, 2, 3), keepdim=True), bias)


@pytest.mark.parametrize("how", CONVOLVE)
def test_a_convolution_that_convolves_in_another_way_is_added_to(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    choose(monkeypatch, "whole")
    model, x = one((Centred if how == "by its class" else nn.Conv2d)(3, 4, 3, padding=1)), torch.randn(2, 3, 6, 6)
    adapters = ak.attach(model)
    adapters.add("a", LoHaConfig(r=2, target_modules=["fc"]))
    CONVOLVE[how](model)
    with adapters.disabled():
        base = model(x)
    assert torch.equal(model(x), base.expand(2, 4, 6, 6))


def test_autocast_adds(monkeypatch: pytest.MonkeyPatch) -> None:
    choose(monkeypatch, "whole")
    monkeypatch.setattr(LoHaLayer, "merged", lambda *_: pytest.fail("the weight was used"))
    model, _, x = adapted("Linear")
    with torch.autocast("cpu", torch.bfloat16):
        assert model.float()(x.float()).dtype == torch.bfloat16


def test_hooks_of_the_layer_see_what_they_saw(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _, x = adapted("Linear")
    seen: list[Tensor] = []
    model.fc.register_forward_hook(lambda module, args, out: seen.append(out))
    for form in ("dense", "whole"):
        choose(monkeypatch, form)
        model(x)
    torch.testing.assert_close(seen[0], seen[1])


@pytest.mark.parametrize("rank", [4, 24])
def test_the_whole_form_is_as_exact_as_adding(rank: int) -> None:
    torch.set_default_dtype(torch.float32)
    model = one(nn.Linear(96, 96))
    adapters = ak.attach(model)
    adapters.add("a", LoHaConfig(r=rank, init_weights=False, target_modules=["fc"]))
    layer, x = model.fc.adapters["a"], torch.randn(300, 96)
    weight, bias = model.fc.weight.detach(), model.fc.bias.detach()
    change, wide = layer.change(), copy.deepcopy(layer).double().change()
    exact = F.linear(x.double(), weight.double() + wide, bias.double())
    plain = F.linear(x, weight, bias) + F.linear(x, change)
    found = F.linear(x, layer.merged(weight, None)[0], bias)
    assert (found - exact).norm() <= 1.05 * (plain - exact).norm()
