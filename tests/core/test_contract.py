"""What a plugin is checked for when it is registered, and what its hooks and its layers may do wrong later."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, make_dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import pytest
import torch
from tests.core.test_errors import unchanged
from tests.models import EmbeddingNet
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.contract import default_registry, hookspecs
from adapterkit_lora import LoraConfig


@dataclass(frozen=True, kw_only=True)
class ShiftConfig(ak.AdapterConfig):
    """Adds one trained number to each output."""

    method = "shift"


class ShiftLayer(ak.AdapterLayer):
    def setup(self, target: ak.Target, config: ShiftConfig) -> None:
        self.shift_by = target.new(target.out_features)

    def forward(self, base: ak.Base, x: Tensor) -> Tensor:
        out: Tensor = base(x) + self.shift_by
        return out


@ak.hookimpl
def config_type() -> type[ak.AdapterConfig]:
    return ShiftConfig


@ak.hookimpl
def key_rule(config: ShiftConfig) -> ak.KeyRule:
    return ak.KeyRule(prefix="shift_")


@ak.hookimpl
def inject(target: ak.Target, config: ShiftConfig) -> ak.AdapterLayer:
    return ShiftLayer(target, config)


class Plugin:
    """An object with these hooks; pluggy needs it to be hashable."""

    def __init__(self, **hooks: Any) -> None:
        self.__dict__.update(hooks)


def plugin(**changes: Any) -> Plugin:
    """A plugin that is right but for `changes`; `None` leaves a hook out."""
    hooks = {"config_type": config_type, "key_rule": key_rule, "inject": inject} | changes
    return Plugin(**{name: hook for name, hook in hooks.items() if hook is not None})


def registered(**hooks: Any) -> ak.AdapterConfig:
    """A plugin with these hooks is the method `"shift"`; gives a config for it."""
    if "shift" in default_registry.methods():
        default_registry.unregister("shift")
    ak.register(plugin(**hooks))
    return ShiftConfig(target_modules=["layers.0", "layers.1", "overhead"])


def config_class(method: str, **fields: Any) -> Any:
    found = make_dataclass("Config", [(n, *f) for n, f in fields.items()], bases=(ak.AdapterConfig,), frozen=True)
    found.method = method  # type: ignore[attr-defined]
    return found


def with_class(**attributes: Any) -> Any:
    """A config with a field `size` and these attributes of the class."""
    return type("Config", (config_class("shift", size=(str | None, None)),), attributes)


@dataclass(frozen=True, kw_only=True)
class Needy(ak.AdapterConfig):
    method = "shift"

    size: int


def returning(value: object) -> Callable[..., Any]:
    """An implementation, without annotations, that returns `value`, or raises it."""

    @ak.hookimpl
    def hook() -> Any:
        if isinstance(value, Exception):
            raise value
        return value

    return hook


def taking(function: Any) -> dict[str, Any]:
    return {"inject": ak.hookimpl(function)}


def more_arguments(target: ak.Target, rank: int, device: str) -> ak.AdapterLayer: ...  # type: ignore[empty-body]
def returns_text(target: ak.Target) -> str: ...  # type: ignore[empty-body]
def takes_text(target: str) -> ak.AdapterLayer: ...  # type: ignore[empty-body]


BY_ZERO = ZeroDivisionError("division by zero")
WHO = "The method 'shift' (Plugin)"
REGISTERED_WRONG: list[tuple[dict[str, Any], str]] = [
    ({"inject": None}, f"{WHO}: it lacks the required hook inject."),
    ({"inject": None, "key_rule": None}, "lacks the required hooks key_rule, inject."),
    ({"injekt": inject}, f"{WHO} implements 'injekt', which is not a hook. Did you mean 'inject'? Hooks: combiners, "),
    ({"xyzzy": inject}, "implements 'xyzzy', which is not a hook. Hooks: "),
    (
        {"key_rule": ak.hookimpl(specname="injekt")(lambda: None)},
        "implements 'key_rule', which is not a hook. Did you mean 'inject'?",
    ),
    (
        taking(more_arguments),
        "hook inject(target, rank, device) takes 'rank', 'device', which its spec does not give. "
        "It gives: target, config, shared.",
    ),
    (taking(returns_text), "hook inject returns str; the spec says "),
    (taking(takes_text), "hook inject takes target as str; the spec says Target."),
    ({"config_type": returning(None)}, "its hook config_type returned None; it must return a subclass of AdapterConf"),
    ({"config_type": returning(3)}, "its hook config_type returned 3; it must return a subclass"),
    ({"config_type": returning(dict)}, "returned <class 'dict'>; it must return a subclass of"),
    ({"config_type": returning(BY_ZERO)}, "its hook config_type raised ZeroDivisionError: division by zero."),
    (
        {"config_type": returning(config_class("shiift"))},
        f"{WHO}: Config.method is 'shiift'; it must be the method's name, 'shift'.",
    ),
    ({"config_type": returning(config_class(""))}, "Config has no `method`: write method = 'its name' in the class."),
    (
        {"config_type": returning(type("Config", (ShiftConfig,), {"__annotations__": {"size": int}, "size": 3}))},
        "Config.size is not a field of the config: the class needs @dataclass(frozen=True, kw_only=True), and the",
    ),
    ({"config_type": returning(type("Config", (ShiftConfig,), {"r": 3}))}, "Config.r is not a field of the config"),
    ({"targets": lambda model: []}, "targets has the name of a hook but no @ak.hookimpl, so nothing would call it."),
    ({"config_type": returning(Needy)}, "Needy() raised TypeError: "),
    ({"config_type": returning(Needy)}, "Every field of a config needs a default that the config takes."),
    (
        {"config_type": returning(config_class("shift", size=(int, None)))},
        "Config() raised ConfigError: Config: size = None is a NoneType; it must be int. Every field",
    ),
    (
        {"config_type": returning(config_class("shift", size=(list[torch.dtype] | None, None)))},
        "Config.size may be a dtype, which adapter_config.json cannot hold. It holds bool, int, float, str, None,",
    ),
    (
        {"config_type": returning(with_class(patterns={"size": "target"}))},
        "Config.patterns names 'target', which is not a field",
    ),
    (
        {"config_type": returning(with_class(patterns={"size": "bias"}))},
        "Config.size is str or None; as a pattern of 'bias' it must be a mapping",
    ),
    (
        {"config_type": returning(with_class(patterns=["size"]))},
        "Config.patterns = ['size'] is a list; it must be a mapping from str to str.",
    ),
    ({"config_type": returning(with_class(not_in_files="size"))}, "Config.not_in_files = 'size' is a str; it must be"),
    (
        {"config_type": returning(with_class(marks={"size": "x"}))},
        "Config.size is a field of the config, so it must not be in its marks or in not_implemented.",
    ),
    (
        {"config_type": returning(config_class("shift", replace=(int, 3)))},
        "Config.replace is a field that hides an attribute of every config. Leave the annotation of a class",
    ),
    (
        {"config_type": returning(config_class("shift", patterns=(dict, field(default_factory=dict))))},
        "Config.patterns is a f",
    ),
    ({"shared": 3}, f"{WHO}: its shared = 3 must be a subclass of Shared."),
    ({"key_rule": returning(None)}, "its hook key_rule returned None; it must return a KeyRule."),
    ({"key_rule": returning("shift_")}, "its hook key_rule returned a str; it must return a KeyRule."),
    ({"key_rule": returning(BY_ZERO)}, "its hook key_rule raised ZeroDivisionError"),
    (
        {"key_rule": returning(ak.KeyRule(""))},
        "its key prefix '' must be a name without dots, such as 'lora_', or a tu",
    ),
    ({"key_rule": returning(ak.KeyRule("a.b"))}, "its key prefix 'a.b' must be a name"),
    ({"key_rule": returning(ak.KeyRule(("a_", "")))}, "its key prefix ('a_', '') must be a name"),
    ({"key_rule": returning(ak.KeyRule(["a_"]))}, "its key prefix ['a_'] must be a name"),  # type: ignore[arg-type]
    (
        {"key_rule": returning(ak.KeyRule("a_", exempt="a_b"))},  # type: ignore[arg-type]
        "its key rule's exempt = 'a_b' must be a set of names, such as frozenset({'x'}).",
    ),
]


@pytest.mark.parametrize(("changes", "text"), REGISTERED_WRONG, ids=[text[-40:] for _, text in REGISTERED_WRONG])
def test_plugin_that_is_refused(changes: dict[str, Any], text: str) -> None:
    registry = ak.Registry()
    with pytest.raises(ak.PluginError) as caught:
        registry.register(plugin(**changes), "shift")
    assert text in str(caught.value)
    with pytest.raises(ak.UnknownNameError):
        registry.method("shift")
    registry.register(plugin())  # nothing of the first attempt is in the way


def test_plugin_that_is_right_is_registered_once() -> None:
    registry = ak.Registry()
    method = registry.register(plugin())
    assert method.name == "shift"
    assert registry.method("shift") is method
    assert repr(method) == "<method 'shift' from Plugin>"
    assert str(registry.methods()["shift"]) == "shift (Plugin)"
    assert registry.config("shift") == ShiftConfig()
    with pytest.raises(ak.PluginError, match=r"the name is taken by Plugin\."):
        registry.register(plugin())


def test_annotations_of_related_types_agree_and_none_are_needed() -> None:
    @ak.hookimpl
    def to_file(config: ShiftConfig, tensors: dict[str, Tensor]) -> tuple[ak.AdapterConfig, Mapping[str, Tensor]]:
        return config, tensors

    @ak.hookimpl
    def targets(model: nn.Module) -> list[str] | None:
        return None

    @ak.hookimpl
    def key_rule(config):  # type: ignore[no-untyped-def]
        return ak.KeyRule(prefix="shift_")

    ak.Registry().register(plugin(to_file=to_file, targets=targets, key_rule=key_rule))


def test_what_cannot_be_a_plugin() -> None:
    registry = ak.Registry()
    with pytest.raises(ak.PluginError, match="the name is taken by the installed package adapterkit"):
        registry.register(plugin(config_type=returning(config_class("lora"))))
    assert registry.method("lora").config_type() is LoraConfig
    with pytest.raises(ak.PluginError, match="a plugin must be hashable, as modules are, not a dict"):
        registry.register({})
    with pytest.raises(ak.PluginError, match=r"Plugin is a class; a plugin is an object, such as Plugin\(\)\."):
        registry.register(Plugin)


@pytest.mark.parametrize("prefix", ["lora_", "lora_x_", "lo"])
def test_prefix_that_begins_like_anothers_hinders_neither(prefix: str) -> None:
    registry = ak.Registry()
    registry.register(plugin(key_rule=returning(ak.KeyRule(prefix=prefix))))
    assert registry.method("lora").name == "lora"
    assert registry.method("shift").key_rule(ShiftConfig()).prefix == prefix


# What hooks do later


def net() -> nn.Module:
    model = EmbeddingNet().eval()
    ak.attach(model).add("before", LoraConfig(r=2, target_modules=["layers.0"]))
    return model


@dataclass
class Third:
    """A hook `inject` that does what it should twice, and then something else."""

    then: Callable[[ak.Target], Any]
    calls: int = 0

    def hook(self) -> Any:
        @ak.hookimpl
        def inject(target: ak.Target, config: ak.AdapterConfig) -> Any:
            self.calls += 1
            return self.then(target) if self.calls == 3 else ShiftLayer(target, config)

        return inject


def with_a_tensor(make: Callable[[Any, ak.Target], None]) -> Callable[[ak.Target], Any]:
    class Layer(ShiftLayer):
        def setup(self, target: ak.Target, config: Any) -> None:
            super().setup(target, config)
            make(self, target)

    return lambda target: Layer(target, ShiftConfig())


def raising(error: Exception) -> Callable[[ak.Target], Any]:
    def then(target: ak.Target) -> Any:
        raise error

    return then


INJECTED_WRONG: list[tuple[Callable[[ak.Target], Any], type[Exception], str]] = [
    (raising(BY_ZERO), ak.PluginError, f"{WHO}: its hook inject raised ZeroDivisionError: division by zero."),
    (raising(ak.ConfigError("not at this layer")), ak.ConfigError, "not at this layer"),
    (
        lambda target: nn.Linear(2, 2),
        ak.PluginError,
        f"{WHO}: its hook inject returned a Linear; it must return a AdapterLayer or None.",
    ),
    (
        lambda target: None,
        ak.SelectionError,
        "The method 'shift' does not support Linear layers, such as 'overhead'. Leave it out with exclude_modules.",
    ),
    (
        with_a_tensor(lambda layer, target: setattr(layer, "other", target.new(2))),
        ak.PluginError,
        "its hook inject made 'other' for 'overhead'; every parameter and buffer must begin with its prefix 'shift_'.",
    ),
    (
        with_a_tensor(lambda layer, target: layer.register_buffer("mask", torch.ones(2))),
        ak.PluginError,
        "its hook inject made 'mask' for 'overhead'",
    ),
]


@pytest.mark.parametrize(("then", "error", "message"), INJECTED_WRONG, ids=[row[2][-30:] for row in INJECTED_WRONG])
def test_injection_that_fails_half_way_changes_nothing(
    then: Callable[[ak.Target], Any], error: type[Exception], message: str
) -> None:
    third = Third(then)
    config, model = registered(inject=third.hook()), net()
    with unchanged(model), pytest.raises(error) as caught:
        ak.attach(model).add("x", config)
    assert message in str(caught.value)
    assert third.calls == 3


def test_what_is_shared_and_raises_changes_nothing() -> None:
    shared = type("Fails", (ak.Shared,), {"setup": lambda *given: 1 / 0})
    model, config = net(), registered(shared=shared)
    with unchanged(model), pytest.raises(ak.PluginError, match="its hook shared raised ZeroDivisionError"):
        ak.attach(model).add("x", config)


@pytest.mark.parametrize("answer", [3, (3, {}), BY_ZERO], ids=["type", "pair", "raises"])
def test_saving_with_a_hook_that_is_wrong_writes_nothing(tmp_path: Path, answer: Any) -> None:
    model, config = net(), registered()
    ak.attach(model).add("x", config)
    registered(to_file=returning(answer))
    message = "its hook to_file (returned a int|must return a ShiftConfig and a mapping|raised ZeroDivisionError)"
    with pytest.raises(ak.PluginError, match=message):
        ak.attach(model).save("x", tmp_path / "x")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("base", "needs"), [(ak.AdapterLayer, "merged or forward"), (ak.LowRankLayer, "factors"), (ak.DenseLayer, "change")]
)
def test_a_layer_that_lacks_what_its_base_needs_is_refused_where_it_is_defined(base: Any, needs: str) -> None:
    with pytest.raises(ak.PluginError) as caught:
        type("Nothing", (base,), {"setup": ShiftLayer.setup})
    assert str(caught.value) == (
        f"Nothing is a subclass of {base.__name__}, so it must define {needs}: see adapterkit.{base.__name__}."
    )
    with pytest.raises(ak.PluginError, match="Nothing defines __init__; write setup"):
        type("Nothing", (base,), {"__init__": ShiftLayer.setup, needs.split(maxsplit=1)[0]: None})


@pytest.mark.parametrize(
    ("base", "name", "meant"),
    [
        (ak.AdapterLayer, "set_up", "setup"),
        (ak.LowRankLayer, "factor", "factors"),
        (ak.DenseLayer, "changes", "change"),
        (ak.Shared, "setups", "setup"),
        (ak.Shared, "penality", "penalty"),
        (ak.Shared, "steps", "step"),
    ],
)
def test_a_method_that_is_called_nearly_as_one_of_the_contract_is_refused(base: type, name: str, meant: str) -> None:
    with pytest.raises(ak.PluginError, match=f"Misspelt.{name}: nothing calls it. Is it meant to be '{meant}'"):
        type("Misspelt", (base,), {name: lambda self: None, "forward": lambda self, base, x: x})


@pytest.mark.parametrize(
    ("base", "name", "wrong", "called"),
    [
        (ak.LowRankLayer, "setup", lambda self, target: None, "def setup(self, target, config)"),
        (ak.LowRankLayer, "factors", property(lambda self: None), "must be a method: def factors(self)"),
        (ak.DenseLayer, "change", lambda self, x: None, "def change(self)"),
        (ak.AdapterLayer, "merged", lambda self, bias, weight: None, "def merged(self, weight, bias)"),
        (ak.AdapterLayer, "forward", lambda self, x: x, "def forward(self, base, x)"),
        (ak.AdapterLayer, "forward", lambda self, x, base: x, "def forward(self, base, x)"),
        (ak.Shared, "setup", lambda self, targets, config: None, "def setup(self, targets, config, root)"),
        (ak.Shared, "forward", lambda self: None, "def forward(self, base, ...)"),
        (ak.Shared, "penalty", lambda self: None, "def penalty(self, layers)"),
        (ak.Shared, "step", lambda self, layers, number: None, "def step(self, number, layers)"),
    ],
)
def test_a_method_that_cannot_be_called_as_the_contract_says_is_refused(
    base: type, name: str, wrong: Any, called: str
) -> None:
    with pytest.raises(ak.PluginError) as caught:
        type("Wrong", (base,), {name: wrong})
    assert str(caught.value).startswith(f"Wrong.{name}")
    assert str(caught.value).endswith(f"{called}.")
    assert "does not take what it is called with: " in str(caught.value) or "must be a method" in called


def test_methods_with_more_arguments_of_their_own_are_right() -> None:
    class Whole(ak.AdapterLayer):
        any_module = True

        def setup(self, target: ak.Target, config: Any, size: int = 3) -> None: ...
        def forward(self, base: Any, states: Tensor, mask: Tensor, *, x: Any = None) -> Any: ...  # type: ignore[override]

    class Router(ak.Shared):
        def forward(self, base: Any, tokens: Tensor, task: int, **rest: Any) -> Any: ...  # type: ignore[override]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda x: setattr(x, "shared", nn.Linear(2, 2)),
            "replaced self.shared, which the library sets. Choose",
        ),
        (lambda x: setattr(x, "kind", "mine"), "replaced self.kind, which the library sets"),
        (lambda x: setattr(x, "any_module", True), "set self.any_module, which must be an attribute of the class"),
        (
            lambda x: setattr(x, "dropout", nn.Dropout(0.1)),
            "put a module or a tensor into self.dropout, but the class attribute dropout is what is read. It must be a",
        ),
        (
            lambda x: setattr(x, "merged", nn.Linear(2, 2)),
            "put a module or a tensor into self.merged, but the class attribute merged is what is read.",
        ),
        (lambda x: setattr(x, "row_dropout", 1.5), "set self.row_dropout = 1.5; it must be a number from 0 to 1."),
        (
            lambda x: x.shift_by.requires_grad_(False),
            "made a parameter 'shift_by' that does not require gradients. Every parameter trains; register a buffer",
        ),
        (
            lambda x: setattr(x, "masks", {"a": [torch.ones(2)]}),
            "keeps tensors in self.masks, which are not saved, moved or trained there. Make each a parameter",
        ),
    ],
)
def test_what_a_setup_must_not_leave_is_refused(change: Any, message: str) -> None:
    model, config = net(), registered(inject=Third(with_a_tensor(lambda layer, _: change(layer)), calls=2).hook())
    with unchanged(model), pytest.raises(ak.PluginError) as caught:
        ak.attach(model).add("x", config)
    assert f"Layer.setup {message}" in str(caught.value)


def test_an_init_that_makes_another_tensor_is_refused() -> None:
    model, config = net(), registered(inject=Third(lambda target: target.new(2, init=torch.randn_like), calls=2).hook())
    with unchanged(model), pytest.raises(ak.PluginError, match=r"init of target\.new must fill its tensor in place"):
        ak.attach(model).add("x", config)


@pytest.mark.parametrize("answer", [["no.such"], "head", [nn.Linear(2, 2)]], ids=["missing", "text", "module"])
def test_targets_that_are_no_paths_of_the_model_are_refused(answer: Any) -> None:
    model, config = net(), registered(targets=returning(answer))
    with unchanged(model), pytest.raises(ak.PluginError, match="must return a list of paths of modules of the model"):
        ak.attach(model).add("x", config)


def test_the_attributes_of_a_format_are_checked_where_it_is_defined() -> None:
    assert type("Listed", (ak.Format,), {"factors": ["a", "b"]}).factors == {"a", "b"}
    with pytest.raises(ak.PluginError) as caught:
        type("Wrong", (ak.Format,), {"factors": "lora_A"})
    assert str(caught.value) == "Wrong.factors = 'lora_A' is a str; it must be a list of str."
    with pytest.raises(ak.PluginError, match=r"Wrong\.ranks = .* it must be a mapping from str to int"):
        type("Wrong", (ak.Format,), {"ranks": {"lora_A": "0"}})


def test_formats_that_are_no_objects_are_refused() -> None:
    method = ak.Registry().register(plugin(formats=returning([ak.Format])))
    with pytest.raises(ak.PluginError, match=r"in its list; it must hold objects of ak\.Format"):
        method.formats()


def test_a_helper_beside_what_it_is_called_like_is_no_mistake() -> None:
    class Layer(ak.DenseLayer):
        def change(self) -> Tensor:
            return self.changes()

        def changes(self) -> Tensor:
            raise NotImplementedError


@pytest.mark.parametrize("answer", [True, False, ValueError("no")])
def test_a_check_that_returns_something_or_raises_another_error_is_refused(answer: Any) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Checked(ak.AdapterConfig):
        method = "checked"

        def check(self) -> Any:
            if isinstance(answer, Exception):
                raise answer
            return answer

    with pytest.raises(ak.PluginError, match=f"Checked.check (returned {answer}|raised ValueError: no); it must raise"):
        Checked()


def test_types_of_fields_that_cannot_be_resolved_are_named() -> None:
    config = config_class("shift", size=("Missing | None", None))
    with pytest.raises(ak.PluginError, match="types of Config's fields cannot be resolved: name 'Missing' is not defi"):
        config()
    assert "size" in str(inspect.signature(config))


@pytest.mark.parametrize(
    ("hint", "right", "wrong", "said"),
    [
        (set, {"b", "a"}, "a", "list of"),
        (list[int], [1, 2], [1.5], "a list of int"),
        (tuple[int, str], (1, "a"), (1, 2), r"a list \(int, str\)"),
        (tuple[int, int], (1, 2), (1, 2, 3), r"a list \(int, int\)"),
        (dict[str, ak.Rank], {"a": 1}, {"a": 0}, "a rank must be at least 1"),
        (dict, {"a": [1]}, [1], "a mapping from"),
    ],
    ids=["set", "list", "pair", "two numbers", "ranks", "dict"],
)
def test_fields_of_collections(hint: Any, right: Any, wrong: Any, said: str) -> None:
    config = config_class("shift", size=(hint, field(default_factory=lambda: right)))
    assert config.from_dict(config(size=right).to_dict()) == config()
    with pytest.raises(ak.ConfigError, match=said):
        config(size=wrong)


@dataclass(frozen=True, kw_only=True)
class LimitedConfig(ak.AdapterConfig):
    method = "limited"

    r: ak.Rank | None = None
    name: Annotated[str, ak.Limit(lambda text: len(text) < 3, " is too long")] = "x"
    init_limited_weights: bool | str = True


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"r": 0}, "r = 0: a rank must be at least 1."),
        ({"r": 1.5}, "LimitedConfig: r = 1.5 is a float; it must be int or None."),
        ({"name": "long"}, "name = 'long' is too long."),
    ],
)
def test_a_value_outside_the_limit_of_its_type_is_refused(fields: dict[str, Any], text: str) -> None:
    assert LimitedConfig(r=1, name="xy").r == 1
    with pytest.raises(ak.ConfigError) as error:
        LimitedConfig(**fields)
    assert str(error.value) == text


@pytest.mark.parametrize(("value", "identity"), [(True, True), (False, False), ("lycoris", True)])
def test_an_adapter_starts_as_the_identity_by_pefts_field(value: Any, identity: bool) -> None:
    assert LimitedConfig(init_limited_weights=value).starts_as_identity is identity


def test_a_forward_that_returns_nothing_is_named() -> None:
    class Silent(ShiftLayer):
        def forward(self, base: Any, x: Tensor) -> Any:
            base(x)

    @ak.hookimpl
    def inject(target: ak.Target, config: ShiftConfig) -> ak.AdapterLayer:
        return Silent(target, config)

    model = net()
    ak.attach(model).add("a", registered(inject=inject))
    with pytest.raises(ak.PluginError, match=r"Silent.forward returned None; it must return the output"):
        model.get_submodule("overhead")(torch.ones(1, model.get_submodule("overhead").in_features))


def test_a_method_may_choose_its_targets() -> None:
    def targets(model: nn.Module, config: ak.AdapterConfig) -> list[str]:
        return [match.path for match in ak.select(model, config).targets][1:]

    config = registered(targets=ak.hookimpl(targets)).replace(target_modules=["layers.0", "layers.1", "head"])
    model = net()
    assert ak.attach(model).add("x", config).targets == ("layers.1", "head")
    with pytest.raises(ak.SelectionError, match="the method 'shift' found no layer to adapt on this"):
        ak.attach(model).add("y", config.replace(target_modules=["head"]))


# The specs, and plugins made from classes


def test_specs_are_those_of_the_design_and_say_what_they_are_for() -> None:
    specs: dict[str, Any] = {name: getattr(hookspecs, name) for name in hookspecs.names()}
    methods = {"config_type", "key_rule", "targets", "inject", "to_file", "from_file", "from_factors"}
    assert specs.keys() == methods | {"sizes", "formats", "layer_kinds", "combiners"}
    assert set(hookspecs.REQUIRED) == {"config_type", "key_rule", "inject"}
    for name, spec in specs.items():
        assert len(spec.__doc__) > 50
        assert ("*Required.*" in spec.__doc__) == (name in hookspecs.REQUIRED)


def test_a_plugin_in_one_line_which_a_module_may_hold() -> None:
    made = ak.plugin(ShiftConfig, ShiftLayer, prefix=("shift_", "shifted_"))
    module = ModuleType("adapterkit_shift")
    module.plugin = made  # type: ignore[attr-defined]
    method = ak.Registry().register(module)
    assert (method.name, method.provider, method.plugin) == ("shift", "adapterkit_shift", made)
    assert method.hooks == ("config_type", "inject", "key_rule")
    assert method.key_rule(ShiftConfig()).owns("shifted_by")
    assert ak.Registry().register(made).provider == "ShiftPlugin"


def test_a_hook_is_overridden_without_a_decorator() -> None:
    class ShiftPlugin(ak.Plugin):
        config, layer, prefix = ShiftConfig, ShiftLayer, "shift_"

        def to_file(self, config: Any, tensors: Any) -> Any:
            return self._renamed(config, tensors)

        def _renamed(self, config: Any, tensors: Any) -> Any:
            return config, {f"x.{key}": tensor for key, tensor in tensors.items()}

    method = ak.Registry().register(ShiftPlugin())
    assert method.to_file(ShiftConfig(), {"a": torch.ones(1)})[1].keys() == {"x.a"}
    with pytest.raises(ak.PluginError, match=r"Wrong.from_fil is not a hook.* Did you mean 'from_file'\?"):
        type("Wrong", (ak.Plugin,), {"from_fil": ShiftPlugin.to_file})
    with pytest.raises(ak.PluginError, match=r"Wrong.formats must be a method: def formats\(self, \.\.\.\)\."):
        type("Wrong", (ak.Plugin,), {"formats": []})


def test_configs_need_no_docstrings(monkeypatch: pytest.MonkeyPatch) -> None:
    """`python -OO` compiles without them."""
    source, module = Path(inspect.getfile(ak.AdapterConfig)), ModuleType("bare_config")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(source.read_bytes(), source, "exec", optimize=2), module.__dict__)
    assert "target_modules" in inspect.signature(module.AdapterConfig).parameters
