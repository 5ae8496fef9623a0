"""What a merge meets that is no plain weight: done right, or refused with the reason before anything is written."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from tests import combining
from tests.combining import bits, has_bits, nothing_changes
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import adapterkit as ak
from adapterkit.contract.registry import default_registry

MASK = torch.ones(8, 8).index_put((torch.tensor(2), torch.tensor(3)), torch.tensor(0.0))
X = torch.randn(3, 8, generator=torch.Generator().manual_seed(2))
Make = Callable[[nn.Linear], nn.Module | None]


class Equalised(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight * self.in_features**-0.5, self.bias)


def computing(name: str, forward: Callable[[nn.Linear, Tensor], Tensor]) -> Make:
    """A class of this name whose forward computes this."""
    forward.__qualname__ = f"{name}.forward"
    return lambda _: type(name, (nn.Linear,), {"forward": forward})(8, 8)


class Counting(nn.Linear):
    """Its own forward computes the plain product."""

    def __init__(self) -> None:
        super().__init__(8, 8)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count.add_(1)
        return x @ self.weight.T + self.bias


def as_buffer(name: str) -> Make:
    def make(layer: nn.Linear) -> None:
        value = getattr(layer, name).detach()
        delattr(layer, name)
        layer.register_buffer(name, value)

    return make


def hooked(layer: nn.Linear) -> None:
    layer.register_forward_pre_hook(lambda *_: None)


def doubled(layer: nn.Linear) -> None:
    inner = layer.forward
    layer.forward = lambda x: inner(x) * 2  # type: ignore[method-assign]


def hooked_by_accelerate(layer: nn.Linear) -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    hooks.add_hook_to_module(layer, hooks.AlignDevicesHook(execution_device="cpu"))


def mapped(layer: nn.Linear) -> None:
    np.save("weight.npy", layer.weight.detach().numpy())
    with warnings.catch_warnings(action="ignore"):  # torch says once in each process that it is not writable
        weight = torch.from_numpy(np.load("weight.npy", mmap_mode="r"))
    layer.weight = nn.Parameter(weight, requires_grad=False)


def inference(layer: nn.Linear) -> None:
    with torch.inference_mode():
        layer.weight = nn.Parameter(layer.weight.clone(), requires_grad=False)


def linear(x: Tensor, weight: Tensor, layer: nn.Linear) -> Tensor:
    return nn.functional.linear(x, weight, layer.bias)


OTHERS: dict[str, Make] = {
    "Equalised": lambda _: Equalised(8, 8),
    "Masked": computing("Masked", lambda m, x: linear(x, m.weight * MASK, m)),
    "Scaled": computing("Scaled", lambda m, x: linear(x, m.weight * (1 + (1 - MASK) * 1e-4), m)),
    "Thresholded": computing("Thresholded", lambda m, x: linear(x, m.weight * (m.weight.abs() > 0.1), m)),
    "Rounded": computing("Rounded", lambda m, x: linear(x, (m.weight * 16).round() / 16, m)),
    "OfMagnitudes": computing("OfMagnitudes", lambda m, x: linear(x.abs(), m.weight, m)),
    "OfSeveral": computing("OfSeveral", lambda m, x: linear(x, m.weight, m) / len(x)),
}
REFUSED: dict[str, tuple[Make, type[ak.AdapterError], str]] = {
    "weight norm": (parametrizations.weight_norm, ak.UnsupportedError, "weight is computed .* by a parametrization"),
    "pruned": (lambda m: prune.l1_unstructured(m, "weight", 0.5), ak.UnsupportedError, "by its hook L1Unstructured"),
    "hook": (hooked, ak.UnsupportedError, "its forward pre-hook .* may set the weight again"),
    "forward on the instance": (doubled, ak.UnsupportedError, "its forward was replaced on the instance"),
    "pruned bias": (lambda m: prune.l1_unstructured(m, "bias", 0.5), ak.UnsupportedError, "its bias is neither a par"),
    "read-only": (mapped, ak.StateError, r"'fc\.weight' is in read-only memory"),
    "inference tensor": (inference, ak.StateError, r"'fc\.weight' was made under torch\.inference_mode"),
    **{n: (make, ak.UnsupportedError, rf"{n}\.forward computes something else") for n, make in OTHERS.items()},
}


def network(make: Make = lambda _: None) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(OrderedDict(first=nn.Linear(8, 8), fc=nn.Linear(8, 8)))
    model.fc = make(model.fc) or model.fc
    return model.eval()


def adapted(model: nn.Module, **fields: Any) -> ak.Adapters:
    return combining.adapted(model, {"a": {"lora_bias": True, **fields}}, ["first", "fc"])


@torch.no_grad()
def output(model: nn.Module) -> Tensor:
    return model(X)


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("case", REFUSED)
def test_a_weight_that_is_not_plain_is_refused_before_anything_is_written(case: str) -> None:
    make, error, message = REFUSED[case]
    adapters = adapted(network(make))
    expected = output(adapters.model)
    with nothing_changes(adapters):
        for call in (adapters.merge, partial(adapters.merge, keep_base=False), adapters.merge_and_detach):
            with pytest.raises(error, match=message):
                call("a")
    assert torch.equal(output(adapters.model), expected)


class Half(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


def test_what_the_message_says_of_parametrizations_works() -> None:
    model = network()
    adapters = adapted(model)
    parametrize.register_parametrization(model.fc, "weight", Half())
    expected = output(model)
    with pytest.raises(ak.UnsupportedError, match="by a parametrization"):
        adapters.merge("a")
    adapters.save("a", "saved")
    adapters.detach()
    parametrize.remove_parametrizations(model.fc, "weight")
    adapters = ak.attach(model)
    adapters.load("saved", "a")
    adapters.merge("a")
    torch.testing.assert_close(output(model), expected)


RIGHT: dict[str, Make] = {
    "the weight is a buffer": as_buffer("weight"),
    "the bias is a buffer": as_buffer("bias"),
    "an own forward that is plain": lambda _: Counting(),
    "accelerate's hook": hooked_by_accelerate,
    "a method of the class on the instance": lambda m: setattr(m, "forward", m.forward),
}


@pytest.mark.parametrize("fields", [{"lora_bias": False}, {"bias": "all"}, {}], ids=str)
@pytest.mark.parametrize("case", RIGHT)
def test_a_layer_that_computes_plainly_with_its_own_weight_is_merged(case: str, fields: dict[str, Any]) -> None:
    model = network(RIGHT[case])
    before, base = bits(model), output(model)
    adapters = adapted(model, **fields)
    expected, count = output(model), bits(model).get("fc.count")
    adapters.merge("a")
    assert bits(model).get("fc.count") == count
    torch.testing.assert_close(output(model), expected)
    adapters.unmerge()
    assert torch.equal(output(model), expected)
    assert torch.equal(adapters.detach()(X), base)
    assert has_bits(model, {k: v for k, v in before.items() if k != "fc.count"})


@dataclass(frozen=True)
class EqualisedKind(ak.LayerKind):
    """It scales as the layer does, so it need not vouch: that is proven."""

    name = "Equalised"

    @classmethod
    def of(cls, module: nn.Module) -> Any:
        return cls(8, 8) if isinstance(module, Equalised) else None

    def read(self, module: nn.Module) -> Tensor:
        return module.weight.detach() * self.in_features**-0.5

    def write(self, module: nn.Module, weight: Tensor) -> None:
        module.weight.detach().copy_(weight / self.in_features**-0.5)


class TrustedKind(EqualisedKind):
    """Vouches for what no run of a copy can show."""

    vouches = True


@pytest.mark.parametrize("kind", [EqualisedKind, TrustedKind])
def test_a_layer_kind_may_know_or_vouch_for_a_class(kind: type[ak.LayerKind]) -> None:
    class Extension:
        @ak.hookimpl
        def layer_kinds(self) -> Any:
            return [kind]

    extension = Extension()
    default_registry.extend(extension)
    model = network(lambda _: Equalised(8, 8))
    if kind is TrustedKind:
        hooked(model.fc)
    adapters = adapted(model)
    before, expected = model.fc.weight.clone(), output(model)
    adapters.merge("a")
    torch.testing.assert_close(output(model), expected)
    adapters.unmerge()
    assert torch.equal(model.fc.weight, before)


def test_a_sharded_weight_is_refused(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        adapters = adapted(network())
        fully_shard(adapters.model.fc, mesh=init_device_mesh("cpu", (1,)))
        for keep_base in (True, False):
            before = adapters.model.first.weight.clone()
            with pytest.raises(ak.UnsupportedError, match=r"'fc': its weight is sharded"):
                adapters.merge("a", keep_base=keep_base)
            assert torch.equal(adapters.model.first.weight, before)
            assert adapters.active == ("a",)
    finally:
        dist.destroy_process_group()


def test_a_layer_that_quantises_in_its_forward_is_refused_and_not_compiled_for_that() -> None:
    from transformers.integrations.bitnet import AutoBitLinear

    adapters = adapted(network(lambda _: AutoBitLinear(8, 8, bias=True, online_quant=True)))
    before = torch._dynamo.utils.counters["frames"]["total"]
    with pytest.raises(ak.UnsupportedError, match=r"AutoBitLinear\.forward computes something else"):
        adapters.merge("a")
    assert torch._dynamo.utils.counters["frames"]["total"] == before


def test_nothing_is_extracted_from_weights_that_the_layer_does_not_compute_with() -> None:
    base, tuned = (network(OTHERS["Masked"]) for _ in range(2))
    with pytest.raises(ak.UnsupportedError, match=r"Masked\.forward computes something else"):
        ak.extract(base, tuned, rank=2, target_modules=["fc"], modules_to_save=None)
