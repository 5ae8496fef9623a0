"""Adapters under what users put models under: copies, the compiler, checkpointing, dtypes, offloading, trainers."""

from __future__ import annotations

import copy
import io
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.core.conftest import assert_as_before, different, set_parameters, snapshot
from tests.models import assert_same_outputs, build, inputs, run
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.forward import delta
from adapterkit_lora import LoraConfig
from adapterkit_vera import VeraConfig

Trained = Callable[..., ak.Adapters]
FIELDS: dict[str, Any] = {"target_modules": "all-linear", "bias": "lora_only"}


def gradients(model: nn.Module, adapters: ak.Adapters, name: str, given: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    model(**given).logits.float().square().mean().backward()
    return {key: p.grad.clone() for key, p in adapters.named_parameters(name) if p.grad is not None}


# Copies


def test_a_deep_copys_adapters_are_independent(trained: Trained) -> None:
    model = build("bert")
    before = snapshot(model)
    adapters = trained(model, "a", **FIELDS)
    adapters.activate("a")
    expected = run(model, "bert")
    others = ak.attach(copy.deepcopy(model))
    assert others is not adapters
    assert_same_outputs(run(others.model, "bert"), expected)
    set_parameters(others, "a", seed=7)
    others.activate()
    others.add("b", LoraConfig(target_modules=["query"]))
    assert adapters.active == adapters.names == ("a",)
    assert torch.equal(run(model, "bert"), expected)
    adapters.activate()
    assert others.active == ("b",)
    assert_as_before(others.detach(), before)


@pytest.mark.parametrize("name", ["bert", "convnet"])
def test_a_whole_adapted_model_goes_through_torch_save(name: str, trained: Trained) -> None:
    model = build(name)
    classes = {path: type(module) for path, module in model.named_modules()}
    adapters = trained(model, "a", "b", modules_to_save=None, **FIELDS)
    adapters.activate("a", trainable=False)
    expected = run(model, name)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    again = torch.load(buffer, weights_only=False)
    assert_same_outputs(run(again, name), expected)
    assert ak.attach(again).names == ("a", "b")
    bare = ak.attach(again).detach()
    assert_same_outputs(run(bare, name), run(build(name), name))
    assert {path: type(module) for path, module in bare.named_modules()} == classes


# The compiler


@pytest.mark.parametrize("name", ["embednet", "convnet"])
def test_a_compiled_model_gives_the_same_outputs(name: str, trained: Trained) -> None:
    torch._dynamo.reset()
    model = build(name)
    head, targets = "head", {"embednet": ["embed", "overhead"], "convnet": ["grouped", "fc"]}[name]
    adapters = trained(model, "a", target_modules=targets, bias="all", modules_to_save=[head])
    adapters.activate("a", trainable=False)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(run(compiled, name), run(model, name))
    adapters.activate()
    torch.testing.assert_close(run(compiled, name), run(model, name))


def test_a_compiled_sequential_head_gives_the_same_outputs() -> None:
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Tanh(), nn.Linear(4, 2))).eval()
    adapters = ak.attach(model)
    adapters.add("a", LoraConfig(r=2, target_modules=["0"], modules_to_save=["1"]))
    set_parameters(adapters, "a")
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    x = torch.ones(2, 4)
    torch.testing.assert_close(compiled(x), model(x))
    with adapters.disabled():
        torch.testing.assert_close(compiled(x), model(x))


def test_a_compiled_model_trains_as_the_model_does(trained: Trained) -> None:
    torch._dynamo.reset()
    model = build("gpt2")
    adapters = trained(model, "a", **FIELDS)
    adapters.activate("a")
    expected = gradients(model, adapters, "a", inputs("gpt2"))
    found = gradients(torch.compile(model, fullgraph=True, backend="aot_eager"), adapters, "a", inputs("gpt2"))
    assert expected.keys() == found.keys()
    assert all(torch.allclose(found[key], expected[key], atol=1e-6) for key in expected)


def test_each_active_set_is_compiled_once_and_then_cached(trained: Trained) -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    model = build("embednet")
    adapters = trained(model, "a", "b", target_modules=["overhead", "embed"])
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    sets: list[tuple[str, ...]] = [("a",), ("b",), ("a", "b"), ()]
    counts = []
    for names in sets * 3:
        adapters.activate(*names, trainable=False)
        torch.testing.assert_close(run(compiled, "embednet"), run(model, "embednet"))
        counts.append(counter.frame_count)
    assert counts == [1, 2, 3, 4, *[4] * 8]


@pytest.mark.parametrize("config", [VeraConfig(r=2), LoraConfig(r=2, modules_to_save=["head"])], ids=["shared", "copy"])
def test_a_sequence_with_an_adapter_has_its_own_layers_alone(config: ak.AdapterConfig) -> None:
    layers = OrderedDict(head=nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), last=nn.Linear(4, 4))
    model: Any = nn.Sequential(layers)
    sequence = model if config.method == "vera" else model.head
    before = list(sequence)
    adapters = ak.attach(model)
    adapters.add("a", config.replace(target_modules=["last"]))
    set_parameters(adapters, "a")
    assert list(sequence) == before
    assert len(sequence) == len(before)
    assert sequence[-1] is before[-1]
    assert list(sequence[:-1]) == before[:-1]
    assert isinstance(sequence[:-1], nn.Sequential)
    x = torch.ones(2, 4)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), model(x))
    sequence.append(nn.Tanh())
    adapters.detach()
    assert list(sequence)[:-1] == before


# Dtypes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["gpt2", "convnet"])
def test_a_half_precision_base_has_float32_adapters_and_keeps_its_outputs_dtype(name: str, dtype: torch.dtype) -> None:
    model = build(name).to(dtype)
    adapters = ak.attach(model)
    config = LoraConfig(r=2, modules_to_save=None, **FIELDS)
    adapters.add("a", config)
    set_parameters(adapters, "a", scale=0.05)
    assert {p.dtype for p in adapters.parameters("a")} == {torch.float32}
    output = run(model, name)
    assert output.dtype == dtype
    wide = ak.attach(build(name))
    wide.add("a", config)
    wide.load_state_dict("a", adapters.state_dict("a"))
    torch.testing.assert_close(output.float(), run(wide.model, name), atol=0.05, rtol=0.05)
    assert different(output.float(), run(build(name), name))
    if name != "convnet":
        found = gradients(model, adapters, "a", inputs(name))
        assert {g.dtype for g in found.values()} == {torch.float32}
        assert len(found) == len(list(adapters.parameters("a")))


def test_autocast_computes_the_adapter_in_the_autocast_dtype_and_gives_float32_gradients(trained: Trained) -> None:
    model = build("bert")
    adapters = trained(model, "a", target_modules=["query", "value"], modules_to_save=None)
    adapters.activate("a")
    layer = model.bert.encoder.layer[0].attention.self.query
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(torch.ones(2, 16))
        assert delta(layer.adapters["a"], torch.ones(2, 16)).dtype == torch.bfloat16
        assert {g.dtype for g in gradients(model, adapters, "a", inputs("bert")).values()} == {torch.float32}
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), layer(torch.ones(2, 16)), atol=0.05, rtol=0.05)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_model_moved_to_another_dtype_takes_its_adapters_along(dtype: torch.dtype, trained: Trained) -> None:
    model = build("bert")
    adapters = trained(model, "a", **FIELDS)
    adapters.activate("a", trainable=False)
    before = run(model, "bert")
    model.to(dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert all(row.dtypes == (str(dtype).removeprefix("torch."),) for row in adapters.status().rows)
    torch.testing.assert_close(run(model, "bert").float(), before, atol=0.1, rtol=0.1)
    if dtype == torch.float64:
        adapters.add("b", LoraConfig(r=2, **FIELDS))
        assert {p.dtype for p in adapters.parameters("b")} == {dtype}


# The meta device


def give_values(model: nn.Module, base: nn.Module) -> None:
    """Fill a model with the base's values, as `from_pretrained` does; what adapters own is left alone."""
    model.load_state_dict(base.state_dict(), strict=False, assign=True)
    for path, module in base.named_modules():
        model.get_submodule(path)._buffers.update(module._buffers)


@pytest.mark.parametrize("how", ["load_state_dict", "load", "to_empty"])
def test_a_model_on_the_meta_device_is_filled_with_its_adapters(how: str, tmp_path: Path, trained: Trained) -> None:
    source = trained(build("bert"), "a", **FIELDS)
    source.activate("a", trainable=False)
    source.save("a", tmp_path)
    with torch.device("meta"):
        model = build("bert")
    adapters = ak.attach(model)
    if how == "load":
        assert adapters.load(tmp_path, "a").ok
        give_values(model, build("bert"))
    else:
        adapters.add("a", LoraConfig(r=2, **FIELDS))
        assert all(p.is_meta for p in adapters.parameters("a"))
    if how == "load_state_dict":
        give_values(model, build("bert"))
        assert adapters.load_state_dict("a", source.state_dict("a")).ok
        assert all(p.requires_grad for p in adapters.parameters("a"))
    if how == "to_empty":
        model.to_empty(device="cpu")
        for module in model.modules():  # what was empty must not be right by chance
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                if tensor is not None:
                    tensor.data.fill_(77)
        model.load_state_dict(source.model.state_dict())
        for path, module in build("bert").named_modules():
            model.get_submodule(path)._buffers.update(module._buffers)
    assert not any(p.is_meta for p in adapters.parameters("a"))
    assert_same_outputs(run(model, "bert"), run(source.model, "bert"))


def test_an_adapter_without_values_is_not_saved(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = build("bert")
    adapters = ak.attach(model)
    adapters.add("a", LoraConfig(target_modules=["query"]))
    with pytest.raises(ak.CheckpointError, match="Adapter 'a' has no values to save"):
        adapters.save("a", tmp_path / "x")
    assert not (tmp_path / "x").exists()


# accelerate


def offload(model: nn.Module, how: str, folder: Path) -> None:
    from accelerate import cpu_offload, disk_offload, dispatch_model

    if how == "cpu":
        cpu_offload(model, execution_device="cpu")
    elif how == "disk":
        disk_offload(model, str(folder), execution_device="cpu")
    else:
        parts = {"bert.embeddings": "cpu", "bert.encoder.layer.0": "disk", "bert.encoder.layer.1": "cpu"}
        parts |= {"bert.pooler": "cpu", "dropout": "cpu", "classifier": "disk"}
        dispatch_model(model, parts, main_device="cpu", offload_dir=str(folder), force_hooks=True)


ACCELERATED: dict[str, Any] = {"target_modules": "all-linear", "bias": "all", "modules_to_save": ["classifier"]}


@pytest.mark.parametrize("how", ["cpu", "disk", "dispatch"])
@pytest.mark.parametrize("first", ["hooks", "adapter", "loaded"])
def test_adapters_act_on_an_offloaded_model(how: str, first: str, tmp_path: Path, trained: Trained) -> None:
    plain = trained(build("bert"), "a", "b", **ACCELERATED)
    plain.activate("b", trainable=False)
    expected = run(plain.model, "bert")
    model = build("bert")
    if first != "adapter":
        offload(model, how, tmp_path / "weights")
    adapters = ak.attach(model)
    if first == "loaded":
        assert adapters.load(plain.save("b", tmp_path / "plain"), "b").ok
        again = ak.attach(build("bert"))
        again.load(adapters.save("b", tmp_path / "again"), "b")
        torch.testing.assert_close(run(again.model, "bert"), expected)
    else:
        trained(model, "a", "b", **ACCELERATED)
    if first == "adapter":
        offload(model, how, tmp_path / "weights")
    adapters.activate("b", trainable=False)
    torch.testing.assert_close(run(model, "bert"), expected)
    with adapters.disabled():
        torch.testing.assert_close(run(model, "bert"), run(build("bert"), "bert"))


def test_an_adapter_that_was_offloaded_with_its_model_is_saved_and_not_written_to(
    tmp_path: Path, trained: Trained
) -> None:
    adapters = trained(build("bert"), "a", **ACCELERATED)
    expected = {key: value.clone() for key, value in adapters.state_dict("a").items()}
    offload(adapters.model, "cpu", tmp_path)
    adapters.save("a", tmp_path / "a")
    saved = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[key], expected[key]) for key in expected)
    with pytest.raises(ak.StateError, match="is offloaded by accelerate, so nothing can be written there"):
        adapters.load_state_dict("a", expected)


@pytest.mark.parametrize("how", ["cpu", "disk", "dispatch"])
def test_detach_gives_an_offloaded_model_its_hooks_forward_back(how: str, tmp_path: Path, trained: Trained) -> None:
    model = build("bert")
    offload(model, how, tmp_path)
    before = snapshot(model)
    forwards = {p: (m.__dict__.get("forward"), m.__dict__.get("_old_forward")) for p, m in model.named_modules()}
    trained(model, "a", "b", **ACCELERATED).detach()
    assert_as_before(model, before)
    after = {p: (m.__dict__.get("forward"), m.__dict__.get("_old_forward")) for p, m in model.named_modules()}
    assert after == forwards
    torch.testing.assert_close(run(model, "bert"), run(build("bert"), "bert"))


def test_a_model_of_the_meta_device_takes_the_values_that_accelerate_sets(trained: Trained, tmp_path: Path) -> None:
    from accelerate import Accelerator, init_empty_weights, load_checkpoint_and_dispatch

    source = trained(build("bert"), "a", target_modules=["query"])
    source.activate("a")
    Accelerator(cpu=True).save_model(source.model, str(tmp_path))
    with init_empty_weights():
        model = build("bert")
        ak.attach(model).add("a", source.config("a"))
    load_checkpoint_and_dispatch(model, str(tmp_path), {"": "cpu"})
    assert_same_outputs(run(model.eval(), "bert"), run(source.model, "bert"))


def test_detach_gives_the_model_back_when_the_hooks_came_after_the_adapters(trained: Trained, tmp_path: Path) -> None:
    from accelerate.hooks import remove_hook_from_submodules

    model = build("bert")
    values = snapshot(model)["values"]
    adapters = trained(model, "a", **ACCELERATED)
    offload(model, "cpu", tmp_path)
    adapters.detach()
    torch.testing.assert_close(run(model, "bert"), run(build("bert"), "bert"))
    remove_hook_from_submodules(model)
    torch.testing.assert_close(run(model, "bert"), run(build("bert"), "bert"))
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in values.items())
    assert type(model.bert.encoder.layer[0].attention.self.query) is nn.Linear


@pytest.mark.parametrize(
    "part", [{"bias": "all", "modules_to_save": []}, {"target_modules": ["query"], "bias": "none"}]
)
def test_an_adapter_that_was_offloaded_with_its_model_does_not_train_in_silence(
    part: dict[str, Any], trained: Trained, tmp_path: Path
) -> None:
    adapters = trained(build("bert"), "a", **ACCELERATED | part)
    adapters.activate("a")
    offload(adapters.model, "cpu", tmp_path)
    with pytest.raises(ak.StateError, match="was offloaded by accelerate together with its model"):
        adapters.model(**inputs("bert"))
    adapters.activate("a", trainable=False)
    adapters.model(**inputs("bert"))


def test_adapters_of_an_offloaded_model_train(trained: Trained, tmp_path: Path) -> None:
    plain = trained(build("bert"), "a", **ACCELERATED)
    plain.activate("a")
    expected = gradients(plain.model, plain, "a", inputs("bert"))
    model = build("bert")
    offload(model, "cpu", tmp_path)
    adapters = trained(model, "a", **ACCELERATED)
    adapters.activate("a")
    found = gradients(model, adapters, "a", inputs("bert"))
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, atol=1e-6, rtol=1e-4)


# Layers whose forward torch passes over


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")  # torch's own fast path gives it
@pytest.mark.parametrize("target", ["linear1", "linear2"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("stack", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_adapters_act_where_torchs_encoder_has_a_fast_path(
    target: str, masked: bool, stack: bool, grad: bool, trained: Trained
) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        model: nn.Module = (nn.TransformerEncoder(layer, 2) if stack else layer).eval()
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2]) if masked else None
    keep = torch.ones(2, 5, dtype=torch.bool) if mask is None else ~mask

    def forward(training: bool) -> Tensor:
        model.train(training)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            if isinstance(module, nn.MultiheadAttention):
                module.dropout = 0.0
        with torch.set_grad_enabled(grad):
            return model(x, src_key_padding_mask=mask)[keep]

    base = forward(False)
    adapters = trained(model, "a", target_modules=[target])
    adapters.activate("a", trainable=False)
    adapted = forward(False)
    assert different(adapted, base)
    torch.testing.assert_close(adapted, forward(True))  # in training there is no fast path
    adapters.activate()
    torch.testing.assert_close(forward(False), base, atol=1e-6, rtol=1e-5)
    adapters.detach()
    assert torch.equal(forward(False), base)
