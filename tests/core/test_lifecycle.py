"""Each method of `Adapters` by itself: what it does, what it leaves alone, what it costs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from tests.core.conftest import assert_as_before, different, set_parameters, snapshot
from tests.models import assert_same_outputs, build, inputs, run
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import adapterkit as ak
from adapterkit_lora import LoraConfig
from adapterkit_vera import VeraConfig

Trained = Callable[..., ak.Adapters]

# Names that PEFT loses tensors for, that `ModuleDict` refuses, or that are parts of keys.
AWKWARD = ["keys", "model", "query", "forward", "classifier", "adapters", "lora_A", "weight", "base_layer", "0"]
AWKWARD += ["ä b/ö"]


class Shared(nn.Module):
    """One linear layer under two paths, called by both."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.other = nn.Linear(6, 6)
        self.second = self.first

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.other(torch.tanh(self.first(x)))))


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().eval()


def alone(adapters: ak.Adapters, name: str, model: str = "bert") -> Tensor:
    with adapters.activated(name, trainable=False):
        return run(adapters.model, model)


# Several adapters, and switching


@pytest.mark.parametrize(
    ("model_name", "path", "size"),
    [
        ("bert", "bert.encoder.layer.1.attention.self.value", (2, 3, 16)),
        ("gpt2", "transformer.h.1.mlp.c_proj", (2, 3, 64)),
        ("convnet", "dilated", (2, 8, 7, 7)),
    ],
)
def test_active_adapters_of_one_layer_add_up_in_any_order(
    model_name: str, path: str, size: tuple[int, ...], trained: Trained
) -> None:
    model = build(model_name)
    layer = model.get_submodule(path)
    adapters = trained(model, "a", "b", target_modules=[path], modules_to_save=None, bias="lora_only")
    x = torch.randn(size, generator=torch.Generator().manual_seed(0))
    outputs = {}
    for names in ((), ("a",), ("b",), ("a", "b"), ("b", "a")):
        adapters.activate(*names, trainable=False)
        outputs[names] = layer(x)
    change = outputs["a",] + outputs["b",] - 2 * outputs[()]
    assert different(outputs["a",], outputs[()])
    for both in (("a", "b"), ("b", "a")):
        torch.testing.assert_close(outputs[both] - outputs[()], change, atol=1e-5, rtol=1e-5)


@pytest.fixture
def no_walks(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Called: from then on, every way to go through a model's modules raises."""

    def refuse(self: nn.Module, *args: object, **kwargs: object) -> Iterator[Any]:
        raise AssertionError(f"a walk over {type(self).__name__}")

    def start() -> None:
        for name in ("modules", "named_modules", "children", "named_children", "parameters", "named_parameters"):
            monkeypatch.setattr(nn.Module, name, refuse)
        for name in ("buffers", "named_buffers", "apply", "train", "requires_grad_", "state_dict", "get_submodule"):
            monkeypatch.setattr(nn.Module, name, refuse)

    return start


def test_switching_for_inference_walks_over_nothing(no_walks: Callable[[], None], trained: Trained) -> None:
    model = build("bert")
    adapters = trained(model, "a", "b", target_modules="all-linear")
    no_walks()
    adapters.activate("a", trainable=False)
    adapters.activate("b", trainable=False)
    with adapters.activated("a", trainable=False):
        assert adapters.active == ("a",)
    with adapters.disabled():
        assert adapters.active == ()
    assert adapters.active == ("b",)


def test_activating_what_is_trainable_already_sets_nothing(no_walks: Callable[[], None], trained: Trained) -> None:
    model = build("bert")
    adapters = trained(model, "a", target_modules=["query"])
    adapters.activate("a")
    no_walks()
    adapters.activate("a", trainable=True)


@pytest.mark.parametrize("context", ["activated", "disabled"])
def test_after_a_context_what_was_active_is_so_again_whatever_happened_inside(context: str, trained: Trained) -> None:
    def block() -> Any:
        return adapters.disabled() if context == "disabled" else adapters.activated("b", trainable=False)

    adapters = trained(build("bert"), "a", "b", target_modules=["query"], modules_to_save=None)
    adapters.activate("a")
    with pytest.raises(ZeroDivisionError), block():
        raise ZeroDivisionError
    assert adapters.active == ("a",)
    with block():
        adapters.rename("a", "c")
    assert adapters.active == ("c",)
    assert all(p.requires_grad for p in adapters.parameters("c"))
    adapters.activate("c", "b")
    with block():
        adapters.remove("c")
    assert adapters.active == ("b",)


def test_an_adapter_added_inside_disabled_is_not_left_trainable(trained: Trained) -> None:
    model = build("bert")
    adapters = trained(model, "a", target_modules=["query"])
    adapters.activate("a")
    with adapters.disabled():
        adapters.add("b", LoraConfig(r=2, target_modules=["query"]))
        assert adapters.active == ("b",)
    assert adapters.active == ("a",)
    assert {id(p) for p in model.parameters() if p.requires_grad} == set(map(id, adapters.parameters("a")))


# Names and files


@pytest.mark.parametrize("name", AWKWARD)
def test_no_adapter_name_loses_anything_in_a_file_or_a_full_state_dict(
    name: str, tmp_path: Path, trained: Trained
) -> None:
    model = build("bert")
    adapters = trained(model, "x", name, target_modules=["query", "classifier"], modules_to_save=["pooler"], bias="all")
    expected, own = alone(adapters, name), adapters.state_dict(name)
    assert len(own) == len(list(adapters.parameters(name)))
    taken = adapters.state_dict(name, source=model.state_dict())
    assert own.keys() == taken.keys()
    assert all(torch.equal(own[key], taken[key]) for key in own)
    fresh = ak.attach(build("bert"))
    assert fresh.load(adapters.save(name, tmp_path), name).ok
    assert_same_outputs(run(fresh.model, "bert"), expected)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_a_full_state_dict_gives_and_takes_an_adapter_whatever_is_around_the_model(
    prefix: str, trained: Trained
) -> None:
    fields = {"target_modules": ["query", "classifier"], "modules_to_save": ["pooler"], "bias": "lora_only"}
    model = build("bert")
    adapters = trained(model, "a", "b", **fields)
    full = {prefix + key: value + 1 for key, value in model.state_dict().items()}
    taken, own = adapters.state_dict("a", source=full), adapters.state_dict("a")
    assert taken.keys() == own.keys()
    assert all(torch.equal(taken[key], own[key] + 1) for key in own)
    with pytest.raises(ak.CheckpointError, match=r"lacks 3 of adapter 'a'.*lora_B"):
        adapters.state_dict("a", source={k: v for k, v in full.items() if not k.endswith("lora_B.weight")})
    other = trained(build("bert"), "a", **fields)
    report = other.load_state_dict("a", full)
    assert report.ok
    assert set(report.ignored) == {prefix + key for key in model.state_dict() if ".a." not in key}
    assert all(torch.equal(value, taken[key]) for key, value in other.state_dict("a").items())
    with other.disabled(), adapters.disabled():
        assert torch.equal(run(other.model, "bert"), run(model, "bert"))


@pytest.mark.parametrize("shared", [False, True])
def test_disabled_save_pretrained_writes_the_base_models_keys_only(shared: bool, tmp_path: Path) -> None:
    model = build("bert")
    layers = model.bert.encoder.layer
    if shared:
        layers[1] = layers[0]
        names = [name for name, _ in layers[0].named_parameters()]
        model._tied_weights_keys = {f"bert.encoder.layer.1.{n}": f"bert.encoder.layer.0.{n}" for n in names}
    model.save_pretrained(tmp_path / "base")
    adapters = ak.attach(model)
    adapters.add("a", LoraConfig(target_modules="all-linear", bias="lora_only"))
    adapters.rename("a", "b")
    with adapters.disabled():
        model.save_pretrained(tmp_path / "adapted")
    base, adapted = (safetensors.torch.load_file(tmp_path / f / "model.safetensors") for f in ("base", "adapted"))
    assert base.keys() == adapted.keys()
    assert all(torch.equal(base[key], adapted[key]) for key in base)


# Modules


@pytest.mark.parametrize("targets", [["first"], ["second"], ["first", "second"]], ids=str)
def test_a_module_that_several_paths_share_is_adapted_once(targets: list[str], tmp_path: Path) -> None:
    model = seeded(Shared)
    before = snapshot(model)
    adapters = ak.attach(model)
    report = adapters.add("a", LoraConfig(r=2, target_modules=targets, bias="lora_only"))
    assert report.targets == ("first",)
    assert report.parameters == 2 * 2 * 6 + 6
    set_parameters(adapters, "a")
    x = torch.ones(1, 6)
    fresh = ak.attach(seeded(Shared))
    assert fresh.load(adapters.save("a", tmp_path), "b").ok
    assert_same_outputs(fresh.model(x), model(x))
    own, taken = adapters.state_dict("a"), adapters.state_dict("a", source=model.state_dict())
    assert own.keys() == taken.keys()
    assert_as_before(adapters.detach(), before)


@pytest.mark.parametrize("targets", [["wte"], ["lm_head"], ["wte", "lm_head"], ["c_attn"]], ids=str)
def test_tied_weights_stay_tied(targets: list[str], trained: Trained) -> None:
    model = build("gpt2")
    base = run(model, "gpt2")
    heads = ["lm_head"] if targets == ["c_attn"] else None  # its copy is apart, the model's own tie is not
    adapters = trained(model, "a", target_modules=targets, modules_to_save=heads)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert different(alone(adapters, "a", "gpt2"), base)
    assert torch.equal(run(model, "gpt2"), base)
    duplicate = copy.deepcopy(model)
    assert duplicate.lm_head.weight is duplicate.transformer.wte.weight
    adapters.detach()
    assert model.lm_head.weight is model.transformer.wte.weight


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # the layer's input needs no gradient
def test_hooks_on_a_target_stay_and_fire_once_with_the_adapted_output(trained: Trained) -> None:
    model = build("bert")
    layer = model.bert.encoder.layer[0].attention.self.query
    seen: list[Tensor] = []
    backward: list[Tensor] = []
    layer.register_forward_hook(lambda module, args, output: seen.append(output.detach().clone()))
    layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().clone()))
    layer.register_full_backward_hook(lambda module, grads_in, grads_out: backward.append(grads_out[0]))
    adapters = trained(model, "a", target_modules=["query"], modules_to_save=None)
    run(model, "bert")
    adapters.activate("a")
    model(**inputs("bert")).logits.sum().backward()
    (before_in, before), (after_in, after) = seen[:2], seen[2:]
    assert torch.equal(before_in, after_in)
    assert different(before, after)
    assert len(backward) == 1
    adapters.detach()
    run(model, "bert")
    assert torch.equal(seen[-1], before)


def test_a_models_own_module_called_adapters_is_the_models(tmp_path: Path) -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.adapters = nn.ModuleDict({"down": nn.Linear(4, 4)})

        def forward(self, x: Tensor) -> Tensor:
            return self.adapters["down"](x)

    model = seeded(Own)
    before = snapshot(model)
    adapters = ak.attach(model)
    assert adapters.add("down", LoraConfig(r=2, target_modules="all-linear")).targets == ("adapters.down",)
    set_parameters(adapters, "down")
    own, taken = adapters.state_dict("down"), adapters.state_dict("down", source=model.state_dict())
    assert own.keys() == taken.keys()
    assert adapters.load_state_dict("down", own).ok
    assert adapters.load(adapters.save("down", tmp_path), "again").ok
    assert_as_before(adapters.detach(), before)


# Life


def test_detach_gives_back_what_required_gradients_and_the_label_names() -> None:
    model = build("bert")
    model.bert.embeddings.requires_grad_(False)
    model.config.id2label = {0: "no", 1: "yes", 2: "maybe"}
    model.config.label2id = {"no": 0, "yes": 1, "maybe": 2, "perhaps": 2}
    before = snapshot(model)
    adapters = ak.attach(model)
    adapters.add("a", LoraConfig(target_modules=["query"], bias="all"), num_labels=4)
    assert not any(p.requires_grad for k, p in model.named_parameters() if ".adapter" not in k)
    assert_as_before(adapters.detach(), before)


def test_rename_keeps_the_parameters_that_an_optimizer_holds(trained: Trained, tmp_path: Path) -> None:
    model = build("bert")
    adapters = trained(model, "a", "b", target_modules=["query"], bias="lora_only")
    parameters = list(adapters.parameters("b"))
    adapters.activate("b")
    adapters.rename("b", "new")
    assert all(p is q for p, q in zip(parameters, adapters.parameters("new"), strict=True))
    assert not any(".b." in key for key in model.state_dict())
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_config.json").is_file()
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("name", ["a", "training"])
def test_adapters_follow_the_models_training_mode(name: str) -> None:
    model = build("bert").train()
    adapters = ak.attach(model)
    adapters.add(name, LoraConfig(target_modules=["query"], modules_to_save=["classifier"]))
    layer = model.bert.encoder.layer[0].attention.self.query.adapters[name]
    assert layer.training
    model.eval()
    assert not layer.training
    adapters.add("b", LoraConfig(target_modules=["query"]))
    assert not model.bert.encoder.layer[0].attention.self.query.adapters["b"].training


def test_status_and_the_container_protocol_tell_what_there_is(trained: Trained) -> None:
    adapters = trained(build("bert"), "a", target_modules=["query"])
    adapters.add("b", LoraConfig(r=4, target_modules=["value"], modules_to_save=None))
    a, b = adapters.status().rows
    assert (a.name, a.method, a.targets, a.heads) == ("a", "lora", 2, ("classifier",))
    assert not a.active
    assert not a.trainable
    assert (b.targets, b.heads, b.parameters, b.dtypes, b.devices) == (2, (), 2 * 4 * 32, ("float32",), ("cpu",))
    assert b.active
    assert b.trainable
    lines = str(adapters.status()).splitlines()
    assert lines[0].split()[:3] == ["adapter", "method", "layers"]
    assert len(lines) == 4
    assert lines[3].startswith("trainable: 256 parameters, ")
    assert len(adapters) == 2
    assert list(adapters) == ["a", "b"]
    assert "a" in adapters
    assert "c" not in adapters
    assert repr(adapters) == "<Adapters of BertForSequenceClassification: 'a', 'b'>"


# Wrapped models, and models inside models


def test_attach_gives_one_object_for_a_model_and_its_wrappers_and_leaves_one_attribute() -> None:
    model = mlp()
    before = snapshot(model)
    assert ak.attach(model) is ak.attach(model)
    del model.__dict__["_adapterkit"]
    assert_as_before(model, before)
    adapters = ak.attach(model)
    assert ak.attach(torch.compile(model)) is ak.attach(nn.DataParallel(model)) is adapters
    adapters.add("a", LoraConfig(r=2, target_modules=["0"]))
    averaged = AveragedModel(model)
    set_parameters(adapters, "a")
    averaged.update_parameters(model)
    found = ak.attach(averaged)
    assert (found.model, found.names) == (averaged.module, ("a",))
    with torch.no_grad():
        torch.testing.assert_close(averaged(torch.ones(2, 6)), model(torch.ones(2, 6)))
    adapters.detach()
    assert ak.attach(model) is not adapters


def test_a_layer_is_not_adapted_through_two_models() -> None:
    model = build("bert")
    ak.attach(model).add("a", LoraConfig(target_modules=["query"]))
    before = snapshot(model)
    with pytest.raises(ak.StateError, match=r"'encoder\.layer\.0\.attention\.self\.query' is already adapted"):
        ak.attach(model.bert).add("b", LoraConfig(target_modules=["query"]))
    del model.bert.__dict__["_adapterkit"]
    assert_as_before(model, before)


def test_adapters_of_a_model_inside_another_are_left_alone_by_it(trained: Trained) -> None:
    model = build("bert")
    before = snapshot(model)
    inner = trained(model.bert, "a", target_modules=["query"])
    inner.activate("a")
    outer = trained(model, "b", target_modules=["value"])
    outer.activate("b")
    assert all(p.requires_grad for p in inner.parameters("a"))
    outer.detach()
    assert all(p.requires_grad for p in inner.parameters("a"))
    inner.detach()
    assert_as_before(model, before)


BORN: dict[str, Callable[[ak.Adapters, Path], Any]] = {
    "add": lambda a, f: a.add("b", VeraConfig(r=2, target_modules=["0"], modules_to_save=["2"])),
    "copy": lambda a, f: a.copy("a", "b"),
    "load": lambda a, f: a.load(f, "b"),
    "load of random tensors": lambda a, f: a.load(f.parent / "vera", "b"),
    "combine": lambda a, f: a.combine("b", {"a": 1.0}, heads="a"),
    "extract": lambda a, f: ak.extract(a.model, mlp(seed=1), name="b", rank=1),
}


def mlp(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))


@pytest.mark.parametrize("call", BORN)
def test_adapter_made_in_inference_mode_can_be_trained_later(call: str, tmp_path: Path) -> None:
    other = ak.attach(mlp())
    other.add("vera", VeraConfig(r=2, target_modules=["0"]))
    other.save("vera", tmp_path / "vera")
    model = mlp()
    adapters = ak.attach(model)
    adapters.add("a", LoraConfig(r=2, target_modules=["0"], modules_to_save=["2"]))
    set_parameters(adapters, "a")
    folder = adapters.save("a", tmp_path / "a")
    with torch.inference_mode():
        BORN[call](adapters, folder)
    adapters.activate("b", trainable=True)
    model(torch.ones(2, 6)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in adapters.parameters("b"))


def test_weight_merged_in_inference_mode_can_be_trained_beside() -> None:
    model, x = mlp(), torch.ones(2, 6)
    model[2].weight = nn.Parameter(torch.ones(6, 6))
    model[0].weight = model[2].weight
    adapters = ak.attach(model)
    adapters.add("a", LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    adapters.add("b", LoraConfig(r=2, target_modules=["0", "2"]), activate=False)
    expected = model[0](x)
    with torch.inference_mode():
        adapters.merge("a", untie=True)
    assert not model[0].weight.is_inference()
    torch.testing.assert_close(model[0](x), expected)
    adapters.activate("b")
    model[:2](x).sum().backward()
    assert model[0].adapters["b"].lora_B.weight.grad is not None
