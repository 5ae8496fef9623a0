"""What LoRA, LoHa and VeRA compute, against the papers' formulas in float64; gradients, dtypes and dropout."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from tests.plugins.one_layer import LAYERS, adapted, check_functorch, check_gradients, inputs, one, plain
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import adapterkit as ak
from adapterkit.forward import delta
from adapterkit.forward.arithmetic import add
from adapterkit_loha import LoHaConfig
from adapterkit_lora import LoraConfig
from adapterkit_vera import VeraConfig

CONFIGS: dict[str, ak.AdapterConfig] = {
    "lora": LoraConfig(r=2, lora_alpha=6),
    "loha": LoHaConfig(r=3, alpha=5),
    "loha-effective": LoHaConfig(r=3, alpha=5, use_effective_conv2d=True),
    "vera": VeraConfig(r=4),
}
CASES = [(m, s) for m in CONFIGS for s in LAYERS if m != "loha-effective" or (s.startswith("Conv") and s != "Conv1D")]
every_case = pytest.mark.parametrize(("method", "sort"), CASES)
every_method = pytest.mark.parametrize("method", ["lora", "loha", "vera"])


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def make(method: str, sort: str) -> tuple[Any, Any, Tensor]:
    return *adapted(LAYERS[sort][0]().double(), CONFIGS[method]), inputs(sort)


@torch.no_grad()
def oracle(layer: Any, method: str, kernel: tuple[int, ...]) -> Tensor:
    """The change `(out, in)` by its definition."""
    if method == "lora":
        names = ("lora_embedding_B", "lora_embedding_A") if layer.kind.lookup else ("lora_B.weight", "lora_A.weight")
        up, down = (layer.get_parameter(name).flatten(1) for name in names)
        return 3.0 * up @ down
    if method == "vera":
        up, down = layer.shared.vera_B, layer.shared.vera_A
        up, down = up[: layer.kind.out_features], down[:, : layer.kind.in_features]
        return torch.diag(layer.vera_lambda_b) @ up @ torch.diag(layer.vera_lambda_d) @ down
    shape = (layer.kind.out_features, layer.kind.in_features)
    result = torch.full(shape, 5 / 3, dtype=torch.float64)
    for index, n in itertools.product(itertools.product(*map(range, shape)), "12"):
        row, column = index
        a, b = getattr(layer, f"hada_w{n}_a"), getattr(layer, f"hada_w{n}_b")
        if method == "loha":
            result[index] *= a[row] @ b[:, column]
        else:
            size = torch.Size(kernel).numel()
            core = getattr(layer, f"hada_t{n}").flatten(2)[..., column % size]
            result[index] *= sum(a[i, row] * core[i, j] * b[j, column // size] for i in range(3) for j in range(3))
    return result


@every_case
def test_the_output_and_the_factors_are_those_of_the_change_by_its_definition(method: str, sort: str) -> None:
    model, layer, x = make(method, sort)
    change = oracle(layer, method, tuple(layer.kind.down_shape(1)[2:]))
    torch.testing.assert_close(layer.factors().delta(), change)
    found, inference = model(x), torch.no_grad()(model)(x)
    bare: Any = ak.attach(model).detach()
    with torch.no_grad():
        layer.kind.write(bare.fc, layer.kind.read(bare.fc) + change)
    torch.testing.assert_close(found, bare(x))
    torch.testing.assert_close(inference, bare(x))


@every_case
def test_gradients(method: str, sort: str) -> None:
    model, layer, x = make(method, sort)
    check_gradients(layer, plain(model, x).detach(), x)


@every_method
@pytest.mark.parametrize("tokens", [2, 60])
def test_the_second_derivative(method: str, tokens: int) -> None:
    model, layer, _ = make(method, "Linear")
    x = torch.randn(tokens, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x, *_: model(x), (x, *layer.parameters()), fast_mode=True)


@every_method
@pytest.mark.parametrize("reentrant", [True, False])
def test_the_backward_under_gradient_checkpointing(method: str, reentrant: bool) -> None:
    model, layer, x = make(method, "Linear")
    wanted = (x.requires_grad_(), *layer.parameters())
    expected = torch.autograd.grad(model(x).square().sum(), wanted)
    checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
    for tensor, grad in zip(wanted, expected, strict=True):
        torch.testing.assert_close(tensor.grad, grad)


@every_method
def test_functorch_differentiates_and_maps(method: str) -> None:
    model, layer, x = make(method, "Linear")
    check_functorch(model, layer, x)


@every_case
def test_a_batch_without_rows_has_an_output_without_rows(method: str, sort: str) -> None:
    model, _, x = make(method, sort)
    assert torch.no_grad()(model)(x[:0]).shape == model(x[:0]).shape == plain(model, x[:0]).shape


@every_method
def test_an_exported_model_takes_batches_of_any_size(method: str) -> None:
    model, _ = adapted(nn.Linear(6, 5).double(), CONFIGS[method].replace(r=2))
    x = torch.randn(70, 6, dtype=torch.float64)
    program = torch.export.export(model, (x[:3],), dynamic_shapes=({0: torch.export.Dim("rows")},)).module()
    torch.testing.assert_close(program(x), model(x))


@every_case
def test_the_change_is_added_in_the_wider_dtype(method: str, sort: str) -> None:
    model, layer, x = make(method, sort)
    if not layer.summed:
        pytest.skip("the layer computes the output itself")
    out = plain(model, x)
    torch.testing.assert_close(add(layer, out, x), out + delta(layer, x))
    rough = add(layer, out.bfloat16(), x)
    assert rough.dtype == torch.float64
    torch.testing.assert_close(rough, out.bfloat16() + delta(layer, x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("method", "tokens"), [("lora", 3), ("lora", 600), ("loha", 300), ("vera", 300)])
@torch.no_grad()
def test_adding_in_one_pass_is_no_less_exact_than_adding_the_delta(
    method: str, tokens: int, dtype: torch.dtype
) -> None:
    model, layer = adapted(nn.Linear(96, 128), CONFIGS[method])
    model.to(dtype)
    x = torch.randn(tokens, 96, dtype=dtype)
    out, wide = plain(model, x), copy.deepcopy(layer).double()
    wide.__dict__["shared"] = None if layer.shared is None else copy.deepcopy(layer.shared).double()
    exact = out.double() + x.double() @ wide.factors().delta().t()
    apart, found = ((y.double() - exact).norm() for y in (out + delta(layer, x), add(layer, out, x)))
    assert found <= 1.02 * apart


@pytest.mark.parametrize("init", [True, False])
@every_case
def test_a_new_adapter_is_the_identity_unless_asked_otherwise(method: str, sort: str, init: bool) -> None:
    model, x = one(LAYERS[sort][0]().double()), inputs(sort)
    before = model(x)
    field = "init_lora_weights" if method == "lora" else "init_weights"
    ak.attach(model).add("a", CONFIGS[method].replace(target_modules=["fc"], **{field: init}))
    assert torch.equal(model(x), before) == init
