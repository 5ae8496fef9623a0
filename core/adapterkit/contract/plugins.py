"""Plugins: one adapter method made from its classes, and what every plugin is checked for when it is registered."""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import EntryPoint
from typing import Any, ClassVar

import pluggy

from adapterkit.contract import combiners, hookspecs
from adapterkit.contract.combiners import Combiner
from adapterkit.contract.config import AdapterConfig, conforms, is_jsonable, readable
from adapterkit.contract.keys import KeyRule
from adapterkit.contract.layers import AdapterLayer, Shared, Target
from adapterkit.contract.method import Method
from adapterkit.errors import PluginError, nearest
from adapterkit.kinds import LayerKind


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
        hooks = hookspecs.names()
        for name, value in list(vars(cls).items()):
            if name.startswith("_") or not inspect.isfunction(value):
                continue
            if name not in hooks:
                close = nearest(name, hooks, 1)
                hint = f" Did you mean {close[0]!r}?" if close else ""
                raise PluginError(
                    f"{cls.__name__}.{name} is not a hook, so nothing would call it.{hint} The name of a helper begins "
                    f"with an underscore. Hooks: {', '.join(hooks)}."
                )
            if not hasattr(value, f"{hookspecs.PROJECT}_impl"):
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
        shared: the class of what all layers of one adapter have in common.
    """
    name = f"{config.__name__.removesuffix('Config')}Plugin"
    made = type(name, (Plugin,), {"config": config, "layer": layer, "prefix": prefix, "shared": shared})
    instance: Plugin = made()
    return instance


def check_plugin(plugin: object, manager: pluggy.PluginManager, who: str) -> None:
    """Hook names exist, arguments and annotations agree with the specs. The plugin is not registered yet.

    Raises:
        PluginError: names the hook and what is wrong with it.
    """
    if getattr(plugin, "__hash__", None) is None:
        raise PluginError(f"{who}: a plugin must be hashable, as modules are, not a {type(plugin).__name__}.")
    if manager.is_registered(plugin):
        raise PluginError(f"{who} is registered already.")
    check_hooks(plugin, who)


def check_hooks(plugin: object, who: str) -> None:
    """The part of `check_plugin` that looks at the hooks alone.

    Raises:
        PluginError: names the hook and what is wrong with it.
    """
    for name, function, options in _implementations(plugin):
        hook = options.get("specname") or name
        spec = getattr(hookspecs, hook, None)
        if spec is None or not hasattr(spec, f"{hookspecs.PROJECT}_spec"):
            close = nearest(hook, sorted(hookspecs.names()), 1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise PluginError(
                f"{who} implements {name!r}, which is no hook.{hint} Hooks: {', '.join(sorted(hookspecs.names()))}."
            )
        _check_signature(who, hook, function, spec, bool(options.get("wrapper") or options.get("hookwrapper")))


def check_extension(plugin: object, who: str) -> None:
    """An extension may only wrap the hooks of methods: its own answer would count for every method.

    Raises:
        PluginError: names the hook.
    """
    for name, _, options in _implementations(plugin):
        hook = options.get("specname") or name
        if hook not in ("layer_kinds", "combiners") and not (options.get("wrapper") or options.get("hookwrapper")):
            raise PluginError(
                f"{who} is no method, so it may not answer hook {hook}: it would for every method. Make it a wrapper "
                "(@hookimpl(wrapper=True)), or register the plugin as a method (ak.register)."
            )


def added_kinds(manager: pluggy.PluginManager) -> list[type[LayerKind]]:
    """The layer kinds of all extensions, latest registered first.

    Raises:
        PluginError: a hook raised, or returned something else.
    """
    plugins = [implementation.plugin for implementation in reversed(manager.hook.layer_kinds.get_hookimpls())]
    return [kind for plugin in plugins for kind in kinds_of(manager, plugin)]


def kinds_of(manager: pluggy.PluginManager, plugin: object) -> list[type[LayerKind]]:
    """The layer kinds of one extension.

    Raises:
        PluginError: its hook raised, or returned something else.
    """
    (group,) = _answers(manager, plugin, "layer_kinds") or ([],)
    if not isinstance(group, Sequence) or not all(isinstance(k, type) and issubclass(k, LayerKind) for k in group):
        raise PluginError(
            f"{_extension(manager, plugin, 'layer_kinds')} returned {group!r}; it must return a list of LayerKind "
            "classes."
        )
    return list(group)


def added_combiners(manager: pluggy.PluginManager) -> dict[str, Combiner]:
    """The combiners of all extensions by name.

    Raises:
        PluginError: a hook raised or returned something else, or a name is taken.
    """
    found: dict[str, Combiner] = {}
    for plugin in [implementation.plugin for implementation in manager.hook.combiners.get_hookimpls()]:
        group = combiners_of(manager, plugin)
        taken = sorted(set(group) & {*combiners.BUILTIN, *found})
        if taken:
            who = _extension(manager, plugin, "combiners")
            raise PluginError(f"{who} gives {taken[0]!r}, a name that is taken. Choose another.")
        found |= group
    return found


def combiners_of(manager: pluggy.PluginManager, plugin: object) -> dict[str, Combiner]:
    """The combiners of one extension by name.

    Raises:
        PluginError: its hook raised, or returned something else.
    """
    (group,) = _answers(manager, plugin, "combiners") or ({},)
    if not isinstance(group, Mapping) or not all(isinstance(c, Combiner) for c in group.values()):
        who = _extension(manager, plugin, "combiners")
        raise PluginError(f"{who} returned {group!r}; it must return Combiners by name.")
    return dict(group)


def _answers(manager: pluggy.PluginManager, plugin: object, hook: str) -> list[Any]:
    """What one plugin's implementation of a hook returns, in a list; an empty one if it has none."""
    others = [p for p in manager.get_plugins() if p is not plugin]
    try:
        answers: list[Any] = manager.subset_hook_caller(hook, others)()
    except Exception as error:
        raise PluginError(f"{_extension(manager, plugin, hook)} raised {type(error).__name__}: {error}.") from error
    return answers


def _extension(manager: pluggy.PluginManager, plugin: object, hook: str) -> str:
    return f"The extension {manager.get_name(plugin)!r}: its hook {hook}"


def check_required(method: Method) -> None:
    """The required hooks are there.

    Raises:
        PluginError: names those that are not.
    """
    missing = [hook for hook in hookspecs.REQUIRED if hook not in method.hooks]
    if missing:
        raise PluginError(f"{_who(method)} lacks the required hook{'s' * (len(missing) > 1)} {', '.join(missing)}.")


def check_not_installed(method: Method, installed: Mapping[str, EntryPoint]) -> None:
    """No installed package provides a method of that name.

    Raises:
        PluginError: names the package.
    """
    entry = installed.get(method.name)
    if entry is not None:
        owner = entry.dist.name if entry.dist else entry.value
        raise PluginError(f"{_who(method)}: the name is taken by the installed package {owner}. Choose another name.")


def check_method(method: Method, others: Mapping[str, Method]) -> None:
    """Names agree, and the key prefix is a name. Others may have the same prefix: files name their method.

    Raises:
        PluginError: names the method, its package and what is wrong.
    """
    who = _who(method)
    config_type = method.config_type()
    if not config_type.method or config_type.method != method.name:
        raise PluginError(
            f"{who}: {config_type.__name__}.method is {config_type.method!r}; it must be the method's name, "
            f"{method.name!r}."
        )
    if method.name in others:
        raise PluginError(f"{who}: the name is taken by {others[method.name].provider}.")
    _check_fields(config_type, who)
    prefix = _prefix(method)
    if not prefix or any(not part or "." in part for part in ([prefix] if isinstance(prefix, str) else prefix)):
        raise PluginError(f"{who}: its key prefix {prefix!r} must be a name without dots, such as 'lora_'.")


def _check_fields(config_type: type[AdapterConfig], who: str) -> None:
    """Raise `PluginError` if a field cannot be in a file, or a pattern cannot hold values for layers."""
    fields = {f.name for f in dataclasses.fields(config_type)}
    own = {name: hint for name, hint in typing.get_type_hints(config_type).items() if name in fields}
    for name, hint in own.items():
        if not is_jsonable(hint):
            raise PluginError(
                f"{who}: {config_type.__name__}.{name} is {readable(hint)}, which adapter_config.json cannot hold. It "
                "holds bool, int, float, str, None, and lists and mappings of these."
            )
    for pattern, field in config_type.patterns.items():
        for name in (pattern, field):
            if name not in own:
                raise PluginError(f"{who}: {config_type.__name__}.patterns names {name!r}, which is not a field.")
        if not conforms({"name": getattr(config_type, field)}, own[pattern]):
            raise PluginError(
                f"{who}: {config_type.__name__}.{pattern} is {readable(own[pattern])}; as a pattern of {field!r} it "
                f"must be a mapping, such as Mapping[str, {readable(own[field])}] = field(default_factory=dict)."
            )


def _prefix(method: Method) -> str | tuple[str, ...]:
    try:
        config = method.config_type()()
    except Exception as error:
        raise PluginError(
            f"{_who(method)}: {method.config_type().__name__}() raised {type(error).__name__}: {error}. Every field of "
            "a config needs a default."
        ) from error
    return method.key_rule(config).prefix


def _who(method: Method) -> str:
    return f"The method {method.name!r} ({method.provider})"


def _implementations(plugin: object) -> Iterator[tuple[str, Any, Mapping[str, Any]]]:
    for name in dir(plugin):
        function = inspect.getattr_static(plugin, name)
        function = getattr(function, "__func__", function)
        options = getattr(function, f"{hookspecs.PROJECT}_impl", None)
        if isinstance(options, dict):
            yield name, function, options


def _check_signature(who: str, hook: str, function: Any, spec: Any, wrapper: bool) -> None:
    allowed = list(inspect.signature(spec).parameters)
    given = [p for p in inspect.signature(function).parameters if p not in ("self", "cls")]
    extra = [p for p in given if p not in allowed]
    if extra:
        raise PluginError(
            f"{who}: hook {hook}({', '.join(given)}) takes {', '.join(map(repr, extra))}, which its spec does not "
            f"give. It gives: {', '.join(allowed) or 'nothing'}."
        )
    ours, theirs = _hints(spec), _hints(function)
    for name, hint in theirs.items():
        if (name == "return" and wrapper) or name not in ours:
            continue
        if not _agree(hint, ours[name]):
            what = "returns" if name == "return" else f"takes {name} as"
            raise PluginError(f"{who}: hook {hook} {what} {_show(hint)}; the spec says {_show(ours[name])}.")


def _hints(function: Any) -> dict[str, Any]:
    """Resolved annotations; those that only a type checker can resolve are left out."""
    from adapterkit.contract import config, keys, layers
    from adapterkit.kinds import factors

    names: dict[str, Any] = {"Mapping": Mapping, "Sequence": typing.Sequence}
    for module in (config, factors, keys, layers):
        names.update({k: v for k, v in vars(module).items() if isinstance(v, type)})
    names = {**names, **getattr(function, "__globals__", {})}
    found = {}
    for name, hint in getattr(function, "__annotations__", {}).items():
        try:
            found[name] = eval(hint, names) if isinstance(hint, str) else hint
        except (NameError, TypeError, AttributeError, SyntaxError):
            continue
    return found


def _agree(theirs: Any, ours: Any) -> bool:
    """Whether two annotations can describe one value: equal, related classes, or such members of a union."""
    if theirs in (Any, object) or ours in (Any, object) or theirs == ours:
        return True
    if _members(theirs) != [theirs] or _members(ours) != [ours]:
        return all(any(_agree(t, o) for o in _members(ours)) for t in _members(theirs))
    theirs, ours = _class(theirs), _class(ours)
    if not isinstance(theirs, type) or not isinstance(ours, type):
        return True
    return issubclass(theirs, ours) or issubclass(ours, theirs)


def _members(hint: Any) -> list[Any]:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return list(typing.get_args(hint))
    return [hint]


def _class(hint: Any) -> Any:
    if hint is None:
        return type(None)
    return typing.get_origin(hint) or hint


def _show(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint)
