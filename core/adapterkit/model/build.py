"""Making an adapter's parts for a model, without touching the model yet."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from adapterkit.contract import AdapterConfig, AdapterLayer, Injector, Method, Target, default_registry
from adapterkit.errors import PluginError, SelectionError, StateError
from adapterkit.forward import (
    Active,
    BiasLayer,
    bias_place,
    check_free,
    check_free_root,
    original_class,
    readers_of,
    trained_dtype,
    widen,
)
from adapterkit.model.adapter import Adapter, SharedTensors, SharedView
from adapterkit.model.heads import copy_head
from adapterkit.model.modules import BaseModules, Uncalled, tensors_below
from adapterkit.model.selection import Match, Selection
from adapterkit.tensors import execution_device, is_fsdp, real_value, reshard


class Builder:
    """Builds one adapter for one model from a config and its selection.

    Args:
        load: layers are made empty, for a file's tensors.
        dtype: of the adapter layers' parameters; `None`: the target's own, but float32 where that has less.
        device: of all that is the adapter's; `None`: where each target computes.
    """

    def __init__(
        self,
        modules: BaseModules,
        method: Method,
        config: AdapterConfig,
        selection: Selection,
        *,
        load: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        reshard(modules.model)
        self.modules, self.method, self.config, self.selection = modules, method, config, selection
        self.rule = method.key_rule(config)
        self.load, self.dtype, self.device = load, dtype, device
        self.targets = {m.path: self._target(m) for m in selection.targets}

    def build(self, name: str, active: Active) -> tuple[Adapter, list[str]]:
        """The adapter, not installed yet, and notes for whoever added it.

        Raises:
            SelectionError: a layer kind that the method does not support.
            PluginError: the method broke its contract.
            StateError: a module that cannot be adapted from here.
        """
        adapter = Adapter(name, self.config)
        shared = dict(self.method.prepare(list(self.targets.values()), self.config))
        self._check_shared(shared)
        if shared:
            check_free_root(self.modules.model)
        adapter.shared = SharedView(SharedTensors(shared)) if shared else None
        self._make_layers(adapter, active)
        for path in self.selection.heads:
            self.add_head(adapter, path, active)
        notes = self._add_biases(adapter, active)
        adapter.readers = readers_of(self.modules, adapter.hosts, adapter.heads)
        return adapter, notes

    def _make_layers(self, adapter: Adapter, active: Active) -> None:
        inject = self.method.injector()
        for path, target in self.targets.items():
            self._add_host(adapter, path, target.module, active)
            adapter.layers[path] = self._make_layer(target, adapter.shared, inject)

    def _make_layer(self, target: Target, shared: SharedView | None, inject: Injector) -> AdapterLayer:
        """The method's layer for one target, checked."""
        layer = inject(target, self.config.at(target.path), {} if shared is None else shared)
        if layer is None:
            raise SelectionError(
                f"The method {self.method.name!r} does not support {target.kind.name} layers, such as {target.path!r}. "
                "Leave it out with exclude_modules."
            )
        if self.rule.derived:
            self._check_kept("inject", (name for name, _ in layer.named_parameters()))
        if not all(map(self.rule.owns, (*layer._parameters, *layer._buffers, *layer._modules))):
            self._check_names(target, layer)  # a module without parameters is called as it likes
        layer.__dict__["method"] = self.method.name
        return layer

    def _check_names(self, target: Target, layer: AdapterLayer) -> None:
        names = [n for n, _ in layer.named_parameters()] + [n for n, _ in layer.named_buffers()]
        wrong = [n for n in names if not self.rule.owns(n)]
        if wrong:
            raise PluginError(
                f"The method {self.method.name!r} ({self.method.provider}): its hook inject made {wrong[0]!r} for "
                f"{target.path!r}; every parameter and buffer must begin with its prefix {self.rule.prefix!r}."
            )

    def add_head(self, adapter: Adapter, path: str, active: Active) -> nn.Module:
        """Give the adapter its own copy of the module at `path`."""
        module = self.modules.model.get_submodule(path)
        if is_fsdp(module):
            raise StateError(
                f"{path!r} cannot be trained as a copy: FSDP shards that module by itself, and no copy can be made of "
                "it. Add the adapter before fully_shard."
            )
        self._add_host(adapter, path, module, active)
        head = adapter.heads[path] = copy_head(module, path)
        widen(head)
        adapter.readers = readers_of(self.modules, adapter.hosts, adapter.heads)
        return head

    def fill(self, adapter: Adapter) -> None:
        """Give what a file left without values those of a new adapter, and move the rest to where it computes."""
        targets = list(self.targets.values())
        if adapter.shared is not None and targets[0].device.type != "meta":
            if any(t.is_meta for t in tensors_below([adapter.shared.module])):
                new = [dataclasses.replace(target, load=False) for target in targets]
                _assign(adapter.shared.module, SharedTensors(self.method.prepare(new, self.config)))
            adapter.shared.module.to(targets[0].device)
        for target in targets:
            layer = adapter.layers[target.path]
            devices = {tensor.device for tensor in tensors_below([layer])}
            if target.device.type == "meta" or devices == {target.device}:
                continue
            if torch.device("meta") in devices:
                new_target = dataclasses.replace(target, load=False)
                _assign(layer, self._make_layer(new_target, adapter.shared, self.method.injector()))
            layer.to(target.device)

    def _target(self, match: Match) -> Target:
        weight = match.module.weight
        assert isinstance(weight, torch.Tensor)
        dtype = self.dtype or trained_dtype(weight.dtype)
        device = self.device or execution_device(match.module, weight)
        return Target(match.path, match.module, match.kind, dtype, device, self.load)

    def _add_host(self, adapter: Adapter, path: str, module: nn.Module, active: Active) -> None:
        check_free(module, path, active)
        adapter.hosts[path] = module
        others = tuple(p for p in self.modules.paths_of[module] if p != path)
        if others:
            adapter.aliases[path] = others

    def _check_shared(self, shared: dict[str, torch.Tensor]) -> None:
        declared = self.rule.shared
        if set(shared) - set(declared):
            raise PluginError(
                f"The method {self.method.name!r} ({self.method.provider}): its hook prepare returned "
                f"{sorted(shared)}, but its key rule declares the shared tensors {sorted(declared)}."
            )
        self._check_kept("prepare", [name for name, t in shared.items() if isinstance(t, nn.Parameter)])

    def _check_kept(self, hook: str, trained: Iterable[str]) -> None:
        """What trains goes to files."""
        lost = [name for name in trained if self.rule.derives(name)]
        if lost:
            raise PluginError(
                f"The method {self.method.name!r} ({self.method.provider}): its hook {hook} made the Parameter "
                f"{lost[0]!r}, which its key rule declares as derived. What is derived is never written to a file, so "
                "what was trained would be lost: make it a buffer, or leave it out of `derived`."
            )

    def _add_biases(self, adapter: Adapter, active: Active) -> list[str]:
        which = self.config.trained_biases
        if which == "none":
            return []
        uncalled, skipped = Uncalled(self.modules), []
        seen: set[Any] = set()
        for module, paths in self.modules.paths_of.items():
            path, bias = paths[0], module._parameters.get("bias")
            if not isinstance(getattr(module, "bias", None), Tensor) or (
                which == "targets" and path not in adapter.layers
            ):
                continue
            if any(path == h or path.startswith(h + ".") for h in adapter.heads):
                continue
            trailing = bias_place(original_class(module), default_registry.kind_of(module))
            if trailing is None and bias is None:  # a buffer that is called so, such as a mask
                continue
            if trailing is None or bias is None or bias in seen or uncalled.reason(path, module):
                skipped.append(path)
                continue
            seen.add(bias)
            self._add_host(adapter, path, module, active)
            value = real_value(module, "bias")
            adapter.biases[path] = BiasLayer(value.to(trained_dtype(value.dtype)), trailing)
        if not skipped:
            return []
        why = "it is not known where they act, or they are buffers, computed, or another layer's too"
        return [f"biases not trained, because {why}: {', '.join(skipped)}"]


def _assign(module: nn.Module, fresh: nn.Module) -> None:
    """Give every tensor without values the fresh module's: buffers that no file holds, too."""
    for own, new in zip(module.modules(), fresh.modules(), strict=True):
        groups: list[tuple[Any, Any]] = [(own._parameters, new._parameters), (own._buffers, new._buffers)]
        for held, made in groups:
            held.update({name: made[name] for name, tensor in held.items() if tensor is not None and tensor.is_meta})
