"""Plugins: one adapter method made from its classes, and the checks of every plugin's hooks."""

from __future__ import annotations

import collections.abc
import inspect
import types
import typing
from typing import Any, ClassVar

import pluggy
import torch

from adapterkit import kinds
from adapterkit.contract import combiners, formats, hookspecs, keys, layers
from adapterkit.contract import config as configs
from adapterkit.contract.config import AdapterConfig
from adapterkit.contract.keys import KeyRule
from adapterkit.contract.layers import AdapterLayer, Shared, Target
from adapterkit.errors import PluginError, nearest, usage

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
