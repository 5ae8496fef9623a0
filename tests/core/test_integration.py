"""Adapters under what users put models under: copies, the compiler, checkpointing, dtypes, offloading, trainers."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from tests.core.conftest import assert_as_before, different, set_parameters, snapshot
from tests.core.test_trainer import trainer
from tests.models import assert_same_outputs, build, inputs, run
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.forward import delta
from adapterkit_lora import LoraConfig

Trained = Callable[..., ak.Adapters]
FIELDS: dict[str, Any] = {"target_modules": "all-linear", "bias": "lora_only"}


@pytest.fixture
def gloo(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


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


@pytest.mark.parametrize("name", ["bert", "gpt2", "convnet"])
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


@pytest.mark.parametrize("name", ["bert", "gpt2", "convnet", "embednet"])
def test_a_compiled_model_gives_the_same_outputs(name: str, trained: Trained) -> None:
    torch._dynamo.reset()
    model = build(name)
    head = {"bert": "classifier", "gpt2": "ln_f"}.get(name, "head")
    targets = {"embednet": ["embed", "overhead"], "convnet": ["grouped", "fc"]}.get(name, "all-linear")
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


# Gradient checkpointing


def checkpoint(model: Any, reentrant: bool) -> None:
    if hasattr(model, "activation_checkpointing_enable"):  # its name from transformers 5.20 on
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": reentrant})
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5", "vit", "llama", "bart"])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("first", ["checkpointing", "adapter"])
def test_gradient_checkpointing_gives_the_same_gradients(name: str, reentrant: bool, first: str) -> None:
    def adapted(checkpointed: bool) -> dict[str, Tensor]:
        model = build(name)
        if checkpointed and first == "checkpointing":
            checkpoint(model, reentrant)
        adapters = ak.attach(model)
        torch.manual_seed(0)
        adapters.add("a", LoraConfig(r=2, target_modules="all-linear", modules_to_save=None))
        set_parameters(adapters, "a")
        if checkpointed and first == "adapter":
            checkpoint(model, reentrant)
        model.train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        for module in model.modules():  # attention and T5 keep probabilities of their own
            for field in ("dropout", "attention_dropout", "dropout_prob", "dropout_rate"):
                if isinstance(getattr(module, field, None), float):
                    setattr(module, field, 0.0)
        return gradients(model, adapters, "a", inputs(name))

    expected, found = adapted(False), adapted(True)
    assert expected
    assert expected.keys() == found.keys()
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, atol=1e-6, rtol=1e-4)


def test_checkpointing_leaves_no_hook_after_detach(trained: Trained) -> None:
    model = build("bert")
    checkpoint(model, reentrant=True)
    before = snapshot(model)
    assert_as_before(trained(model, "a", **FIELDS).detach(), before)


def test_embeddings_require_no_gradient_where_nothing_is_checkpointed(trained: Trained) -> None:
    model = build("bert").train()
    trained(model, "a", target_modules=["intermediate.dense"], layers_to_transform=[1]).activate("a")
    outputs = model(**inputs("bert"), output_hidden_states=True).hidden_states
    assert not outputs[0].requires_grad
    assert not outputs[1].requires_grad
    assert outputs[2].requires_grad


# Dtypes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["bert", "gpt2", "convnet"])
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


def test_a_float64_base_has_float64_adapters(trained: Trained) -> None:
    model = build("bert").double()
    adapters = trained(model, "a", **FIELDS)
    assert {p.dtype for p in adapters.parameters("a")} == {torch.float64}


# The meta device


def give_values(model: nn.Module, base: nn.Module) -> None:
    """Fill a model with the base's values, as `from_pretrained` does; what adapters own is left alone."""
    model.load_state_dict(base.state_dict(), strict=False, assign=True)
    for path, module in base.named_modules():
        model.get_submodule(path)._buffers.update(module._buffers)


def test_an_adapter_added_on_the_meta_device_is_filled_by_load_state_dict(trained: Trained) -> None:
    source = trained(build("bert"), "a", **FIELDS)
    source.activate("a", trainable=False)
    with torch.device("meta"):
        model = build("bert")
    adapters = ak.attach(model)
    adapters.add("a", LoraConfig(r=2, **FIELDS))
    assert all(p.is_meta for p in adapters.parameters("a"))
    give_values(model, build("bert"))
    assert adapters.load_state_dict("a", source.state_dict("a")).ok
    assert not any(p.is_meta for p in adapters.parameters("a"))
    assert all(p.requires_grad for p in adapters.parameters("a"))
    assert_same_outputs(run(model, "bert"), run(source.model, "bert"))


def test_a_model_made_on_the_meta_device_is_filled_after_to_empty(trained: Trained) -> None:
    source = trained(build("bert"), "a", **FIELDS)
    source.activate("a", trainable=False)
    with torch.device("meta"):
        model = build("bert")
    ak.attach(model).add("a", LoraConfig(r=2, **FIELDS))
    model.to_empty(device="cpu")
    for module in model.modules():  # what was empty must not be right by chance
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                tensor.data.fill_(77)
    model.load_state_dict(source.model.state_dict())
    for path, module in build("bert").named_modules():
        model.get_submodule(path)._buffers.update(module._buffers)
    assert_same_outputs(run(model, "bert"), run(source.model, "bert"))


def test_an_adapter_is_loaded_before_the_base_is_there(tmp_path: Path, trained: Trained) -> None:
    source = trained(build("bert"), "a", **FIELDS)
    source.activate("a", trainable=False)
    source.save("a", tmp_path)
    with torch.device("meta"):
        model = build("bert")
    adapters = ak.attach(model)
    assert adapters.load(tmp_path, "x").ok
    assert not any(p.is_meta for p in adapters.parameters("x"))
    give_values(model, build("bert"))
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
@pytest.mark.parametrize("first", ["hooks", "adapter"])
def test_adapters_act_on_an_offloaded_model(how: str, first: str, tmp_path: Path, trained: Trained) -> None:
    plain = trained(build("bert"), "a", "b", **ACCELERATED)
    plain.activate("b", trainable=False)
    expected = run(plain.model, "bert")
    model = build("bert")
    if first == "hooks":
        offload(model, how, tmp_path)
    adapters = trained(model, "a", "b", **ACCELERATED)
    if first == "adapter":
        offload(model, how, tmp_path)
    adapters.activate("b", trainable=False)
    torch.testing.assert_close(run(model, "bert"), expected)
    with adapters.disabled():
        torch.testing.assert_close(run(model, "bert"), run(build("bert"), "bert"))


@pytest.mark.parametrize("how", ["cpu", "disk", "dispatch"])
def test_adapters_on_an_offloaded_model_are_saved_and_loaded(how: str, tmp_path: Path, trained: Trained) -> None:
    plain = trained(build("bert"), "a", **ACCELERATED)
    plain.activate("a", trainable=False)
    plain.save("a", tmp_path / "plain")
    model = build("bert")
    offload(model, how, tmp_path / "weights")
    adapters = ak.attach(model)
    assert adapters.load(tmp_path / "plain", "x").ok
    torch.testing.assert_close(run(model, "bert"), run(plain.model, "bert"))
    adapters.save("x", tmp_path / "again")
    again = ak.attach(build("bert"))
    again.load(tmp_path / "again", "y")
    torch.testing.assert_close(run(again.model, "bert"), run(plain.model, "bert"))


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
    before, forwards = snapshot(model), {p: m.__dict__.get("forward") for p, m in model.named_modules()}
    inner = {p: m.__dict__.get("_old_forward") for p, m in model.named_modules()}
    trained(model, "a", "b", **ACCELERATED).detach()
    assert_as_before(model, before)
    assert {p: m.__dict__.get("forward") for p, m in model.named_modules()} == forwards
    assert {p: m.__dict__.get("_old_forward") for p, m in model.named_modules()} == inner
    torch.testing.assert_close(run(model, "bert"), run(build("bert"), "bert"))


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


@pytest.mark.parametrize("grad", [True, False])
def test_output_projection_of_torchs_attention_acts_in_an_encoder(trained: Trained, grad: bool) -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    adapters = trained(model, "a", target_modules="all-linear")
    assert adapters.status().rows[0].targets == 3
    base = model(x)
    adapters.activate("a", trainable=False)
    with torch.set_grad_enabled(grad):
        adapted = model(x)
    assert different(adapted, base)
    adapters.merge("a")
    torch.testing.assert_close(model(x), adapted, atol=2e-6, rtol=1e-5)


# Trainers and shards


@pytest.mark.usefixtures("gloo")
def test_fsdp_shards_an_adapted_model_and_gives_the_adapter_back(trained: Trained) -> None:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = build("bert")
    adapters = trained(model, "a", **FIELDS)
    adapters.activate("a")
    expected, own = run(model, "bert"), {k: v.clone() for k, v in adapters.state_dict("a").items()}
    mesh = init_device_mesh("cpu", (1,))
    for layer in model.bert.encoder.layer:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    torch.testing.assert_close(run(model, "bert"), expected)
    model(**inputs("bert")).logits.square().mean().backward()
    assert all(p.grad is not None for p in adapters.parameters("a"))
    full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    taken = adapters.state_dict("a", source=full)
    assert taken.keys() == own.keys()
    assert all(torch.equal(taken[key], own[key]) for key in own)


@pytest.mark.usefixtures("gloo")
def test_an_adapter_goes_through_a_distributed_checkpoint(tmp_path: Path, trained: Trained) -> None:
    import torch.distributed.checkpoint as dcp

    adapters = trained(build("bert"), "a", **FIELDS)
    adapters.activate("a", trainable=False)
    expected = run(adapters.model, "bert")
    dcp.save(adapters.state_dict("a"), checkpoint_id=tmp_path / "dcp")
    other = trained(build("bert"), "x", "a", **FIELDS)
    tensors = {key: torch.empty_like(value) for key, value in other.state_dict("a").items()}
    dcp.load(tensors, checkpoint_id=tmp_path / "dcp")
    other.load_state_dict("a", tensors)
    other.activate("a", trainable=False)
    assert_same_outputs(run(other.model, "bert"), expected)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_transformers_trainer_trains_the_adapters_parameters_only(checkpointed: bool, tmp_path: Path) -> None:
    model = build("bert")
    model.config.use_cache = False  # the trainer does that
    if checkpointed:
        checkpoint(model, reentrant=True)
    before = snapshot(model)
    adapters = ak.attach(model)
    adapters.add("a", LoraConfig(target_modules=["query", "value"]), num_labels=4)
    start = {k: v.clone() for k, v in adapters.state_dict("a").items()}
    trainer(model, tmp_path, max_steps=2, learning_rate=0.1, save_strategy="no").train()
    now = adapters.state_dict("a")
    assert all(different(now[key], start[key]) for key in start if "lora_A" not in key)
    model.__dict__.pop("_is_accelerate_prepared", None)  # the trainer leaves that
    assert_as_before(adapters.detach().eval(), before)
