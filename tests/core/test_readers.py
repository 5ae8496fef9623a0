"""Declared readers: modules that read the weights of layers below them instead of calling them."""

from __future__ import annotations

import copy
import pickle
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import cpu_offload
from tests.core.conftest import assert_as_before, different, set_parameters, snapshot
from tests.models import build, inputs, run
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import adapterkit as ak
from adapterkit.forward import known_readers, readers
from adapterkit_loha import LoHaConfig
from adapterkit_lora import LoraConfig
from adapterkit_vera import VeraConfig

Trained = Callable[..., ak.Adapters]
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


class Reader(nn.Module):
    """Calls `called` and `table`, and reads `read`, `conv` and, once more, `table`."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 6)
        self.called = nn.Linear(6, 6)
        self.read = nn.Linear(6, 6)
        self.conv = nn.Conv1d(6, 6, 3, padding=1, groups=2)
        self.inner: Callable[[Tensor], Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """`(rows, places)` to `(rows, places, 7)`."""
        h = self.called(self.table(x))
        h = torch.tanh(F.linear(h, self.read.weight, self.read.bias))
        h = F.conv1d(h.transpose(1, 2), self.conv.weight, self.conv.bias, padding=1, groups=2).transpose(1, 2)
        if self.inner is not None:
            h = self.inner(h)
        return F.linear(h, self.table.weight)


class Outer(nn.Module):
    """A reader of its own layer, above a reader."""

    def __init__(self) -> None:
        super().__init__()
        self.reader = Reader()
        self.out = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        """`(rows, places, 3)`."""
        return F.linear(self.reader(x), self.out.weight, self.out.bias)


X = torch.tensor([[0, 3, 5, 2], [1, 1, 6, 4]])
TARGETS = ("table", "called", "read", "conv", "out")


@pytest.fixture(autouse=True)
def declared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "_declared", {})
    ak.declare_reader(Reader, "read", "conv", "table")
    ak.declare_reader(Outer, "out")


@pytest.fixture
def net() -> Outer:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Outer().eval()


@pytest.fixture
def acting(net: Outer, trained: Trained) -> ak.Adapters:
    """The adapter `a`, active on all layers of `net`."""
    adapters = trained(net, "a", target_modules=TARGETS)
    adapters.activate("a")
    return adapters


@pytest.fixture
def gloo(tmp_path: Path) -> Iterator[Any]:
    """The mesh of a process group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def add(model: nn.Module, **fields: Any) -> ak.Adapters:
    """Adds and activates the adapter `a` with values."""
    adapters = ak.attach(model)
    adapters.add("a", LoraConfig(**{"r": 2, **fields}))
    set_parameters(adapters, "a")
    return adapters


def without_gradient(model: nn.Module, adapters: ak.Adapters, name: str, out: Tensor) -> list[str]:
    model.zero_grad()
    out.float().square().sum().backward()
    return [n for n, p in adapters.named_parameters(name) if p.grad is None or not p.grad.any()]


# What is read is what acts

CONFIGS: dict[str, ak.AdapterConfig] = {
    "lora": LoraConfig(r=2, target_modules=TARGETS),
    "lora with a bias": LoraConfig(r=2, target_modules=TARGETS[1:], lora_bias=True),
    "trained biases": LoraConfig(r=2, target_modules=TARGETS, bias="all"),
    "loha": LoHaConfig(r=2, target_modules=TARGETS),
    "vera": VeraConfig(r=4, target_modules=["called", "read", "out"]),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_adapted_equals_merged_and_every_parameter_has_a_gradient(net: Outer, config: ak.AdapterConfig) -> None:
    base = net(X).detach()
    adapters = ak.attach(net)
    adapters.add("a", config)
    set_parameters(adapters, "a")
    adapted = net(X)
    assert different(adapted, base)
    assert not without_gradient(net, adapters, "a", adapted)
    adapters.merge("a")
    torch.testing.assert_close(net(X), adapted, **CLOSE)
    adapters.unmerge()
    torch.testing.assert_close(net(X), adapted, **CLOSE)


class ScaleConfig(ak.AdapterConfig):
    method = "scale"


class ScaleLayer(ak.AdapterLayer):
    """`s * base(x)`, bias included: no sum."""

    def setup(self, target: ak.Target, config: Any) -> None:
        self.scale_s = target.new(target.out_features, init=1.5)

    def forward(self, base: ak.Base, x: Tensor) -> Tensor:
        out: Tensor = base(x)
        return out * self.scale_s


class MergedLayer(ScaleLayer):
    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        s = self.scale_s
        return weight * s[:, None], None if bias is None else bias * s


class StoppingLayer(MergedLayer):
    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        with torch.no_grad():
            return super().merged(weight, bias)


@pytest.mark.parametrize(
    ("layer", "refused"),
    [
        (MergedLayer, ""),
        (ScaleLayer, r"reads the weight of a Linear .* 'scale' has no merge rule there"),
        (StoppingLayer, "'scale' has a merge rule without gradients there"),
    ],
)
def test_method_that_is_no_sum_is_read_by_its_merge_rule_or_refused(net: Outer, layer: Any, refused: str) -> None:
    ak.register(ak.plugin(ScaleConfig, layer, prefix="scale_"))
    adapters = ak.attach(net)
    adapters.add("s", ScaleConfig(target_modules=["read", "out"]))
    if refused:
        with pytest.raises(ak.UnsupportedError, match=refused):
            net(X)
    if layer is not ScaleLayer:
        with torch.set_grad_enabled(not refused):
            adapted = net(X)
        assert refused or not without_gradient(net, adapters, "s", adapted)
        adapters.merge("s")
        torch.testing.assert_close(net(X), adapted, **CLOSE)


def test_trained_copy_that_is_read_trains_and_is_the_parameter_itself(net: Outer) -> None:
    adapters = add(net, target_modules=["called"], modules_to_save=["read", "out", "table"])
    copies = dict(adapters.named_parameters("a"))
    seen: list[Tensor] = []
    net.reader.inner = lambda h: (seen.append(net.reader.read.weight), h)[1]
    adapted = net(X)
    assert seen[0] is copies["reader.read.weight"]
    assert not without_gradient(net, adapters, "a", adapted)
    adapters.merge("a")
    torch.testing.assert_close(net(X), adapted, **CLOSE)


class Nested(nn.Module):
    """Reads a layer of its head, which it calls, too."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.head = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        """`(rows, 3)`."""
        return self.head(self.fc(x)) + F.linear(x, self.head[1].weight, self.head[1].bias)  # type: ignore[arg-type]


def test_layer_inside_a_trained_copy_is_read_in_the_copy() -> None:
    ak.declare_reader(Nested, "head.1")
    model, x = Nested(), torch.ones(2, 4)
    before = snapshot(model)
    base = model(x).detach()
    adapters = add(model, target_modules=["fc"], modules_to_save=["head"])
    adapters.add("b", LoraConfig(r=2, target_modules=["head.1"], modules_to_save=None), activate=False)
    adapters.add("c", LoraConfig(r=2, target_modules=["fc"], modules_to_save=["head"]), activate=False)
    assert not any(readers.READS in module.__dict__ for module in adapters.heads("c")["head"].modules())
    adapted = model(x)
    assert not without_gradient(model, adapters, "a", adapted)
    copied = copy.deepcopy(model)
    torch.testing.assert_close(copied(x), adapted, **CLOSE)
    adapters.merge_and_detach("a")
    torch.testing.assert_close(model(x), adapted, **CLOSE)
    with ak.attach(copied).disabled():
        torch.testing.assert_close(copied(x), base, **CLOSE)
    with ak.attach(copied).per_sample(["a", None]), pytest.raises(ak.UnsupportedError, match="weight of a Sequential"):
        copied(x)
    for name in ("b", "c"):
        ak.attach(copied).remove(name)
    assert_as_before(ak.attach(copied).detach(), before)


def test_half_precision_weight_is_changed_in_float32_and_rounded_once(net: Outer) -> None:
    add(net.bfloat16(), target_modules=["read"])
    (layer,) = (m for n, m in net.named_modules() if n.endswith("read.adapters.a"))
    exact = net.reader.read.weight.float() + layer.factors().delta()
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):  # does not round it
            found = ak.effective_weight(net.reader.read)
        assert found is not None
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found, exact.bfloat16(), atol=0, rtol=2**-7)


# Architectures


def make(name: str, given: dict[str, Tensor], **fields: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    """A small transformers model, `<Config>/<Model>`, and its inputs."""
    import transformers

    config, model = (f"{name.partition('/')[0]}Config", "".join(name.split("/")))
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    made = getattr(transformers, config)(**{**sizes, "vocab_size": 32, **fields})
    return getattr(transformers, model)(made), given


def encoder() -> tuple[nn.Module, dict[str, Tensor]]:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), {"src": torch.randn(2, 5, 8)}


IDS = {"input_ids": torch.arange(1, 13).view(2, 6)}
SOUND = {"conv_dim": (8,), "conv_stride": (5,), "conv_kernel": (10,), "num_feat_extract_layers": 1}
SOUND |= {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "layerdrop": 0.0, "mask_time_prob": 0.0}
SIZES = {"embedding_size": 8, "intra_bottleneck_size": 16, "true_hidden_size": 16}
STATES = {"state_size": 4, "expand": 2, "conv_kernel": 4, "time_step_rank": 4}
HEADS = {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8}
LAYERS = {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 0}
JAMBA = {"num_experts": 2, "num_experts_per_tok": 1, "mamba_d_state": 4, "mamba_dt_rank": 4, "use_mamba_kernels": False}
MAMBA2 = {"state_size": 8, "num_heads": 4, "head_dim": 8, "n_groups": 1, "chunk_size": 8}
ARCHITECTURES: dict[str, Callable[[], tuple[nn.Module, dict[str, Tensor]]]] = {
    "torch": encoder,
    "wavlm": lambda: make("WavLM/Model", {"input_values": torch.randn(2, 100)}, **SOUND),
    "mobilebert": lambda: make("MobileBert/ForMaskedLM", IDS, **SIZES),
    "mamba": lambda: make("Mamba/ForCausalLM", IDS, **STATES),
    "falcon_mamba": lambda: make("FalconMamba/ForCausalLM", IDS, **STATES),
    "mamba2": lambda: make("Mamba2/ForCausalLM", IDS, **MAMBA2),
    "jamba": lambda: make("Jamba/ForCausalLM", IDS, num_key_value_heads=2, **JAMBA, **LAYERS),
    "bamba": lambda: make(
        "Bamba/ForCausalLM", IDS, num_key_value_heads=2, attn_layer_indices=[1], attn_rotary_emb=4, **HEADS
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_all_layers_of_an_architecture_act_merged_as_adapted(name: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, given = ARCHITECTURES[name]()
    model.eval()

    def forward() -> Tensor:
        out = model(**given)
        return out if isinstance(out, Tensor) else out[0]

    named = [n for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv1d)) and "pos_conv" not in n]
    base = forward()
    adapters = ak.attach(model)
    adapters.add("a", LoraConfig(r=2, target_modules=named))
    set_parameters(adapters, "a", scale=0.1)
    adapted = forward()
    assert not without_gradient(model, adapters, "a", adapted)
    adapters.merge("a", untie=True)
    merged = forward()
    assert (merged - adapted).abs().max() <= 1e-5 * (merged - base).abs().max().clamp(min=1)


@pytest.mark.parametrize("grad", [True, False])
def test_attention_of_torch_reads_its_output_projection_on_the_fast_path_too(grad: bool) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, x = nn.MultiheadAttention(8, 2, batch_first=True).eval(), torch.randn(2, 5, 8)
    base = model(x, x, x, need_weights=False)[0]
    adapters = add(model, target_modules=["out_proj"], bias="all")
    adapters.activate("a", trainable=False)
    with torch.set_grad_enabled(grad):
        adapted = model(x, x, x, need_weights=False)[0]
    assert different(adapted, base)
    adapters.merge("a")
    torch.testing.assert_close(model(x, x, x, need_weights=False)[0], adapted, **CLOSE)


def test_every_reader_of_transformers_in_the_table_exists() -> None:
    import transformers

    folder = Path(transformers.__file__).parent / "models"
    text = "\n".join(p.read_text(encoding="utf-8") for p in folder.glob("*/modeling_*.py"))
    classes = set(re.findall(r"^class (\w+)", text, re.MULTILINE))
    ends = [end for names in known_readers.READERS for end in names.split() if "." not in end]
    assert [end for end in ends if not any(name.endswith(end) for name in classes)] == []


# What is neither called nor read


@pytest.mark.parametrize(
    ("name", "sizes", "unused", "called"),
    [
        ("Bart", {"encoder_layers": 1, "decoder_layers": 1}, "model.shared", "model.encoder.embed_tokens"),
        ("ProphetNet", {"num_encoder_layers": 1}, "prophetnet.word_embeddings", "prophetnet.encoder.word_embeddings"),
        ("Udop", {"num_layers": 1}, "patch_embed.proj", "encoder.embed_patches"),
    ],
)
def test_unused_table_of_an_encoder_decoder_is_found(
    name: str, sizes: dict[str, Any], unused: str, called: str
) -> None:
    import transformers

    config = getattr(transformers, f"{name}Config")(**sizes)
    with torch.device("meta"):
        model = getattr(transformers, f"{name}ForConditionalGeneration")(config)
    with pytest.raises(ak.SelectionError, match=f"neither calls nor reads it; it calls '{re.escape(called)}'"):
        ak.select(model, LoraConfig(target_modules=[unused]))


def test_table_that_is_called_under_two_names_is_adapted(trained: Trained) -> None:
    model: Any = build("t5")  # as transformers 4 made it
    model.encoder.embed_tokens = model.decoder.embed_tokens = model.shared
    base = run(model, "t5")
    trained(model, "a", target_modules=["shared"]).activate("a")
    assert different(run(model, "t5"), base)


# Layers that are read by nobody knows whom


@pytest.fixture
def undeclared(net: Outer, monkeypatch: pytest.MonkeyPatch, trained: Trained) -> ak.Adapters:
    monkeypatch.setattr(readers, "_declared", {})
    adapters = trained(net, "a", "idle", target_modules=["read", "called", "out"])
    adapters.activate("a")
    return adapters


NEVER_RAN = "2 of its 3 layers never ran since it was activated, such as 'reader.read'. If the model reads their"


def test_status_and_save_say_which_layers_never_ran(net: Outer, undeclared: ak.Adapters, tmp_path: Path) -> None:
    assert not any(row.notes for row in undeclared.status().rows)  # nothing ran yet
    undeclared.save("a", tmp_path / "before")
    net(X)
    active, idle = undeclared.status().rows
    assert [note.startswith(NEVER_RAN) for note in active.notes] == [True]
    assert not idle.notes
    with pytest.warns(ak.AdapterWarning, match=f"Adapter 'a': {NEVER_RAN}"):
        undeclared.save("a", tmp_path / "after")
    undeclared.save("idle", tmp_path / "idle")
    assert (tmp_path / "after" / "adapter_model.safetensors").is_file()
    undeclared.activate("idle")
    assert not any(row.notes for row in undeclared.status().rows)


def test_outside_a_readers_forward_all_is_as_it_was(net: Outer, trained: Trained) -> None:
    own, before = net.reader.read._parameters["weight"], net.state_dict()
    names = [name for name, _ in net.named_parameters()]
    adapters = trained(net, "a", target_modules=TARGETS, bias="all")
    adapters.activate("a")
    net(X)
    assert net.reader.read.weight is own
    assert isinstance(net.reader.read.weight, nn.Parameter)
    assert not any(row.notes for row in adapters.status().rows)  # all were read or called
    after = {key: value for key, value in net.state_dict().items() if ".adapter" not in key}
    assert list(after) == list(before)
    assert all(after[key].data_ptr() == before[key].data_ptr() for key in before)
    assert [name for name, _ in net.named_parameters() if ".adapter" not in name] == names


# Everywhere else it is the parameter itself


WRITES: dict[str, Callable[[nn.Linear], object]] = {
    "data": lambda layer: layer.weight.data.zero_(),
    "no_grad": lambda layer: torch.no_grad()(lambda: layer.weight.copy_(torch.zeros(6, 6)))(),
    "init": lambda layer: nn.init.zeros_(layer.weight),
    "assigned": lambda layer: setattr(layer, "weight", nn.Parameter(torch.zeros(6, 6))),
    "loaded": lambda layer: layer.load_state_dict({"weight": torch.zeros(6, 6)}, strict=False),
}


@pytest.mark.usefixtures("acting")
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES.keys())
def test_write_reaches_the_parameter(net: Outer, write: Callable[[nn.Linear], object]) -> None:
    write(net.reader.read)
    assert not net.reader.read._parameters["weight"].any()  # type: ignore[union-attr]
    assert not net.state_dict()["reader.read.weight"].any()


def test_weight_is_deleted_and_set_as_any_attribute(net: Outer, trained: Trained) -> None:
    trained(net, "a", target_modules=["read"])
    layer: Any = net.reader.read
    own = layer.weight
    del layer.weight
    assert not hasattr(layer, "weight")
    with pytest.raises(AttributeError, match="'Linear' object has no attribute 'weight'"):
        del layer.weight
    layer.weight = own.detach() + 1  # no parameter: torch's older weight_norm does that
    torch.testing.assert_close(layer.weight, own + 1)
    del layer.weight
    layer.register_parameter("weight", own)
    assert layer.weight is own


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
@pytest.mark.usefixtures("acting")
def test_copy_reads_its_own_adapters(net: Outer, copied: Callable[[Outer], Outer]) -> None:
    expected = net(X)
    other = copied(net)
    torch.testing.assert_close(other(X), expected, **CLOSE)
    with torch.no_grad():
        for parameter in ak.attach(other).parameters("a"):
            parameter.zero_()
    assert different(other(X), expected)
    torch.testing.assert_close(net(X), expected, **CLOSE)


def test_detach_gives_back_the_model_as_it_was(net: Outer, trained: Trained) -> None:
    before, base = snapshot(net), net(X)
    adapters = trained(net, "a", "b", target_modules=TARGETS)
    adapters.activate("a", "b")
    net(X)
    kept = net.forward
    adapters.remove("a")
    adapters.rename("b", "c")
    adapters.copy("c", "d")
    adapters.detach()
    assert_as_before(net, before)
    torch.testing.assert_close(kept(X), base, **CLOSE)


@pytest.mark.usefixtures("acting")
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_exception_in_a_reader_ends_its_reading(net: Outer, error: type[BaseException]) -> None:
    own = net.reader.read._parameters["weight"]

    def fail(h: Tensor) -> Tensor:
        raise error

    net.reader.inner = fail
    with pytest.raises(error):
        net(X)
    assert net.reader.read.weight is own
    assert not readers.running.stack


@pytest.mark.usefixtures("acting")
def test_reader_in_another_thread_changes_nothing_here(net: Outer) -> None:
    own, seen = net.reader.read._parameters["weight"], threading.Barrier(2, timeout=30)
    found = []

    def wait(h: Tensor) -> Tensor:
        found.append(net.reader.read.weight)
        seen.wait()
        seen.wait()
        return h

    net.reader.inner = wait
    thread = threading.Thread(target=net, args=(X,))
    thread.start()
    seen.wait()
    here = net.reader.read.weight
    seen.wait()
    thread.join(30)
    assert here is own
    assert found[0] is not own


@pytest.mark.usefixtures("acting")
def test_own_forward_within_a_reader_adds_the_adapter_once(net: Outer) -> None:
    h = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    expected, outputs = net.reader.read(h), []
    net.reader.inner = lambda x: (outputs.extend([net.reader.read(h), net.reader.read.forward(h)]), x)[1]
    net(X)
    for out in outputs:
        torch.testing.assert_close(out, expected, **CLOSE)


@pytest.mark.usefixtures("acting")
def test_reader_reads_however_its_forward_is_called(net: Outer) -> None:
    torch.testing.assert_close(net.forward(X), net(X), **CLOSE)
    values = {name: p.detach().clone() for name, p in net.named_parameters()}
    torch.testing.assert_close(torch.func.functional_call(net, values, (X,)), net(X), **CLOSE)


def test_layers_that_nobody_reads_are_as_they_were(trained: Trained) -> None:
    model = build("t5")  # reads `wo.weight.dtype` at every feed-forward
    trained(model, "a", target_modules=["q", "wo"])
    adapted = [m for m in model.modules() if "adapters" in m._modules]
    assert adapted
    assert not any(isinstance(vars(type(m)).get("weight"), property) for m in adapted)
    assert not any(readers.READS in m.__dict__ for m in model.modules())


# With what others do to a model


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_reader_or_function_inside_it_has_the_same_gradients(
    net: Outer, acting: ak.Adapters, reentrant: bool, inside: bool
) -> None:
    def inner(h: Tensor) -> Tensor:
        return torch.tanh(F.linear(h, net.reader.read.weight, net.reader.read.bias))

    def gradients(call: Callable[[], Tensor]) -> dict[str, Tensor | None]:
        net.zero_grad()
        call().square().sum().backward()
        return {name: p.grad for name, p in acting.named_parameters("a")}

    net.reader.inner = inner
    expected = gradients(lambda: net(X))
    if inside:
        net.reader.inner = lambda h: checkpoint(inner, h, use_reentrant=reentrant)
        found = gradients(lambda: net(X))
    else:
        start = torch.zeros(1, requires_grad=True)
        found = gradients(lambda: checkpoint(lambda x, _: net(x), X, start, use_reentrant=reentrant))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")
def test_compiled_and_exported_reader_reads_without_a_break(net: Outer, acting: ak.Adapters) -> None:
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    adapted, found = net(X), compiled(X)
    torch.testing.assert_close(found, adapted, **CLOSE)
    assert not without_gradient(net, acting, "a", found)
    with acting.disabled():
        torch.testing.assert_close(compiled(X), net(X), **CLOSE)
    acting.activate("a", trainable=False)
    program = torch.export.export(net, (X,), strict=False)
    torch.testing.assert_close(program.module()(X), adapted, **CLOSE)


def replica_of(module: nn.Module) -> nn.Module:
    """As `nn.DataParallel` makes it: parameters are attributes."""
    replica = module._replicate_for_data_parallel()  # type: ignore[operator]
    for name, child in module._modules.items():
        replica._modules[name] = None if child is None else replica_of(child)
    for name, parameter in module._parameters.items():
        setattr(replica, name, None if parameter is None else parameter.clone())
    return replica  # type: ignore[no-any-return]


def test_replica_of_data_parallel_reads_its_own_parameters(net: Outer, acting: ak.Adapters) -> None:
    replica = replica_of(net)
    torch.testing.assert_close(replica(X), net(X), **CLOSE)
    assert not without_gradient(net, acting, "a", replica(X))
    assert isinstance(net.reader.read.weight, nn.Parameter)


def test_hooks_of_accelerate_at_a_read_layer_and_at_its_reader(
    net: Outer, acting: ak.Adapters, trained: Trained
) -> None:
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    expected = net(X)
    acting.detach()
    for module in (net.reader.read, net.reader.table, net.reader):
        add_hook_to_module(module, AlignDevicesHook("cpu", io_same_device=True))
    before = snapshot(net)
    adapters = trained(net, "a", target_modules=TARGETS)
    adapters.activate("a")
    torch.testing.assert_close(net(X), expected, **CLOSE)
    torch.testing.assert_close(net.reader.table(X), net.reader.table.forward(X), **CLOSE)
    adapters.detach()
    assert_as_before(net, before)


def test_parametrization_below_the_adapter_is_read_with_it_and_one_put_on_later_is_refused(net: Outer) -> None:
    parametrizations.weight_norm(net.reader.read)
    plain = net.reader.read.weight.detach().clone()
    add(net, target_modules=["read", "out"])
    (layer,) = (m for n, m in net.named_modules() if n.endswith("read.adapters.a"))
    torch.testing.assert_close(ak.effective_weight(net.reader.read), plain + layer.factors().delta(), **CLOSE)
    parametrizations.weight_norm(net.out)
    with pytest.raises(ak.UnsupportedError, match=r"parametrization .* was put on it after the adapter"):
        net(X)


# Rows, shards, other memory


def test_rows_read_one_adapter_and_different_ones_are_refused(net: Outer, trained: Trained) -> None:
    adapters = trained(net, "a", target_modules=["read", "called"])
    adapters.activate("a", trainable=False)
    expected = net(X)
    with adapters.per_sample(["a", "a"]):
        torch.testing.assert_close(net(X), expected, **CLOSE)
    with adapters.per_sample(["a", None]), pytest.raises(ak.UnsupportedError, match="reads the weight of a Linear"):
        net(X)


def test_output_layer_that_is_called_has_an_adapter_for_each_row(trained: Trained) -> None:
    model = build("llama")
    adapters = trained(model, "a", target_modules=["lm_head"])
    with adapters.per_sample(["a", None]):
        assert run(model, "llama").isfinite().all()


@pytest.mark.usefixtures("acting")
def test_sharded_weight_is_refused_where_it_is_read(net: Outer, gloo: Any) -> None:
    net.reader.read.weight = nn.Parameter(distribute_tensor(net.reader.read.weight.detach(), gloo))
    with pytest.raises(ak.UnsupportedError, match=r"is a DTensor \(sharded or quantised\)"):
        net(X)


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
def test_reader_that_is_sharded_by_fsdp_reads(net: Outer, acting: ak.Adapters, gloo: Any) -> None:
    expected = net(X).detach()
    fully_shard(net.reader, mesh=gloo)
    fully_shard(net, mesh=gloo)
    adapted = net(X)
    torch.testing.assert_close(adapted, expected, **CLOSE)
    assert not without_gradient(net, acting, "a", adapted)


def test_weight_that_is_not_there_is_refused_where_it_is_read(net: Outer, trained: Trained) -> None:
    trained(net, "a", target_modules=["read"]).activate("a")
    layer = net.reader.read
    data, own = layer.weight.data, layer.weight
    layer.weight.data = torch.empty(0)
    with pytest.raises(ak.UnsupportedError, match=r"has the shape \(0,\) here \(sharded by DeepSpeed's ZeRO-3, or"):
        net(X)
    own.data = data
    layer.weight = nn.Parameter(own.to("meta"))
    with pytest.raises(ak.UnsupportedError, match=r"is not in memory \(meta device or offloaded\)"):
        net(X)
    layer.weight = own
    cpu_offload(net, torch.device("cpu"))
    with pytest.raises(ak.UnsupportedError, match=r"is not in memory \(meta device or offloaded\)"):
        ak.effective_weight(layer)


@pytest.mark.parametrize("config", [LoraConfig, LoHaConfig])
def test_model_on_the_meta_device_runs(config: type[ak.AdapterConfig]) -> None:
    with torch.device("meta"):
        net = Outer()
    ak.attach(net).add("a", config(r=2, target_modules=TARGETS))
    assert net(X.to("meta")).shape == (2, 4, 3)


# Losses that take the output layer's weight


def with_fused_loss(model: Any) -> Any:
    """As training tools patch it: `model(..., fused=True)` multiplies by `lm_head.weight` itself."""
    original = model.forward

    def forward(fused: bool = False, **given: Any) -> Any:
        if not fused:
            return original(**given)
        hidden = model.base_model(**given).last_hidden_state
        head = model.get_output_embeddings()
        return F.linear(hidden, head.weight, head.bias)

    model.forward = forward
    return model


@pytest.mark.parametrize("fields", [{"target_modules": ["lm_head"]}, {"modules_to_save": ["lm_head"]}], ids=str)
@pytest.mark.parametrize("patched_first", [True, False])
def test_fused_loss_takes_the_weight_that_acts(fields: dict[str, Any], patched_first: bool) -> None:
    model: Any = build("llama")
    given = inputs("llama")
    if patched_first:
        with_fused_loss(model)
    adapters = add(model, **{"target_modules": ["q_proj"], **fields})
    if not patched_first:
        with_fused_loss(model)
    hidden = model.model(**given).last_hidden_state
    outside = F.linear(hidden, ak.effective_weight(model.lm_head), ak.effective_weight(model.lm_head, "bias"))
    for fused in (model(fused=True, **given), outside):
        torch.testing.assert_close(fused, model(**given).logits, **CLOSE)
        assert not without_gradient(model, adapters, "a", fused)
    adapters.detach()
    torch.testing.assert_close(model(fused=True, **given), model(**given).logits, **CLOSE)


def test_effective_weight_of_a_layer_without_adapters_is_its_parameter() -> None:
    layer = nn.Linear(3, 2, bias=False)
    assert ak.effective_weight(layer) is layer.weight
    assert ak.effective_weight(layer, "bias") is None
    for arguments in ((3,), (layer, "scale")):
        with pytest.raises(ak.ConfigError, match="effective_weight needs a module and 'weight' or 'bias', not"):
            ak.effective_weight(*arguments)  # type: ignore[arg-type]


# Declaring


def test_reader_is_declared_by_its_name_and_for_subclasses(monkeypatch: pytest.MonkeyPatch, net: Outer) -> None:
    class Mine(Reader):
        pass

    net.reader.__class__ = Mine
    for declared, targets in (((), ["read", "called"]), (("read", "table"), ["read", "table"])):
        if declared:
            monkeypatch.setattr(readers, "_declared", {})
        for child in declared:
            ak.declare_reader("Mine", child)
        adapters = add(net, target_modules=targets)
        assert not without_gradient(net, adapters, "a", net(X))
        adapters.detach()


def test_declaration_that_makes_no_sense_is_refused() -> None:
    for reader in (3, "", int, None):
        with pytest.raises(ak.ConfigError, match="declare_reader needs a class of modules or its name, not"):
            ak.declare_reader(reader, "read")  # type: ignore[arg-type]
    text = "declare_reader needs the paths of the layers that 'Reader' reads, not"
    for children in ((), ("",), ("a..b",), (3,)):
        with pytest.raises(ak.ConfigError, match=text):
            ak.declare_reader("Reader", *children)  # type: ignore[arg-type]
