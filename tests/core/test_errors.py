"""Every error by its text, and that whatever was refused has changed nothing."""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from tests.core.conftest import assert_as_before, set_parameters, snapshot
from tests.models import EmbeddingNet, build, run
from torch import Tensor, nn

import adapterkit as ak
from adapterkit_lora import LoraConfig
from adapterkit_vera import VeraConfig

ROOT = Path(__file__).parents[2]
FIELDS: dict[str, Any] = {"r": 2, "target_modules": ["layers.0", "layers.1"]}


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """The model and its adapters are afterwards what they were before, bit for bit."""
    adapters = ak.attach(model)
    before, held = snapshot(model), _held(adapters)
    yield
    assert_as_before(model, before)
    now = _held(adapters)
    assert now.keys() == held.keys()
    for name, (config, trains, tensors) in held.items():
        assert now[name][:2] == (config, trains), name
        assert list(now[name][2]) == list(tensors), name
        for key, value in tensors.items():
            assert value.is_meta or torch.equal(value, now[name][2][key]), key


def _held(adapters: ak.Adapters) -> dict[str, Any]:
    held: dict[str, Any] = {
        name: (
            adapters.config(name),
            [p.requires_grad for p in adapters.parameters(name)],
            {k: v.clone() for k, v in adapters.state_dict(name).items()},
        )
        for name in adapters
    }
    return held | {"": ((adapters.active, adapters.names), repr(adapters), {})}


class Case(NamedTuple):
    """A call that is refused, with the error's class and parts of its text."""

    call: Callable[[Any], object]
    error: type[ak.AdapterError]
    texts: tuple[str, ...]


def case(call: Callable[[Any], object], error: type[ak.AdapterError], *texts: str) -> Case:
    return Case(call, error, texts)


def check(refused: Case, argument: object) -> None:
    with pytest.raises(refused.error) as caught:
        refused.call(argument)
    for text in refused.texts:
        assert text in str(caught.value)


def table(cases: dict[str, Case]) -> Any:
    return pytest.mark.parametrize("refused", cases.values(), ids=cases.keys())


@pytest.fixture
def net() -> nn.Module:
    """A model with one active adapter, `"a"`, as if trained, and one that is not, `"b"`."""
    model = EmbeddingNet().eval()
    adapters = ak.attach(model)
    adapters.add("b", LoraConfig(**FIELDS, modules_to_save=["head"]))
    adapters.add("a", LoraConfig(**FIELDS, modules_to_save=["head"]))
    set_parameters(adapters, "a")
    return model


# Configs


CONFIGS = {
    "unknown field": case(
        lambda c: c(rnak=8),
        ak.UnknownNameError,
        "LoraConfig has no field 'rnak'.",
        "Its fields: target_modules, ",
    ),
    "unknown field, nearest": case(lambda c: c(lora_alhpa=8), ak.UnknownNameError, "Did you mean 'lora_alpha'?"),
    "positional": case(
        lambda c: c(8), ak.ConfigError, "LoraConfig takes its fields by name: LoraConfig(r=8), not (8,)"
    ),
    "replace": case(lambda c: c().replace(rnak=8), ak.UnknownNameError, "LoraConfig has no field 'rnak'."),
    "replace checks": case(lambda c: c().replace(r=0), ak.ConfigError, "r = 0: a rank must be at least 1."),
    "r nan": case(lambda c: c(r=float("nan")), ak.ConfigError, "LoraConfig: r = nan is a float; it must be int."),
    "r float": case(lambda c: c(r=8.0), ak.ConfigError, "r = 8.0 is a float; it must be int."),
    "r bool": case(lambda c: c(r=True), ak.ConfigError, "r = True is a bool; it must be int."),
    "r text": case(lambda c: c(r="8"), ak.ConfigError, "r = '8' is a str; it must be int."),
    "r none": case(lambda c: c(r=None), ak.ConfigError, "r = None is a NoneType; it must be int."),
    "r tensor": case(lambda c: c(r=torch.tensor(8)), ak.ConfigError, "is a Tensor; it must be int."),
    "r zero": case(lambda c: c(r=0), ak.ConfigError, "r = 0: a rank must be at least 1."),
    "r negative": case(lambda c: c(r=-1), ak.ConfigError, "r = -1: a rank must be at least 1."),
    "rank_pattern zero": case(
        lambda c: c(rank_pattern={"q": 0}), ak.ConfigError, "rank_pattern: r = 0: a rank must be"
    ),
    "rank_pattern text": case(
        lambda c: c(rank_pattern={"q": "4"}), ak.ConfigError, "it must be a mapping from str to int."
    ),
    "rank_pattern list": case(lambda c: c(rank_pattern=[4]), ak.ConfigError, "it must be a mapping from str to int."),
    "alpha nan": case(lambda c: c(lora_alpha=float("nan")), ak.ConfigError, "it must be a finite float32."),
    "alpha infinite": case(lambda c: c(lora_alpha=float("inf")), ak.ConfigError, "it must be a finite float32."),
    "alpha beyond floats": case(lambda c: c(lora_alpha=10**400), ak.ConfigError, "it must be a finite float32."),
    "alpha_pattern nan": case(
        lambda c: c(alpha_pattern={"q": float("nan")}),
        ak.ConfigError,
        "it must be a mapping from str to a finite float32",
    ),
    "dropout one": case(
        lambda c: c(lora_dropout=1.0),
        ak.ConfigError,
        "lora_dropout = 1.0 must be a probability, at least 0 and below 1.",
    ),
    "dropout negative": case(lambda c: c(lora_dropout=-0.1), ak.ConfigError, "must be a probability"),
    "dropout nan": case(lambda c: c(lora_dropout=float("nan")), ak.ConfigError, "it must be a finite float32."),
    "bias": case(lambda c: c(bias="some"), ak.ConfigError, "bias = 'some' must be 'none' or 'all' or 'lora_only'."),
    "targets number": case(lambda c: c(target_modules=3), ak.ConfigError, "it must be str or a list of str or None."),
    "targets numbers": case(lambda c: c(target_modules=[1, 2]), ak.ConfigError, "must be str or a list of str or None"),
    "targets mixed set": case(lambda c: c(target_modules={1, "a"}), ak.ConfigError, "must be str or a list of str"),
    "targets empty": case(
        lambda c: c(target_modules=[]),
        ak.ConfigError,
        "target_modules is empty; name at least one module, or leave it None.",
    ),
    "exclude empty": case(lambda c: c(exclude_modules=""), ak.ConfigError, "exclude_modules is empty;"),
    "layers text": case(
        lambda c: c(layers_to_transform="all"), ak.ConfigError, "layers_to_transform = 'all' is a str;"
    ),
    "layers bool": case(lambda c: c(layers_to_transform=True), ak.ConfigError, "layers_to_transform = True is a bool;"),
    "pattern alone": case(
        lambda c: c(layers_pattern="h"),
        ak.ConfigError,
        "layers_pattern says where to count layers; it needs layers_to_transform beside it.",
    ),
    "init": case(
        lambda c: c(init_lora_weights="kaiming"),
        ak.ConfigError,
        "init_lora_weights = 'kaiming' must be True, False, 'gaussian', ",
        "'orthogonal', 'pissa', 'olora' or 'pissa_niter_N'.",
    ),
    "init number": case(lambda c: c(init_lora_weights=1), ak.ConfigError, "init_lora_weights = 1 is a int;"),
    "init of PEFT": case(
        lambda c: c(init_lora_weights="eva"),
        ak.UnsupportedError,
        "init_lora_weights = 'eva' is an option of PEFT that adapterkit does not implement.",
        "loads if the field is set to true in its adapter_config.json",
    ),
    "odd rank": case(
        lambda c: c(r=3, init_lora_weights="orthogonal"),
        ak.ConfigError,
        "r = 3: init_lora_weights='orthogonal' needs an even rank.",
    ),
    "lora_bias": case(
        lambda c: c(lora_bias=True, init_lora_weights="gaussian"),
        ak.ConfigError,
        "lora_bias needs init_lora_weights True or False, not 'gaussian'.",
    ),
}


@table(CONFIGS)
def test_config_that_is_refused(refused: Case) -> None:
    check(refused, LoraConfig)


@pytest.mark.parametrize("field", sorted(LoraConfig.not_implemented))
def test_option_of_peft_that_is_not_implemented_is_refused_in_the_constructor(field: str) -> None:
    with pytest.raises(ak.UnsupportedError, match=f"LoraConfig: {field} = 'on' is an option of PEFT that adapterkit"):
        LoraConfig(**{field: "on"})


@pytest.mark.parametrize("field", sorted({*LoraConfig.not_implemented, "a_field_of_next_year"}))
def test_option_of_peft_that_is_not_implemented_is_refused_in_a_file(field: str) -> None:
    with pytest.raises(ak.UnsupportedError) as caught:
        LoraConfig.from_dict({"peft_type": "LORA", field: ["on"]})
    assert f"{field} = ['on'] is not implemented by the method 'lora' here" in str(caught.value)
    assert "may change the adapter's outputs. If not, remove it from the file." in str(caught.value)


@pytest.mark.parametrize("field", sorted(LoraConfig.not_implemented))
def test_option_of_peft_that_changes_nothing_is_kept(field: str) -> None:
    neutral = LoraConfig.not_implemented[field]
    config = LoraConfig.from_dict({"peft_type": "LORA", field: neutral})
    assert config.to_dict()[field] == neutral


def test_value_nested_too_deeply_is_refused() -> None:
    value: list[Any] = []
    for _ in range(5000):
        value = [value]
    with pytest.raises(ak.ConfigError, match="a value is nested too deeply"):
        LoraConfig.from_dict({"target_modules": value})


# Names and calls


NAMES = ("", "a.b", ".", None, 3, ("a",), b"a")


@pytest.mark.parametrize("name", NAMES, ids=repr)
@pytest.mark.parametrize("call", ["add", "load", "rename", "copy"])
def test_name_that_no_adapter_can_have(net: nn.Module, tmp_path: Path, call: str, name: Any) -> None:
    adapters = ak.attach(net)
    adapters.save("a", tmp_path / "a")
    calls: dict[str, Callable[[], object]] = {
        "add": lambda: adapters.add(name, LoraConfig(**FIELDS)),
        "load": lambda: adapters.load(tmp_path / "a", name),
        "rename": lambda: adapters.rename("a", name),
        "copy": lambda: adapters.copy("a", name),
    }
    text = f"{name!r} cannot be an adapter's name: it must be text, not empty, without a dot."
    with unchanged(net), pytest.raises(ak.ConfigError, match=re.escape(text)):
        calls[call]()


@pytest.mark.parametrize("call", ["add", "load", "rename", "copy"])
def test_name_that_is_taken(net: nn.Module, tmp_path: Path, call: str) -> None:
    adapters = ak.attach(net)
    adapters.save("a", tmp_path / "a")
    calls: dict[str, Callable[[], object]] = {
        "add": lambda: adapters.add("b", LoraConfig(**FIELDS)),
        "load": lambda: adapters.load(tmp_path / "a", "b"),
        "rename": lambda: adapters.rename("a", "b"),
        "copy": lambda: adapters.copy("a", "b"),
    }
    text = "There is an adapter 'b' already. Remove it first, or choose another name."
    with unchanged(net), pytest.raises(ak.ConfigError, match=text):
        calls[call]()


UNKNOWN: dict[str, Callable[[ak.Adapters, Any], object]] = {
    "config": lambda a, name: a.config(name),
    "parameters": lambda a, name: list(a.parameters(name)),
    "named_parameters": lambda a, name: list(a.named_parameters(name)),
    "activate": lambda a, name: a.activate("b", name),
    "activated": lambda a, name: a.activated(name).__enter__(),
    "remove": lambda a, name: a.remove(name),
    "rename": lambda a, name: a.rename(name, "c"),
    "copy": lambda a, name: a.copy(name, "c"),
    "state_dict": lambda a, name: a.state_dict(name),
    "load_state_dict": lambda a, name: a.load_state_dict(name, {}),
    "save": lambda a, name: a.save(name, "/nowhere"),
}


@pytest.mark.parametrize("name", ["aa", "", None, ["a"], 0], ids=repr)
@pytest.mark.parametrize("call", UNKNOWN)
def test_adapter_that_does_not_exist(net: nn.Module, call: str, name: Any) -> None:
    with unchanged(net), pytest.raises(ak.UnknownNameError) as caught:
        UNKNOWN[call](ak.attach(net), name)
    assert f"No adapter {name!r}. There is: 'a', 'b'." in str(caught.value)


def test_adapter_that_does_not_exist_among_none() -> None:
    with pytest.raises(ak.UnknownNameError, match=re.escape("No adapter 'a'. There is no adapter yet.")):
        ak.attach(EmbeddingNet()).remove("a")


def test_unknown_adapter_is_told_the_nearest() -> None:
    adapters = ak.attach(EmbeddingNet())
    adapters.add("imdb-sentiment", LoraConfig(**FIELDS))
    with pytest.raises(ak.UnknownNameError, match=re.escape("Did you mean 'imdb-sentiment'?")):
        adapters.activate("imdb-sentimnet")


class Frozen(nn.Linear):
    """A layer of whose class no subclass can be made."""

    def __init_subclass__(cls, **_: object) -> None:
        raise TypeError("final")


class TwoOutputs(nn.Linear):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x), None


def with_layer(layer: nn.Module) -> nn.Module:
    model = nn.Module()
    model.fc, model.odd = nn.Linear(4, 4), layer
    return model


def own_attribute() -> nn.Module:
    layer = nn.Linear(4, 4)
    layer.adapters = 3  # type: ignore[assignment]
    return with_layer(layer)


def own_shared() -> nn.Module:
    model = with_layer(nn.Linear(4, 4))
    model.adapter_shared = nn.Linear(4, 4)
    return model


def scripted() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return with_layer(torch.jit.script(nn.Sequential(nn.Linear(4, 4))))


def int8() -> nn.Module:
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    return with_layer(layer)


def of_another_model() -> nn.Module:
    model = with_layer(nn.Linear(4, 4))
    ak.attach(with_layer(model.odd)).add("there", LoraConfig(target_modules=["odd"]))
    return model


def typed(model_type: str) -> nn.Module:
    model = with_layer(nn.Linear(4, 4))
    model.config = type("Config", (), {"model_type": model_type})()
    return model


def add(**fields: Any) -> Callable[[nn.Module], object]:
    return lambda model: ak.attach(model).add("c", LoraConfig(**FIELDS | fields))


def select(**fields: Any) -> Callable[[nn.Module], object]:
    return lambda model: ak.select(model, LoraConfig(**FIELDS | fields))


ON_NET = {
    "not a config": case(
        lambda m: ak.attach(m).add("c", {"r": 8}),
        ak.ConfigError,
        "{'r': 8} is no adapter config. Make one with its class",
    ),
    "a bare config": case(
        lambda m: ak.attach(m).add("c", ak.AdapterConfig()), ak.UnknownNameError, "No adapter method ''"
    ),
    "no match": case(
        add(target_modules=["laiers"]),
        ak.SelectionError,
        "['laiers'] matched none of the 5 layers that can be adapted. Nearest: ",
        "A list takes exact paths or suffixes at a dot; a string is a regular expression for the full path.",
    ),
    "no match, nearest": case(add(target_modules=["overhaed"]), ak.SelectionError, "Nearest: 'overhead'."),
    "no match by expression": case(add(target_modules="overhea"), ak.SelectionError, "matched none of the 5 layers"),
    "a container": case(
        add(target_modules=["layers"]),
        ak.SelectionError,
        "'layers', taken by target_modules 'layers', cannot be adapted: a ModuleList is a container",
    ),
    "all left out": case(
        add(target_modules=["head"], modules_to_save=["head"]),
        ak.SelectionError,
        "is left out; 1 in all, for example 'head': modules_to_save trains 'head' in full.",
    ),
    "all excluded": case(add(exclude_modules=["layers.0", "layers.1"]), ak.SelectionError, "is left out; 2 in all"),
    "no layer of that number": case(
        add(layers_to_transform=[7]), ak.SelectionError, "layers_to_transform leaves out layer 0 of 'layers'"
    ),
    "no such stack": case(
        add(layers_to_transform=[0], layers_pattern="blocks"),
        ak.SelectionError,
        "layers_to_transform: it is in no stack that is counted",
    ),
    "stack twice": case(
        add(layers_to_transform={"layers": [0]}, layers_pattern="layers"),
        ak.ConfigError,
        "layers_to_transform names its stacks itself here; leave layers_pattern out.",
    ),
    "stack numbers": case(
        add(layers_to_transform={"layers": "some"}),
        ak.ConfigError,
        "layers_to_transform 'layers': 'some' is neither 'all' nor a list of layer numbers.",
    ),
    "no default": case(
        add(target_modules=None),
        ak.SelectionError,
        "There is no default for target_modules on EmbeddingNet, which has no model_type.",
        "target_modules='all-linear' or a list of names such as ['0', '1', 'overhead', 'head'].",
    ),
    "bad expression": case(
        add(target_modules="*.q"),
        ak.ConfigError,
        "target_modules = '*.q' is no valid regular expression: nothing to repeat at position 0.",
        "A list of names, such as ['query', 'value'], is taken literally.",
    ),
    "bad pattern": case(
        add(rank_pattern={"(": 2}), ak.ConfigError, "rank_pattern = ", "is no valid regular expression"
    ),
    "head that is no module": case(
        add(modules_to_save=["haed"]),
        ak.SelectionError,
        "modules_to_save 'haed' matched no module; an entry is an exact path or a suffix at a dot. Nearest: 'head'",
    ),
    "head that is no module, far from any": case(
        add(modules_to_save=["zzz"]), ak.SelectionError, "modules_to_save 'zzz' matched no module"
    ),
    "head that is part of a name": case(add(modules_to_save=["ead"]), ak.SelectionError, "'ead' matched no module"),
    "head that is a container": case(
        add(target_modules=["overhead"], modules_to_save=["layers"]),
        ak.SelectionError,
        "modules_to_save 'layers' cannot be trained as a copy: a ModuleList is a container that is never called",
    ),
    "labels without labels": case(
        lambda m: ak.attach(m).add("c", LoraConfig(**FIELDS, modules_to_save=["head"]), num_labels=4),
        ak.ConfigError,
        "num_labels and id2label set the size of an adapter's head, but the model's config has no labels.",
    ),
    "lora_bias on an embedding": case(
        add(target_modules=["embed"], lora_bias=True),
        ak.ConfigError,
        "lora_bias has no meaning at 'embed': an embedding has no bias. Leave it out.",
    ),
    "pissa on an embedding": case(
        add(target_modules=["embed"], init_lora_weights="pissa"),
        ak.StateError,
        "init_lora_weights='pissa' is for linear layers; 'embed' is a Embedding. Leave it out with exclude_modules.",
    ),
    "pissa of too high a rank": case(
        add(r=9, init_lora_weights="pissa"),
        ak.StateError,
        "init_lora_weights='pissa' takes r <= min(in, out) = 8 at 'layers.0', not 9.",
    ),
    "olora of too high a rank": case(add(r=9, init_lora_weights="olora"), ak.StateError, "min(in, out) = 8"),
    "rank beyond memory": case(add(r=10**14), ak.PluginError, "its hook inject raised RuntimeError"),
    "rank beyond numbers": case(
        add(r=10**40), ak.PluginError, "The method 'lora' (adapterkit ", "its hook inject raised"
    ),
    "select a text": case(
        lambda m: ak.select(m, "lora"),
        ak.ConfigError,
        "select needs an adapter config such as LoraConfig(r=8), not a str.",
    ),
    "activate twice": case(
        lambda m: ak.attach(m).activate("a", "a"), ak.ConfigError, "activate('a', 'a') names an adapter twice."
    ),
    "two heads": case(
        lambda m: ak.attach(m).activate("a", "b"),
        ak.ConfigError,
        "'a' and 'b' each have their own 'head', and only one can act. Say which: heads='a'.",
    ),
    "heads of another": case(
        lambda m: ak.attach(m).activate("a", heads="b"),
        ak.UnknownNameError,
        "No adapter to be activated 'b'. There is: 'a'.",
    ),
    "dtype by name": case(
        lambda m: ak.attach(m).load(".", "c", dtype="float16"),
        ak.ConfigError,
        "dtype = 'float16' must be a floating torch.dtype, 'file' or None.",
    ),
    "dtype of integers": case(
        lambda m: ak.attach(m).load(".", "c", dtype=torch.int8), ak.ConfigError, "dtype = torch.int8 must be a floating"
    ),
    "dtype that is none": case(lambda m: ak.attach(m).load(".", "c", dtype=8), ak.ConfigError, "dtype = 8 must be"),
    "state dict that is none": case(
        lambda m: ak.attach(m).load_state_dict("a", None),
        ak.CheckpointError,
        "A state dict is a mapping from names to tensors, not a NoneType.",
    ),
    "state dict of numbers": case(
        lambda m: ak.attach(m).load_state_dict("a", {"x": 1}), ak.CheckpointError, "at 'x' there is a int."
    ),
    "state dict of other keys": case(
        lambda m: ak.attach(m).load_state_dict("a", {1: torch.ones(1)}), ak.CheckpointError, "at 1 there is a Tensor."
    ),
    "source of numbers": case(
        lambda m: ak.attach(m).state_dict("a", {"x": 1}), ak.CheckpointError, "at 'x' there is a int."
    ),
    "source that lacks tensors": case(
        lambda m: ak.attach(m).state_dict("a", {}),
        ak.CheckpointError,
        "The state dict lacks 6 of adapter 'a''s tensors, such as 'head.bias'.",
    ),
    "save nowhere": case(
        lambda m: ak.attach(m).save("a", ""),
        ak.ConfigError,
        "'' is no folder: give its path, as text or as a pathlib.Path.",
    ),
    "save to a number": case(lambda m: ak.attach(m).save("a", 5), ak.ConfigError, "5 is no folder"),
    "save to nobody's home": case(
        lambda m: ak.attach(m).save("a", "~nobody_at_all/x"),
        ak.ConfigError,
        "'~nobody_at_all/x' is no folder: Could not",
    ),
}


@table(ON_NET)
def test_call_that_is_refused_and_changes_nothing(net: nn.Module, refused: Case) -> None:
    with unchanged(net):
        check(refused, net)


ODD_MODELS = {
    "nothing to adapt": (
        nn.ReLU,
        case(select(target_modules="all-linear"), ak.SelectionError, "ReLU has no layer that can be adapted."),
    ),
    "the root alone": (
        lambda: nn.Linear(4, 4),
        case(select(target_modules="all-linear"), ak.SelectionError, "Linear has no layer that can be adapted"),
    ),
    "another kind": (
        lambda: with_layer(nn.Bilinear(4, 4, 4)),
        case(
            add(target_modules=["odd"]),
            ak.SelectionError,
            "'odd', taken by target_modules 'odd', is a Bilinear, which cannot be adapted "
            "(layer kinds: Linear, Conv1D, Conv1d, Conv2d, Conv3d, Embedding).",
            "Leave it out with exclude_modules, or name the layers inside it.",
        ),
    ),
    "an embedding bag": (
        lambda: with_layer(nn.EmbeddingBag(4, 4)),
        case(add(target_modules=["odd"]), ak.SelectionError, "is a EmbeddingBag, which cannot be adapted"),
    ),
    "max_norm": (
        lambda: with_layer(nn.Embedding(4, 4, max_norm=1.0)),
        case(add(target_modules=["odd"]), ak.SelectionError, "An embedding with max_norm rewrites its own rows."),
    ),
    "lazy": (
        lambda: with_layer(nn.LazyLinear(4)),
        case(add(target_modules=["odd"]), ak.SelectionError, "It has no sizes yet: run the model once, then add"),
    ),
    "int8": (
        int8,
        case(
            add(target_modules=["odd"]),
            ak.SelectionError,
            "Its weight is quantised (torch.int8); no installed extension",
        ),
    ),
    "complex": (
        lambda: with_layer(nn.Linear(4, 4, dtype=torch.complex64)),
        case(add(target_modules=["odd"]), ak.SelectionError, "Its weight is complex (torch.complex64)."),
    ),
    "a layer that is never called": (
        lambda: build("t5"),
        case(
            add(target_modules=["shared"]),
            ak.SelectionError,
            "'shared', taken by target_modules 'shared', cannot be adapted: the model neither calls nor reads it; it "
            "calls 'encoder.embed_tokens' and 'decoder.embed_tokens', which may be tied to it. Leave it out.",
        ),
    ),
    "a head that is never called": (
        lambda: build("t5"),
        case(
            add(target_modules=["q"], modules_to_save=["shared"]),
            ak.SelectionError,
            "modules_to_save 'shared' cannot be trained as a copy: the model neither calls nor reads it; it calls",
        ),
    ),
    "a model type without a default": (
        lambda: typed("gpt9"),
        case(add(target_modules=None), ak.SelectionError, "no default for target_modules on model_type 'gpt9'."),
    ),
    "an attribute of our name": (
        own_attribute,
        case(
            add(target_modules=["odd"]),
            ak.StateError,
            "'odd' has an attribute 'adapters' of its own, which adapterkit would overwrite. Leave this layer out",
        ),
    ),
    "an attribute where shared tensors go": (
        own_shared,
        case(
            lambda model: ak.attach(model).add("c", VeraConfig(target_modules=["fc"])),
            ak.StateError,
            "The model has an attribute 'adapter_shared' of its own, which adapterkit would overwrite with the tensors",
        ),
    ),
    "scripted": (
        scripted,
        case(add(target_modules=["0"]), ak.SelectionError, "'odd.0', taken by target_modules '0', is a Recursive"),
    ),
    "a scripted head": (
        scripted,
        case(
            add(target_modules=["fc"], modules_to_save=["odd"]),
            ak.StateError,
            "'odd' is scripted (torch.jit); nothing can be added to it. Adapt the model unscripted.",
        ),
    ),
    "a class without subclasses": (
        lambda: with_layer(Frozen(4, 4)),
        case(
            add(target_modules=["odd", "fc"]),
            ak.StateError,
            "'odd' is a Frozen, a class that cannot be extended (TypeError: final), so no adapter can be put there.",
        ),
    ),
    "adapted elsewhere": (
        of_another_model,
        case(
            add(target_modules=["odd"]),
            ak.StateError,
            "'odd' is already adapted through another model that shares it. Use the adapters of that model",
        ),
    ),
    "no weights yet": (
        lambda: with_layer(nn.Linear(4, 4, device="meta")),
        case(
            add(target_modules=["odd"], init_lora_weights="olora"),
            ak.StateError,
            "init_lora_weights='olora' needs the weight of 'odd', which is on the meta device. Load the base first.",
        ),
    ),
}


@pytest.mark.parametrize(("make", "refused"), ODD_MODELS.values(), ids=ODD_MODELS.keys())
def test_odd_model_is_refused_with_a_reason_and_not_changed(make: Callable[[], nn.Module], refused: Case) -> None:
    model = make()
    comparable = not any(isinstance(m, nn.LazyLinear | torch.jit.ScriptModule) for m in model.modules())
    with unchanged(model) if comparable else nullcontext():
        check(refused, model)
    assert len(ak.attach(model)) == 0


def test_layer_whose_output_is_no_tensor_says_so_when_it_runs() -> None:
    model = with_layer(TwoOutputs(4, 4))
    ak.attach(model).add("a", LoraConfig(target_modules=["odd"]))
    text = "A TwoOutputs is adapted that returns a tuple, and an adapter can only be added to a tensor."
    with pytest.raises(ak.SelectionError, match=text):
        model.odd(torch.ones(2, 4))


def test_expression_that_never_ends_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adapterkit.contract.patterns.TIME_LIMIT_SECONDS", 0.05)
    model = nn.ModuleDict({"a" * 40 + "b": nn.Linear(4, 4)})
    with unchanged(model), pytest.raises(ak.ConfigError) as caught:
        ak.attach(model).add("c", LoraConfig(target_modules=r"(a|aa)+c"))
    assert "took over 0.05 s to match the module names: it backtracks without end." in str(caught.value)
    assert "Write a simpler expression, or list the modules." in str(caught.value)


@pytest.mark.parametrize("thing", ["model", None, nn.Linear, torch.ones(2)], ids=["text", "None", "class", "tensor"])
def test_attach_needs_a_module(thing: Any) -> None:
    with pytest.raises(
        ak.ConfigError, match=re.escape(f"attach needs a torch.nn.Module, not a {type(thing).__name__}.")
    ):
        ak.attach(thing)


def test_select_needs_a_module() -> None:
    with pytest.raises(ak.ConfigError, match=re.escape("select needs a torch.nn.Module, not a str.")):
        ak.select("model", LoraConfig())  # type: ignore[arg-type]


DETACHED: dict[str, Callable[[ak.Adapters], object]] = {
    "model": lambda a: a.model,
    "add": lambda a: a.add("c", LoraConfig(**FIELDS)),
    "load": lambda a: a.load(".", "c"),
    "remove": lambda a: a.remove("a"),
    "activate": lambda a: a.activate("a"),
    "activate none": lambda a: a.activate(),
    "detach": lambda a: a.detach(),
}


@pytest.mark.parametrize("call", DETACHED)
def test_adapters_that_were_detached_say_so(net: nn.Module, call: str) -> None:
    adapters = ak.attach(net)
    adapters.detach()
    with pytest.raises(ak.StateError, match="These adapters were detached; call"):
        DETACHED[call](adapters)


def test_adapters_that_were_detached_can_be_printed(net: nn.Module) -> None:
    adapters = ak.attach(net)
    adapters.detach()
    assert repr(adapters) == "<Adapters, detached>"


# Label sets


LABELS = {
    "zero": case(lambda k: k(num_labels=0), ak.ConfigError, "num_labels = 0 must be a positive number of classes."),
    "negative": case(lambda k: k(num_labels=-3), ak.ConfigError, "num_labels = -3 must be a positive number"),
    "bool": case(lambda k: k(num_labels=True), ak.ConfigError, "num_labels = True must be a positive number"),
    "float": case(lambda k: k(num_labels=4.0), ak.ConfigError, "num_labels = 4.0 must be a positive number"),
    "text": case(lambda k: k(num_labels="4"), ak.ConfigError, "num_labels = '4' must be a positive number"),
    "gaps": case(
        lambda k: k(id2label={0: "a", 2: "b"}),
        ak.ConfigError,
        "id2label must number its classes 0, 1, 2, ... without gaps, not [0, 2].",
    ),
    "empty": case(lambda k: k(id2label={}), ak.ConfigError, "id2label must number its classes 0, 1, 2, ..."),
    "text keys": case(lambda k: k(id2label={"0": "a"}), ak.ConfigError, "without gaps, not ['0']."),
    "mixed keys": case(lambda k: k(id2label={0: "a", "x": "b"}), ak.ConfigError, "without gaps, not [0, 'x']."),
    "list": case(lambda k: k(id2label=["a", "b"]), ak.ConfigError, "must be a mapping from class numbers to names."),
    "number": case(
        lambda k: k(id2label=5), ak.ConfigError, "id2label = 5 must be a mapping from class numbers to names"
    ),
    "two answers": case(
        lambda k: k(num_labels=3, id2label={0: "a", 1: "b"}),
        ak.ConfigError,
        "num_labels = 3 disagrees with id2label, which has 2 classes.",
    ),
    "no head": case(
        lambda k: k(modules_to_save=None, num_labels=4),
        ak.ConfigError,
        "num_labels and id2label set the size of an adapter's head, but it has no head (modules_to_save).",
    ),
    "no output layer": case(
        lambda k: k(modules_to_save=["pooler"], num_labels=4),
        ak.ConfigError,
        "num_labels=4: no linear layer of the head",
        "has 3 outputs, so it is not known which one to resize.",
        "Resize the model's head before adding the adapter.",
    ),
}


@pytest.fixture(scope="module")
def bert() -> nn.Module:
    return build("bert")


@table(LABELS)
def test_label_set_that_is_refused(bert: nn.Module, refused: Case) -> None:
    def labelled(num_labels: Any = None, id2label: Any = None, **fields: Any) -> None:
        ak.attach(bert).add("c", LoraConfig(r=2, **fields), num_labels=num_labels, id2label=id2label)

    with unchanged(bert):
        check(refused, labelled)


# The errors themselves


def test_each_error_is_also_the_builtin_that_a_caller_expects() -> None:
    for error, builtin in {
        ak.ConfigError: ValueError,
        ak.UnsupportedError: NotImplementedError,
        ak.UnknownNameError: KeyError,
        ak.SelectionError: ValueError,
        ak.StateError: RuntimeError,
        ak.CheckpointError: ValueError,
        ak.SaveError: OSError,
        ak.PluginError: RuntimeError,
    }.items():
        assert issubclass(error, builtin)
        assert issubclass(error, ak.AdapterError)


def test_unknown_name_prints_without_quotes_around_it() -> None:
    assert str(ak.UnknownNameError("No adapter 'a'.")) == "No adapter 'a'."


# Odd models that are adapted all the same


class Keywords(nn.Linear):
    """A linear layer with arguments beside its input."""

    def forward(self, x: Tensor, scale: float = 1.0, *, shift: float = 0.0) -> Tensor:
        return super().forward(x) * scale + shift


class KeywordOnly(nn.Linear):
    def forward(self, *, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x)


class Float8(nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, 4)
        self.weight = nn.Parameter(self.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype), self.bias)


class Calls(nn.Module):
    """A model of one layer, called as `call` says."""

    def __init__(self, layer: nn.Module, call: Callable[[nn.Module, Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.layer = layer
        self.call = call or (lambda layer, x: layer(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.layer, x)


def deep(levels: int) -> nn.Module:
    model: nn.Module = nn.Linear(4, 4)
    for _ in range(levels):
        model = nn.Sequential(model)
    return model


def with_children_called_as_ours() -> nn.Module:
    layer = nn.Sequential(nn.Linear(4, 4))
    layer.add_module("adapters", nn.Sequential(nn.Linear(4, 4)))
    return layer


def with_config(config: object) -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4))
    model.config = config  # type: ignore[assignment]
    return model


ADAPTED: dict[str, Callable[[], nn.Module]] = {
    "float64": lambda: nn.Sequential(nn.Linear(4, 4, dtype=torch.float64)),
    "float16": lambda: nn.Sequential(nn.Linear(4, 4, dtype=torch.float16)),
    "bfloat16": lambda: nn.Sequential(nn.Linear(4, 4, dtype=torch.bfloat16)),
    "float8": lambda: Calls(Float8()),
    "parametrised": lambda: Calls(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))),
    "spectral norm": lambda: Calls(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))),
    "DataParallel": lambda: nn.DataParallel(nn.Sequential(nn.Linear(4, 4))),
    "input by keyword": lambda: Calls(nn.Linear(4, 4), lambda layer, x: layer(input=x)),
    "another argument": lambda: Calls(Keywords(4, 4), lambda layer, x: layer(x, 2.0)),
    "keywords": lambda: Calls(Keywords(4, 4), lambda layer, x: layer(x, scale=2.0, shift=1.0)),
    "input not the first keyword": lambda: Calls(Keywords(4, 4), lambda layer, x: layer(scale=2.0, x=x)),
    "input by keyword only": lambda: Calls(KeywordOnly(4, 4), lambda layer, x: layer(x=x)),
    "200 levels deep": lambda: deep(200),
    "children called adapters": with_children_called_as_ours,
    "a module called base_model": lambda: nn.Sequential(nn.ModuleDict({"base_model": nn.Linear(4, 4)})["base_model"]),
    "a config that is a dict": lambda: with_config({"model_type": "bert", "id2label": {0: "a"}}),
    "a config with odd labels": lambda: with_config(type("C", (), {"id2label": {"x": "y"}, "model_type": ["x"]})()),
}


@pytest.mark.parametrize("make", ADAPTED.values(), ids=ADAPTED.keys())
def test_odd_model_is_adapted_and_given_back(make: Callable[[], nn.Module]) -> None:
    model = make().eval()
    dtype = next(model.parameters()).dtype
    x = torch.randn(3, 4, dtype=torch.float32 if dtype.itemsize == 1 else dtype)
    before, base = snapshot(model), model(x)
    adapters = ak.attach(model)
    adapters.add("a", LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    adapted = model(x)
    with adapters.disabled():
        assert torch.equal(model(x), base)
    assert adapted.dtype == base.dtype
    assert (adapted - base).abs().max() > 1e-3
    adapters.detach()
    assert_as_before(model, before)
    assert torch.equal(model(x), base)


def test_children_of_the_model_that_are_called_adapters_are_adapted_and_saved(tmp_path: Path) -> None:
    model = with_children_called_as_ours()
    adapters = ak.attach(model)
    report = adapters.add("0", LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    assert report.targets == ("0", "adapters.0")
    adapters.save("0", tmp_path / "a")
    assert adapters.load(tmp_path / "a", "again").ok


def test_module_called_base_model_saves_and_loads(tmp_path: Path) -> None:
    model = nn.Module()
    model.base_model = nn.Module()
    model.base_model.model = nn.Sequential(nn.Linear(4, 4))
    adapters = ak.attach(model)
    adapters.add("a", LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    adapters.save("a", tmp_path / "a")
    assert adapters.load(tmp_path / "a", "b").ok
    for one, other in zip(adapters.parameters("a"), adapters.parameters("b"), strict=True):
        assert torch.equal(one, other)


def test_sparse_embedding_is_adapted() -> None:
    model = Calls(nn.Embedding(6, 4, sparse=True))
    ak.attach(model).add("a", LoraConfig(r=2, target_modules=["layer"], init_lora_weights=False))
    model(torch.tensor([1, 2])).sum().backward()
    assert all(p.grad is not None for p in ak.attach(model).parameters("a"))


# That the list is whole


def _texts(error: ast.expr) -> Iterator[str]:
    for node in ast.walk(error):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def _raised() -> Iterator[tuple[str, list[str]]]:
    """Where an error with a text of its own is raised, and that text's constant parts."""
    for path in sorted([*(ROOT / "core").rglob("*.py"), *(ROOT / "plugins").rglob("*.py")]):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Raise) and node.exc is not None:
                texts = [text for text in _texts(node.exc) if len(text) >= 12]
                if texts:
                    yield f"{path.relative_to(ROOT)}:{node.lineno}", texts


def test_every_message_is_in_some_test() -> None:
    tests = "\n".join(p.read_text(encoding="utf-8") for p in sorted((ROOT / "tests").rglob("*.py")))
    tests = re.sub(r'"\s*\n\s*f?r?"', "", tests.replace("\\", ""))  # texts over several lines, and escaped ones
    untested = [
        (place, texts)
        for place, texts in _raised()
        if not any(text[i : i + 12] in tests for text in texts for i in range(len(text) - 11))
    ]
    assert not untested, "\n".join(f"{place}: {' ... '.join(texts)}" for place, texts in untested)


def test_messages_of_files_are_json_of_the_field(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "use_dora": True}))
    model = EmbeddingNet()
    with unchanged(model), pytest.raises(ak.CheckpointError):
        ak.attach(model).load(tmp_path, "a")


def test_model_still_runs_after_refused_calls(bert: nn.Module) -> None:
    before = run(bert, "bert")
    with pytest.raises(ak.SelectionError):
        ak.attach(bert).add("x", LoraConfig(target_modules=["nothing_at_all"]))
    assert torch.equal(run(bert, "bert"), before)
