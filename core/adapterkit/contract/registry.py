"""The registry: which methods and extensions there are, found late and checked when they are registered."""

from __future__ import annotations

import importlib.metadata
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pluggy
from torch import nn

from adapterkit import kinds
from adapterkit.contract import combiners, hookspecs
from adapterkit.contract.combiners import Combiner
from adapterkit.contract.config import AdapterConfig
from adapterkit.contract.hookspecs import EXTENSIONS_GROUP, METHODS_GROUP, PROJECT
from adapterkit.contract.method import Method
from adapterkit.contract.plugins import (
    Plugin,
    added_combiners,
    added_kinds,
    check_extension,
    check_method,
    check_not_installed,
    check_plugin,
    check_required,
    kinds_of,
)
from adapterkit.errors import (
    AdapterWarning,
    CheckpointError,
    ConfigError,
    PluginError,
    UnknownNameError,
    UnsupportedError,
    unknown,
)
from adapterkit.kinds import LayerKind

if TYPE_CHECKING:
    from adapterkit.contract.method import Method


DISABLE_VARIABLE = "ADAPTERKIT_DISABLE_PLUGINS"


@dataclass(frozen=True)
class Installed:
    """One method that can be asked for: its name, the distribution (or module) it is from, and its version."""

    name: str
    provider: str
    version: str | None

    def __str__(self) -> str:
        return f"{self.name} ({self.provider}{' ' + self.version if self.version else ''})"


def switched_off() -> frozenset[str]:
    """Names of plugins, and of distributions, that the environment says are not there."""
    return frozenset(filter(None, (n.strip() for n in os.environ.get(DISABLE_VARIABLE, "").split(","))))


class Registry:
    """Adapter methods, layer kinds and combiners, from entry points and from `register`.

    A method's plugin is imported when it is first asked for, so one that is broken breaks only itself.
    """

    def __init__(self) -> None:
        self._manager = pluggy.PluginManager(PROJECT)
        self._manager.add_hookspecs(hookspecs)
        self._methods: dict[str, Method] = {}
        self._kinds: tuple[type[LayerKind], ...] | None = None

    def methods(self) -> Mapping[str, Installed]:
        """Every method by name: registered ones and those that installed packages announce. Imports none."""
        found = {}
        for entry in _entries(METHODS_GROUP):
            dist = entry.dist
            found[entry.name] = Installed(entry.name, *((dist.name, dist.version) if dist else (entry.value, None)))
        for name, method in self._methods.items():
            found.setdefault(name, Installed(name, method.provider, None))
        return dict(sorted(found.items()))

    def method(self, name: str) -> Method:
        """The method called `name`, its plugin imported if need be.

        Raises:
            UnknownNameError: no such method; lists what there is and the entry-point group searched.
            PluginError: it cannot be imported, breaks the contract, or two packages claim the name.
        """
        if not isinstance(name, str):
            raise unknown("adapter method", name, self.methods())
        if name in self._methods:
            return self._methods[name]
        claims = {(e.dist.name if e.dist else "", e.value): e for e in _entries(METHODS_GROUP) if e.name == name}
        if not claims:
            advice = f"Methods come from installed packages (entry-point group {METHODS_GROUP!r}) or ak.register."
            if name in switched_off():
                advice = f"It is switched off by {DISABLE_VARIABLE}. {advice}"
            raise unknown("adapter method", name, self.methods(), advice)
        if len(claims) > 1:
            owners = " and ".join(sorted(f"{dist or '?'} ({value})" for dist, value in claims))
            raise PluginError(
                f"Two packages provide the method {name!r}: {owners}. Uninstall one of them, or switch it off: "
                f"{DISABLE_VARIABLE}={min(claims)[0]}."
            )
        return self._load(next(iter(claims.values())))

    def claim(self, values: Mapping[str, Any], where: object) -> Method:
        """The method of a file with these fields in its `adapter_config.json`.

        It is the one whose `peft_type` and `marks` agree and that knows every field; of several, the one with the most
        marks. Where the type has only one method, it is that one, and its config says which fields it does not know.

        Args:
            where: the file, for messages.

        Raises:
            CheckpointError: the file names no type, or several methods take it equally.
            UnknownNameError: no method has that type.
            UnsupportedError: none of the type's methods takes it; lists the fields that each does not know.
        """
        kind = values.get("peft_type")
        if not isinstance(kind, str) or not kind:
            raise CheckpointError(f"{where}: adapter_config.json has no 'peft_type', so its method is not known.")
        found: dict[str, type[AdapterConfig]] = {}
        for name in self.methods():
            try:
                config_type = self.method(name).config_type()
            except PluginError:
                if name == kind.lower():
                    raise
                continue  # a plugin that is broken breaks only itself
            if config_type.type_in_files() == kind.upper():
                found[name] = config_type
        if not found:
            try:
                return self.method(kind.lower())
            except UnknownNameError as error:
                raise UnknownNameError(
                    f"{where} is an adapter of type {kind!r}, and no plugin provides the method {kind.lower()!r}. "
                    f"Installed methods: {', '.join(map(str, self.methods().values())) or 'none'} (entry-point group "
                    f"{METHODS_GROUP!r}). Install the package of that one."
                ) from error
        takers = {n: len(c.marks) for n, c in found.items() if c.is_marked(values) and not c.unknown(values)}
        best = [name for name, marks in takers.items() if marks == max(takers.values())]
        if len(best) == 1 or len(found) == 1:
            return self.method((best or [*found])[0])
        if best:
            raise CheckpointError(
                f"{where} may be of any of the methods {' and '.join(map(repr, best))}: each of them knows all "
                f"its fields. Switch one of them off: {DISABLE_VARIABLE}={best[-1]}."
            )
        reasons = [f"{name!r} {_why_not(config_type, values)}" for name, config_type in found.items()]
        raise UnsupportedError(
            f"{where} is an adapter of type {kind!r}, and none of that type's methods takes it: {'; '.join(reasons)}. "
            "Install a method that does, or remove fields that change nothing."
        )

    def register(self, plugin: object, name: str | None = None) -> Method:
        """Make a plugin's method available without an entry point: from a notebook, or in tests.

        Args:
            plugin: what `ak.plugin(...)` gives, an instance of an `ak.Plugin` subclass, a module that has one of these
                under the name `plugin`, or a module of `@hookimpl` functions.
            name: the method's name; its config's `method` if `None`.

        Raises:
            PluginError: the plugin breaks the contract, or its name is taken.
        """
        provider = plugin.__name__ if isinstance(plugin, ModuleType) else type(plugin).__name__
        installed = {e.name: e for e in _entries(METHODS_GROUP)}
        return self._add(plugin, name, provider, installed)

    def unregister(self, name: str) -> None:
        """Forget a method that `register` or discovery made available.

        Raises:
            UnknownNameError: it is not registered.
        """
        if name not in self._methods:
            raise unknown("registered method", name, self._methods)
        self._manager.unregister(self._methods.pop(name).plugin)

    def extend(self, plugin: object) -> None:
        """Add an extension: layer kinds, combiners, or wrappers around hooks.

        Raises:
            PluginError: it breaks the contract.
        """
        self._extend(plugin, f"The extension {getattr(plugin, '__name__', type(plugin).__name__)!r}")
        self._kinds = None

    def retract(self, plugin: object) -> None:
        """Undo `extend`.

        Raises:
            UnknownNameError: that plugin was not added.
        """
        added = self._extensions()
        if not any(p is plugin for p in added.values()):
            raise unknown("extension", plugin, added)
        self._manager.unregister(plugin)
        self._kinds = None

    def extensions(self) -> Mapping[str, object]:
        """Every extension by name: its plugin, or the `PluginError` that says why it could not be loaded."""
        failed = self._load_extensions()
        return dict(sorted({**self._extensions(), **failed}.items()))

    def kinds(self) -> tuple[type[LayerKind], ...]:
        """Every layer kind, extensions' first."""
        if self._kinds is None:
            for error in self._load_extensions().values():
                warnings.warn(str(error), AdapterWarning, stacklevel=2)
            self._kinds = (*added_kinds(self._manager), *kinds.BUILTIN)
        return self._kinds

    def kind_of(self, module: nn.Module) -> LayerKind | None:
        """What sort of layer `module` is, or `None` if it can hold no adapter."""
        for kind in self.kinds():
            try:
                found = kind.of(module)
            except Exception as error:
                if kind in kinds.BUILTIN:
                    raise
                warnings.warn(
                    f"The layer kind {kind.name!r} of {kind.__module__} is passed over for a {type(module).__name__}: "
                    f"it raised {type(error).__name__}: {error}.",
                    AdapterWarning,
                    stacklevel=2,
                )
                continue
            if found is not None:
                return found
        return None

    def combiner(self, name: str) -> Combiner:
        """A way to combine, by name.

        Raises:
            UnknownNameError: there is none of that name.
        """
        self.kinds()  # which loads the extensions
        known = {**combiners.BUILTIN, **added_combiners(self._manager)}
        if not isinstance(name, str) or name not in known:
            raise unknown("method of combination", name, known)
        return known[name]

    def config(self, method: str, **fields: Any) -> AdapterConfig:
        """A config by the method's name: `config("lora", r=8)`."""
        return self.method(method).config_type()(**fields)

    def method_of(self, config: object) -> Method:
        """The method that a config is for.

        Raises:
            ConfigError: not a config, or a config class that the registered method does not use.
        """
        if not isinstance(config, AdapterConfig):
            raise ConfigError(
                f"{config!r} is no adapter config. Make one with its class, such as LoraConfig(r=8), or with "
                "ak.config('lora', r=8)."
            )
        method = self.method(config.method)
        if not isinstance(config, method.config_type()):
            raise ConfigError(
                f"{type(config).__name__} says it is for {config.method!r}, but that method "
                f"({method.provider}) uses {method.config_type().__name__}."
            )
        return method

    def _extensions(self) -> dict[str, object]:
        methods = [method.plugin for method in self._methods.values()]
        named = [(self._manager.get_name(plugin) or "", plugin) for plugin in self._manager.get_plugins()]
        return {name: plugin for name, plugin in named if not any(plugin is m for m in methods)}

    def _load_extensions(self) -> dict[str, PluginError]:
        """Load what is announced and not there yet; what fails breaks only itself, and is returned by name."""
        failed = {}
        entries = list(dict.fromkeys(_entries(EXTENSIONS_GROUP)))
        for entry in entries:
            shared = sum(other.name == entry.name for other in entries) > 1
            name = f"{entry.name} ({entry.value})" if shared else entry.name
            if not self._manager.has_plugin(name):
                try:
                    self._extend(_import(entry, "extension"), f"The extension {name!r}", name)
                    self._kinds = None
                except PluginError as error:
                    failed[name] = error
        return failed

    def _extend(self, plugin: object, who: str, name: str | None = None) -> None:
        check_plugin(plugin, self._manager, who)
        check_extension(plugin, who)
        self._manager.register(plugin, name)
        try:  # what it adds is asked for now, so that what is wrong with it hinders nobody later
            kinds_of(self._manager, plugin)
            added_combiners(self._manager)
        except Exception:
            self._manager.unregister(plugin)
            raise

    def _load(self, entry: EntryPoint) -> Method:
        dist = entry.dist
        provider = f"{dist.name} {dist.version}" if dist else entry.value
        return self._add(_import(entry, "method"), entry.name, provider, {})

    def _add(self, plugin: object, name: str | None, provider: str, installed: Mapping[str, EntryPoint]) -> Method:
        own = getattr(plugin, "plugin", None)
        if isinstance(plugin, ModuleType) and isinstance(own, Plugin):  # a module that holds the plugin
            plugin = own
        check_plugin(plugin, self._manager, f"The method {name!r} ({provider})" if name else provider)
        self._manager.register(plugin)
        try:
            method = Method(name or provider, plugin, provider, self._manager)
            check_required(method)
            method.name = name or method.config_type().method
            check_method(method, self._methods)
            check_not_installed(method, installed)
        except Exception:
            self._manager.unregister(plugin)
            raise
        self._methods[method.name] = method
        return method


def _why_not(config_type: type[AdapterConfig], values: Mapping[str, Any]) -> str:
    unknown = config_type.unknown(values)
    if unknown:
        return f"does not know {', '.join(f'{name} = {values[name]!r}' for name in unknown)}"
    marks = {name: "a value" if mark is ... else repr(mark) for name, mark in config_type.marks.items()}
    return f"needs {', '.join(f'{name} = {mark}' for name, mark in marks.items())}"


def _import(entry: EntryPoint, what: str) -> object:
    owner = f"{entry.dist.name} {entry.dist.version}" if entry.dist else "?"
    try:
        return entry.load()
    except (Exception, SystemExit) as error:
        raise PluginError(
            f"The {what} {entry.name!r} of {owner} cannot be imported from {entry.value!r}: "
            f"{type(error).__name__}: {error}. Other methods are not affected; reinstall or remove that package, or "
            f"set {DISABLE_VARIABLE}={entry.name}."
        ) from error


def _entries(group: str) -> Iterator[EntryPoint]:
    disabled = switched_off()
    found = importlib.metadata.entry_points(group=group)
    return (e for e in found if not disabled & {e.name, e.dist.name if e.dist else e.name})


default_registry = Registry()
