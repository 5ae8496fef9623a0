"""Method: the one typed door through which the core calls a plugin's hooks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import pluggy
from torch import Tensor, nn

from adapterkit.contract.config import AdapterConfig
from adapterkit.contract.keys import KeyRule
from adapterkit.contract.layers import AdapterLayer
from adapterkit.contract.target import Target
from adapterkit.errors import AdapterError, PluginError, UnsupportedError
from adapterkit.kinds import Factors, LayerKind

if TYPE_CHECKING:
    from adapterkit.contract.foreign import ForeignFile

T = TypeVar("T")
Injector = Callable[[Target, AdapterConfig, Mapping[str, Tensor]], AdapterLayer | None]
_MAPPING: type[Mapping[str, Tensor]] = Mapping  # type: ignore[type-abstract]


class Method:
    """One adapter method, provided by one plugin.

    Attributes:
        name: the method's name, such as `"lora"`.
        provider: who provides it, for messages: the distribution and version, or the module.
        plain: the functions that implement its hooks, by hook, for a compiler: it cannot trace pluggy's calls.
    """

    def __init__(self, name: str, plugin: object, provider: str, manager: pluggy.PluginManager) -> None:
        self.name, self.plugin, self.provider = name, plugin, provider
        self._manager = manager
        callers = manager.get_hookcallers(plugin) or []
        self.plain = {c.name: _plain(i) for c in callers for i in c.get_hookimpls() if i.plugin is plugin}

    def __repr__(self) -> str:
        return f"<method {self.name!r} from {self.provider}>"

    @property
    def hooks(self) -> tuple[str, ...]:
        """Names of the hooks that this method implements."""
        callers = self._manager.get_hookcallers(self.plugin) or []
        return tuple(sorted(c.name for c in callers))

    def config_type(self) -> type[AdapterConfig]:
        """See `hookspecs.config_type`."""
        found = self._call("config_type", object)
        if not (isinstance(found, type) and issubclass(found, AdapterConfig)):
            raise self._fault("config_type", f"returned {found!r}; it must return a subclass of AdapterConfig")
        return found

    def key_rule(self, config: AdapterConfig) -> KeyRule:
        """See `hookspecs.key_rule`."""
        return self._required("key_rule", KeyRule, config=config)

    def prepare(self, targets: Sequence[Target], config: AdapterConfig) -> Mapping[str, Tensor]:
        """See `hookspecs.prepare`."""
        return self._call("prepare", _MAPPING, targets=targets, config=config) or {}

    def injector(self) -> Injector:
        """`hookspecs.inject`, to be called for one target after the other: who answers is settled once for them all."""
        caller = self._caller("inject")

        def inject(target: Target, config: AdapterConfig, shared: Mapping[str, Tensor]) -> AdapterLayer | None:
            return self._checked(caller, AdapterLayer, {"target": target, "config": config, "shared": shared})

        return inject

    def factors(self, layer: AdapterLayer) -> Factors | None:
        """See `hookspecs.factors`."""
        return self._call("factors", Factors, layer=layer)

    def merge(
        self, layer: AdapterLayer, weight: Tensor, bias: Tensor | None, *, where: str = "this layer"
    ) -> tuple[Tensor, Tensor | None]:
        """See `hookspecs.merge`; `where` names the layer in messages.

        Raises:
            UnsupportedError: the method says that this layer cannot be merged.
            PluginError: it gave a weight or a bias of another shape, or a bias where there is none.
        """
        found = self._call("merge", tuple, layer=layer, weight=weight, bias=bias)
        if found is None:
            raise UnsupportedError(f"The method {self.name!r} cannot merge {where}. Leave the adapter active.")
        if len(found) != 2 or not isinstance(found[0], Tensor) or found[0].shape != weight.shape:
            raise self._fault("merge", "must return (weight, bias), the weight of the shape it was given")
        if getattr(found[1], "shape", None) != getattr(bias, "shape", None):
            given = "None, for there is none" if bias is None else f"a tensor of shape {tuple(bias.shape)}"
            raise self._fault("merge", f"must return as the bias of {where} {given}; to refuse, return None alone")
        return found

    def to_file(self, config: AdapterConfig, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """See `hookspecs.to_file`."""
        found = self._call("to_file", _MAPPING, config=config, tensors=tensors)
        return tensors if found is None else found

    def file_config(self, config: AdapterConfig) -> AdapterConfig:
        """See `hookspecs.file_config`."""
        return self._call("file_config", AdapterConfig, config=config) or config

    def from_file(
        self, config: AdapterConfig, tensors: Mapping[str, Tensor], layers: Mapping[str, LayerKind]
    ) -> Mapping[str, Tensor]:
        """See `hookspecs.from_file`."""
        found = self._call("from_file", _MAPPING, config=config, tensors=tensors, layers=layers)
        return tensors if found is None else found

    def config_from_ranks(self, ranks: Mapping[str, int], *, bias: bool, trained_biases: str) -> AdapterConfig:
        """See `hookspecs.config_from_ranks`."""
        return self._required("config_from_ranks", AdapterConfig, ranks=ranks, bias=bias, trained_biases=trained_biases)

    def from_factors(self, target: Target, config: AdapterConfig, factors: Factors) -> Mapping[str, Tensor] | None:
        """See `hookspecs.from_factors`."""
        return self._call("from_factors", _MAPPING, target=target, config=config, factors=factors)

    def foreign_config(
        self, tensors: Mapping[str, Tensor], layers: Mapping[str, LayerKind], metadata: Mapping[str, str]
    ) -> AdapterConfig | None:
        """See `hookspecs.foreign_config`; what comes back is a config of this method."""
        return self._call("foreign_config", self.config_type(), tensors=tensors, layers=layers, metadata=metadata)

    def to_foreign(
        self,
        naming: str,
        config: AdapterConfig,
        tensors: Mapping[str, Mapping[str, Tensor]],
        layers: Mapping[str, LayerKind],
        component: str,
    ) -> ForeignFile | None:
        """See `hookspecs.to_foreign`."""
        from adapterkit.contract.foreign import ForeignFile

        given = {"naming": naming, "config": config, "tensors": tensors, "layers": layers, "component": component}
        return self._call("to_foreign", ForeignFile, **given)

    def layers_in_file(
        self, tensors: Mapping[str, Tensor], config: AdapterConfig | None
    ) -> Mapping[str, nn.Module] | None:
        """See `hookspecs.layers_in_file`.

        Raises:
            PluginError: something that is no module, or no module's path.
        """
        found: Mapping[str, Any] | None = self._call("layers_in_file", _MAPPING, tensors=tensors, config=config)
        for path, module in ({} if found is None else found).items():
            if not isinstance(module, nn.Module) or not isinstance(path, str) or not all(path.split(".")):
                raise self._fault("layers_in_file", f"gave {path!r}: {module!r}; it must give modules by their paths")
        return found

    def _required(self, hook: str, kind: type[T], **arguments: Any) -> T:
        found = self._call(hook, kind, **arguments)
        if found is None:
            raise self._fault(hook, f"returned None; it must return a {kind.__name__}")
        return found

    def _call(self, hook: str, kind: type[T], /, **arguments: Any) -> T | None:
        """Call this method's implementation of `hook`, and check the type of what it returns."""
        return self._checked(self._caller(hook), kind, arguments)

    def _caller(self, hook: str) -> pluggy.HookCaller:
        """What calls this method's `hook`. Not to be kept: methods registered later would answer too."""
        methods = [i.plugin for i in self._manager.hook.config_type.get_hookimpls() if not (i.wrapper or i.hookwrapper)]
        return self._manager.subset_hook_caller(hook, [plugin for plugin in methods if plugin is not self.plugin])

    def _checked(self, caller: pluggy.HookCaller, kind: type[T], arguments: Mapping[str, Any]) -> T | None:
        try:
            found = caller(**arguments)
        except AdapterError:
            raise
        except Exception as error:
            wrappers = [i.plugin_name for i in caller.get_hookimpls() if i.wrapper or i.hookwrapper]
            also = f" (the hook is wrapped by the extensions {', '.join(wrappers)})" if wrappers else ""
            raise self._fault(caller.name, f"raised {type(error).__name__}: {error}{also}") from error
        if found is not None and not isinstance(found, kind):
            raise self._fault(
                caller.name, f"returned a {type(found).__name__}; it must return a {kind.__name__} or None"
            )
        return found

    def _fault(self, hook: str, what: str) -> PluginError:
        return PluginError(f"The method {self.name!r} ({self.provider}): its hook {hook} {what}.")


def _plain(implementation: pluggy.HookImpl) -> Callable[..., Any]:
    function, names = implementation.function, implementation.argnames
    return lambda **given: function(**{name: given[name] for name in names})
