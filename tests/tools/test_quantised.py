"""Quantised bases: they train with the mixin, and a merge is refused before anything is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.models import build
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.contract import default_registry
from adapterkit_lora import LoraConfig

from .test_trainer import sft_with_mixin

X = torch.randn(3, 32, generator=torch.Generator().manual_seed(1))


def int8_of_torchao(model: nn.Module) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(model.second, quantization.Int8WeightOnlyConfig())


def int8_of_quanto(model: nn.Module) -> None:
    quanto = pytest.importorskip("optimum.quanto")
    quanto.quantize(model, weights=quanto.qint8, include=["second"])
    quanto.freeze(model)


def int8_of_quanto_in_each_forward(model: nn.Module) -> None:
    quanto = pytest.importorskip("optimum.quanto")
    quanto.quantize(model, weights=quanto.qint8, include=["second"])


def packed(name: str, **options: Any) -> Callable[[nn.Module], None]:
    """Put a layer of bitsandbytes in the place of the second one."""

    def quantise(model: nn.Module) -> None:
        layers = pytest.importorskip("bitsandbytes").nn
        model.second = getattr(layers, name)(32, 32, **options)
        model.second.load_state_dict({"weight": torch.randn(32, 32) * 0.1, "bias": torch.zeros(32)}, strict=False)
        model.second.to("cpu")

    return quantise


PACKED = {
    "4 bits of bitsandbytes": packed("Linear4bit", quant_type="nf4", compute_dtype=torch.float32),
    "8 bits of bitsandbytes": packed("Linear8bitLt", has_fp16_weights=False),
}


@pytest.mark.parametrize("keep_base", [True, False], ids=["base kept", "base not kept"])
@pytest.mark.parametrize(
    "quantise", [int8_of_torchao, int8_of_quanto, int8_of_quanto_in_each_forward, *PACKED.values()]
)
def test_one_quantised_layer_refuses_the_whole_merge(quantise: Callable[[nn.Module], None], keep_base: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("first", nn.Linear(32, 32))
    model.add_module("second", nn.Linear(32, 32))
    quantise(model.eval())
    adapters = ak.attach(model)
    adapters.add("a", LoraConfig(target_modules=["first", "second"], init_lora_weights=False))
    expected, flags = output(model), [p.requires_grad for p in model.parameters()]
    for merge in (lambda: adapters.merge("a", keep_base=keep_base), lambda: adapters.merge_and_detach("a")):
        with pytest.raises(ak.UnsupportedError, match="Nothing can be merged into 'second'"):
            merge()
        assert torch.equal(output(model), expected)
        assert adapters.active == ("a",)
        assert adapters.merged == ()
        assert [p.requires_grad for p in model.parameters()] == flags


@torch.no_grad()
def output(model: nn.Module) -> Tensor:
    return model(X)


def from_pretrained(config: Any, folder: Path) -> Any:
    """A tiny language model that transformers quantises as it loads it."""
    import transformers

    build("llama").save_pretrained(folder)
    auto: Any = transformers.AutoModelForCausalLM
    return auto.from_pretrained(folder, quantization_config=config, device_map="cpu", dtype=torch.float32)


def bitsandbytes(bits: int) -> Any:
    import transformers

    pytest.importorskip("bitsandbytes")
    return transformers.BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)


def torchao() -> Any:
    import transformers

    quantization = pytest.importorskip("torchao.quantization")
    return transformers.TorchAoConfig(quantization.Int8WeightOnlyConfig())


def quanto() -> Any:
    import transformers

    pytest.importorskip("optimum.quanto")
    return transformers.QuantoConfig(weights="int8")


LOADED = {
    "bitsandbytes, 4 bits": (lambda: bitsandbytes(4), "all-linear"),
    "bitsandbytes, 8 bits": (lambda: bitsandbytes(8), "all-linear"),
    "torchao": (torchao, "all-linear"),
    "quanto": (quanto, "all-linear"),
}


@pytest.mark.parametrize(("config", "targets"), LOADED.values(), ids=LOADED.keys())
def test_a_quantised_model_trains_with_the_mixin_and_resumes(config: Any, targets: Any, tmp_path: Path) -> None:
    states = []
    for checkpoint in (None, str(tmp_path / "checkpoint-2")):
        model = from_pretrained(config(), tmp_path / "base")
        torch.manual_seed(3)
        adapters = ak.attach(model)
        adapters.add("t", LoraConfig(r=2, target_modules=targets, lora_dropout=0.1))
        start = {key: tensor.clone() for key, tensor in adapters.training_state("t").items()}
        sft_with_mixin(model, tmp_path).train(resume_from_checkpoint=checkpoint)
        assert model.is_quantized
        states.append(adapters.training_state("t"))
        assert any(not torch.equal(start[key], tensor) for key, tensor in states[-1].items())
    for key, tensor in states[0].items():
        torch.testing.assert_close(states[1][key], tensor, rtol=1e-4, atol=1e-4)


QUANTISED = [int8_of_torchao, int8_of_quanto]


def quantised(quantise: Callable[[nn.Module], None]) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("first", nn.Linear(32, 32))
    model.add_module("second", nn.Linear(32, 32))
    quantise(model.eval())
    return model


@pytest.mark.parametrize("quantise", QUANTISED)
def test_a_report_has_the_size_of_a_quantised_weight(quantise: Callable[[nn.Module], None]) -> None:
    adapters = ak.attach(quantised(quantise))
    adapters.add("a", LoraConfig(r=2, target_modules=["first", "second"], init_lora_weights=False))
    layers = adapters.report().findings.adapters[0].layers.values()
    assert [layer.base_norm for layer in layers] == [pytest.approx(3.27, rel=0.05)] * 2


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("quantise", QUANTISED)
def test_an_adapter_begins_with_the_leading_part_of_a_quantised_weight(
    quantise: Callable[[nn.Module], None], init: str
) -> None:
    model = quantised(quantise)
    expected = model(X)
    ak.attach(model).add("a", LoraConfig(r=4, target_modules=["second"], init_lora_weights=init))
    torch.testing.assert_close(model(X), expected, rtol=1e-4, atol=1e-4)
    assert model.second.adapters["a"].lora_A.weight.abs().max() > 0


@pytest.mark.parametrize("quantise", QUANTISED)
def test_a_quantised_module_is_not_trained_as_a_copy(quantise: Callable[[nn.Module], None]) -> None:
    adapters = ak.attach(quantised(quantise))
    with pytest.raises(ak.UnsupportedError, match=r"'second' cannot be trained as a copy: its weight is a .*Tensor"):
        adapters.add("a", LoraConfig(r=2, target_modules=["first"], modules_to_save=["second"]))
    assert adapters.names == ()


@pytest.mark.parametrize("forwards", [0, 2])
@pytest.mark.parametrize("quantise", PACKED.values(), ids=PACKED.keys())
def test_the_weight_of_a_packed_layer_is_the_one_that_it_computes_with(
    quantise: Callable[[nn.Module], None], forwards: int
) -> None:
    model = quantised(quantise)
    for _ in range(forwards):
        output(model)
    kind = default_registry.kind_of(model.second)
    assert (kind.out_features, kind.in_features) == (32, 32)
    torch.testing.assert_close(model.second(X), X @ kind.read(model.second).T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["lora", "loha", "vera"])
@pytest.mark.parametrize("quantise", PACKED.values(), ids=PACKED.keys())
def test_every_method_adds_its_change_to_a_packed_layer_and_trains(
    quantise: Callable[[nn.Module], None], method: str, tmp_path: Path
) -> None:
    model = quantised(quantise)
    adapters = ak.attach(model)
    bare = output(model)
    adapters.add("a", ak.config(method, r=2, target_modules=["second"]))
    optimizer = torch.optim.SGD(adapters.parameters("a"), lr=1.0)
    for _ in range(5):
        model(X).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    factors = adapters.layers("a")["second"].factors()
    change = factors.delta().detach()
    assert change.abs().max() > 1e-4
    hidden = model.first(X).detach()
    torch.testing.assert_close(output(model), bare + hidden @ change.T, rtol=1e-5, atol=1e-5)
    shown: Any = ak.as_peft(model)
    with torch.no_grad():
        seen = shown.get_base_model().second.get_delta_weight("a")
    torch.testing.assert_close(seen, change, rtol=1e-5, atol=1e-5)
    adapters.save("a", tmp_path)
    trained = output(model)
    assert torch.equal(adapters.detach()(X), bare)
    ak.attach(model).load(tmp_path, "b")
    torch.testing.assert_close(output(model), trained)
