"""Methods whose targets are modules without a weight: blocks, attention, routers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from tests.models import build, inputs, run
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.contract.registry import default_registry
from adapterkit.disk import merge_checkpoint
from adapterkit_lora import LoraConfig


class ScaledConfig(ak.AdapterConfig):
    """What a module returns, or the first of what it returns, times a learned number."""

    method = "scaled"


class ScaledLayer(ak.AdapterLayer):
    any_module = True

    def setup(self, target: ak.Target, config: ScaledConfig) -> None:
        self.scaled_by = target.new(1, init=1.0)

    def forward(self, base: Any, *args: Any, **kwargs: Any) -> Any:
        out = base(*args, **kwargs)
        return (out[0] * self.scaled_by, *out[1:]) if isinstance(out, tuple) else out * self.scaled_by


@pytest.fixture(autouse=True)
def registered() -> None:
    ak.register(ak.plugin(ScaledConfig, ScaledLayer, prefix="scaled_"))


class Mixed(nn.Module):
    """Called with two tensors, one by keyword, and returns a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor, *, shift: Tensor, double: bool = False) -> tuple[Tensor, Tensor]:
        return self.inner(x) * (2 if double else 1) + shift, shift


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.mixed, self.act = nn.Linear(4, 4), Mixed(), nn.Tanh()
        self.blocks = nn.ModuleList([self.first])

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        out, shift = self.mixed(self.act(hidden), shift=hidden, double=True)
        return torch.cat([out, shift], -1)


def model() -> Model:
    torch.manual_seed(0)
    return Model().eval()


X = torch.linspace(-1, 1, 12).view(3, 4)


def set_to(adapters: ak.Adapters, name: str, value: float) -> None:
    with torch.no_grad():
        for parameter in adapters.parameters(name):
            parameter.fill_(value)


def scaled(base: nn.Module, *targets: str, by: float = 3.0) -> ak.Adapters:
    adapters = ak.attach(base)
    adapters.add("a", ScaledConfig(target_modules=targets))
    set_to(adapters, "a", by)
    return adapters


def test_a_block_keeps_its_arguments_and_the_rest_of_its_tuple() -> None:
    base = model()
    out, shift = base(X).chunk(2, -1)
    scaled(base, "mixed")
    torch.testing.assert_close(base(X), torch.cat([3 * out, shift], -1))


def test_a_module_without_parameters_can_be_a_target() -> None:
    base = model()
    before = base.act(X)
    adapters = scaled(base, "act")
    torch.testing.assert_close(base.act(X), 3 * before)
    assert [p.dtype for p in adapters.parameters("a")] == [torch.float32]
    assert adapters.layers("a")["act"].kind.name == "Module"


@pytest.mark.parametrize("order", [("a", "lora"), ("lora", "a")])
def test_the_first_active_is_the_innermost_also_where_another_method_is(order: tuple[str, str]) -> None:
    base = model()
    adapters = scaled(base, "first")
    adapters.add("lora", LoraConfig(r=2, target_modules=["first"], init_lora_weights=False))
    plain = nn.functional.linear(X, base.first.weight, base.first.bias)
    with adapters.activated("lora"):
        change = base.first(X) - plain
    adapters.activate(*order)
    expected = 3 * plain + change if order[0] == "a" else 3 * (plain + change)
    torch.testing.assert_close(base.first(X), expected)


@pytest.mark.parametrize(
    ("act", "text"),
    [
        (lambda a: a.merge("a"), "'a' cannot be merged"),
        (lambda a: a.combine("b", {"a": 1.0}), "'a' \\(scaled\\) has no low-rank change"),
        (lambda a: a.convert("a", to="lora", name="b"), "'a' \\(scaled\\) has no low-rank change"),
    ],
)
def test_what_needs_a_weight_is_refused_by_name(act: Any, text: str) -> None:
    base = model()
    adapters = scaled(base, "mixed")
    before = base(X)
    with pytest.raises(ak.UnsupportedError, match=text):
        act(adapters)
    torch.testing.assert_close(base(X), before, rtol=0, atol=0)


def test_a_report_says_that_nothing_can_be_measured() -> None:
    assert "no low-rank form of its change at 1 target" in str(scaled(model(), "mixed").report("a"))


def test_it_lives_as_every_adapter_does(tmp_path: Path) -> None:
    base = build("gpt2").eval()
    plain = run(base, "gpt2")
    adapters = scaled(base, "attn", "mlp", by=1.5)
    expected = run(base, "gpt2")
    assert not torch.allclose(expected, plain)

    adapters.save("a", tmp_path / "saved")
    adapters.copy("a", "b")
    adapters.rename("b", "c")
    adapters.remove("a")
    assert torch.equal(run(base, "gpt2"), plain)
    adapters.activate("c")
    torch.testing.assert_close(run(copy.deepcopy(base), "gpt2"), expected)

    again = build("gpt2").eval()
    assert ak.attach(again).load(tmp_path / "saved", "a").ok
    torch.testing.assert_close(run(again, "gpt2"), expected)
    with pytest.raises(ak.UnsupportedError, match="cannot be merged"):
        merge_checkpoint(again_saved(tmp_path), tmp_path / "saved", tmp_path / "merged")
    found = ak.inspect_adapter(tmp_path / "saved", base=tmp_path / "base")
    assert {(layer.kind, layer.shape) for layer in found.layers} == {("Module", None)}
    with pytest.raises(ak.UnsupportedError, match=r"\(scaled\) has no low-rank change of the weight"):
        ak.convert_file(tmp_path / "saved", tmp_path / "lora", to="lora", base=tmp_path / "base")
    adapters.detach()
    assert torch.equal(run(base, "gpt2"), plain)


def again_saved(folder: Path) -> Path:
    build("gpt2").save_pretrained(folder / "base")
    return folder / "base"


def test_per_sample_gives_each_row_its_own_where_a_block_is_called_with_one_tensor() -> None:
    base = model()
    plain = base(X)
    adapters = scaled(base, "act")
    changed = base(X)
    with adapters.per_sample(["a", None, "a"]):
        torch.testing.assert_close(base(X), torch.stack([changed[0], plain[1], changed[2]]))


def test_per_sample_refuses_a_block_that_is_called_with_more() -> None:
    base = model()
    with scaled(base, "mixed").per_sample(["a", None, "a"]), pytest.raises(ak.UnsupportedError, match="one tensor"):
        base(X)


def test_it_trains_through_gradient_checkpointing() -> None:
    gradients = []
    for checkpointing in (False, True):
        base = build("llama").train()
        adapters = scaled(base, "mlp", by=1.5)
        if checkpointing:
            base.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        base(**inputs("llama")).logits.square().mean().backward()
        gradients.append([p.grad for p in adapters.parameters("a")])
    torch.testing.assert_close(*gradients)


def test_it_acts_at_blocks_whose_weights_are_offloaded() -> None:
    base = build("gpt2").eval()
    expected = 2 * base.transformer.h[0].mlp(torch.ones(1, 1, base.config.n_embd))
    accelerate.cpu_offload(base, torch.device("cpu"))
    scaled(base, "h.0.mlp", by=2.0)
    torch.testing.assert_close(base.transformer.h[0].mlp(torch.ones(1, 1, base.config.n_embd)), expected)


def test_parameters_are_float32_beside_bfloat16() -> None:
    adapters = scaled(model().to(torch.bfloat16), "mixed")
    assert [p.dtype for p in adapters.parameters("a")] == [torch.float32]


MIXED = ScaledConfig(target_modules=["mixed"])


class SizedLayer(ScaledLayer):
    def setup(self, target: ak.Target, config: ScaledConfig) -> None:
        self.scaled_by = target.new(target.out_features)


class DroppingLayer(ScaledLayer):
    def setup(self, target: ak.Target, config: ScaledConfig) -> None:
        super().setup(target, config)
        self.dropout = 0.1


@pytest.mark.parametrize(
    ("layer", "config", "error", "message"),
    [
        (ScaledLayer, ScaledConfig(target_modules=["blocks"]), ak.SelectionError, "a ModuleList is a container"),
        (ScaledLayer, LoraConfig(target_modules=["mixed"]), ak.SelectionError, "is a Mixed, which cannot be adapted"),
        (SizedLayer, MIXED, ak.UnsupportedError, r"A Mixed is adapted as a whole, so it has no weight \(out, in\)"),
        (DroppingLayer, MIXED, ak.PluginError, "its dropouts belong into its forward"),
    ],
)
def test_what_a_block_cannot_have_is_refused(layer: Any, config: Any, error: type[Exception], message: str) -> None:
    default_registry.unregister("scaled")
    ak.register(ak.plugin(ScaledConfig, layer, prefix="scaled_"))
    with pytest.raises(error, match=message):
        ak.attach(model()).add("a", config)


def test_a_class_that_cannot_adapt_a_module_is_refused_where_it_is_defined() -> None:
    with pytest.raises(ak.PluginError, match="has any_module, so it must be an AdapterLayer that defines forward"):

        class Merging(ak.AdapterLayer):
            any_module = True

            def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
                return weight, bias
