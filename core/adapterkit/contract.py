"""What is checked of a plugin when it is registered, so that its mistakes are named before it is used."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import EntryPoint
from typing import TYPE_CHECKING, Any

import pluggy

from adapterkit import combiners, hookspecs
from adapterkit.combiners import Combiner
from adapterkit.errors import PluginError, nearest
from adapterkit.kinds import LayerKind

if TYPE_CHECKING:
    from adapterkit.method import Method


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
            close = nearest(hook, _hook_names(), 1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise PluginError(f"{who} implements {name!r}, which is no hook.{hint} Hooks: {', '.join(_hook_names())}.")
        _check_signature(who, hook, function, spec, bool(options.get("wrapper") or options.get("hookwrapper")))


def check_extension(plugin: object, who: str) -> None:
    """What is no method only wraps the hooks of methods: an answer of its own would be given for all of them.

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
    prefix = _prefix(method)
    if not prefix or "." in prefix:
        raise PluginError(f"{who}: its key prefix {prefix!r} must be a name without dots, such as 'lora_'.")


def _prefix(method: Method) -> str:
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


def _hook_names() -> list[str]:
    return [n for n in dir(hookspecs) if hasattr(getattr(hookspecs, n), f"{hookspecs.PROJECT}_spec")]


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
    from adapterkit import config, factors, keys, layer, target

    names: dict[str, Any] = {"Mapping": Mapping, "Sequence": typing.Sequence}
    for module in (config, factors, keys, layer, target):
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
