"""What the tests of combining share: adapters with values, dense changes, and a model with dense changes in it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from tests.models import MODELS, build
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.contract.registry import default_registry
from adapterkit_lora import LoraConfig


def adapted(model: nn.Module, adapters: Mapping[str, Mapping[str, Any]], targets: Any = None) -> ak.Adapters:
    """`model` with LoRA adapters of these fields, all with random values."""
    found = ak.attach(model)
    for seed, (name, fields) in enumerate(adapters.items()):
        defaults = {"target_modules": targets, "r": 3, "lora_alpha": 5, "modules_to_save": None}
        found.add(name, LoraConfig(**{**defaults, **fields}))
        randomise(found, name, seed)
    return found


def randomise(adapters: ak.Adapters, name: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in adapters.parameters(name):
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter), alpha=0.2)


def tiny(name: str, adapters: Mapping[str, Mapping[str, Any]], dtype: torch.dtype = torch.float64) -> ak.Adapters:
    """Adapters on one of the tiny models, on all its targets and its embedding."""
    spec = MODELS[name]
    targets = [*spec.targets, *([spec.embedding] if spec.embedding else [])]
    return adapted(build(name).to(dtype), adapters, targets)


def deltas(adapters: ak.Adapters, name: str) -> dict[str, Tensor]:
    """The adapter's change at each of its targets: dense, canonical, float64."""
    found = {}
    for path, module in adapters.model.named_modules():
        slots = module._modules.get("adapters")
        if slots is not None and name in slots._modules:
            factors = default_registry.method_of(adapters.config(name)).factors(slots[name])
            found[path] = factors.up.detach().double() @ factors.down.detach().double()
    return found


def sums(adapters: ak.Adapters, weights: Mapping[str, float]) -> dict[str, Tensor]:
    """`sum of w_i dW_i` at every target that one of them has."""
    total: dict[str, Tensor] = {}
    for name, weight in weights.items():
        for path, delta in deltas(adapters, name).items():
            total[path] = total.get(path, torch.zeros_like(delta)) + weight * delta
    return total


def with_changes(model: nn.Module, changes: Mapping[str, Tensor]) -> nn.Module:
    """A copy of the bare model with these dense changes written into its weights."""
    bare = copy.deepcopy(model)
    ak.attach(bare).detach()
    for path, change in changes.items():
        module = bare.get_submodule(path)
        kind = default_registry.kind_of(module)
        assert kind is not None
        module.weight = nn.Parameter(module.weight.detach().clone())  # it may be tied
        kind.write(module, kind.read(module).double() + change)
    return bare


def same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float = 1e-10) -> None:
    assert set(found) == set(expected)
    for path, delta in expected.items():
        size = max(float(delta.norm()), 1e-30)
        assert float((found[path] - delta).norm()) <= tolerance * size, path


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def has_bits(model: nn.Module, before: Mapping[str, Tensor]) -> bool:
    """Whether the model has these tensors, every bit."""
    after = model.state_dict()
    return all(torch.equal(after[key], value) for key, value in before.items())


@contextmanager
def registered(plugin: Any) -> Iterator[Any]:
    ak.register(plugin)
    try:
        yield plugin
    finally:
        ak.default_registry.unregister(plugin.config.method)


@contextmanager
def nothing_changes(adapters: ak.Adapters) -> Iterator[None]:
    """Checks that neither the model nor its adapters are other than before, whatever is raised inside."""

    def picture() -> tuple[Any, ...]:
        model = adapters.model
        modules = [(n, type(m), m.training) for n, m in model.named_modules()]
        flags = [(n, p.requires_grad, id(p)) for n, p in model.named_parameters()]
        labels = getattr(getattr(model, "config", None), "id2label", None)
        return modules, flags, adapters.names, adapters.active, adapters.merged, labels

    before = picture()
    values = {key: value.clone() for key, value in adapters.model.state_dict().items()}
    try:
        yield
    finally:
        assert picture() == before
        after = adapters.model.state_dict()
        assert list(after) == list(values)
        assert all(torch.equal(after[k], v) or bool(v.isnan().any()) for k, v in values.items())


def outer_method() -> ak.Plugin:
    """A third party's additive method of rank 1, `dW = u v^T`, which cannot be a result."""

    class OuterConfig(ak.AdapterConfig):
        method = "outer"

    class OuterLayer(ak.LowRankLayer):
        def setup(self, target: ak.Target, config: Any) -> None:
            self.outer_u = target.new(target.out_features)
            self.outer_v = target.new(target.in_features, init=nn.init.normal_)

        def factors(self) -> ak.Factors:
            return ak.Factors(self.outer_u[:, None], self.outer_v[None, :])

    return ak.plugin(OuterConfig, OuterLayer, prefix="outer_")


def scaling_method(mergeable: bool) -> ak.Plugin:
    """A method that multiplies outputs: not additive, so it has no factors."""

    class ScaleConfig(ak.AdapterConfig):
        method = "scale"

    class ScaleLayer(ak.AdapterLayer):
        def setup(self, target: ak.Target, config: Any) -> None:
            self.scale_out = target.new(target.out_features, init=1.0)

        def forward(self, base: ak.Base, x: Tensor) -> Tensor:
            return base(x) * self.kind.spread(self.scale_out)

    class MergedLayer(ScaleLayer):
        def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
            return weight * self.scale_out[:, None], None if bias is None else bias * self.scale_out

    return ak.plugin(ScaleConfig, MergedLayer if mergeable else ScaleLayer, prefix="scale_")
