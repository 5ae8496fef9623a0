"""Every error by its text, and that whatever was refused has changed nothing."""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.core.conftest import assert_as_before, set_parameters, snapshot
from tests.models import EmbeddingNet, build
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.contract.config import OPTIONS
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


@contextmanager
def refused(error: type[ak.AdapterError], *texts: str) -> Iterator[None]:
    """The block raises this error, with these parts in its text."""
    with pytest.raises(error) as caught:
        yield
    for text in texts:
        assert text in str(caught.value)


# A row of the tables below: what is given, and a part of the error's text. A ConfigError is expected, where the row
# names no other.
Row = tuple[Any, str] | tuple[Any, str, type[ak.AdapterError]]
SELECTION, CHECKPOINT, STATE = ak.SelectionError, ak.CheckpointError, ak.StateError
UNKNOWN_NAME, UNSUPPORTED, PLUGIN = ak.UnknownNameError, ak.UnsupportedError, ak.PluginError


def table(rows: list[Row]) -> Any:
    whole = [(*row, ak.ConfigError)[:3] for row in rows]
    return pytest.mark.parametrize(("given", "text", "error"), whole, ids=[row[1][:60] for row in rows])


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

NAN = float("nan")
CONFIGS: list[Row] = [
    ({"rnak": 8}, "LoraConfig has no field 'rnak'. Did you mean 'r'? Its fields: r, lora_alpha, ", UNKNOWN_NAME),
    ({"lora_alhpa": 8}, "Did you mean 'lora_alpha'?", UNKNOWN_NAME),
    ({"r": 8.0}, "LoraConfig: r = 8.0 is a float; it must be int."),
    ({"r": True}, "r = True is a bool; it must be int."),
    ({"r": None}, "r = None is a NoneType; it must be int."),
    ({"r": 0}, "r = 0: a rank must be at least 1."),
    ({"rank_pattern": {"q": 0}}, "rank_pattern: r = 0: a rank must be"),
    ({"rank_pattern": {"q": "4"}}, "it must be a mapping from str to int."),
    ({"rank_pattern": [4]}, "it must be a mapping from str to int."),
    ({"lora_alpha": NAN}, "lora_alpha = nan is a float; it must be a number, finite in float32."),
    ({"lora_alpha": True}, "lora_alpha = True is a bool; it must be a number, finite in float32."),
    ({"lora_alpha": 10**400}, "is a int; it must be a number, finite in float32."),
    ({"alpha_pattern": {"q": NAN}}, "it must be a mapping from str to a number, finite in float32"),
    ({"lora_alpha": -3e38}, "lora_alpha = -3e+38 is too large: the limit is 2**64."),
    ({"alpha_pattern": {"q": 3e38}}, "alpha_pattern = 3e+38 is too large: the limit is 2**64."),
    ({"lora_dropout": 1.0}, "lora_dropout = 1.0 must be a probability, at least 0 and below 1."),
    ({"lora_dropout": -0.1}, "lora_dropout = -0.1 must be a probability"),
    ({"bias": "some"}, "bias = 'some' must be 'none' or 'all' or 'lora_only'."),
    ({"target_modules": 3}, "target_modules = 3 is a int; it must be str or a list of str or None."),
    ({"target_modules": {1, "a"}}, "must be str or a list of str"),
    ({"target_modules": []}, "target_modules is empty; name at least one module, or leave it None."),
    ({"exclude_modules": ""}, "exclude_modules is empty;"),
    ({"layers_to_transform": "all"}, "layers_to_transform = 'all' is a str;"),
    ({"layers_pattern": "h"}, "layers_pattern says where to count layers; it needs layers_to_transform beside it."),
    (
        {"init_lora_weights": "kaiming"},
        "must be True, False, 'gaussian', 'orthogonal', 'pissa', 'olora' or 'pissa_niter_N'.",
    ),
    ({"init_lora_weights": 1}, "init_lora_weights = 1 is a int;"),
    ({"init_lora_weights": "eva"}, "'eva' is an option of PEFT that adapterkit does not implement.", UNSUPPORTED),
    ({"init_lora_weights": "MiCA"}, "Files of adapters that were trained from it load.", UNSUPPORTED),
    ({"init_lora_weights": "loftq"}, "It replaces weights of the base, and the adapter goes with those", UNSUPPORTED),
    ({"r": 3, "init_lora_weights": "orthogonal"}, "r = 3: init_lora_weights='orthogonal' needs an even rank."),
    ({"lora_bias": True, "init_lora_weights": "gaussian"}, "lora_bias needs init_lora_weights True or False, not"),
]


@table(CONFIGS)
def test_config_that_is_refused(given: dict[str, Any], text: str, error: type[ak.AdapterError]) -> None:
    with refused(error, text):
        LoraConfig(**given)
    with refused(error, text):
        LoraConfig().replace(**given)


def test_config_by_position_is_refused() -> None:
    with refused(ak.ConfigError, "LoraConfig takes its fields by name: LoraConfig(r=8), not (8,)"):
        LoraConfig(8)


@pytest.mark.parametrize("field", sorted(name for name in OPTIONS if name not in LoraConfig.__dataclass_fields__))
def test_option_of_peft_that_is_not_implemented(field: str) -> None:
    """Refused in the constructor, and in a file where it changes what an adapter computes; else kept."""
    with refused(ak.UnsupportedError, f"LoraConfig: {field} = 'on' is an option of PEFT that adapterkit"):
        LoraConfig(**{field: "on"})
    neutral = OPTIONS[field]
    if neutral is ...:
        neutral = ["on"]
    else:
        with refused(ak.UnsupportedError, f"{field} = ['on'] changes what the adapter computes, and the method 'lora'"):
            LoraConfig.from_dict({"peft_type": "LORA", field: ["on"]})
    assert LoraConfig.from_dict({"peft_type": "LORA", field: neutral}).to_dict()[field] == neutral


def test_value_nested_too_deeply_is_refused() -> None:
    value: list[Any] = []
    for _ in range(5000):
        value = [value]
    with refused(ak.ConfigError, "a value is nested too deeply"):
        LoraConfig.from_dict({"target_modules": value})


# Names and calls

NEW: dict[str, Callable[[ak.Adapters, Path, Any], object]] = {
    "add": lambda a, folder, name: a.add(name, LoraConfig(**FIELDS)),
    "load": lambda a, folder, name: a.load(folder, name),
    "rename": lambda a, folder, name: a.rename("a", name),
    "copy": lambda a, folder, name: a.copy("a", name),
}


@pytest.mark.parametrize("call", NEW)
def test_name_that_no_adapter_can_have(net: nn.Module, tmp_path: Path, call: str) -> None:
    adapters = ak.attach(net)
    adapters.save("a", tmp_path)
    texts = {
        name: f"{name!r} cannot be an adapter's name: it must be text, and not dots alone."
        for name in ("", ".", "..", None, 3, ("a",), b"a")
    }
    texts["b"] = "There is an adapter 'b' already. Remove it first, or choose another name."
    for name, text in texts.items():
        if call == "load" and name is None:  # the folder's name
            continue
        with unchanged(net), refused(ak.ConfigError, text):
            NEW[call](adapters, tmp_path, name)


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


@pytest.mark.parametrize("call", UNKNOWN)
def test_adapter_that_does_not_exist(net: nn.Module, call: str) -> None:
    for name in ("aa", "", None, ["a"], 0):
        with unchanged(net), refused(ak.UnknownNameError, f"Unknown adapter {name!r}. Available: 'a', 'b'."):
            UNKNOWN[call](ak.attach(net), name)


def test_adapter_that_does_not_exist_is_told_the_nearest() -> None:
    adapters = ak.attach(EmbeddingNet())
    with refused(ak.UnknownNameError, "Unknown adapter 'a'. There are none yet."):
        adapters.remove("a")
    adapters.add("imdb-sentiment", LoraConfig(**FIELDS))
    with refused(ak.UnknownNameError, "Did you mean 'imdb-sentiment'?"):
        adapters.activate("imdb-sentimnet")


OUTSIDE = "layers_to_transform: it is outside the stacks whose layers are counted"
SELECTIONS: list[Row] = [
    (
        {"target_modules": ["laiers"]},
        "['laiers'] matched none of the 5 layers that can be adapted. Nearest: ",
        SELECTION,
    ),
    (
        {"target_modules": "overhea"},
        "A list takes exact paths or suffixes at a dot; a string is a regular expression for the full path.",
        SELECTION,
    ),
    ({"target_modules": ["overhaed"]}, "Nearest: 'overhead'.", SELECTION),
    (
        {"target_modules": ["layers"]},
        "'layers', taken by target_modules 'layers', cannot be adapted: a ModuleList is a container",
        SELECTION,
    ),
    (
        {"target_modules": ["head"], "modules_to_save": ["head"]},
        "is left out; 1 in all, for example 'head': modules_to_save trains 'head' in full.",
        SELECTION,
    ),
    ({"exclude_modules": ["layers.0", "layers.1"]}, "is left out; 2 in all", SELECTION),
    ({"layers_to_transform": [7]}, "layers_to_transform leaves out layer 0 of 'layers'", SELECTION),
    ({"layers_to_transform": [0], "layers_pattern": "blocks"}, OUTSIDE, SELECTION),
    (
        {"layers_to_transform": {"layers": [0]}, "layers_pattern": "layers"},
        "layers_to_transform already names its stacks here; leave layers_pattern out.",
    ),
    (
        {"layers_to_transform": {"layers": "some"}},
        "layers_to_transform 'layers': 'some' is neither 'all' nor a list of layer numbers.",
    ),
    (
        {"target_modules": None},
        "There is no default for target_modules on EmbeddingNet, which has no model_type.",
        SELECTION,
    ),
    (
        {"target_modules": None},
        "target_modules='all-linear' or a list of names such as ['0', '1', 'overhead', 'head'].",
        SELECTION,
    ),
    (
        {"target_modules": "*.q"},
        "target_modules = '*.q' is not a valid regular expression: nothing to repeat at position 0. A list of names, "
        "such as ['query', 'value'], is taken literally.",
    ),
    ({"rank_pattern": {"(": 2}}, "is not a valid regular expression"),
    (
        {"modules_to_save": ["haed"]},
        "modules_to_save 'haed' matched no module; an entry is an exact path or a suffix at a dot. Nearest: 'head'",
        SELECTION,
    ),
    ({"modules_to_save": ["ead"]}, "'ead' matched no module", SELECTION),
    (
        {"target_modules": ["overhead"], "modules_to_save": ["layers"]},
        "modules_to_save 'layers' cannot be trained as a copy: a ModuleList is a container, whose forward",
        SELECTION,
    ),
    ({"r": 10**14}, "The method 'lora' (adapterkit ", PLUGIN),
    ({"r": 10**14}, "its hook inject raised RuntimeError", PLUGIN),
]


@table(SELECTIONS)
def test_config_that_does_not_fit_the_model_is_refused_and_changes_nothing(
    net: nn.Module, given: dict[str, Any], text: str, error: type[ak.AdapterError]
) -> None:
    with unchanged(net), refused(error, text):
        ak.attach(net).add("c", LoraConfig(**FIELDS | given))


Call = Callable[[ak.Adapters], object]
CALLS: list[Row] = [
    (lambda a: a.add("c", {"r": 8}), "{'r': 8} is not an adapter config. Make one with its class"),
    (lambda a: a.add("c", ak.AdapterConfig()), "Unknown adapter method ''", UNKNOWN_NAME),
    (
        lambda a: a.add("c", LoraConfig(**FIELDS, modules_to_save=["head"]), num_labels=4),
        "num_labels and id2label set the size of an adapter's head, but the model has no config with labels.",
    ),
    (lambda a: ak.select(a.model, "lora"), "select needs an adapter config such as LoraConfig(r=8), not a str."),
    (lambda a: ak.select("model", LoraConfig()), "select needs a torch.nn.Module, not a str."),
    (lambda a: a.activate("a", "a"), "activate('a', 'a') names an adapter twice."),
    (
        lambda a: a.activate("a", "b"),
        "'a' and 'b' each have their own 'head', and only one can act. Say which: heads='a'.",
    ),
    (lambda a: a.activate("a", heads="b"), "Unknown active adapter 'b'. Available: 'a'.", UNKNOWN_NAME),
    (
        lambda a: a.load(".", "c", dtype="float16"),
        "dtype = 'float16' must be a floating torch.dtype of 16 bits or more, 'model',",
    ),
    (lambda a: a.load(".", "c", dtype=torch.int8), "dtype = torch.int8 must be a floating"),
    (
        lambda a: a.load_state_dict("a", None),
        "A state dict is a mapping from names to tensors, not a NoneType.",
        CHECKPOINT,
    ),
    (lambda a: a.load_state_dict("a", {"x": 1}), "at 'x' there is a int.", CHECKPOINT),
    (lambda a: a.load_state_dict("a", {1: torch.ones(1)}), "at 1 there is a Tensor.", CHECKPOINT),
    (lambda a: a.state_dict("a", {"x": 1}), "at 'x' there is a int.", CHECKPOINT),
    (
        lambda a: a.state_dict("a", {}),
        "The state dict lacks 6 of adapter 'a''s tensors, such as 'head.bias'.",
        CHECKPOINT,
    ),
    (lambda a: a.save("a", ""), "'' is not a folder: give its path, as text or as a pathlib.Path."),
    (lambda a: a.save("a", "~nobody_at_all/x"), "'~nobody_at_all/x' is not a folder: Could not"),
]


@table(CALLS)
def test_call_that_is_refused_and_changes_nothing(
    net: nn.Module, given: Call, text: str, error: type[ak.AdapterError]
) -> None:
    with unchanged(net), refused(error, text):
        given(ak.attach(net))


class Frozen(nn.Linear):
    """A layer of whose class no subclass can be made."""

    def __init_subclass__(cls, **_: object) -> None:
        raise TypeError("final")


class TwoOutputs(nn.Linear):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x), None


def with_layer(layer: nn.Module, **attributes: Any) -> nn.Module:
    """A model with a linear layer `fc`, this one as `odd`, and attributes."""
    model = nn.Module()
    model.fc, model.odd = nn.Linear(4, 4), layer
    for name, value in attributes.items():
        setattr(model, name, value)
    return model


def own_attribute() -> nn.Module:
    layer = nn.Linear(4, 4)
    layer.adapters = 3
    return with_layer(layer)


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


ODD: Any = {"target_modules": ["odd"]}
ODD_MODELS: list[tuple[Callable[[], nn.Module], type[ak.AdapterError], dict[str, Any], str]] = [
    (lambda: nn.Linear(4, 4), SELECTION, {"target_modules": "all-linear"}, "Linear has no layer that can be adapted"),
    (
        lambda: with_layer(nn.Bilinear(4, 4, 4)),
        SELECTION,
        ODD,
        "'odd', taken by target_modules 'odd', is a Bilinear, which cannot be adapted (layer kinds: Linear, Conv1D, "
        "Conv1d, Conv2d, Conv3d, Embedding, packed Linear). Leave it out with exclude_modules, or name the layers "
        "inside it.",
    ),
    (
        lambda: with_layer(nn.Embedding(4, 4, max_norm=1.0)),
        SELECTION,
        ODD,
        "An embedding with max_norm rewrites its own rows.",
    ),
    (lambda: with_layer(nn.LazyLinear(4)), SELECTION, ODD, "It has no sizes yet: run the model once, then add"),
    (int8, SELECTION, ODD, "is a Linear, which cannot be adapted: its weight is quantised (torch.int8), in a way"),
    (
        lambda: with_layer(nn.Linear(4, 4, dtype=torch.complex64)),
        SELECTION,
        ODD,
        "Its weight is complex (torch.complex64).",
    ),
    (
        lambda: build("t5"),  # a layer that is never called
        SELECTION,
        {"target_modules": ["shared"]},
        "'shared', taken by target_modules 'shared', cannot be adapted: the model neither calls nor reads it; it calls "
        "'encoder.embed_tokens' and 'decoder.embed_tokens', which may be tied to it. Leave it out.",
    ),
    (
        lambda: build("t5"),
        SELECTION,
        {"target_modules": ["q"], "modules_to_save": ["shared"]},
        "modules_to_save 'shared' cannot be trained as a copy: the model neither calls nor reads it; it calls",
    ),
    (
        lambda: with_layer(nn.Linear(4, 4), config=type("Config", (), {"model_type": "gpt9"})()),
        SELECTION,
        {"target_modules": None},
        "no default for target_modules on model_type 'gpt9'.",
    ),
    (
        own_attribute,
        STATE,
        ODD,
        "'odd' has an attribute 'adapters' of its own, which adapterkit would overwrite. Leave this layer out",
    ),
    (scripted, SELECTION, {"target_modules": ["0"]}, "'odd.0', taken by target_modules '0', is a Recursive"),
    (
        scripted,
        STATE,
        {"target_modules": ["fc"], "modules_to_save": ["odd"]},
        "'odd' is scripted (torch.jit), so nothing can be added to it. Adapt the unscripted model.",
    ),
    (
        lambda: with_layer(Frozen(4, 4)),
        STATE,
        {"target_modules": ["odd", "fc"]},
        "'odd' is a Frozen, a class that cannot be extended (TypeError: final), so no adapter can be put there.",
    ),
    (
        of_another_model,
        STATE,
        ODD,
        "'odd' is already adapted through another model that shares it. Use the adapters of that model",
    ),
]


@pytest.mark.parametrize(("make", "error", "given", "text"), ODD_MODELS, ids=[row[3][:40] for row in ODD_MODELS])
def test_odd_model_is_refused_with_a_reason_and_not_changed(
    make: Callable[[], nn.Module], error: type[ak.AdapterError], given: dict[str, Any], text: str
) -> None:
    model = make()
    comparable = not any(isinstance(m, nn.LazyLinear | torch.jit.ScriptModule) for m in model.modules())
    with unchanged(model) if comparable else nullcontext(), refused(error, text):
        ak.attach(model).add("c", LoraConfig(**given))
    assert len(ak.attach(model)) == 0


def test_attribute_of_the_model_where_shared_tensors_go_is_not_overwritten() -> None:
    model = with_layer(nn.Linear(4, 4), adapter_shared=nn.Linear(4, 4))
    text = "The model has an attribute 'adapter_shared' of its own, which adapterkit would overwrite with the tensors"
    with unchanged(model), refused(ak.StateError, text):
        ak.attach(model).add("c", VeraConfig(target_modules=["fc"]))


def test_layer_whose_output_is_no_tensor_says_so_when_it_runs() -> None:
    model = with_layer(TwoOutputs(4, 4))
    ak.attach(model).add("a", LoraConfig(target_modules=["odd"]))
    text = "A TwoOutputs is adapted that returns a tuple, and an adapter can only be added to a tensor."
    with refused(ak.SelectionError, text):
        model.odd(torch.ones(2, 4))


class Grouped(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([super().forward(x)] * 2, -1)


def test_error_in_a_layer_that_computes_otherwise_says_what_to_leave_out() -> None:
    model = with_layer(Grouped(4, 4))
    ak.attach(model).add("a", LoraConfig(target_modules=["odd"]))
    with pytest.raises(RuntimeError) as caught:
        model.odd(torch.ones(2, 4))
    assert "An adapter acts in this layer, whose class has a forward of its own." in caught.value.__notes__[0]


def test_model_with_a_layer_without_sizes_is_refused() -> None:
    model = with_layer(nn.LazyLinear(4))
    with refused(ak.StateError, "'odd.weight' has no size yet. Run the model once, then add the adapter."):
        ak.attach(model).add("a", LoraConfig(target_modules=["fc"]))
    assert ak.attach(model).names == ()
    assert not any("adapters" in path for path, _ in model.named_modules())


@pytest.mark.parametrize("thing", ["model", None, nn.Linear, torch.ones(2)], ids=["text", "None", "class", "tensor"])
def test_attach_needs_a_module(thing: Any) -> None:
    with refused(ak.ConfigError, f"attach needs a torch.nn.Module, not a {type(thing).__name__}."):
        ak.attach(thing)


def test_adapters_that_were_detached_say_so(net: nn.Module) -> None:
    adapters = ak.attach(net)
    adapters.detach()
    assert repr(adapters) == "<Adapters, detached>"
    calls: list[Callable[[], object]] = [
        lambda: adapters.model,
        lambda: adapters.add("c", LoraConfig(**FIELDS)),
        lambda: adapters.load(".", "c"),
        lambda: adapters.remove("a"),
        lambda: adapters.activate("a"),
        adapters.activate,
        adapters.detach,
    ]
    for use in calls:
        with refused(ak.StateError, "These adapters were detached; call ak.attach"):
            use()


# Label sets

LABELS: list[Row] = [
    ({"num_labels": 0}, "num_labels = 0 must be a positive number of classes."),
    ({"num_labels": True}, "num_labels = True must be a positive number"),
    ({"num_labels": 4.0}, "num_labels = 4.0 must be a positive number"),
    ({"id2label": {0: "a", 2: "b"}}, "id2label must number its classes 0, 1, 2, ... without gaps, not [0, 2]."),
    ({"id2label": {}}, "id2label must number its classes 0, 1, 2, ..."),
    ({"id2label": {0: "a", "x": "b"}}, "without gaps, not [0, 'x']."),
    ({"id2label": ["a", "b"]}, "must be a mapping from class numbers to names."),
    ({"num_labels": 3, "id2label": {0: "a", 1: "b"}}, "num_labels = 3 disagrees with id2label, which has 2 classes."),
    (
        {"modules_to_save": None, "num_labels": 4},
        "num_labels and id2label set the size of an adapter's head, but it has no head (modules_to_save).",
    ),
    (
        {"modules_to_save": ["pooler"], "num_labels": 4},
        "has 3 outputs, so it is unknown which one to resize. Resize the model's head before adding the adapter.",
    ),
    ({"modules_to_save": ["pooler"], "num_labels": 4}, "num_labels=4: no linear layer of the head"),
]


@table(LABELS)
def test_label_set_that_is_refused(given: dict[str, Any], text: str, error: type[ak.AdapterError]) -> None:
    model = build("bert")
    labels = {key: given[key] for key in ("num_labels", "id2label") if key in given}
    config = LoraConfig(r=2, **{key: value for key, value in given.items() if key not in labels})
    with unchanged(model), refused(error, text):
        ak.attach(model).add("c", config, **labels)


# The errors themselves


def test_each_error_is_also_the_builtin_that_a_caller_expects() -> None:
    for error, builtin in {
        ak.ConfigError: ValueError,
        ak.UsageError: TypeError,
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
    assert str(ak.UnknownNameError("Unknown adapter 'a'.")) == "Unknown adapter 'a'."  # without a KeyError's quotes


# Odd models that are adapted all the same


class Keywords(nn.Linear):
    """A linear layer with arguments beside its input."""

    def forward(self, x: Tensor, scale: float = 1.0, *, shift: float = 0.0) -> Tensor:
        return super().forward(x) * scale + shift


class KeywordOnly(nn.Linear):
    def forward(self, *, x: Tensor) -> Tensor:
        return super().forward(x)


class Float8(nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, 4)
        self.weight = nn.Parameter(self.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype), self.bias)


class Calls(nn.Module):
    """A model of one layer, called as `call` says."""

    def __init__(
        self, layer: nn.Module, call: Callable[[nn.Module, Tensor], Tensor] | None = None, config: Any = None
    ) -> None:
        super().__init__()
        self.layer, self.config = layer, config
        self.call = call or (lambda layer, x: layer(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.layer, x)


def deep(levels: int) -> nn.Module:
    model: nn.Module = nn.Linear(4, 4)
    for _ in range(levels):
        model = nn.Sequential(model)
    return model


ADAPTED: dict[str, Callable[[], nn.Module]] = {
    "float64": lambda: nn.Sequential(nn.Linear(4, 4, dtype=torch.float64)),
    "bfloat16": lambda: nn.Sequential(nn.Linear(4, 4, dtype=torch.bfloat16)),
    "float8": lambda: Calls(Float8()),
    "parametrised": lambda: Calls(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))),
    "DataParallel": lambda: nn.DataParallel(nn.Sequential(nn.Linear(4, 4))),
    "input by keyword": lambda: Calls(nn.Linear(4, 4), lambda layer, x: layer(input=x)),
    "another argument": lambda: Calls(Keywords(4, 4), lambda layer, x: layer(x, 2.0)),
    "keywords": lambda: Calls(Keywords(4, 4), lambda layer, x: layer(x, scale=2.0, shift=1.0)),
    "input not the first keyword": lambda: Calls(Keywords(4, 4), lambda layer, x: layer(scale=2.0, x=x)),
    "input by keyword only": lambda: Calls(KeywordOnly(4, 4), lambda layer, x: layer(x=x)),
    "200 levels deep": lambda: deep(200),
    "a config that is a dict": lambda: Calls(nn.Linear(4, 4), config={"model_type": "bert", "id2label": {0: "a"}}),
    "a config with odd labels": lambda: Calls(
        nn.Linear(4, 4), config=type("C", (), {"id2label": {"x": "y"}, "model_type": ["x"]})()
    ),
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


def test_keys_without_pefts_prefix_of_a_module_called_base_model() -> None:
    model = nn.Module()
    model.base_model = nn.Sequential(nn.Linear(4, 4))
    adapters = ak.attach(model)
    adapters.add("a", LoraConfig(r=2, target_modules="all-linear"))
    bare = {key.removeprefix("base_model.model."): tensor for key, tensor in adapters.state_dict("a").items()}
    assert bare.keys() == {"base_model.0.lora_A.weight", "base_model.0.lora_B.weight"}
    assert adapters.load_state_dict("a", bare) == ak.LoadReport()


# That the list is whole


def _raised() -> Iterator[tuple[str, list[str]]]:
    """Where an error with a text of its own is raised, and that text's constant parts."""
    for path in sorted([*(ROOT / "core").rglob("*.py"), *(ROOT / "plugins").rglob("*.py")]):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Raise) and node.exc is not None:
                texts = [part.value for part in ast.walk(node.exc) if isinstance(part, ast.Constant)]
                found = [text for text in texts if isinstance(text, str) and len(text) >= 12]
                if found:
                    yield f"{path.relative_to(ROOT)}:{node.lineno}", found


def test_every_message_is_in_some_test() -> None:
    tests = "\n".join(p.read_text(encoding="utf-8") for p in sorted((ROOT / "tests").rglob("*.py")))
    tests = re.sub(r'"\s*\n\s*f?r?"', "", tests.replace("\\", ""))  # texts over several lines, and escaped ones
    untested = [
        (place, texts)
        for place, texts in _raised()
        if not any(text[i : i + 12] in tests for text in texts for i in range(len(text) - 11))
    ]
    assert not untested, "\n".join(f"{place}: {' ... '.join(texts)}" for place, texts in untested)
