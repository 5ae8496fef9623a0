"""A method: the plugin that its author writes, and how the library calls its hooks and its layers' mathematics."""

from __future__ import annotations

import collections.abc
import inspect
import math
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from types import NoneType
from typing import Any, ClassVar

import pluggy
import torch
from torch import Tensor, nn

from adapterkit import kinds
from adapterkit.contract import combiners, formats, hookspecs, keys, layers
from adapterkit.contract import config as configs
from adapterkit.contract.config import AdapterConfig
from adapterkit.contract.formats import ForeignFile, Format, Kinds, Tensors, empty_layer
from adapterkit.contract.keys import KeyRule
from adapterkit.contract.layers import (
    AdapterLayer,
    DenseLayer,
    LowRankLayer,
    Shared,
    Target,
    device_of,
    widened,
    without_values,
)
from adapterkit.errors import AdapterError, AdapterWarning, PluginError, UnsupportedError, UsageError, nearest, usage
from adapterkit.kinds import Factors

# Shapes of layers with more weights than this are checked on the meta device. Its first use takes about a second, so
# smaller layers are checked with values.
_LARGE = 2**22
_MARK = f"{hookspecs.PROJECT}_impl"


class Plugin:
    """One adapter method. `ak.plugin(Config, Layer, prefix="outer_")` makes one in a line.

    A subclass sets the class attributes and overrides hooks of `adapterkit.contract.hookspecs` with methods of their
    names; those are marked as implementations automatically. An instance is what the entry point names:

        class OuterPlugin(ak.Plugin):
            config, layer, prefix = OuterConfig, OuterLayer, "outer_"

            def from_factors(self, factors, kinds): ...

        plugin = OuterPlugin()

    Attributes:
        config: the dataclass that a user writes.
        layer: the class of the adapter layers.
        prefix: what every key of the method begins with; a tuple if there are several.
        shared: the class of the tensors that all layers of one adapter use, or `None`.

    Raises:
        PluginError: where a subclass is defined, if it has a public method that is not a hook.
    """

    config: ClassVar[type[AdapterConfig]]
    layer: ClassVar[type[AdapterLayer]]
    prefix: ClassVar[str | tuple[str, ...]]
    shared: ClassVar[type[Shared] | None] = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name, value in list(vars(cls).items()):
            if name in hookspecs.names() and not inspect.isfunction(value):
                raise PluginError(f"{cls.__name__}.{name} must be a method: def {name}(self, ...).")
            if name.startswith("_") or not inspect.isfunction(value):
                continue
            if name not in hookspecs.names():
                raise PluginError(
                    f"{cls.__name__}.{name} is not a hook, so nothing would call it.{_hint(name)} The name of a helper "
                    f"begins with an underscore. Hooks: {', '.join(hookspecs.names())}."
                )
            if not hasattr(value, _MARK):
                hookspecs.hookimpl(value)

    @hookspecs.hookimpl
    def config_type(self) -> type[AdapterConfig]:
        """See `hookspecs.config_type`."""
        return self.config

    @hookspecs.hookimpl
    def key_rule(self, config: Any) -> KeyRule:
        """See `hookspecs.key_rule`."""
        return KeyRule(self.prefix)

    @hookspecs.hookimpl
    def inject(self, target: Target, config: Any, shared: Any) -> AdapterLayer | None:
        """See `hookspecs.inject`."""
        return self.layer(target, config, shared)


@usage()
def plugin(
    config: type[AdapterConfig],
    layer: type[AdapterLayer],
    *,
    prefix: str | tuple[str, ...],
    shared: type[Shared] | None = None,
) -> Plugin:
    """The plugin of a method that needs no hook of its own, as its entry point names it.

    Args:
        prefix: what every key of the method begins with, such as `"outer_"`; a tuple if there are several.
        shared: a subclass of `Shared`, if the layers of one adapter share anything.
    """
    name = f"{config.__name__.removesuffix('Config')}Plugin"
    made = type(name, (Plugin,), {"config": config, "layer": layer, "prefix": prefix, "shared": shared})
    instance: Plugin = made()
    return instance


def manager_of(plugin: object, who: str) -> pluggy.PluginManager:
    """Pluggy's manager of one plugin, whose hooks are checked.

    Raises:
        PluginError: names the hook and what is wrong with it.
    """
    if isinstance(plugin, type):
        raise PluginError(f"{who}: {plugin.__name__} is a class; a plugin is an object, such as {plugin.__name__}().")
    if getattr(plugin, "__hash__", None) is None:
        raise PluginError(f"{who}: a plugin must be hashable, as modules are, not a {type(plugin).__name__}.")
    for name in dir(plugin):
        function = inspect.getattr_static(plugin, name)
        function = getattr(function, "__func__", function)
        options = getattr(function, _MARK, None)
        if isinstance(options, dict):
            _check_hook(function, name, options.get("specname") or name, who)
        elif name in hookspecs.names() and inspect.isroutine(getattr(plugin, name, None)):
            raise PluginError(f"{who}: {name} has the name of a hook but no @ak.hookimpl, so nothing would call it.")
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    manager.register(plugin)
    return manager


def _check_hook(function: Any, name: str, hook: str, who: str) -> None:
    """Raise `PluginError` if a function `name` cannot implement this hook: it is unknown, or the signatures differ."""
    if hook not in hookspecs.names():
        known = ", ".join(sorted(hookspecs.names()))
        raise PluginError(f"{who} implements {name!r}, which is not a hook.{_hint(hook)} Hooks: {known}.")
    spec = getattr(hookspecs, hook)
    gives = [*inspect.signature(spec).parameters]
    takes = [name for name in inspect.signature(function).parameters if name not in ("self", "cls")]
    extra = [repr(name) for name in takes if name not in gives]
    if extra:
        raise PluginError(
            f"{who}: hook {hook}({', '.join(takes)}) takes {', '.join(extra)}, which its spec does not give. It "
            f"gives: {', '.join(gives) or 'nothing'}."
        )
    ours, theirs = _hints(spec), _hints(function)
    for argument in theirs.keys() & ours.keys():
        if not _agree(theirs[argument], ours[argument]):
            what = "returns" if argument == "return" else f"takes {argument} as"
            given, wanted = (getattr(h, "__name__", h) for h in (theirs[argument], ours[argument]))
            raise PluginError(f"{who}: hook {hook} {what} {given}; the spec says {wanted}.")


def _hint(name: str) -> str:
    return "".join(f" Did you mean {close!r}?" for close in nearest(name, hookspecs.names(), 1))


def _hints(function: Any) -> dict[str, Any]:
    """Annotations; none where only a type checker can resolve them."""
    names: dict[str, Any] = {}
    for module in (collections.abc, torch, kinds, combiners, configs, formats, keys, layers):
        names |= vars(module)
    try:
        return typing.get_type_hints(function, names | getattr(function, "__globals__", {}))
    except Exception:  # noqa: BLE001 - an author may write anything there
        return {}


def _classes(hint: Any) -> list[type]:
    """The classes that an annotation allows; none if it allows anything."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    members = [typing.get_origin(member) or member for member in (typing.get_args(hint) if union else (hint,))]
    return [] if Any in members else [member for member in members if isinstance(member, type)]


def _agree(theirs: Any, ours: Any) -> bool:
    """Whether one value may have both annotations: a class of one is a class of the other, or a subclass."""
    one, other = _classes(theirs), _classes(ours)
    return not (one and other) or any(issubclass(a, b) or issubclass(b, a) for a in one for b in other)


class Method:
    """One adapter method, provided by one plugin.

    Attributes:
        name: the method's name, such as `"lora"`.
        provider: who provides it, for messages: the distribution and version, or the module.
        shared: the plugin's subclass of `Shared`, or `None`.
        replaces_call: its adapters are the model's call while they act (`Shared.forward`).
        any_module: its targets may be modules without a layer kind.
        manager: pluggy's manager of this plugin alone.
        hooks: the names of the hooks that the plugin implements.
    """

    def __init__(self, name: str, plugin: object, provider: str) -> None:
        self.name, self.plugin, self.provider = name, plugin, provider
        self.shared: type[Shared] | None = getattr(plugin, "shared", None)
        self.replaces_call = bool(getattr(self.shared, "replaces_call", False))
        self.any_module = bool(getattr(getattr(plugin, "layer", None), "any_module", False))
        self.manager = manager_of(plugin, f"The method {name!r} ({provider})")
        self.hooks = tuple(sorted(c.name for c in self.manager.get_hookcallers(plugin) or []))

    def __repr__(self) -> str:
        return f"<method {self.name!r} from {self.provider}>"

    # Hooks

    def config_type(self) -> type[AdapterConfig]:
        """See `hookspecs.config_type`."""
        found = self._call("config_type", object)
        if not (isinstance(found, type) and issubclass(found, AdapterConfig)):
            raise self.fault(f"its hook config_type returned {found!r}; it must return a subclass of AdapterConfig")
        return found

    def key_rule(self, config: AdapterConfig) -> KeyRule:
        """See `hookspecs.key_rule`."""
        found: KeyRule = self._call("key_rule", KeyRule, config=config)
        return found

    def targets(self, model: nn.Module, config: AdapterConfig) -> Sequence[str] | None:
        """See `hookspecs.targets`; `None`: what `target_modules` selects."""
        found: Sequence[str] | None = self._call("targets", Sequence, NoneType, model=model, config=config)
        paths = {path for path, _ in model.named_modules()} if found else ()
        for path in (found,) if isinstance(found, str) else found or ():
            if isinstance(found, str) or path not in paths:
                raise self.fault(
                    f"its hook targets returned {path!r}; it must return a list of paths of modules of the model"
                )
        return found

    def inject(self, target: Target, config: AdapterConfig, shared: Shared | None) -> AdapterLayer | None:
        """See `hookspecs.inject`."""
        given = {"target": target, "config": config, "shared": shared}
        found: AdapterLayer | None = self._call("inject", AdapterLayer, NoneType, **given)
        return found

    def to_file(self, config: AdapterConfig, tensors: Tensors) -> tuple[AdapterConfig, Tensors]:
        """See `hookspecs.to_file`."""
        return self._pair("to_file", config=config, tensors=tensors) or (config, tensors)

    def from_file(self, config: AdapterConfig, tensors: Tensors) -> tuple[AdapterConfig, Tensors]:
        """See `hookspecs.from_file`."""
        return self._pair("from_file", config=config, tensors=tensors) or (config, tensors)

    def from_factors(self, factors: Mapping[str, Factors], kinds: Kinds) -> tuple[AdapterConfig, Tensors]:
        """See `hookspecs.from_factors`.

        Raises:
            UsageError: the method cannot be a result.
        """
        found = self._pair("from_factors", factors=factors, kinds=kinds)
        if found is None:
            raise self.cannot_result()
        return found

    def cannot_result(self) -> UsageError:
        """The error for a method that no known change can be converted to."""
        return UsageError(
            f"The method {self.name!r} cannot be a result: it has no hook from_factors, so no change can be "
            "converted to it. Use to='lora', which can express every low-rank change."
        )

    def formats(self) -> Sequence[Format]:
        """See `hookspecs.formats`."""
        found: Sequence[Format] = self._call("formats", Sequence, NoneType) or ()
        for form in found:
            if not isinstance(form, Format):
                raise self.fault(f"its hook formats returned {form!r} in its list; it must hold objects of ak.Format")
        return found

    def _pair(self, hook: str, **arguments: Any) -> tuple[AdapterConfig, Tensors] | None:
        """Call a hook that returns a config and tensors, and check them."""
        found = self._call(hook, tuple, NoneType, **arguments)
        if found is None:
            return None
        if len(found) != 2 or not isinstance(found[0], self.config_type()) or not isinstance(found[1], Mapping):
            raise self.fault(f"its hook {hook} must return a {self.config_type().__name__} and a mapping of tensors")
        return found[0], found[1]

    def _call(self, hook: str, /, *kinds: type, **arguments: Any) -> Any:
        return self.ask(f"its hook {hook}", kinds, getattr(self.manager.hook, hook), **arguments)

    def ask(self, what: str, kinds: tuple[type, ...], function: Callable[..., Any], /, *args: Any, **named: Any) -> Any:
        """Call a function of the plugin, and check what it returns. `what` names the function in messages.

        Raises:
            PluginError: the function raised something else than an `AdapterError`, or returned none of these kinds.
        """
        try:
            found = function(*args, **named)
        except (AdapterError, AdapterWarning):  # a warning, where the user has made them errors
            raise
        except Exception as error:
            raise self.fault(f"{what} raised {type(error).__name__}: {error}") from error
        if not isinstance(found, kinds):
            names = " or ".join("None" if kind is NoneType else kind.__name__ for kind in kinds)
            given = "None" if found is None else f"a {type(found).__name__}"
            raise self.fault(f"{what} returned {given}; it must return a {names}")
        return found

    def fault(self, what: str) -> PluginError:
        """The error for something that the plugin did wrong."""
        return PluginError(f"The method {self.name!r} ({self.provider}): {what}.")

    def check_no_call(self, what: str) -> None:
        """Raise `UnsupportedError` if its adapters replace the model's call; `what` is then not possible."""
        if self.shared is not None and self.replaces_call:
            raise UnsupportedError(
                f"{what}: {self.shared.__name__}.forward is the model's call while the adapter acts, and no change of "
                "weights or of single rows stands for that. Make it active (adapters.activate) instead."
            )

    # The mathematics of layers

    def factors(
        self, layer: AdapterLayer, dtype: torch.dtype = torch.float32, *, scaled: bool = True, where: str = "a layer"
    ) -> Factors | None:
        """The exact change of an additive layer as two matrices, `dW = up @ down` with every scaling in `up`.

        Computed in the wider of `dtype` and the dtype of the layer's parameters. With `scaled=False` a number that
        scales the change stays in `scale`. `None`: the layer is not additive, it acts with a model's call that the
        adapter replaces, or its factors act across the groups of a convolution.

        Raises:
            PluginError: the layer's `factors` or `change` failed, or gave something else.
        """
        if not isinstance(layer, LowRankLayer | DenseLayer) or self.replaces_call:
            return None
        name = "change" if type(layer).factors is DenseLayer.factors else "factors"
        what, wide = f"{type(layer).__name__}.{name}", widened(layer, dtype)
        found: Factors = self.ask(what, (Factors,), wide.factors).flat()
        if layer.kind.is_ungrouped(found.down):
            return None
        sizes = (layer.kind.out_features, layer.kind.in_features)
        if not _fit(found, *sizes):
            given = ", ".join(f"{part} {_shown(t)}" for part, t in found._asdict().items() if t is not None)
            raise self.fault(
                f"{what} gave for {where} of {sizes} (out, in): {given}. up must be (out, r), down (r, in), bias "
                "(out,), mid (r,), and scale a number or (out,)"
            )
        return found.folded(torch.promote_types(found.up.dtype, dtype), scaled=scaled)

    def merge(
        self, layer: AdapterLayer, weight: Tensor, bias: Tensor | None, *, where: str = "this layer"
    ) -> tuple[Tensor, Tensor | None]:
        """The weight and the bias with the layer worked in, in their dtype; `where` names the layer in messages.

        Raises:
            UnsupportedError: the layer cannot be merged.
            PluginError: its `merged` failed, or gave a weight or a bias of another shape.
        """
        what, wide = f"{type(layer).__name__}.merged", widened(layer, weight.dtype)
        found: Any = self.ask(what, (object,), wide.merged, weight, bias)
        if not isinstance(found, tuple) or len(found) != 2 or not isinstance(found[0], Tensor):
            raise self.fault(f"{what} returned {_shown(found)}; it must return (weight, bias)")
        if found[0].shape != weight.shape:
            raise self.fault(f"{what} gave {where} a weight of {_shown(found[0])}; it must be {_shown(weight)}")
        if bias is None and found[1] is not None:
            raise UnsupportedError(f"{where} has no bias to merge the adapter's into. Leave the adapter active.")
        if getattr(found[1], "shape", None) != getattr(bias, "shape", None):
            raise self.fault(f"{what} gave {where} a bias of {_shown(found[1])}; it must be {_shown(bias)}")
        return found[0], found[1]

    @torch.no_grad()
    def check_shapes(self, layer: AdapterLayer, path: str, *, has_bias: bool) -> bool:
        """Check the shapes of what the layer's mathematics gives; that of a large layer without values.

        Returns:
            Whether its factors change the layer's bias.

        Raises:
            PluginError: names the function, the layer, and what it must give.
            UnsupportedError: `merged` gives a bias, and the layer has none.
        """
        sizes = (layer.kind.out_features, layer.kind.in_features)
        device = device_of(layer)
        if device.type == "meta":
            return False
        if math.prod(sizes) > _LARGE:
            layer, device = without_values(layer), torch.device("meta")
        weight, bias = torch.zeros(sizes, device=device), torch.zeros(sizes[0], device=device) if has_bias else None
        what = f"{type(layer).__name__}.change"
        try:
            if isinstance(layer, DenseLayer):
                change = self.ask(what, (object,), layer.change)
                if getattr(change, "shape", None) != weight.shape:
                    raise self.fault(f"{what} gave {path!r} {_shown(change)}; it must be {_shown(weight)}")
            if layer.additive:
                factors = self.factors(layer, where=repr(path))
                return factors is not None and factors.bias is not None
            if self.merges(layer):
                self.merge(layer, weight, bias, where=repr(path))
        except PluginError as error:
            if error.__cause__ is None:  # else the function may need values, which the forward shows
                raise
        return False

    def merges(self, layer: AdapterLayer) -> bool:
        """Whether the layer can be merged, as far as its class tells."""
        defined = type(layer).merged is not AdapterLayer.merged
        return defined and layer.kind.has_weight and not self.replaces_call

    # Files

    def read(
        self, tensors: Tensors, kinds: Kinds, metadata: Mapping[str, str], config: AdapterConfig | None = None
    ) -> tuple[AdapterConfig, Tensors] | None:
        """The config and the tensors of the adapter that a file holds, for a model with these layers.

        Args:
            config: the config of PEFT's file. `None`: the file is another program's, and the result is `None` if no
                format of this method finds a layer in it.
        """
        for form in self.formats():
            what = f"its hook formats gave a {type(form).__name__} whose read"
            found = self.ask(what, (tuple, NoneType), form.read, tensors, kinds, metadata, config)
            if found is not None:
                if not isinstance(found[0], self.config_type()):
                    own = self.config_type().__name__
                    raise self.fault(f"{what} gave a {type(found[0]).__name__}; it must give a {own}")
                return self.from_file(*found)
        return None if config is None else self.from_file(config, tensors)

    def write(
        self, naming: str, config: AdapterConfig, tensors: Mapping[str, Tensors], kinds: Kinds, component: str
    ) -> ForeignFile | None:
        """The adapter as files of `naming` have it, by `Format.write`; `None`: no format of the method writes those."""
        form = next((form for form in self.formats() if naming in form.namings), None)
        return None if form is None else form.write(naming, config, tensors, kinds, component)

    def layers_in_file(self, tensors: Tensors, config: AdapterConfig | None) -> dict[str, nn.Module]:
        """The layers that a file's tensors are for, on the meta device, as far as they tell; see `hookspecs.sizes`.

        Args:
            config: `None`: the file is another program's, and its layers are called what it calls them.
        """
        if "sizes" not in self.hooks:
            return {}
        groups = {path: group for form in self.formats() for path, group in form.groups(tensors).items()}
        if config is not None and not groups:
            rule = self.key_rule(config)
            for key, tensor in self.from_file(config, tensors)[1].items():
                split = rule.split(key)
                if split is not None:
                    groups.setdefault(split[0], {})[split[1]] = tensor
        found = {}
        for path, group in groups.items():
            size = self._call("sizes", tuple, nn.Module, NoneType, tensors=group)
            if size is not None and all(path.split(".")):
                found[path] = empty_layer(*size) if isinstance(size, tuple) else size
        return found


def _fit(factors: Factors, out: int, columns: int) -> bool:
    """Whether the shapes of flat factors go together, for a weight of this size."""
    rank = len(factors.down)
    shapes = {"up": (out, rank), "down": (rank, columns), "bias": (out,), "mid": (rank,), "scale": (out,)}
    held = {part: value for part, value in factors._asdict().items() if value is not None}
    if isinstance(factors.scale, int | float) or getattr(factors.scale, "shape", None) == (1,):
        del held["scale"]
    return all(getattr(value, "shape", None) == shapes[part] for part, value in held.items())


def _shown(value: Any) -> str:
    return f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
