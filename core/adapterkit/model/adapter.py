"""One adapter on one model: its config, layers, heads, trained biases and shared tensors."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from numbers import Real
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
    Shared,
    beside,
    default_registry,
    part_name,
    unwrapped_key,
)
from adapterkit.errors import ConfigError, StateError, UnsupportedError, UsageError, unknown, warn
from adapterkit.forward import (
    Active,
    BiasLayer,
    Path,
    Strength,
    calls_adapters,
    install,
    let_read,
    stop_reading,
    uninstall,
)
from adapterkit.model.heads import LabelSet
from adapterkit.model.modules import computes_with, inside, modules_below
from adapterkit.results import AdapterStatus
from adapterkit.tensors import Slot, execution_device, gradients, is_hooked, module_slots, put, size_of


@dataclass(eq=False)
class Adapter:
    """One adapter: its config and, by module path, its layers, heads and trained biases.

    Attributes:
        hosts: the modules of the model that it adapts, by path.
        aliases: the other paths of hosts that several paths lead to, by path.
        sizes: the shapes of the hosts' weights when it was installed, by path.
        readers: modules of the model that read the weights of hosts instead of calling them, and the paths from there.
        tables: the heads that are the base's embeddings, saved because the vocabulary was resized.
        labels: the label set of its heads; `None` if it has none of its own.
        shared: what all layers have in common; adapters whose shared tensors are equal have one.
        seed: what its random initial values follow from, with the path of each layer; `None`: it has none.
        unset: it was made on the meta device or emptied, and nothing has given it values since, as far as is known.
        steps: how often `Adapters.step` was called while it was active.
        penalised: the penalty of its method was asked for.
        trains_for_now: parameters that require gradients only as long as a block or a graph needs them to.
        trained_before: parameters that required gradients until others were activated or this adapter was merged.
    """

    name: str
    config: AdapterConfig
    hosts: dict[str, nn.Module] = field(default_factory=dict)
    aliases: dict[str, tuple[str, ...]] = field(default_factory=dict)
    sizes: dict[str, tuple[int, ...] | None] = field(default_factory=dict)
    layers: dict[str, AdapterLayer] = field(default_factory=dict)
    heads: dict[str, nn.Module] = field(default_factory=dict)
    biases: dict[str, BiasLayer] = field(default_factory=dict)
    tables: frozenset[str] = frozenset()
    readers: dict[nn.Module, tuple[Path, ...]] = field(default_factory=dict)
    shared: Shared | None = None
    seed: int | None = None
    unset: bool = False
    steps: int = 0
    penalised: bool = False
    labels: LabelSet | None = None
    trains_for_now: list[nn.Parameter] = field(default_factory=list)
    trained_before: list[nn.Parameter] = field(default_factory=list)

    # What it consists of

    def parts(self, *, shared: bool = False) -> Iterator[tuple[str, str, nn.Module]]:
        """`(container, path, module)` of everything that is installed at its hosts, and with `shared` at the model."""
        for container, group in ((LAYERS, self.layers), (HEADS, self.heads), (BIASES, self.biases)):
            for path, module in group.items():
                yield container, path, module
        if shared and self.shared is not None:
            yield SHARED, "", self.shared

    def places(self, path: str) -> list[str]:
        """Every path of the host at `path`, this one first."""
        return [path, *self.aliases.get(path, ())]

    def place_in_file(self, container: str, path: str) -> str:
        """What the keys of one of `parts` begin with in a file."""
        return path if container == LAYERS else beside(path, self.layers)

    def modules(self) -> Iterator[nn.Module]:
        """Every module that is the adapter's, shared tensors included."""
        return modules_below(part for _, _, part in self.parts(shared=True))

    def parameters(self) -> list[nn.Parameter]:
        """Every parameter, once."""
        return list({id(p): p for p in self._parameters()}.values())

    def _parameters(self) -> Iterator[nn.Parameter]:
        return (p for module in self.modules() for p in module._parameters.values() if p is not None)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """`(<path>.<local>, parameter)` of every parameter; the name of a shared one has no path."""
        for _, path, module in sorted(self.parts(shared=True), key=lambda part: part[0] != SHARED):
            yield from module.named_parameters(prefix=path)

    def slots(self) -> dict[str, Slot]:
        """Every parameter and buffer by a key without the adapter's name, `<path>.<container>.<local>`.

        Of tied tensors there is the first. The copy of a base's bias, which a trained bias keeps, is not the adapter's.
        """
        found: dict[int, Slot] = {}
        for container, path, part in self.parts(shared=True):
            for local, slot in module_slots(part, non_persistent=not isinstance(part, BiasLayer)):
                slot.key = f"{path}.{container}.{local}".lstrip(".")
                found.setdefault(id(slot.tensor), slot)
        return {slot.key: slot for slot in found.values()}

    # Values

    @property
    def no_values(self) -> str:
        """The message of the error if values are needed that were never set."""
        return (
            f"Adapter {self.name!r} has no values: it was made on the meta device, or to_empty took them, and not all "
            f"were set since. When the base has its weights, call adapters.reset({self.name!r}) for initial values, or "
            "load_state_dict or load_training_state for others."
        )

    def has_values(self) -> bool:
        """Whether it has values. It need not as long as its model is on the meta device, too.

        What `to_empty` makes is marked (`PerAdapter`), and torch counts writes to it. So values that others set count.

        Raises:
            StateError: it has none, and its model has.
        """
        if not self.unset:
            return True
        if self.base_is_meta:
            return False
        for slot in self.slots().values():
            tensor = slot.tensor
            emptied = getattr(tensor, "emptied", False)
            if tensor.is_meta or (emptied and (tensor.is_inference() or tensor._version == 0)):
                raise StateError(self.no_values)
        self.unset = False
        return True

    @property
    def base_is_meta(self) -> bool:
        """Whether the modules that it adapts have no values; what accelerate offloads has."""
        bare = (host for host in self.hosts.values() if not is_hooked(host))
        return any(p is not None and p.is_meta for host in bare for p in host._parameters.values())

    def write(self, values: Sequence[tuple[Slot, Tensor]], model: nn.Module) -> None:
        """Copy tensors into the adapter, all or none. What is on the meta device goes to where its module computes."""
        places: dict[nn.Module, torch.device] = {}
        if any(slot.tensor.is_meta for slot, _ in values):
            for _, path, part in self.parts():
                kind = part.kind if isinstance(part, AdapterLayer) else None
                device = execution_device(*computes_with(self.hosts[path], kind, model))
                places |= dict.fromkeys(part.modules(), device)
            shared = next(iter(places.values()), None)
            places |= {} if shared is None or self.shared is None else dict.fromkeys(self.shared.modules(), shared)
        ready = []
        for slot, value in values:
            at = places.get(slot.owner) if slot.tensor.is_meta else None
            ready.append((slot, value if at is None or at.type == "meta" else value.to(at)))
        put(ready)
        if self.unset:
            written = {id(slot.tensor) for slot, _ in values}
            self.unset = any(id(slot.tensor) not in written for slot in self.slots().values())

    def state_dict_keys(self) -> Iterator[str]:
        """Every key of the adapter in the model's own state dict."""
        for container, path, module in self.parts(shared=True):
            for place in self.places(path):
                prefix = f"{place}.{container}.{part_name(self.name)}.".lstrip(".")
                yield from module.state_dict(prefix=prefix, keep_vars=True)

    def tie_numbers(self) -> dict[str, int]:
        """Every path of the modules that its heads replace, with a number; tied heads have the same number."""
        found: dict[str, int] = {}
        for path, head in self.heads.items():
            found |= dict.fromkeys(self.places(path), id(next(head.parameters(), head)))
        return found

    def status(self, *, active: bool, merged: bool, notes: tuple[str, ...] = ()) -> AdapterStatus:
        """The adapter's row in the table of `Adapters.status`."""
        parameters = self.parameters()
        return AdapterStatus(
            name=self.name,
            method=self.config.method,
            targets=len(self.layers),
            heads=tuple(self.heads),
            parameters=size_of(parameters),
            dtypes=tuple(sorted({str(p.dtype).removeprefix("torch.") for p in parameters})),
            devices=tuple(sorted({str(p.device) for p in parameters})),
            active=active,
            trainable=any(p.requires_grad for p in parameters),
            merged=merged,
            notes=notes,
            trainable_parameters=sum(p.numel() for p in parameters if p.requires_grad),
            ranks=tuple(sorted({layer.config.r for layer in self.layers.values() if hasattr(layer.config, "r")})),
            memory=sum(p.numel() * p.element_size() for p in parameters),
        )

    # On the model

    def share(self, shared: Shared) -> None:
        """Have all layers use this module."""
        self.shared = shared
        for layer in self.layers.values():
            layer.__dict__["shared"] = shared

    def install(self, active: Active) -> None:
        """Register every part at its host; `AdaptedModel` registers what they share."""
        self.sizes = {path: _size(host) for path, host in self.hosts.items()}
        let_read(self.readers, self.name)
        for container, path, module in self.parts():
            install(self.hosts[path], path, container, self.name, module, active)

    def uninstall(self, model: nn.Module) -> None:
        """Remove every part from its host, and what they share from the model."""
        for container, path, _ in self.parts():
            uninstall(self.hosts[path], container, self.name)
        stop_reading(self.readers, self.name)
        uninstall(model, SHARED, self.name)

    def changed(self, paths_now: Mapping[nn.Module, Sequence[str]]) -> dict[str, str]:
        """What happened to each module where the adapter does not act any more, to follow `"'path' "` in a sentence.

        A module may be replaced (`model.head = nn.Linear(...)`), deleted or given another class, and its weight another
        size (`resize_token_embeddings`). In modules that were wrapped or moved the adapter still acts.

        Args:
            paths_now: the paths of the model's modules.
        """
        found = {}
        for path, host in self.hosts.items():
            if _was_replaced(paths_now.get(host, ()), self.places(path)):
                found[path] = "was replaced"
            elif not calls_adapters(host):
                found[path] = f"was given another class ({type(host).__name__})"
            elif (what := self.does_not_fit(path)) is not None:
                found[path] = f"has {what}"
        for container, path, part in self.parts():
            parts = self.hosts[path]._modules.get(container)
            if path not in found and (parts is None or parts._modules.get(part_name(self.name)) is not part):
                found[path] = "has another module in place of the adapter's own: it was replaced"
        return found

    def does_not_fit(self, path: str) -> str | None:
        """What the module at `path` has since the adapter was added, so that the adapter does not fit it any more.

        It may follow `"'path' has "` in a sentence. Forwards of some modules ask, so it is fast.
        """
        host, before = self.hosts[path], self.sizes[path]
        weight = host._parameters.get("weight")
        size = before if weight is None or weight.shape == before else _size(host)
        if before and size and before != size:
            return f"another weight, of shape {size} in place of {before}: it was resized or replaced"
        if path in self.biases and host._parameters.get("bias", host) is None:
            return "no bias any more"
        return self.layers[path].kind.changed(host) if path in self.layers else None

    # What trains

    def trains(self) -> bool:
        """Whether any parameter requires a gradient."""
        return any(p.requires_grad for p in self._parameters())

    def may_train(self) -> bool:
        """`trains()` by the first and the last part alone, so that the cost does not depend on the number of layers.

        It notices a user who sets `requires_grad` on the whole model. `trains_for_now` lists what adapterkit has set.
        """
        for held in self._first_and_last:  # a generator takes twice as long, in every switch
            for parameter in held.values():
                if parameter is not None and parameter.requires_grad:
                    return True
        return False

    @cached_property
    def _first_and_last(self) -> list[dict[str, nn.Parameter | None]]:
        """The parameters of the first and the last part, by module."""
        parts = [module for _, _, module in self.parts()] or list(self.modules())
        return [module._parameters for module in modules_below((*parts[:1], *parts[-1:])) if module._parameters]

    def train(self, *, for_now: bool) -> None:
        """Let all parameters require gradients until `freeze`; with `for_now`, the end of a block freezes them too."""
        self.trained_before, enabled = [], gradients.enable(self.parameters())
        self.trains_for_now = [*self.trains_for_now, *enabled] if for_now else []

    def train_again(self) -> None:
        """Let the parameters that `freeze` froze require gradients, for now."""
        self.trains_for_now += gradients.enable(self.trained_before)
        self.trained_before = []

    def freeze(self, parameters: Sequence[nn.Parameter]) -> None:
        """Let these parameters require no gradients; those that a graph holds stay as they are, for now."""
        frozen, self.trains_for_now = gradients.disable(parameters)
        self.trained_before = [*self.trained_before, *frozen]


def _was_replaced(now: Sequence[str], before: Sequence[str]) -> bool:
    """Whether something else is at a path where a module was `before`.

    A module that was wrapped is below each of its paths, and one that was moved is at none of them.
    """
    if now == before:
        return False
    still_there = [any(unwrapped_key(path) == old or inside(path, [old]) for path in now) for old in before]
    return not now or (any(still_there) and not all(still_there))


def _size(module: nn.Module) -> tuple[int, ...] | None:
    """The shape of the weight; `None` if there is none, or it is packed or in pieces, so that its shape varies."""
    weight = module._parameters.get("weight")
    if not isinstance(weight, Tensor) or nn.parameter.is_lazy(weight):
        return None
    return tuple(weight.shape) if weight.is_floating_point() and weight.dim() > 1 else None


def acting_heads(adapters: Sequence[Adapter], chosen: str | None) -> tuple[str, ...]:
    """The adapters that provide the acting heads when all of these are active; the last one wins: the chosen one.

    A head replaces its module, so a warning names what other adapters change inside: it does not act.

    Raises:
        UnknownNameError: the chosen one is not among them.
        ConfigError: two have a head at one module, and none is chosen.
    """
    if chosen is not None and chosen not in [adapter.name for adapter in adapters]:
        raise unknown("active adapter", chosen, [adapter.name for adapter in adapters])
    owners: dict[str, str] = {}
    for path, name in [(path, adapter.name) for adapter in adapters for path in adapter.heads]:
        other = owners.setdefault(path, name)
        if other != name and chosen is None:
            raise ConfigError(
                f"{other!r} and {name!r} each have their own {path!r}, and only one can act. Say which: "
                f"heads={other!r}."
            )
    for head, owner in owners.items():
        for adapter in adapters:
            changed = () if head in adapter.heads else (*adapter.layers, *adapter.biases)
            lost = next((path for path in changed if inside(path, [head])), None)
            if lost is not None:
                warn(
                    f"While {owner!r} has its head at {head!r}, what {adapter.name!r} changes at {lost!r} does not act."
                )
    return tuple(sorted((adapter.name for adapter in adapters if adapter.heads), key=lambda name: name == chosen))


def training_among(names: Sequence[str], trainable: bool | Collection[str]) -> tuple[str, ...]:
    """Those of these adapters that shall train."""
    if isinstance(trainable, bool):
        return tuple(names) if trainable else ()
    if isinstance(trainable, str) or not isinstance(trainable, Collection):
        raise ConfigError(f"trainable = {trainable!r} must be True, False, or a list of the names that train.")
    for name in trainable:
        if name not in names:
            raise unknown("active adapter", name, names)
    return tuple(name for name in names if name in trainable)


def checked_strengths(
    call: str, adapters: Sequence[Adapter], strengths: Mapping[str, Strength] | None
) -> dict[str, Strength]:
    """What the change of each adapter is multiplied by, by name, where that is not 1 everywhere.

    A strength by module is given for every layer and bias of the adapter. One for a block counts for all layers in it.

    Raises:
        UnknownNameError: a strength for none of these adapters, or for a module where it has no layer.
        ConfigError: a strength is not a finite number.
        UnsupportedError: its adapter is not additive, so its change has no multiple.
    """
    named, found = {adapter.name: adapter for adapter in adapters}, dict[str, Strength]()
    if strengths is not None and not isinstance(strengths, Mapping):
        raise ConfigError(f"{call} takes strengths by adapter, {{'a': 0.7}}, not {strengths!r}.")
    for name, strength in dict[str, Any](strengths or {}).items():
        if name not in named:
            raise unknown("adapter with a strength", name, named)
        if not isinstance(strength, Mapping):
            found[name] = _checked_strength(named[name], strength, "")
            continue
        layers: dict[str, float | None] = dict.fromkeys((*named[name].layers, *named[name].biases), 1.0)
        for module in sorted(strength, key=len):  # an inner module's own strength comes last, and counts
            inner = [path for path in layers if path == module or path.startswith(f"{module}.")]
            if not inner:
                raise unknown(f"layer of adapter {name!r}", module, layers)
            given = strength[module]
            number = None if given is None else _checked_strength(named[name], given, f" at {module!r}")
            layers |= dict.fromkeys(inner, number)
        numbers = set(layers.values()) or {1.0}
        same = numbers.pop() if len(numbers) == 1 else None
        found[name] = layers if same is None else same
    return {name: strength for name, strength in found.items() if strength != 1.0}


def _checked_strength(adapter: Adapter, strength: Any, where: str) -> float:
    """The strength as a float; only of an additive adapter it may differ from 1."""
    number = finite_number(strength, f"The strength of {adapter.name!r}{where}")
    if number == 1.0:
        return number
    what = f"Adapter {adapter.name!r} cannot act with a strength of {number:g}{where}"
    default_registry.method_of(adapter.config).check_no_call(what)
    if not all(layer.additive for layer in adapter.layers.values()):
        raise UnsupportedError(
            f"{what}: the method {adapter.config.method!r} is not additive, so its change has no multiple. Leave the "
            "strength out."
        )
    return number


def finite_number(given: object, what: str) -> float:
    """The number as a float, for tensors of float32. A `UsageError` calls one that is not such a number `what`."""
    try:
        number = math.nan if isinstance(given, bool) or not isinstance(given, Real) else float(given)
    except OverflowError:
        number = math.inf
    if not abs(number) <= torch.finfo(torch.float32).max:  # also true for nan
        raise UsageError(f"{what} is {given!r}, but it must be a finite number of float32.")
    return number
