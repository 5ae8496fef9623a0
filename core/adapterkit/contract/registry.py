"""The registry: which methods and extensions there are, found late and checked when they are registered."""

from __future__ import annotations

import difflib
import importlib.metadata
import os
import reprlib
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from torch import nn

from adapterkit import kinds
from adapterkit.contract import combiners
from adapterkit.contract.combiners import Combiner
from adapterkit.contract.config import AdapterConfig, config_faults
from adapterkit.contract.hookspecs import EXTENSIONS_GROUP, METHODS_GROUP, REQUIRED
from adapterkit.contract.layers import Shared
from adapterkit.contract.method import Method, Plugin, manager_of
from adapterkit.errors import (
    CheckpointError,
    ConfigError,
    MissingMethodError,
    PluginError,
    UnsupportedError,
    unknown,
    usage_of_methods,
    warn,
)
from adapterkit.kinds import LayerKind
from adapterkit.migration import COMBINATIONS, advice

DISABLE_VARIABLE = "ADAPTERKIT_DISABLE_PLUGINS"


@dataclass(frozen=True)
class Installed:
    """One method that can be asked for: its name, the distribution (or module) it is from, and its version."""

    name: str
    provider: str
    version: str | None

    def __str__(self) -> str:
        return f"{self.name} ({self.provider}{' ' + self.version if self.version else ''})"


@dataclass(frozen=True)
class Extension:
    """A plugin that is not a method: the layer kinds and combiners that it adds."""

    plugin: object
    kinds: tuple[type[LayerKind], ...] = ()
    combiners: Mapping[str, Combiner] = field(default_factory=dict)


def switched_off() -> tuple[str, ...]:
    """Names of plugins, and of distributions, that the environment says are not there."""
    return tuple(filter(None, (n.strip() for n in os.environ.get(DISABLE_VARIABLE, "").split(","))))


def _is_off(name: str) -> bool:
    """Whether a plugin or a distribution is switched off; its name may have commas itself."""
    off, own = switched_off(), tuple(part.strip() for part in name.split(","))
    return any(off[i : i + len(own)] == own for i in range(len(off)))


@usage_of_methods("ak")
class Registry:
    """Adapter methods, layer kinds and combiners, from entry points and from `register`.

    A method's plugin is imported when it is first asked for, so one that is broken breaks only itself.
    """

    def __init__(self) -> None:
        self._methods: dict[str, Method] = {}
        self._extensions: dict[str, Extension] = {}
        self._kinds: tuple[type[LayerKind], ...] | None = None

    def methods(self) -> Mapping[str, Installed]:
        """Every method by name: registered ones and those that installed packages announce. Imports none."""
        registered = {name: Installed(name, method.provider, None) for name, method in self._methods.items()}
        return dict(sorted({**registered, **{entry.name: owner for entry, owner in _announced(METHODS_GROUP)}}.items()))

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
        claims = {(o.provider, e.value): (e, o) for e, o in _announced(METHODS_GROUP) if e.name == name}
        if not claims:
            advice = f"Methods come from installed packages (entry-point group {METHODS_GROUP!r}) or ak.register."
            if _is_off(name):
                advice = f"It is switched off by {DISABLE_VARIABLE}. {advice}"
            raise unknown("adapter method", name, self.methods(), advice)
        if len(claims) > 1:
            owners = " and ".join(sorted(f"{dist} ({value})" for dist, value in claims))
            raise PluginError(
                f"Two packages provide the method {name!r}: {owners}. Uninstall one of them, or switch it off: "
                f"{DISABLE_VARIABLE}={min(claims)[0]}."
            )
        ((entry, owner),) = claims.values()
        made = self._made(_import(entry, owner, "method"), name, f"{owner.provider} {owner.version}")
        return self._methods.setdefault(name, made)

    def claim(self, values: Mapping[str, Any], where: object) -> Method:
        """The method of a file with these fields in its `adapter_config.json`.

        It is the one whose `peft_type` and `marks` agree and that implements every field that changes what the adapter
        computes; of several, the one that knows the most fields, and then the one with the most marks. Where the type
        has only one method, it is that one, and its config says which fields it does not implement.

        The methods that are `_likely` are asked first. Only if none of them takes the file, every plugin is imported.

        Args:
            where: the file, for messages.

        Raises:
            CheckpointError: the file names no type, or several methods take it equally.
            MissingMethodError: no method has that type.
            UnsupportedError: none of the type's methods takes it; lists the fields that each does not implement.
        """
        kind = values.get("peft_type")
        if not isinstance(kind, str) or not kind:
            raise CheckpointError(f"{where}: adapter_config.json has no 'peft_type', so its method is not known.")
        for candidates in (lambda: self._likely(kind), self.methods):
            found = self._of_type(kind, candidates())
            lacking = {name: config_type.lacking(values) for name, config_type in found.items()}
            takers = {
                name: (-len(unknown), len(found[name].marks))
                for name, (refused, unknown) in lacking.items()
                if found[name].is_marked(values) and not refused
            }
            if takers:
                break
        if not found:
            raise MissingMethodError(
                f"{where} is an adapter of type {kind!r}, and no plugin provides the method {kind.lower()!r}. "
                f"Installed methods: {', '.join(map(str, self.methods().values())) or 'none'} (entry-point group "
                f"{METHODS_GROUP!r}). Install the package of that one."
            )
        best = [name for name, known in takers.items() if known == max(takers.values())]
        if len(best) == 1 or len(found) == 1:
            return self.method((best or [*found])[0])
        if best:
            raise CheckpointError(
                f"{where} may be of any of the methods {' and '.join(map(repr, best))}: each of them knows its "
                f"fields equally well. Switch one of them off: {DISABLE_VARIABLE}={best[-1]}."
            )
        reasons = []
        for name, config_type in found.items():
            refused = ", ".join(f"{field} = {values[field]!r}" for field in lacking[name][0])
            marks = ", ".join(f"{f} = {'a value' if m is ... else repr(m)}" for f, m in config_type.marks.items())
            reasons.append(f"{name!r} does not implement {refused}" if refused else f"{name!r} needs {marks}")
        raise UnsupportedError(
            f"{where} is an adapter of type {kind!r}, and none of that type's methods takes it: {'; '.join(reasons)}. "
            "Install a method that does, or use the program that wrote the file."
        )

    def read_config(self, values: Mapping[str, Any], where: object) -> tuple[Method, AdapterConfig]:
        """The method and the config of a folder with these fields in its `adapter_config.json`.

        Raises:
            AdapterError: see `claim`, and `AdapterConfig.from_dict`.
        """
        method, file = self.claim(values, where), f"{where}/adapter_config.json"
        return method, method.config_type().from_dict({"modules_to_save": None, **values}, where=file)

    def _likely(self, kind: str) -> list[str]:
        """The methods whose files may have this `peft_type`, as far as can be told without an import.

        These are the method of that name, every method from `register`, and every method whose entry point names the
        type in brackets: `dora = "adapterkit_dora:plugin [lora]"`. The others are asked only if none of these takes the
        file, so that the result does not depend on what was imported before.
        """
        installed = {entry.name: entry.extras for entry, _ in _announced(METHODS_GROUP)}
        said = [name for name, types in installed.items() if kind.lower() in (name, *map(str.lower, types))]
        return [*said, *(name for name in self._methods if name not in installed)]

    def _of_type(self, kind: str, names: Iterable[str]) -> dict[str, type[AdapterConfig]]:
        """The config classes of those methods whose files have this `peft_type`; a broken plugin is left out."""
        found = {}
        for name in names:
            try:
                config_type = self.method(name).config_type()
            except PluginError:
                if name == kind.lower():
                    raise
                continue
            if config_type.type_in_files() == kind.upper():
                found[name] = config_type
        return found

    def register(self, plugin: object, name: str | None = None) -> Method:
        """Make a plugin's method available without an entry point: from a notebook, or in tests.

        Args:
            plugin: what `ak.plugin(...)` gives, an instance of an `ak.Plugin` subclass, a module that has one of these
                under the name `plugin`, or a module of `@hookimpl` functions.
            name: the method's name; its config's `method` if `None`.

        Raises:
            PluginError: the plugin breaks the contract, or its name is taken.
        """
        method = self._made(plugin, name, _name_of(plugin))
        for entry, owner in _announced(METHODS_GROUP):
            if entry.name == method.name:
                raise method.fault(f"the name is taken by the installed package {owner.provider}. Choose another name")
        return self._methods.setdefault(method.name, method)

    def unregister(self, name: str) -> None:
        """Forget a method that `register` or discovery made available.

        Raises:
            UnknownNameError: it is not registered.
        """
        if name not in self._methods:
            raise unknown("registered method", name, self._methods)
        del self._methods[name]

    def extend(self, plugin: object) -> None:
        """Add an extension: layer kinds and combiners.

        Raises:
            PluginError: it breaks the contract.
        """
        name = _name_of(plugin)
        self._extend(plugin, name if name not in self._extensions else f"{name} {id(plugin)}")

    def retract(self, plugin: object) -> None:
        """Undo `extend`.

        Raises:
            UnknownNameError: that plugin was not added.
        """
        name = next((name for name, extension in self._extensions.items() if extension.plugin is plugin), None)
        if name is None:
            raise unknown("extension", plugin, self._extensions)
        del self._extensions[name]
        self._kinds = None

    def extensions(self) -> Mapping[str, Extension | PluginError]:
        """Every extension by name; for one that could not be loaded the error that says why."""
        failed = self._load_extensions()
        found: dict[str, Extension | PluginError] = {**self._extensions, **failed}
        return dict(sorted(found.items()))

    def kinds(self) -> tuple[type[LayerKind], ...]:
        """Every layer kind, extensions' first."""
        if self._kinds is None:
            for error in self._load_extensions().values():
                warn(str(error))
            added = reversed(self._extensions.values())
            self._kinds = (*(kind for extension in added for kind in extension.kinds), *kinds.BUILTIN)
        return self._kinds

    def kind_of(self, module: nn.Module) -> LayerKind | None:
        """What sort of layer `module` is, or `None` if it can hold no adapter."""
        for kind in self.kinds():
            try:
                found: object = kind.of(module)
                fault = f"its `of` returned {found!r}, which is neither a layer kind nor None"
            except Exception as error:
                if kind in kinds.BUILTIN:
                    raise
                found, fault = error, f"it raised {type(error).__name__}: {error}"
            if isinstance(found, LayerKind):
                return found
            if found is not None:
                warn(
                    f"The layer kind {getattr(kind, 'name', kind.__name__)!r} of {kind.__module__} is passed over for "
                    f"a {type(module).__name__}: {fault}."
                )
        return None

    def combiner(self, name: str) -> Combiner:
        """A way to combine, by name.

        Raises:
            UnknownNameError: there is none of that name.
        """
        self.kinds()  # which loads the extensions
        known = self._combiners()
        if not isinstance(name, str) or name not in known:
            peft = advice(name, COMBINATIONS) if isinstance(name, str) else ""
            raise unknown("method of combination", name, known, peft.strip(), guess=not peft)
        return known[name]

    def config_class(self, name: str) -> type[AdapterConfig]:
        """The config class of that name, whichever method has it: `config_class("LoraConfig")`.

        Raises:
            AttributeError: no method that can be imported has such a class, or several have.
        """
        found, broken = list[type[AdapterConfig]](), ""
        for method in self.methods():
            try:
                found.append(self.method(method).config_type())
            except PluginError as error:
                broken += f" {method!r} cannot be imported: {error}"
        meant = [config_type for config_type in found if config_type.__name__ == name]
        if len(meant) == 1:
            return meant[0]
        if meant:
            modules = " and ".join(config_type.__module__ for config_type in meant)
            raise AttributeError(f"Two methods have a config class {name!r}: {modules}. Import the one that you mean.")
        known = {config_type.__name__ for config_type in found}
        low = {own.lower(): own for own in known}
        close = [low[near] for near in difflib.get_close_matches(name.lower(), low, n=1, cutoff=0.88)]
        hint = f"Did you mean {close[0]}?" if close else "docs/port-a-peft-method.md shows how to write another method."
        there = ", ".join(sorted(known)) or "none"
        raise AttributeError(f"No installed method has a config class {name!r}. There are {there}. {hint}{broken}")

    def config(self, method: str, **fields: Any) -> AdapterConfig:
        """A config by the method's name: `config("lora", r=8)`."""
        return self.method(method).config_type()(**fields)

    def method_of(self, config: object) -> Method:
        """The method that a config is for.

        Raises:
            ConfigError: not a config, or a config class that the registered method does not use.
        """
        if not isinstance(config, AdapterConfig):
            kind = type(config)
            if kind.__module__.partition(".")[0] == "peft":
                raise ConfigError(
                    f"This {kind.__name__} is PEFT's. Make adapterkit's, which has the same fields: "
                    f"ak.{kind.__name__}(...). ak.from_peft(model) takes over the adapters of a PeftModel."
                )
            shown = f"A {kind.__name__}" if isinstance(config, nn.Module) else reprlib.repr(config)
            raise ConfigError(
                f"{shown} is not an adapter config. Make one with its class, such as "
                "ak.LoraConfig(r=8), or with ak.config('lora', r=8)."
            )
        method = self.method(config.method)
        if not isinstance(config, method.config_type()):
            raise ConfigError(
                f"{type(config).__name__} says it is for {config.method!r}, but that method "
                f"({method.provider}) uses {method.config_type().__name__}."
            )
        return method

    def _combiners(self) -> dict[str, Combiner]:
        added = [extension.combiners for extension in self._extensions.values()]
        return {name: combiner for group in (combiners.BUILTIN, *added) for name, combiner in group.items()}

    def _load_extensions(self) -> dict[str, PluginError]:
        """Load what is announced and not there yet; what fails breaks only itself, and is returned by name."""
        failed = {}
        entries = dict(_announced(EXTENSIONS_GROUP))
        names = Counter(entry.name for entry in entries)
        for entry, owner in entries.items():
            name = f"{entry.name} ({entry.value})" if names[entry.name] > 1 else entry.name
            if name not in self._extensions:
                try:
                    self._extend(_import(entry, owner, "extension"), name)
                except PluginError as error:
                    failed[name] = error
        return failed

    def _extend(self, plugin: object, name: str) -> None:
        """Add an extension. What it adds is asked for now, so that what is wrong with it hinders nobody later."""
        who = f"The extension {name!r}"
        if any(extension.plugin is plugin for extension in self._extensions.values()):
            raise PluginError(f"{who} is registered already.")
        given: dict[str, Any] = {}
        for hook in manager_of(plugin, who).get_hookcallers(plugin) or ():
            if hook.name not in ("layer_kinds", "combiners"):
                raise PluginError(
                    f"{who} is not a method, so it may not answer hook {hook.name}: it would answer for every method. "
                    "Register the plugin as a method (ak.register)."
                )
            try:
                given[hook.name] = next(iter(hook()), ())
            except Exception as error:
                raise PluginError(f"{who}: its hook {hook.name} raised {type(error).__name__}: {error}.") from error
        kinds, ways = given.get("layer_kinds", ()), given.get("combiners") or {}
        if not isinstance(kinds, Sequence) or not all(isinstance(k, type) and issubclass(k, LayerKind) for k in kinds):
            raise PluginError(
                f"{who}: its hook layer_kinds returned {kinds!r}; it must return a list of LayerKind classes."
            )
        if not isinstance(ways, Mapping) or not all(isinstance(way, Combiner) for way in ways.values()):
            raise PluginError(f"{who}: its hook combiners returned {ways!r}; it must return Combiners by name.")
        for name_of_way, way in ways.items():
            if way.rotates and not way.is_rotated():
                raise PluginError(
                    f"{who}: the combiner {name_of_way!r} has rotates=True, but its result does not rotate with its "
                    "inputs: f(P X Q) is not P f(X) Q. Leave rotates out."
                )
        taken = sorted(ways.keys() & self._combiners().keys())
        if taken:
            raise PluginError(f"{who}: its hook combiners gives {taken[0]!r}, a name that is taken. Choose another.")
        self._extensions[name] = Extension(plugin, tuple(kinds), ways)
        self._kinds = None

    def _made(self, plugin: object, name: str | None, provider: str) -> Method:
        """The method of a plugin, checked."""
        own = getattr(plugin, "plugin", None)
        if isinstance(plugin, ModuleType) and isinstance(own, Plugin):  # a module that holds the plugin
            plugin = own
        method = Method(name or provider, plugin, provider)
        missing = [hook for hook in REQUIRED if hook not in method.hooks]
        if missing:
            raise method.fault(f"it lacks the required hook{'s' * (len(missing) > 1)} {', '.join(missing)}")
        method.name = name or method.config_type().method
        if method.name in self._methods:
            raise method.fault(f"the name is taken by {self._methods[method.name].provider}")
        _check_method(method)
        return method


def _check_method(method: Method) -> None:
    """Raise `PluginError` for a config, a shared class or a key prefix with which the method could not work."""
    config_type, shared = method.config_type(), method.shared
    fault = next(config_faults(config_type), None)
    if fault is not None:
        raise method.fault(f"{config_type.__name__}{fault}")
    if config_type.method != method.name:
        raise method.fault(
            f"{config_type.__name__}.method is {config_type.method!r}; it must be the method's name, {method.name!r}"
        )
    if shared is not None and not (isinstance(shared, type) and issubclass(shared, Shared)):
        raise method.fault(f"its shared = {shared!r} must be a subclass of Shared")
    try:
        config = config_type()
    except PluginError:
        raise
    except Exception as error:
        raise method.fault(
            f"{config_type.__name__}() raised {type(error).__name__}: {str(error).rstrip('.')}. Every field of a "
            "config needs a default that the config takes"
        ) from error
    rule = method.key_rule(config)
    prefixes = rule.prefix if isinstance(rule.prefix, tuple) else (rule.prefix,)
    if not prefixes or not all(isinstance(part, str) and part and "." not in part for part in prefixes):
        raise method.fault(
            f"its key prefix {rule.prefix!r} must be a name without dots, such as 'lora_', or a tuple of such names"
        )
    if not isinstance(rule.exempt, Set):
        raise method.fault(
            f"its key rule's exempt = {rule.exempt!r} must be a set of names, such as frozenset({{'x'}})"
        )


def _name_of(plugin: object) -> str:
    return plugin.__name__ if isinstance(plugin, ModuleType) else type(plugin).__name__


def _import(entry: EntryPoint, owner: Installed, what: str) -> object:
    try:
        return entry.load()
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise PluginError(
            f"The {what} {entry.name!r} of {owner.provider} {owner.version} cannot be imported from {entry.value!r}: "
            f"{type(error).__name__}: {error}. Other methods are not affected; reinstall or remove that package, or "
            f"set {DISABLE_VARIABLE}={entry.name}."
        ) from error


def _announced(group: str) -> Iterator[tuple[EntryPoint, Installed]]:
    """What installed packages announce in this entry-point group, without what is switched off."""
    for entry, owner in _found(group, tuple(map(_as_of, sys.path))):
        if not (_is_off(entry.name) or _is_off(owner.provider)):
            yield entry, owner


@lru_cache(maxsize=8)
def _found(group: str, places: Sequence[tuple[Path, int]]) -> list[tuple[EntryPoint, Installed]]:
    """What the packages in these places announce. To look takes as long as to load a small adapter."""
    entries = [(entry, cast("Any", entry.dist).metadata) for entry in importlib.metadata.entry_points(group=group)]
    return [(entry, Installed(entry.name, about["Name"], about["Version"])) for entry, about in entries]


def _as_of(place: str) -> tuple[Path, int]:
    """A folder of packages, and when the last one came or went."""
    folder = Path(place).absolute()
    with suppress(OSError):
        return folder, folder.stat().st_mtime_ns
    return folder, 0


default_registry = Registry()
