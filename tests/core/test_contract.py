"""What a plugin is checked for when it is registered, and what its hooks may do wrong later."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from tests.core.test_errors import unchanged
from tests.models import EmbeddingNet
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.contract import hookspecs
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


def config_class(method: str) -> Any:
    @dataclass(frozen=True, kw_only=True)
    class Config(ak.AdapterConfig):
        pass

    Config.method = method
    return Config


@dataclass(frozen=True, kw_only=True)
class Needy(ak.AdapterConfig):
    method = "shift"

    size: int


def returning(value: object) -> Callable[..., Any]:
    """An implementation, without annotations, that returns `value`."""

    @ak.hookimpl
    def hook() -> Any:
        return value

    return hook


@ak.hookimpl
def of_no_spec() -> None:
    pass


@ak.hookimpl
def injekt(target: ak.Target) -> ak.AdapterLayer:
    raise AssertionError


@ak.hookimpl
def with_more_arguments(target: ak.Target, rank: int, device: str) -> ak.AdapterLayer:
    raise AssertionError


@ak.hookimpl
def returns_text(target: ak.Target) -> str:
    return ""


@ak.hookimpl
def takes_text(target: str) -> ak.AdapterLayer:
    raise AssertionError


@ak.hookimpl
def without_annotations(config):  # type: ignore[no-untyped-def]
    return ak.KeyRule(prefix="shift_")


@ak.hookimpl
def fails() -> Any:
    raise ZeroDivisionError("division by zero")


WHO = "The method 'shift' (Plugin)"

REGISTERED_WRONG: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "no inject": ({"inject": None}, (f"{WHO} lacks the required hook inject.",)),
    "no hooks": (
        {"inject": None, "key_rule": None, "config_type": None},
        (f"{WHO} lacks the required hooks config_type, key_rule, inject.",),
    ),
    "misspelt hook": (
        {"injekt": injekt},
        (f"{WHO} implements 'injekt', which is no hook. Did you mean 'inject'? Hooks: combiners, ",),
    ),
    "a hook of no name": ({"xyzzy": of_no_spec}, ("implements 'xyzzy', which is no hook. Hooks: ",)),
    "arguments": (
        {"inject": with_more_arguments},
        (
            "hook inject(target, rank, device) takes 'rank', 'device', which its spec does not give. "
            "It gives: target, config, shared.",
        ),
    ),
    "returns": ({"inject": returns_text}, ("hook inject returns str; the spec says ",)),
    "takes": ({"inject": takes_text}, ("hook inject takes target as str; the spec says Target.",)),
    "no config": ({"config_type": returning(None)}, ("its hook config_type returned None; it must return a subclass",)),
    "no class": (
        {"config_type": returning(3)},
        ("its hook config_type returned 3; it must return a subclass of Adapter",),
    ),
    "another class": ({"config_type": returning(dict)}, ("returned <class 'dict'>; it must return a subclass of",)),
    "config that fails": (
        {"config_type": fails},
        ("its hook config_type raised ZeroDivisionError: division by zero.",),
    ),
    "config of another name": (
        {"config_type": returning(config_class("shiift"))},
        (f"{WHO}: Config.method is 'shiift'; it must be the method's name, 'shift'.",),
    ),
    "config without a name": ({"config_type": returning(config_class(""))}, ("Config.method is ''; it must be",)),
    "config without defaults": (
        {"config_type": returning(Needy)},
        ("Needy() raised TypeError: ", "Every field of a config needs a default."),
    ),
    "no rule": ({"key_rule": returning(None)}, ("its hook key_rule returned None; it must return a KeyRule.",)),
    "rule of another type": (
        {"key_rule": returning("shift_")},
        ("its hook key_rule returned a str; it must return a KeyRule or None.",),
    ),
    "rule that fails": ({"key_rule": fails}, ("its hook key_rule raised ZeroDivisionError",)),
    "no prefix": (
        {"key_rule": returning(ak.KeyRule(prefix=""))},
        ("its key prefix '' must be a name without dots, such as 'lora_'.",),
    ),
    "prefix with a dot": ({"key_rule": returning(ak.KeyRule(prefix="a.b"))}, ("its key prefix 'a.b' must be a name",)),
}


@pytest.mark.parametrize(("changes", "texts"), REGISTERED_WRONG.values(), ids=REGISTERED_WRONG.keys())
def test_plugin_that_is_refused(changes: dict[str, Any], texts: tuple[str, ...]) -> None:
    registry = ak.Registry()
    with pytest.raises(ak.PluginError) as caught:
        registry.register(plugin(**changes), "shift")
    for text in texts:
        assert text in str(caught.value)
    with pytest.raises(ak.UnknownNameError):
        registry.method("shift")
    registry.register(plugin())  # nothing of the first attempt is in the way


def test_plugin_without_a_config_and_a_name_is_told_the_hook() -> None:
    with pytest.raises(ak.PluginError, match="lacks the required hook config_type"):
        ak.Registry().register(plugin(config_type=None))


def test_plugin_that_is_right_is_registered() -> None:
    registry = ak.Registry()
    method = registry.register(plugin())
    assert method.name == "shift"
    assert registry.method("shift") is method
    assert repr(method) == "<method 'shift' from Plugin>"
    assert str(registry.methods()["shift"]) == "shift (Plugin)"
    assert registry.config("shift") == ShiftConfig()


def test_hook_without_annotations_is_taken() -> None:
    ak.Registry().register(plugin(key_rule=without_annotations))


def test_name_that_a_registered_method_has() -> None:
    registry = ak.Registry()
    registry.register(plugin())
    with pytest.raises(ak.PluginError, match=r"the name is taken by Plugin\."):
        registry.register(plugin(key_rule=returning(ak.KeyRule(prefix="other_"))))


def test_name_that_an_installed_package_has() -> None:
    registry = ak.Registry()
    fake = plugin(config_type=returning(config_class("lora")))
    with pytest.raises(ak.PluginError, match="the name is taken by the installed package adapterkit"):
        registry.register(fake)
    assert registry.method("lora").config_type() is LoraConfig


@pytest.mark.parametrize("prefix", ["lora_", "lora_x_", "lo"])
def test_prefix_that_begins_like_anothers_hinders_neither(prefix: str) -> None:
    registry = ak.Registry()
    registry.register(plugin(key_rule=returning(ak.KeyRule(prefix=prefix))))
    assert registry.method("lora").name == "lora"
    assert registry.method("shift").key_rule(ShiftConfig()).prefix == prefix


def test_plugin_twice() -> None:
    registry, shift = ak.Registry(), plugin()
    registry.register(shift)
    with pytest.raises(ak.PluginError, match="Plugin is registered already"):
        registry.register(shift)


def test_specname_is_the_hook_that_is_checked() -> None:
    @ak.hookimpl(specname="injekt")
    def inject(target: ak.Target) -> ak.AdapterLayer:
        raise AssertionError

    with pytest.raises(ak.PluginError, match="Did you mean 'inject'"):
        ak.Registry().register(plugin(inject=inject))


# What hooks do later


def net() -> nn.Module:
    model = EmbeddingNet().eval()
    ak.attach(model).add("before", LoraConfig(r=2, target_modules=["layers.0"]))
    return model


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> Callable[..., ak.AdapterConfig]:
    """`registered(inject=...)`: a plugin with these hooks is the method `"shift"`; gives a config for it."""
    from adapterkit.contract.registry import default_registry

    done = []

    def make(**hooks: Any) -> ak.AdapterConfig:
        done.append(default_registry.register(plugin(**hooks)).name)
        return ShiftConfig(target_modules=["layers.0", "layers.1", "overhead"])

    yield make  # type: ignore[misc]
    for name in done:
        default_registry.unregister(name)


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


class WrongPrefix(ShiftLayer):
    def setup(self, target: ak.Target, config: ShiftConfig) -> None:
        super().setup(target, config)
        self.other = target.new(2)


class WrongBuffer(ShiftLayer):
    def setup(self, target: ak.Target, config: ShiftConfig) -> None:
        super().setup(target, config)
        self.register_buffer("mask", torch.ones(2))


def raise_error(target: ak.Target) -> Any:
    raise ZeroDivisionError(target.path)


def raise_ours(target: ak.Target) -> Any:
    raise ak.ConfigError("not at this layer")


INJECTED_WRONG: dict[str, tuple[Callable[[ak.Target], Any], type[Exception], str]] = {
    "raises": (raise_error, ak.PluginError, f"{WHO}: its hook inject raised ZeroDivisionError: overhead."),
    "raises ours": (raise_ours, ak.ConfigError, "not at this layer"),
    "another type": (
        lambda target: nn.Linear(2, 2),
        ak.PluginError,
        f"{WHO}: its hook inject returned a Linear; it must return a AdapterLayer or None.",
    ),
    "no such kind": (
        lambda target: None,
        ak.SelectionError,
        "The method 'shift' does not support Linear layers, such as 'overhead'. Leave it out with exclude_modules.",
    ),
    "a parameter of another prefix": (
        lambda target: WrongPrefix(target, ShiftConfig()),
        ak.PluginError,
        "its hook inject made 'other' for 'overhead'; every parameter and buffer must begin with its prefix 'shift_'.",
    ),
    "a buffer of another prefix": (
        lambda target: WrongBuffer(target, ShiftConfig()),
        ak.PluginError,
        "its hook inject made 'mask' for 'overhead'",
    ),
}


@pytest.mark.parametrize(("then", "error", "message"), INJECTED_WRONG.values(), ids=INJECTED_WRONG.keys())
def test_injection_that_fails_half_way_changes_nothing(
    registered: Callable[..., Any], then: Callable[[ak.Target], Any], error: type[Exception], message: str
) -> None:
    third = Third(then)
    config = registered(inject=third.hook())
    model = net()
    with unchanged(model), pytest.raises(error) as caught:
        ak.attach(model).add("x", config)
    assert message in str(caught.value)
    assert third.calls == 3


@pytest.mark.parametrize(
    ("shared", "message"),
    [
        (3, f"{WHO}: its shared = 3 must be a subclass of Shared."),
        (type("Fails", (ak.Shared,), {"setup": lambda *given: 1 / 0}), "its hook shared raised ZeroDivisionError"),
    ],
    ids=["type", "raises"],
)
def test_what_is_shared_and_wrong_changes_nothing(registered: Callable[..., Any], shared: Any, message: str) -> None:
    model, config = net(), registered(shared=shared)
    with unchanged(model), pytest.raises(ak.PluginError) as caught:
        ak.attach(model).add("x", config)
    assert message in str(caught.value)


@pytest.mark.parametrize("implementation", [returning(3), returning((3, {})), fails], ids=["type", "pair", "raises"])
def test_saving_with_a_hook_that_is_wrong_writes_nothing(
    registered: Callable[..., Any], tmp_path: Any, implementation: Any
) -> None:
    model, config = net(), registered()
    ak.attach(model).add("x", config)
    from adapterkit.contract.registry import default_registry

    default_registry.unregister("shift")
    default_registry.register(plugin(to_file=implementation))
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


def test_plugin_that_is_not_hashable() -> None:
    with pytest.raises(ak.PluginError, match="a plugin must be hashable, as modules are, not a dict"):
        ak.Registry().register({})


# The specs themselves


def specs() -> dict[str, Any]:
    return {n: f for n, f in vars(hookspecs).items() if hasattr(f, f"{hookspecs.PROJECT}_spec")}


def test_specs_are_those_of_the_design() -> None:
    methods = {"config_type", "key_rule", "targets", "inject", "to_file", "from_file", "from_factors"}
    assert set(specs()) == methods | {"sizes", "formats", "layer_kinds", "combiners"}
    assert set(hookspecs.REQUIRED) == {"config_type", "key_rule", "inject"}


@pytest.mark.parametrize("name", specs())
def test_spec_says_what_it_is_for(name: str) -> None:
    assert len(specs()[name].__doc__ or "") > 50
    assert ("*Required.*" in specs()[name].__doc__) == (name in hookspecs.REQUIRED)


Answer = tuple[ak.AdapterConfig, Mapping[str, Tensor]]


def test_annotations_of_related_types_agree() -> None:
    @ak.hookimpl
    def to_file(config: ShiftConfig, tensors: dict[str, Tensor]) -> Answer:
        return config, tensors

    @ak.hookimpl
    def targets(model: nn.Module) -> list[str] | None:
        return None

    ak.Registry().register(plugin(to_file=to_file, targets=targets))


# Plugins made from classes


def test_a_plugin_in_one_line() -> None:
    made = ak.plugin(ShiftConfig, ShiftLayer, prefix=("shift_", "shifted_"))
    method = ak.Registry().register(made)
    assert (method.name, method.provider) == ("shift", "ShiftPlugin")
    assert method.hooks == ("config_type", "inject", "key_rule")
    assert method.key_rule(ShiftConfig()).owns("shifted_by")


def test_a_hook_is_overridden_without_a_decorator() -> None:
    class ShiftPlugin(ak.Plugin):
        config, layer, prefix = ShiftConfig, ShiftLayer, "shift_"

        def to_file(self, config: Any, tensors: Any) -> Any:
            return self._renamed(config, tensors)

        def _renamed(self, config: Any, tensors: Any) -> Any:
            return config, {f"x.{key}": tensor for key, tensor in tensors.items()}

    method = ak.Registry().register(ShiftPlugin())
    assert method.to_file(ShiftConfig(), {"a": torch.ones(1)})[1].keys() == {"x.a"}


def test_a_public_method_that_is_not_a_hook_is_refused_with_the_nearest() -> None:
    with pytest.raises(ak.PluginError, match=r"ShiftPlugin.from_fil is not a hook.* Did you mean 'from_file'\?"):

        class ShiftPlugin(ak.Plugin):
            def from_fil(self, config: Any, tensors: Any) -> Any:
                return config, tensors


def test_a_module_may_hold_the_plugin() -> None:
    from types import ModuleType

    module = ModuleType("adapterkit_shift")
    module.plugin = ak.plugin(ShiftConfig, ShiftLayer, prefix="shift_")  # type: ignore[attr-defined]
    assert ak.Registry().register(module).plugin is module.plugin


@pytest.mark.parametrize(
    ("hint", "default", "patterns", "message"),
    [
        (torch.dtype, torch.int8, {}, "Config.size is dtype, which adapter_config.json cannot hold"),
        (set[str], (), {}, "which adapter_config.json cannot hold"),
        (int, 3, {"size": "target"}, "Config.patterns names 'target', which is not a field"),
        (str | None, None, {"size": "bias"}, "Config.size is str or None; as a pattern of 'bias' it must be a mapping"),
    ],
)
def test_fields_that_no_file_can_hold_are_refused_at_registration(
    hint: Any, default: Any, patterns: Any, message: str
) -> None:
    from dataclasses import make_dataclass

    made = make_dataclass("Config", [("size", hint, default)], bases=(ak.AdapterConfig,), frozen=True, kw_only=True)
    made.method, made.patterns = "shift", patterns  # type: ignore[attr-defined]
    with pytest.raises(ak.PluginError) as caught:
        ak.Registry().register(ak.plugin(made, ShiftLayer, prefix="shift_"))  # type: ignore[arg-type]
    assert message in str(caught.value)


def test_a_method_may_choose_its_targets(registered: Callable[..., Any]) -> None:
    def targets(model: nn.Module, config: ak.AdapterConfig) -> list[str]:
        return [match.path for match in ak.select(model, config).targets][1:]

    config = registered(targets=ak.hookimpl(targets)).replace(target_modules=["layers.0", "layers.1", "head"])
    model = net()
    assert ak.attach(model).add("x", config).targets == ("layers.1", "head")
    with pytest.raises(ak.SelectionError, match="the method 'shift' found no layer to adapt on this"):
        ak.attach(model).add("y", config.replace(target_modules=["head"]))
