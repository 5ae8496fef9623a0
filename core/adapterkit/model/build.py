"""Building an adapter for a model, without touching the model yet: from initial values, or from given tensors.

An adapter's tensors are given by their keys in a file, PEFT's prefix left out. A layer is built from its target alone,
so that files are read without a model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from contextlib import suppress
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from adapterkit.contract import (
    BIASES,
    HEADS,
    LAYERS,
    SHARED,
    AdapterConfig,
    AdapterLayer,
    Method,
    Shared,
    Target,
    default_registry,
)
from adapterkit.errors import CheckpointError, PluginError, SelectionError, StateError, UnsupportedError
from adapterkit.forward import (
    Active,
    BiasLayer,
    bias_place,
    check_free,
    check_free_root,
    original_class,
    readers_of,
    trained_dtype,
)
from adapterkit.kinds import Linear
from adapterkit.model.adapter import Adapter
from adapterkit.model.heads import adopt_rows, copy_head, head_values
from adapterkit.model.modules import BaseModules, computes_with, inside
from adapterkit.model.selection import Selection
from adapterkit.model.sorting import Fit, SortedTensors, sort_for
from adapterkit.tensors import (
    Slot,
    agreed,
    execution_device,
    module_slots,
    new_seed,
    real_value,
    reshard,
    seeded,
    shape_of,
)

Tensors = Mapping[str, Tensor]


class LayerBuilder:
    """Builds the layers of one adapter, each from its target, with initial values or given ones.

    Of a model it reads nothing but a target's `module`, and that only for initial values.

    Args:
        fit: collects the given tensors that do not fit.
        cast: give tensors the targets' dtype.
    """

    def __init__(self, method: Method, config: AdapterConfig, fit: Fit | None = None, *, cast: bool = True) -> None:
        self.method, self.config, self.cast = method, config, cast
        self.rule = method.key_rule(config)
        self.fit = fit or Fit(self.rule)
        # For layers that are alike, whether they change the bias of the base's layer.
        self._checked: dict[Hashable, bool] = {}
        self.without_bias: list[str] = []

    def build(
        self, targets: Sequence[Target], model: nn.Module, tensors: Tensors | None, seed: int | None
    ) -> tuple[Shared | None, dict[str, AdapterLayer]]:
        """What all layers share, and the layer of each target, by path. See `shared` and `layer`.

        Args:
            seed: for each layer torch's generators are set to this seed and its path, and restored afterwards.
                `None`: all layers draw from them as they are.
        """
        with seeded(seed, (target.device for target in targets)) as begin:
            begin("")
            shared, layers = self.shared(targets, tensors, model), {}
            for target in targets:
                begin(target.path)
                layers[target.path] = self.layer(target, shared)
        return shared, layers

    def layer(self, target: Target, shared: Shared | None = None) -> AdapterLayer:
        """The method's layer for one target, with the tensors of `target.file`, or with initial values.

        What a file lacks has initial values too, but not on the meta device.

        Raises:
            SelectionError: the method does not support the target's kind.
            StateError: an initial value needs the base's weight, which is not there.
            PluginError: the method broke its contract.
        """
        layer = self._injected(target, shared)
        if target.file is not None:
            self._fill(layer, target, lambda: self._injected(dataclasses.replace(target, file=None), shared))
        return layer

    def shared(
        self, targets: Sequence[Target], tensors: Tensors | None = None, model: nn.Module | None = None
    ) -> Shared | None:
        """What the layers of all these targets have in common; `None` if the method has no such thing.

        Args:
            tensors: those of a file, by name; see `layer`.
        """
        made = self.method.shared
        if made is None:
            return None
        if targets:
            dtype = reduce(torch.promote_types, (target.dtype for target in targets))
            root = Target("", model, targets[0].kind, dtype, targets[0].device, tensors)
        else:  # all that the adapter does is in the model's call
            parameters = () if model is None else model.parameters()
            own = next((p for p in parameters if p.is_floating_point()), torch.empty(0))
            root = Target("", model, Linear(0, 0), trained_dtype(own.dtype), own.device, tensors)
        module: Shared = self.method.ask("its hook shared", (Shared,), made, targets, self.config, root)
        self._check_names(module, made.__name__, "shared tensor's name")
        if tensors is not None:
            fresh, alone = [dataclasses.replace(t, file=None) for t in targets], dataclasses.replace(root, file=None)
            self._fill(module, root, lambda: made(fresh, self.config, alone))
        return module

    def _injected(self, target: Target, shared: Shared | None) -> AdapterLayer:
        """What the hook `inject` gives, checked."""
        layer = self.method.inject(target, self.config.at(target.path), shared)
        if layer is None:
            raise SelectionError(
                f"The method {self.method.name!r} does not support {target.kind.name} layers, such as {target.path!r}. "
                "Leave it out with exclude_modules."
            )
        self._check_names(layer, "hook inject", "parameter and buffer", f" for {target.path!r}")
        layer.__dict__["method"] = self.method.name
        alike = (type(layer), target.kind, id(layer.config))
        has_bias = target.module is None or isinstance(getattr(target.module, "bias", None), Tensor)
        if alike not in self._checked:
            self._checked[alike] = False
            with suppress(UnsupportedError):  # it acts all the same
                self._checked[alike] = self.method.check_shapes(layer, target.path, has_bias=has_bias)
        if self._checked[alike] and not has_bias:
            self.without_bias.append(target.path)
        return layer

    def _check_names(self, module: nn.Module, maker: str, what: str, where: str = "") -> None:
        for name, _ in (*module.named_parameters(), *module.named_buffers()):
            if not self.rule.owns(name):
                raise PluginError(
                    f"The method {self.method.name!r} ({self.method.provider}): its {maker} made {name!r}{where}; "
                    f"every {what} must begin with its prefix {self.rule.prefix!r}."
                )

    def _fill(self, module: nn.Module, target: Target, fresh: Callable[[], nn.Module]) -> None:
        """Give a new module the tensors of `target.file`, and what these lack from a fresh one with initial values."""
        assert target.file is not None
        place = f"{target.path}." if target.path else ""
        self.fit.assign(module, target.file, place, target.device, cast=self.cast)
        if target.device.type == "meta":
            return
        lacking = [(n, slot) for n, slot in module_slots(module, non_persistent=True) if slot.tensor.is_meta]
        made = dict(module_slots(fresh(), non_persistent=True)) if lacking else {}
        for name, slot in lacking:
            if name not in made or made[name].tensor.shape != slot.tensor.shape:
                raise CheckpointError(
                    f"{place}{name} is missing, or has another shape than {tuple(slot.tensor.shape)}, which goes with "
                    "the rest of its layer in the file. The file is damaged, or another base's."
                )
            slot.assign(made[name].tensor)
        module.to(target.device)


def build_adapter(
    modules: BaseModules,
    name: str,
    builder: LayerBuilder,
    selection: Selection,
    active: Active,
    tensors: Tensors | None = None,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | None = None,
) -> tuple[Adapter, list[str]]:
    """An adapter for a model, not installed yet, and notes for whoever added it.

    Args:
        tensors: by their keys in a file; what does not fit, or is nobody's, is in `builder.fit`. `None`: all values are
            initial.
        dtype: of the layers' parameters; `None`: the target's own, but float32 where that has less; `"model"`: each
            part's is the module's own.
        device: of all that is the adapter's; `None`: where each target computes. With given tensors, of layers alone.

    Raises:
        SelectionError: a layer kind that the method does not support.
        PluginError: the method broke its contract.
        StateError: a module that cannot be adapted from here.
    """
    reshard(modules.model)
    adapter = Adapter(name, builder.config, seed=new_seed() if tensors is None else None)
    for match in selection.targets:
        _add_host(adapter, modules, match.path, match.module, active)
    for path in selection.heads:
        module = modules.model.get_submodule(path)
        _add_host(adapter, modules, path, module, active)
        adapter.heads[path] = head = copy_head(module, path)
        if dtype != "model":
            head._apply(lambda t: t.to(trained_dtype(t.dtype)) if t.is_floating_point() else t)
        if tensors is None and device is not None:
            head.to(device)
    notes = _add_biases(adapter, modules, selection.paths, active, dtype, device)
    given, targets, has_shared = None, [], builder.method.shared is not None
    if tensors is not None:
        given = sort_for(adapter, selection.paths, tensors, builder.rule, shared=has_shared)
    for match in selection.targets:
        owner, like = computes_with(match.module, match.kind, modules.model)
        at = device or execution_device(owner, like)
        file = None if given is None else given.layers.get(match.path, {})
        targets.append(Target(match.path, match.module, match.kind, _dtype(dtype, like.dtype), at, file))
    if has_shared:
        check_free_root(modules.model)
        if builder.method.replaces_call:
            check_free(modules.model, type(modules.model).__name__, active)
    held = None if given is None else given.shared
    adapter.shared, adapter.layers = builder.build(targets, modules.model, held, adapter.seed)
    adapter.readers = readers_of(modules, adapter.hosts, adapter.heads)
    if given is not None:
        _fill_beside(adapter, builder, given)
    notes += [
        f"the adapter cannot be merged: it adds a bias at {path!r}, where the base has none"
        for path in builder.without_bias[:1]
    ]
    return adapter, notes


def initial_values(adapter: Adapter, model: nn.Module) -> list[tuple[Slot, Tensor]]:
    """What `add` would give an adapter like this, for the weights that the model has now, with the places of each.

    Raises:
        StateError: the base has no weights yet; or the adapter is from a file, and its sizes do not follow from its
            config.
    """
    method, targets = default_registry.method_of(adapter.config), _targets(adapter, model)
    adapter.seed = agreed(new_seed() if adapter.seed is None else adapter.seed, model, adapter.parameters())
    shared, layers = LayerBuilder(method, adapter.config).build(targets, model, None, adapter.seed)
    fresh = Adapter(adapter.name, adapter.config, layers=layers, shared=shared)
    values = {key: slot.tensor for key, slot in fresh.slots().items()}
    for path, head in adapter.heads.items():
        values |= {f"{path}.{HEADS}.{n}": t for n, t in head_values(head, adapter.hosts[path], model, adapter.seed)}
    values |= {f"{path}.{BIASES}.bias": real_value(adapter.hosts[path], "bias") for path in adapter.biases}
    slots, found = adapter.slots(), []
    for key, slot in slots.items():
        value = values.get(key)
        if value is not None and value.is_meta:
            raise StateError(f"{key!r} has no initial value, because the base has no weights yet. Load these first.")
        if value is None or value.shape != shape_of(slot.tensor):
            there = "none" if value is None else f"one of shape {tuple(value.shape)}"
            raise StateError(
                f"{key!r} has the shape {tuple(shape_of(slot.tensor))}, and a new adapter of the same config has "
                f"{there}: it is from a file with other sizes. Load that file again."
            )
        found.append((slot, value))
    kept = [(path, bias) for path, bias in adapter.biases.items() if bias.base is not None]
    return found + [(Slot(bias, "base"), values[f"{path}.{BIASES}.bias"]) for path, bias in kept]


def initial_shared(adapter: Adapter, model: nn.Module) -> dict[str, Tensor]:
    """The buffers that the layers of an adapter of this config would share, by the keys of `Adapter.slots`.

    Random ones are other than the adapter's, unless they follow from its config, as VeRA's projections do.
    """
    if adapter.shared is None:
        return {}
    builder = LayerBuilder(default_registry.method_of(adapter.config), adapter.config)
    targets = _targets(adapter, model)
    with seeded(0, (target.device for target in targets)):
        shared = builder.shared(targets, model=model)
    return {} if shared is None else {f"{SHARED}.{name}": tensor for name, tensor in shared.named_buffers()}


def _targets(adapter: Adapter, model: nn.Module) -> list[Target]:
    """What the hooks got for the layers of an adapter, for the weights that the model has now."""
    targets = []
    for path, layer in adapter.layers.items():
        owner, like = computes_with(adapter.hosts[path], layer.kind, model)
        own = next((p.dtype for p in layer.parameters() if p.is_floating_point()), trained_dtype(like.dtype))
        targets.append(Target(path, adapter.hosts[path], layer.kind, own, execution_device(owner, like)))
    return targets


def completed(
    adapter: Adapter, model: nn.Module, values: Sequence[tuple[Slot, Tensor]]
) -> Sequence[tuple[Slot, Tensor]]:
    """Given values, and initial ones for what these lack if the adapter has none."""
    if not adapter.unset or adapter.base_is_meta:
        return values
    given = {id(slot.tensor) for slot, _ in values}
    if all(id(slot.tensor) in given for slot in adapter.slots().values()):
        return values
    return [*values, *((slot, t) for slot, t in initial_values(adapter, model) if id(slot.tensor) not in given)]


def _fill_beside(adapter: Adapter, builder: LayerBuilder, given: SortedTensors) -> None:
    """Give new heads and biases the tensors of a file."""
    for container, path, part in adapter.parts():
        if container == LAYERS:
            continue
        tensors = given.of(container, path)
        if container == HEADS:
            adopt_rows(part, tensors)
        place = f"{adapter.place_in_file(container, path)}."
        builder.fit.assign(part, tensors, place, None, cast=builder.cast or container == HEADS)
    builder.fit.add_rest(given)


def _dtype(asked: torch.dtype | str | None, own: torch.dtype) -> torch.dtype:
    """The dtype of a parameter for a module of dtype `own`; see `build_adapter`."""
    if isinstance(asked, torch.dtype):
        return asked
    trains = own.is_floating_point and own.itemsize >= 2  # not what is quantised
    return own if asked == "model" and trains else trained_dtype(own)


def _add_host(adapter: Adapter, modules: BaseModules, path: str, module: nn.Module, active: Active) -> None:
    check_free(module, path, active)
    adapter.hosts[path] = module
    others = tuple(p for p in modules.paths_of[module] if p != path)
    if others:
        adapter.aliases[path] = others


def _add_biases(
    adapter: Adapter,
    modules: BaseModules,
    targets: Collection[str],
    active: Active,
    dtype: torch.dtype | str | None,
    device: torch.device | None,
) -> list[str]:
    which = adapter.config.trained_biases
    if which == "none":
        return []
    skipped: list[str] = []
    seen: set[Any] = set()
    for module, paths in modules.paths_of.items():
        path, bias = paths[0], module._parameters.get("bias")
        if not isinstance(getattr(module, "bias", None), Tensor) or (which == "targets" and path not in targets):
            continue
        if inside(path, adapter.heads) is not None:
            continue
        trailing = bias_place(original_class(module), default_registry.kind_of(module))
        if trailing is None and bias is None:  # a buffer that is called so, such as a mask
            continue
        if trailing is None or bias is None or bias in seen or modules.why_ignored(module):
            skipped.append(path)
            continue
        seen.add(bias)
        _add_host(adapter, modules, path, module, active)
        value = real_value(module, "bias")
        own = _dtype("model" if dtype == "model" else None, value.dtype)
        adapter.biases[path] = BiasLayer(value.to(device or value.device, own), trailing)
    if not skipped:
        return []
    why = "it is not known where they act, or they are buffers, computed, or another layer's too"
    return [f"biases not trained, because {why}: {', '.join(skipped)}"]
