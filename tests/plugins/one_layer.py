"""Small models of one layer, `fc`, with a random adapter `a` of any method."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import adapterkit as ak
from adapterkit.contract import twin
from adapterkit.forward import arithmetic

LAYERS: dict[str, tuple[Any, Any]] = {
    "Linear": (lambda: nn.Linear(6, 5), lambda: torch.randn(2, 3, 6)),
    "Conv1D": (lambda: Conv1D(5, 6), lambda: torch.randn(2, 3, 6)),
    "Conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1, groups=2), lambda: torch.randn(2, 4, 7)),
    "Conv2d": (lambda: nn.Conv2d(3, 4, (2, 3), 2, padding=1, padding_mode="circular"), lambda: torch.randn(2, 3, 6, 6)),
    "Conv1d-reflect": (lambda: nn.Conv1d(2, 3, 3, padding=1, padding_mode="reflect"), lambda: torch.randn(2, 2, 7)),
    "Conv2d-depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4), lambda: torch.randn(2, 4, 5, 5)),
    "Conv2d-same": (lambda: nn.Conv2d(2, 4, 3, padding="same", dilation=2), lambda: torch.randn(1, 2, 5, 5)),
    "Conv3d": (lambda: nn.Conv3d(2, 3, 2, dilation=2), lambda: torch.randn(1, 2, 4, 4, 4)),
    "Embedding": (lambda: nn.Embedding(7, 5), lambda: torch.randint(0, 7, (2, 3))),
}


def one(layer: nn.Module) -> Any:
    """A model of one layer."""
    return nn.Sequential(OrderedDict([("fc", layer)])).eval()


def adapted(layer: nn.Module, config: ak.AdapterConfig) -> tuple[Any, Any]:
    """A model of this layer, and its adapter layer with random parameters."""
    model = one(layer)
    adapters = ak.attach(model)
    adapters.add("a", config.replace(target_modules=["fc"]))
    with torch.no_grad():
        for parameter in adapters.parameters("a"):
            parameter.normal_(std=0.7)
    return model, model.fc.adapters["a"]


def inputs(sort: str, dtype: torch.dtype = torch.float64) -> Tensor:
    x: Tensor = LAYERS[sort][1]()
    return x.to(dtype) if x.is_floating_point() else x


def plain(model: Any, x: Tensor) -> Tensor:
    """The layer's output without its adapter."""
    with ak.attach(model).disabled():
        out: Tensor = model(x)
    return out


def check_functorch(model: Any, layer: nn.Module, x: Tensor) -> None:
    """The gradients of each row of `x`, by `vmap` of `grad`, are those of autograd row by row."""
    parameters = dict(layer.named_parameters())

    def loss(given: Any, row: Tensor) -> Tensor:
        changed = {f"fc.adapters.a.{name}": value for name, value in given.items()}
        return torch.func.functional_call(model, changed, (row,)).square().sum()

    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    for i, row in enumerate(x):
        expected = torch.autograd.grad(model(row).square().sum(), list(parameters.values()))
        for value, gradient in zip(found.values(), expected, strict=True):
            torch.testing.assert_close(value[i], gradient)


def check_gradients(layer: Any, out: Tensor, x: Tensor) -> None:
    """The gradients for the parameters of a layer, and for an input that has some, are those of small differences."""
    values = tuple(p.detach().clone().requires_grad_() for p in layer.parameters())

    def call(given: Tensor, *parameters: Tensor) -> Tensor:
        table = dict(zip(map(id, layer.parameters()), parameters, strict=True))
        other = twin(layer, lambda tensor: table.get(id(tensor), tensor))
        return arithmetic.add(other, out, given) if layer.summed else other(lambda _: out, given)

    if x.is_floating_point():
        assert torch.autograd.gradcheck(call, (x.requires_grad_(), *values), fast_mode=True)
    else:
        assert torch.autograd.gradcheck(lambda *v: call(x, *v), values, fast_mode=True)


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
