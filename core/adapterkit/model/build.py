"""Building an adapter for a model, without touching the model yet: from initial values, or from given tensors.

An adapter's tensors are given by their keys in a file, PEFT's prefix left out. A layer is built from its target alone,
so that files are read without a model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from adapterkit.contract import AdapterConfig, AdapterLayer, KeyRule, Method, Shared, Target, beside, default_registry
from adapterkit.errors import CheckpointError, PluginError, SelectionError, UnsupportedError
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
from adapterkit.kinds import Linear
from adapterkit.model.adapter import Adapter
from adapterkit.model.heads import adopt_rows, copy_head
from adapterkit.model.modules import BaseModules, inside
from adapterkit.model.selection import Selection
from adapterkit.results import LoadReport, Mismatch
from adapterkit.tensors import Slot, apart, execution_device, module_slots, real_value, reshard

Tensors = Mapping[str, Tensor]


@dataclass
class Fit:
    """How given tensors fit an adapter, by their keys in a file.

    Attributes:
        optional: keys that are not missed.
        missing, unexpected, mismatched, exempt, ignored: see `LoadReport`.
        taken: memory that the adapter's tensors have already.
    """

    rule: KeyRule
    optional: Collection[str] = ()
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[Mismatch] = field(default_factory=list)
    exempt: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    taken: set[int] = field(default_factory=set)

    def match(self, module: nn.Module, given: Tensors, place: str) -> list[tuple[Slot, Tensor]]:
        """The slots of a module with the tensors that fit there; nothing is written. What does not fit is noted.

        Args:
            given: tensors by their names in the module.
            place: what the module's keys begin with: its path and a dot.

        Raises:
            CheckpointError: a tensor of whole numbers where floating ones are needed.
        """
        slots, values = dict(module_slots(module)), []
        # `setup` makes these buffers, so a file need not have them.
        non_persistent = [local for local, _ in module.named_buffers() if local not in slots]
        for local in given:
            if local not in slots:
                (self.ignored if local in non_persistent else self.unexpected).append(place + local)
        if isinstance(module, Shared):
            self.exempt += [place + local for local in non_persistent if local not in given]
        for local, slot in slots.items():
            slot.key = key = place + local
            own, tensor = slot.tensor, given.get(local)
            if tensor is None:
                if key not in self.optional:
                    (self.exempt if self.rule.may_lack(key) else self.missing).append(key)
            elif own.is_floating_point() and not tensor.is_floating_point():
                raise CheckpointError(
                    f"{key!r} holds {tensor.dtype}, and floating numbers are needed: it is quantised, or damaged."
                )
            elif own.shape != tensor.shape:
                self.mismatched.append(Mismatch(key, tuple(tensor.shape), tuple(own.shape)))
            else:
                values.append((slot, tensor))
        return values

    def assign(self, module: nn.Module, given: Tensors, place: str, device: torch.device | None, *, cast: bool) -> None:
        """Give a new module the tensors that fit, in memory of their own.

        Args:
            device: `None`, or the meta device: each tensor stays where the module's is, or where it is itself.
            cast: to the module's dtypes.
        """
        for slot, tensor in self.match(module, given, place):
            own = slot.tensor
            at = tensor.device if own.is_meta else own.device
            dtype = own.dtype if cast else tensor.dtype
            to = at if device is None or device.type == "meta" else device
            slot.assign(apart(tensor.detach().to(to, dtype).contiguous(), self.taken))

    def report(self) -> LoadReport:
        """What users get."""
        keys = (tuple(self.missing), tuple(self.unexpected))
        return LoadReport(*keys, tuple(self.mismatched), tuple(self.exempt), tuple(self.ignored))


def by_layer(
    tensors: Tensors, rule: KeyRule, layers: Mapping[str, str]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """The tensors of layers by path and name in the layer, and all others by key.

    A known layer's path comes first: a module may be called like the method's prefix. Else the last part that begins
    with the prefix begins the name in the layer.

    Args:
        layers: the path that a layer is known by, for each of its paths. Tensors of other layers are in the second
            result.
    """
    inside: dict[str, dict[str, Tensor]] = {}
    rest: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        split = rule.split(key, layers)
        if split is None or split[0] not in layers:
            rest[key] = tensor
        else:
            inside.setdefault(layers[split[0]], {})[split[1]] = tensor
    return inside, rest


def beside_layers(adapter: Adapter, tensors: dict[str, Tensor]) -> Iterator[tuple[str, nn.Module, dict[str, Tensor]]]:
    """Each head and trained bias, with what its keys begin with and its tensors, which are taken out of `tensors`."""
    for path, module in (*adapter.heads.items(), *adapter.biases.items()):
        ending = beside(path, adapter.layers).removeprefix(path)
        places = [other + ending for other in adapter.places(path)]
        held: dict[str, Tensor] = {}
        for place in places:
            keys = [f"{place}.bias"] if isinstance(module, BiasLayer) else list(tensors)
            inside = [key for key in keys if key in tensors and key.startswith(f"{place}.")]
            held |= {key.removeprefix(f"{place}."): tensors.pop(key) for key in inside}
        yield f"{places[0]}.", module, held


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
        self._checked: set[Hashable] = set()

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
        if alike not in self._checked:
            self._checked.add(alike)
            has_bias = target.module is None or isinstance(getattr(target.module, "bias", None), Tensor)
            with suppress(UnsupportedError):  # it acts all the same
                self.method.check_shapes(layer, target.path, has_bias=has_bias)
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
        if any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers())):
            for own, new in zip(module.modules(), fresh().modules(), strict=True):
                groups: list[tuple[Any, Any]] = [(own._parameters, new._parameters), (own._buffers, new._buffers)]
                for held, made in groups:
                    held |= {name: made[name] for name, tensor in held.items() if tensor is not None and tensor.is_meta}
        module.to(target.device)


def build_adapter(
    modules: BaseModules,
    name: str,
    builder: LayerBuilder,
    selection: Selection,
    active: Active,
    tensors: Tensors | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> tuple[Adapter, list[str]]:
    """An adapter for a model, not installed yet, and notes for whoever added it.

    Args:
        tensors: by their keys in a file; what does not fit, or is nobody's, is in `builder.fit`. `None`: all values are
            initial.
        dtype: of the layers' parameters; `None`: the target's own, but float32 where that has less.
        device: of all that is the adapter's; `None`: where each target computes.

    Raises:
        SelectionError: a layer kind that the method does not support.
        PluginError: the method broke its contract.
        StateError: a module that cannot be adapted from here.
    """
    reshard(modules.model)
    adapter = Adapter(name, builder.config)
    paths = {path: m.path for m in selection.targets for path in (*modules.paths_of[m.module], m.path)}
    layers, rest = ({}, None) if tensors is None else by_layer(tensors, builder.rule, paths)
    targets = []
    for match in selection.targets:
        _add_host(adapter, modules, match.path, match.module, active)
        weight: Any = match.module.weight
        at = device or execution_device(match.module, weight)
        file = None if rest is None else layers.get(match.path, {})
        targets.append(Target(match.path, match.module, match.kind, dtype or trained_dtype(weight.dtype), at, file))
    if builder.method.shared is not None:
        check_free_root(modules.model)
        if builder.method.replaces_call:
            check_free(modules.model, type(modules.model).__name__, active)
        held = None if rest is None else {key: rest.pop(key) for key in list(rest) if builder.rule.is_shared(key)}
        adapter.shared = builder.shared(targets, held, modules.model)
    for target in targets:
        adapter.layers[target.path] = builder.layer(target, adapter.shared)
    for path in selection.heads:
        module = modules.model.get_submodule(path)
        _add_host(adapter, modules, path, module, active)
        adapter.heads[path] = copy_head(module, path)
        widen(adapter.heads[path])
    notes = _add_biases(adapter, modules, active)
    adapter.readers = readers_of(modules, adapter.hosts, adapter.heads)
    if rest is not None:
        for place, part, given in beside_layers(adapter, rest):
            head = not isinstance(part, BiasLayer)
            if head:
                adopt_rows(part, given)
            builder.fit.assign(part, given, place, None, cast=builder.cast or head)
        builder.fit.unexpected += rest
    return adapter, notes


def _add_host(adapter: Adapter, modules: BaseModules, path: str, module: nn.Module, active: Active) -> None:
    check_free(module, path, active)
    adapter.hosts[path] = module
    others = tuple(p for p in modules.paths_of[module] if p != path)
    if others:
        adapter.aliases[path] = others


def _add_biases(adapter: Adapter, modules: BaseModules, active: Active) -> list[str]:
    which = adapter.config.trained_biases
    if which == "none":
        return []
    skipped: list[str] = []
    seen: set[Any] = set()
    for module, paths in modules.paths_of.items():
        path, bias = paths[0], module._parameters.get("bias")
        if not isinstance(getattr(module, "bias", None), Tensor) or (which == "targets" and path not in adapter.layers):
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
        adapter.biases[path] = BiasLayer(value.to(trained_dtype(value.dtype)), trailing)
    if not skipped:
        return []
    why = "it is not known where they act, or they are buffers, computed, or another layer's too"
    return [f"biases not trained, because {why}: {', '.join(skipped)}"]
