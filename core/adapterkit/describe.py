"""`ak.describe_methods`: the installed methods and extensions, and what each can do."""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass

from adapterkit import kinds
from adapterkit.contract import (
    EXTENSIONS_GROUP,
    AdapterLayer,
    Extension,
    Installed,
    Registry,
    combiners,
    default_registry,
    switched_off,
)
from adapterkit.errors import AdapterError, PluginError, usage
from adapterkit.results import Printed, columns, in_lines


@dataclass(frozen=True)
class MethodInfo:
    """One method.

    Attributes:
        name: its name in configs and files.
        package, version: its distribution; the module and `None` if it has none.
        config: the class of its configs.
        prefix: the prefix of its parameters' names.
        hooks: the hooks that it implements.
        merges: whether its adapters can be merged into weights.
        combines: whether its adapters can be combined and converted, because their change has a low-rank form.
        error: why it cannot be used; apart from name, package and version the other fields are then empty.
    """

    name: str
    package: str
    version: str | None
    config: str = ""
    prefix: str = ""
    hooks: tuple[str, ...] = ()
    merges: bool = False
    combines: bool = False
    error: str | None = None

    @property
    def results(self) -> bool:
        """Whether it can be the method of a combination or conversion."""
        return "from_factors" in self.hooks

    @property
    def foreign(self) -> bool:
        """Whether it reads files of other programs."""
        return "formats" in self.hooks


@dataclass(frozen=True)
class ExtensionInfo:
    """One plugin that is not a method.

    Attributes:
        name, package, version: as for methods.
        kinds: layer kinds that it adds.
        combiners: methods of combination that it adds.
        error: why it cannot be used.
    """

    name: str
    package: str
    version: str | None
    kinds: tuple[str, ...] = ()
    combiners: tuple[str, ...] = ()
    error: str | None = None


@dataclass(frozen=True)
class MethodsReport(Printed):
    """What is installed. Prints as tables.

    Attributes:
        methods: every method, by name.
        extensions: every other plugin, by name.
        kinds: all layer kinds that can be adapted, in the order in which they are tried.
        combiners: all methods of combination.
        switched_off: the names in the environment variable `ADAPTERKIT_DISABLE_PLUGINS`.
    """

    methods: tuple[MethodInfo, ...]
    extensions: tuple[ExtensionInfo, ...]
    kinds: tuple[str, ...]
    combiners: tuple[str, ...]
    switched_off: tuple[str, ...] = ()

    @property
    def failed(self) -> tuple[MethodInfo | ExtensionInfo, ...]:
        """Plugins that cannot be used."""
        plugins: tuple[MethodInfo | ExtensionInfo, ...] = (*self.methods, *self.extensions)
        return tuple(plugin for plugin in plugins if plugin.error)

    def __str__(self) -> str:
        table: list[tuple[str, ...]] = [
            ("method", "package", "prefix", "merges", "combines", "result", "foreign files")
        ]
        lines = []
        for m in self.methods:
            if not m.error:
                flags = (m.merges, m.combines, m.results, m.foreign)
                table.append((m.name, _package(m), m.prefix, *("yes" if flag else "no" for flag in flags)))
                lines.append(f"  {m.name}: {', '.join(m.hooks)}")
        lines += [f"layer kinds: {', '.join(self.kinds)}", f"combiners: {', '.join(self.combiners)}"]
        for extension in self.extensions:
            if not extension.error:
                adds = ", ".join((*extension.kinds, *extension.combiners)) or "wraps hooks"
                lines.append(f"extension {extension.name} ({_package(extension)}): {adds}")
        lines += [f"failed: {plugin.name} ({_package(plugin)}): {plugin.error}" for plugin in self.failed]
        lines += [f"switched off: {name}" for name in self.switched_off]
        return in_lines([*columns(table), *lines])


@usage("ak.describe_methods()")
def describe_methods(registry: Registry = default_registry) -> MethodsReport:
    """Every method and extension that is installed or registered, and what it can do.

    This imports every plugin. A plugin that fails is listed with the reason, and does not affect the others.
    """
    extensions = tuple(_extension(*found) for found in registry.extensions().items())
    usable = [e for e in extensions if not e.error]
    return MethodsReport(
        tuple(_method(registry, installed) for installed in registry.methods().values()),
        extensions,
        (*(name for e in usable for name in e.kinds), *(kind.name for kind in kinds.BUILTIN)),
        tuple(sorted((*combiners.BUILTIN, *(name for e in usable for name in e.combiners)))),
        tuple(sorted(set(switched_off()))),
    )


def _method(registry: Registry, installed: Installed) -> MethodInfo:
    name, package, version = installed.name, installed.provider, installed.version
    try:
        method = registry.method(name)
        config = method.config_type()
        prefix = method.key_rule(config()).prefix
    except AdapterError as error:
        return MethodInfo(name, package, version, error=str(error))
    path, layer = f"{config.__module__}.{config.__qualname__}", getattr(method.plugin, "layer", AdapterLayer)
    prefixes = " ".join((prefix,) if isinstance(prefix, str) else prefix)
    merges, combines = layer.merged is not AdapterLayer.merged, hasattr(layer, "factors")
    if method.replaces_call:
        merges = combines = False
    return MethodInfo(name, package, version, path, prefixes, method.hooks, merges, combines)


def _extension(name: str, found: Extension | PluginError) -> ExtensionInfo:
    plugin = found if isinstance(found, PluginError) else found.plugin
    package, version = getattr(plugin, "__name__", type(plugin).__name__), None
    for entry in importlib.metadata.entry_points(group=EXTENSIONS_GROUP, name=name):
        package, version = (entry.dist.name, entry.dist.version) if entry.dist else (entry.value, None)
    if isinstance(found, PluginError):
        return ExtensionInfo(name, package, version, error=str(found))
    return ExtensionInfo(name, package, version, tuple(kind.name for kind in found.kinds), tuple(found.combiners))


def _package(plugin: MethodInfo | ExtensionInfo) -> str:
    return " ".join(filter(None, (plugin.package, plugin.version)))
