"""Layer kinds against the definition: the layer itself with `W + dW` written into it."""

from __future__ import annotations

import copy
import importlib
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.core.conftest import set_parameters
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import adapterkit as ak
from adapterkit.contract.registry import default_registry
from adapterkit.kinds import base
from adapterkit_lora import LoraConfig

pytestmark = [
    # torch's note that an even kernel with padding="same" is padded in a copy
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning"),
]
few = settings(max_examples=40, deadline=None)
CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


class ScaledEmbedding(nn.Embedding):
    """As BART's: rows times a number."""

    def __init__(self, *args: Any, embed_scale: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.embed_scale = embed_scale

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.embed_scale


class Shifted(nn.Embedding):
    """As BART's positions: it looks up other rows than its input names."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + 1)


class CausalConv(nn.Conv1d):
    """It pads its input itself."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(nn.functional.pad(x, (2, 0)))


def kind_of(layer: nn.Module) -> ak.LayerKind:
    kind = default_registry.kind_of(layer)
    assert kind is not None
    return kind


@st.composite
def linears(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    sizes = st.integers(1, 5)
    inner, outer, bias = draw(sizes), draw(sizes), draw(st.booleans())
    layer = draw(st.sampled_from((nn.Linear(inner, outer, bias=bias), Conv1D(outer, inner))))
    lead = draw(st.lists(st.integers(0, 3), max_size=3))
    return layer.double(), torch.randn(*lead, inner, dtype=torch.float64)


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    dims = draw(st.sampled_from((1, 2, 2, 3)))
    each = lambda low, high: draw(st.tuples(*[st.integers(low, high)] * dims))  # noqa: E731
    kernel, dilation = each(1, 3), each(1, 2)
    padding: Any = draw(st.sampled_from(("same", "valid", "numbers", "numbers")))
    if padding == "numbers":
        padding = each(0, 2)
    stride = (1,) * dims if padding == "same" else each(1, 2)
    groups = draw(st.integers(1, 3))
    layer = CONVOLUTIONS[dims](
        groups * draw(st.integers(1, 2)),
        groups * draw(st.integers(1, 2)),
        kernel,
        stride,
        padding,
        dilation,
        groups,
        draw(st.booleans()),
        draw(st.sampled_from(("zeros", "reflect", "replicate", "circular"))),
    )
    batch = draw(st.sampled_from(((), (1,), (2,))))
    return layer.double(), torch.randn(*batch, layer.in_channels, *each(5, 6), dtype=torch.float64)


@st.composite
def embeddings(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    rows, dim = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    padding = draw(st.none() | st.integers(0, rows - 1))
    if draw(st.booleans()):
        layer: nn.Embedding = ScaledEmbedding(rows, dim, padding, embed_scale=draw(st.sampled_from((1.0, 0.5, 4.0))))
    else:
        layer = nn.Embedding(rows, dim, padding)
    return layer.double(), torch.randint(0, rows, draw(st.sampled_from(((), (3,), (2, 4)))))


layers = st.one_of(linears(), convolutions(), embeddings())


def factors_for(kind: ak.LayerKind, rank: int) -> ak.Factors:
    up = torch.randn(kind.out_features, rank, dtype=torch.float64)
    return ak.Factors(up, torch.randn(rank, kind.in_features, dtype=torch.float64))


def change_of_output(layer: nn.Module, delta: Tensor, x: Tensor) -> Tensor:
    """The oracle: what writing `W + delta` into the layer adds to its output."""
    kind, changed = kind_of(layer), copy.deepcopy(layer)
    kind.write(changed, kind.read(layer) + delta)
    with torch.no_grad():
        return changed(x) - layer(x)


@few
@given(case=layers, rank=st.integers(1, 3), seed=st.integers(0, 2**16))
def test_apply_is_what_writing_the_delta_adds_to_the_output(
    case: tuple[nn.Module, Tensor], rank: int, seed: int
) -> None:
    layer, x = case
    torch.manual_seed(seed)
    factors = factors_for(kind_of(layer), rank)
    torch.testing.assert_close(kind_of(layer).apply(x, factors), change_of_output(layer, factors.delta(), x))


@few
@given(case=layers, rank=st.integers(1, 3), scale=st.sampled_from((-2.5, 0.0, 1.0)), wide=st.booleans())
def test_expand_onto_adds_the_scaled_expansion(
    case: tuple[nn.Module, Tensor], rank: int, scale: float, wide: bool
) -> None:
    layer, x = case
    kind = kind_of(layer)
    factors = factors_for(kind, rank)
    out, hidden = layer(x).detach(), kind.project(x, factors.down)
    before = out.clone()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base, "WIDE", 0 if wide else 10**9)
        found = kind.expand_onto(out, hidden, factors.up, None, scale)
    torch.testing.assert_close(found, before + scale * kind.apply(x, factors))
    assert torch.equal(out, before)


@few
@given(case=st.one_of(linears(), convolutions()), rank=st.integers(1, 3))
def test_a_bias_of_the_factors_is_added_where_the_layer_puts_its_own(case: tuple[nn.Module, Tensor], rank: int) -> None:
    layer, x = case
    kind = kind_of(layer)
    factors, bias = factors_for(kind, rank), torch.randn(kind.out_features, dtype=torch.float64)
    with_bias = kind.apply(x, factors._replace(bias=bias))
    torch.testing.assert_close(with_bias, kind.apply(x, factors) + kind.spread(bias))
    plain, biased = copy.deepcopy(layer), copy.deepcopy(layer)
    plain.bias = nn.Parameter(torch.zeros_like(bias))
    biased.bias = nn.Parameter(bias)
    with torch.no_grad():
        torch.testing.assert_close(biased(x), plain(x) + kind.spread(bias))


@few
@given(case=layers, rank=st.integers(1, 4))
def test_what_is_written_is_read_back_and_files_shapes_flatten_to_the_canonical_ones(
    case: tuple[nn.Module, Tensor], rank: int
) -> None:
    layer, kind = case[0], kind_of(case[0])
    before = layer.weight.detach().clone()
    kind.write(layer, kind.read(layer).clone())
    assert torch.equal(layer.weight, before)
    weight = torch.randn(kind.out_features, kind.in_features, dtype=torch.float64)
    kind.write(layer, weight)
    assert torch.equal(kind.read(layer), weight)
    assert torch.empty(kind.up_shape(rank)).flatten(1).shape == (kind.out_features, rank)
    assert torch.empty(kind.down_shape(rank)).flatten(1).shape == (rank, kind.in_features)


def test_the_canonical_weight_is_indexed_by_output_then_input() -> None:
    linear, transposed, embedding = nn.Linear(3, 2), Conv1D(2, 3), nn.Embedding(3, 2)
    conv = nn.Conv2d(4, 2, (3, 1), groups=2)
    assert kind_of(linear).read(linear)[1, 2] == linear.weight[1, 2]
    assert kind_of(transposed).read(transposed)[1, 2] == transposed.weight[2, 1]
    assert kind_of(embedding).read(embedding)[1, 2] == embedding.weight[2, 1]
    assert kind_of(conv).read(conv)[1, 4] == conv.weight[1, 1, 1, 0]  # 4 = channel 1 of the group, row 1


@pytest.mark.parametrize(
    ("layer", "memory_format"),
    [(nn.Conv2d(3, 4, 2), torch.channels_last), (nn.Conv3d(3, 4, 2), torch.channels_last_3d)],
)
def test_channels_last_weights_are_written_in_their_own_layout(layer: nn.Module, memory_format: Any) -> None:
    layer = layer.to(memory_format=memory_format)
    weight = torch.randn(kind_of(layer).out_features, kind_of(layer).in_features)
    kind_of(layer).write(layer, weight)
    assert layer.weight.is_contiguous(memory_format=memory_format)
    assert torch.equal(kind_of(layer).read(layer), weight)


def test_channels_last_inputs_are_convolved_like_others() -> None:
    layer = nn.Conv2d(3, 4, 3, padding=1).double().to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64).to(memory_format=torch.channels_last)
    factors = factors_for(kind_of(layer), 2)
    torch.testing.assert_close(kind_of(layer).apply(x, factors), change_of_output(layer, factors.delta(), x))


def test_written_values_are_cast_to_the_layers_dtype_and_results_have_the_factors_dtype() -> None:
    layer = nn.Linear(3, 2, dtype=torch.bfloat16)
    kind_of(layer).write(layer, torch.full((2, 3), 1.0))
    assert torch.equal(layer.weight.detach(), torch.ones(2, 3, dtype=torch.bfloat16))
    factors = ak.Factors(torch.ones(2, 1), torch.ones(1, 3))
    assert kind_of(layer).apply(torch.ones(4, 3, dtype=torch.bfloat16), factors).dtype == torch.float32


@settings(max_examples=20, deadline=None)
@given(case=embeddings(), p=st.sampled_from((0.2, 0.5, 0.9)))
def test_dropout_on_an_embedding_drops_whole_rows_and_scales_the_rest(case: tuple[nn.Module, Tensor], p: float) -> None:
    layer, x = case
    factors = factors_for(kind_of(layer), 2)
    whole = kind_of(layer).apply(x, factors).flatten(0, -2) if x.dim() else kind_of(layer).apply(x, factors)[None]
    kept = kind_of(layer).apply(x, factors, p).reshape(whole.shape)
    for row, before in zip(kept, whole, strict=True):
        assert torch.equal(row, torch.zeros_like(row)) or torch.allclose(row, before / (1 - p))


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.Embedding(3, 2), torch.ones(20_000, dtype=torch.long)),
        (nn.Linear(3, 2), torch.ones(20_000, 3)),
        (nn.Conv1d(3, 2, 2), torch.ones(20_000, 3, 2)),
    ],
    ids=["embedding", "linear", "conv"],
)
def test_dropout_keeps_the_expectation(layer: nn.Module, x: Tensor) -> None:
    torch.manual_seed(0)
    kind = kind_of(layer)
    factors = ak.Factors(torch.ones(kind.out_features, 2), torch.ones(2, kind.in_features))
    dropped, whole = kind.apply(x, factors, 0.4), kind.apply(x, factors)
    assert dropped.std() > 0.1
    torch.testing.assert_close(dropped.mean(), whole.mean(), rtol=0.02, atol=0)


def test_the_padding_row_of_an_embedding_gets_no_gradient() -> None:
    down = torch.ones(2, 4, requires_grad=True)
    kind = kind_of(nn.Embedding(4, 3, padding_idx=1))
    kind.apply(torch.tensor([0, 1, 1, 2]), ak.Factors(torch.ones(3, 2), down)).sum().backward()
    assert down.grad is not None
    assert down.grad.count_nonzero(0).tolist() == [2, 0, 2, 0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["bart.Bart", "m2m_100.M2M100", "gemma.GemmaText", "gemma3.Gemma3Text"])
def test_a_change_is_multiplied_by_what_the_layer_multiplies_by(name: str, dtype: torch.dtype) -> None:
    place, prefix = name.split(".")
    module = importlib.import_module(f"transformers.models.{place}.modeling_{place}")
    model: Any = nn.Sequential(getattr(module, f"{prefix}ScaledWordEmbedding")(6, 4, 0, embed_scale=33.94)).to(dtype)
    adapters = ak.attach(model)
    adapters.add("a", LoraConfig(r=2, lora_alpha=2, target_modules=["0"]))
    x = torch.tensor([[1, 2, 4]])
    with torch.no_grad():
        model[0].weight.zero_()
        for parameter in adapters.parameters("a"):
            parameter.fill_(0.25)  # each number of the change is 0.125
    for factor in (33.94, 3.0):
        if isinstance(model[0].embed_scale, Tensor):
            model[0].embed_scale.fill_(factor)
        else:
            model[0].embed_scale = factor
        adapted = model(x)
        own = copy.deepcopy(model)
        adapters.merge("a")
        torch.testing.assert_close(model(x), adapted, rtol=1e-4, atol=0)
        torch.testing.assert_close(own(x), adapted, rtol=1e-4, atol=0)
        adapters.unmerge()
    adapters.copy("a", "b")
    adapters.activate("b")
    torch.testing.assert_close(model(x), adapted, rtol=1e-4, atol=0)


def test_a_plain_embedding_is_not_scaled_whatever_is_noted_on_it() -> None:
    layer = nn.Embedding(5, 4).double()
    layer.embed_scale = 2.0  # type: ignore[assignment]
    factors, x = factors_for(kind_of(layer), 2), torch.tensor([[1, 2, 4]])
    torch.testing.assert_close(kind_of(layer).apply(x, factors), change_of_output(layer, factors.delta(), x))


@pytest.mark.parametrize(
    "layer",
    [
        nn.Embedding(4, 2, max_norm=1.0),
        Shifted(4, 2),
        CausalConv(2, 2, 3),
        nn.ConvTranspose1d(2, 2, 1),
        nn.LazyLinear(2),
        nn.Bilinear(2, 2, 2),
        nn.LayerNorm(2),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_layers_whose_output_is_no_plain_function_of_the_weight_are_no_kind(layer: nn.Module) -> None:
    assert default_registry.kind_of(layer) is None


BIASED: list[tuple[nn.Module, tuple[int, ...]]] = [
    (nn.LayerNorm((3, 1)), (2, 3, 1)),
    (nn.Bilinear(3, 3, 4), (2, 3)),
    (nn.GroupNorm(2, 4), (2, 4, 3)),
    (nn.BatchNorm1d(4), (2, 4)),
    (nn.BatchNorm3d(4), (2, 4, 3, 1, 2)),
    (nn.SyncBatchNorm(4), (2, 4, 3)),
    (nn.InstanceNorm1d(4, affine=True), (4, 3)),
    (nn.InstanceNorm3d(4, affine=True), (2, 4, 3, 1, 2)),
    (nn.ConvTranspose2d(4, 3, 2), (4, 3, 3)),
]


@pytest.mark.parametrize(("layer", "shape"), BIASED, ids=str)
def test_a_trained_bias_acts_where_the_layers_own_does(layer: nn.Module, shape: tuple[int, ...]) -> None:
    adapters = ak.attach(nn.ModuleDict({"layer": layer.eval(), "fc": nn.Linear(2, 2)}))
    adapters.add("a", LoraConfig(r=2, target_modules=["fc"], bias="all"))
    set_parameters(adapters, "a")
    given = [torch.randn(shape)] * (2 if isinstance(layer, nn.Bilinear) else 1)
    found, own = layer(*given), dict(adapters.named_parameters("a"))["layer.bias"].detach()
    adapters.detach()
    assert not torch.equal(own, layer.bias)
    layer.bias.data = own
    torch.testing.assert_close(layer(*given), found)


def test_an_adapted_layer_is_of_the_same_kind() -> None:
    model = nn.Sequential(nn.Conv1d(2, 2, 1), nn.Embedding(3, 2), nn.Linear(2, 2))
    before = [default_registry.kind_of(m) for m in model]
    ak.attach(model).add("a", ak.config("lora", target_modules=["0", "1", "2"]))
    assert [default_registry.kind_of(m) for m in model] == before
