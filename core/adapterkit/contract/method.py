"""Method: the one typed door through which the core calls a plugin's hooks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import pluggy
import torch
from torch import Tensor, nn

from adapterkit.contract.config import AdapterConfig
from adapterkit.contract.formats import ForeignFile, Format, empty_layer
from adapterkit.contract.keys import KeyRule
from adapterkit.contract.layers import AdapterLayer, DenseLayer, LowRankLayer, Shared, Target, widened
from adapterkit.errors import AdapterError, PluginError, UnsupportedError
from adapterkit.kinds import Factors, LayerKind

T = TypeVar("T")
Injector = Callable[[Target, AdapterConfig, Any], AdapterLayer | None]
Tensors = Mapping[str, Tensor]


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

    @property
    def shared(self) -> type[Shared] | None:
        """The plugin's `shared`: the class of the tensors that all layers of one adapter use; `None`: it has none."""
        found = getattr(self.plugin, "shared", None)
        if found is not None and not (isinstance(found, type) and issubclass(found, Shared)):
            raise PluginError(
                f"The method {self.name!r} ({self.provider}): its shared = {found!r} must be a subclass of Shared."
            )
        return found

    def defines(self, function: str, layer: AdapterLayer | None = None) -> bool:
        """Whether the layers have a function of their own of this name: `factors`, `merged`.

        Without a layer, as far as the plugin tells: by its `layer`, or by what its `inject` says that it returns.
        """
        found: Any = type(layer) if layer is not None else getattr(self.plugin, "layer", None)
        if found is None:
            inject = getattr(self.plugin, "inject", None)
            name = getattr(inject, "__annotations__", {}).get("return")
            found = getattr(inject, "__globals__", {}).get(name) if isinstance(name, str) else name
        known = isinstance(found, type) and issubclass(found, AdapterLayer)
        return known and getattr(found, function, None) is not getattr(AdapterLayer, function, None)

    def injector(self) -> Injector:
        """`hookspecs.inject`, to be called for one target after the other: who answers is settled once for them all."""
        caller = self._caller("inject")

        def inject(target: Target, config: AdapterConfig, shared: Any) -> AdapterLayer | None:
            found: AdapterLayer | None = self._checked(
                caller, AdapterLayer, {"target": target, "config": config, "shared": shared}
            )
            return found

        return inject

    def factors(
        self, layer: AdapterLayer, dtype: torch.dtype = torch.float32, *, scaled: bool = True
    ) -> Factors | None:
        """The exact change of an additive layer as two matrices, `dW = up @ down` with every scaling in `up`.

        Worked out in the dtype of the layer's parameters, and in `dtype` at least. With `scaled=False` a number that
        scales the change stays in `scale`. `None`: the layer is not additive, or its factors act across the groups of
        a convolution.

        Raises:
            PluginError: the layer's `factors` or `change` failed, or gave something else.
        """
        if not isinstance(layer, LowRankLayer | DenseLayer):
            return None
        wide = widened(layer, dtype)
        name = "change" if type(layer).factors is DenseLayer.factors else "factors"
        found = self._ask(layer, name, Factors, wide.factors).flat()
        if layer.kind.is_ungrouped(found):
            return None
        sizes = (layer.kind.out_features, layer.kind.in_features)
        if (found.up.shape[0], found.down.shape[1]) != sizes or found.up.shape[1] != found.down.shape[0]:
            shapes = f"{tuple(found.up.shape)} and {tuple(found.down.shape)}"
            raise self._broken(layer, name, f"gave matrices of shapes {shapes} for a layer of {sizes} (out, in)")
        return found.folded(torch.promote_types(found.up.dtype, dtype), scaled=scaled)

    def merge(
        self, layer: AdapterLayer, weight: Tensor, bias: Tensor | None, *, where: str = "this layer"
    ) -> tuple[Tensor, Tensor | None]:
        """The weight and the bias with the layer worked in, in their dtype; `where` names the layer in messages.

        Raises:
            UnsupportedError: the layer cannot be merged.
            PluginError: its `merged` failed, or gave a weight or a bias of another shape.
        """
        wide = widened(layer, weight.dtype)
        found = self._ask(layer, "merged", tuple, lambda: wide.merged(weight, bias))
        if len(found) != 2 or not isinstance(found[0], Tensor) or found[0].shape != weight.shape:
            raise self._broken(layer, "merged", "must return (weight, bias), the weight of the shape it was given")
        if bias is None and found[1] is not None:
            raise UnsupportedError(f"{where} has no bias to merge the adapter's into. Leave the adapter active.")
        if getattr(found[1], "shape", None) != getattr(bias, "shape", None):
            given = "None" if bias is None else f"a tensor of shape {tuple(bias.shape)}"
            raise self._broken(layer, "merged", f"must return as the bias of {where} {given}")
        return found

    def merges(self, layer: AdapterLayer) -> bool:
        """Whether the layer can be merged, as far as its class tells."""
        return type(layer).merged is not AdapterLayer.merged

    def _ask(self, layer: AdapterLayer, name: str, kind: type[T], function: Callable[[], Any]) -> T:
        try:
            found = function()
        except AdapterError:
            raise
        except Exception as error:
            raise self._broken(layer, name, _raised(error)) from error
        if not isinstance(found, kind):
            raise self._broken(layer, name, f"returned a {type(found).__name__}; it must return a {kind.__name__}")
        return found

    def targets(self, model: nn.Module, config: AdapterConfig) -> Sequence[str] | None:
        """See `hookspecs.targets`; `None`: what `target_modules` selects."""
        found: Sequence[str] | None = self._call("targets", Sequence, model=model, config=config)
        return found

    def to_file(self, config: AdapterConfig, tensors: Tensors) -> tuple[AdapterConfig, Tensors]:
        """See `hookspecs.to_file`."""
        return self._pair("to_file", config=config, tensors=tensors) or (config, tensors)

    def from_file(self, config: AdapterConfig, tensors: Tensors) -> tuple[AdapterConfig, Tensors]:
        """See `hookspecs.from_file`."""
        return self._pair("from_file", config=config, tensors=tensors) or (config, tensors)

    def read(
        self,
        tensors: Tensors,
        kinds: Mapping[str, LayerKind],
        metadata: Mapping[str, str],
        config: AdapterConfig | None = None,
    ) -> tuple[AdapterConfig, Tensors] | None:
        """The config and the tensors that a file amounts to on a model with these layers.

        Args:
            config: that of PEFT's file; `None`: the file is another program's, and the result is `None` if no format of
                this method finds anything in it.
        """
        for form in self.formats():
            try:
                found = form.read(tensors, kinds, metadata, config)
            except AdapterError:
                raise
            except Exception as error:
                raise self._fault("formats", f"gave a {type(form).__name__} whose read {_raised(error)}") from error
            if found is not None and not isinstance(found[0], self.config_type()):
                what, own = type(found[0]).__name__, self.config_type().__name__
                raise self._fault("formats", f"gave a {type(form).__name__} that read a {what}; it must give a {own}")
            if found is not None:
                return self.from_file(*found)
        return None if config is None else self.from_file(config, tensors)

    def from_factors(
        self, factors: Mapping[str, Factors], kinds: Mapping[str, LayerKind]
    ) -> tuple[AdapterConfig, Tensors]:
        """See `hookspecs.from_factors`.

        Raises:
            UnsupportedError: the method cannot be a result.
        """
        found = self._pair("from_factors", factors=factors, kinds=kinds)
        if found is None:
            raise UnsupportedError(
                f"The method {self.name!r} cannot be a result: it has no hook from_factors, so no change can be "
                "converted to it. Use to='lora', which can express every low-rank change."
            )
        return found

    def layers_in_file(self, tensors: Tensors, config: AdapterConfig | None) -> dict[str, nn.Module]:
        """The layers that a file's tensors are for, on the meta device, as far as they tell; see `hookspecs.sizes`.

        Args:
            config: `None`: the file is another program's, and its layers are called what it calls them.
        """
        if "sizes" not in self.hooks:
            return {}
        groups: dict[str, dict[str, Tensor]] = {}
        for form in self.formats():
            groups |= form.groups(tensors)
        if config is not None and not groups:
            rule = self.key_rule(config)
            for key, tensor in self.from_file(config, tensors)[1].items():
                split = rule.split(key)
                if split is not None:
                    groups.setdefault(split[0], {})[split[1]] = tensor
        found = {}
        for path, group in groups.items():
            size = self._call("sizes", (tuple, nn.Module), tensors=group)
            if isinstance(size, tuple):
                size = empty_layer(*size)
            if size is not None and all(path.split(".")):
                found[path] = size
        return found

    def formats(self) -> Sequence[Format]:
        """See `hookspecs.formats`."""
        return self._call("formats", Sequence) or ()

    def write(
        self,
        naming: str,
        config: AdapterConfig,
        tensors: Mapping[str, Tensors],
        kinds: Mapping[str, LayerKind],
        component: str,
    ) -> ForeignFile | None:
        """The adapter as files of `naming` have it, by `Format.write`; `None`: no format of the method writes those."""
        form = next((form for form in self.formats() if naming in form.namings), None)
        return None if form is None else form.write(naming, config, tensors, kinds, component)

    def _pair(self, hook: str, **arguments: Any) -> tuple[AdapterConfig, Tensors] | None:
        """What a hook that gives a config and tensors gave, checked."""
        found = self._call(hook, tuple, **arguments)
        if found is None:
            return None
        if len(found) != 2 or not isinstance(found[0], self.config_type()) or not isinstance(found[1], Mapping):
            raise self._fault(hook, f"must return a {self.config_type().__name__} and a mapping of tensors")
        return found[0], found[1]

    def _required(self, hook: str, kind: type[T], **arguments: Any) -> T:
        found: T | None = self._call(hook, kind, **arguments)
        if found is None:
            raise self._fault(hook, f"returned None; it must return a {kind.__name__}")
        return found

    def _call(self, hook: str, kind: Any, /, **arguments: Any) -> Any:
        """Call this method's implementation of `hook`, and check the type of what it returns."""
        return self._checked(self._caller(hook), kind, arguments)

    def _caller(self, hook: str) -> pluggy.HookCaller:
        """What calls this method's `hook`. Not to be kept: methods registered later would answer too."""
        methods = [i.plugin for i in self._manager.hook.config_type.get_hookimpls() if not (i.wrapper or i.hookwrapper)]
        return self._manager.subset_hook_caller(hook, [plugin for plugin in methods if plugin is not self.plugin])

    def _checked(self, caller: pluggy.HookCaller, kind: Any, arguments: Mapping[str, Any]) -> Any:
        try:
            found = caller(**arguments)
        except AdapterError:
            raise
        except Exception as error:
            wrappers = [i.plugin_name for i in caller.get_hookimpls() if i.wrapper or i.hookwrapper]
            also = f" (the hook is wrapped by the extensions {', '.join(wrappers)})" if wrappers else ""
            raise self._fault(caller.name, f"{_raised(error)}{also}") from error
        if found is not None and not isinstance(found, kind):
            kinds = " or a ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
            raise self._fault(caller.name, f"returned a {type(found).__name__}; it must return a {kinds} or None")
        return found

    def guarded(self, what: str, function: Callable[..., T], *arguments: Any) -> T:
        """What a class of the plugin's gives. What it raises is wrapped in a `PluginError`, as for a hook."""
        try:
            return function(*arguments)
        except AdapterError:
            raise
        except Exception as error:
            raise self._fault(what, _raised(error)) from error

    def _broken(self, layer: AdapterLayer, function: str, what: str) -> PluginError:
        return PluginError(f"The method {self.name!r} ({self.provider}): {type(layer).__name__}.{function} {what}.")

    def _fault(self, hook: str, what: str) -> PluginError:
        return PluginError(f"The method {self.name!r} ({self.provider}): its hook {hook} {what}.")


def _raised(error: Exception) -> str:
    return f"raised {type(error).__name__}: {error}"


def _plain(implementation: pluggy.HookImpl) -> Callable[..., Any]:
    function, names = implementation.function, implementation.argnames
    return lambda **given: function(**{name: given[name] for name in names})
