"""Adapter: everything that belongs to one adapter on one model."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Self

import torch
from torch import Tensor, nn

from adapterkit.contract import BIASES, HEADS, LAYERS, SHARED, AdapterConfig, AdapterLayer
from adapterkit.errors import AdapterWarning, ConfigError, unknown
from adapterkit.forward import Active, BiasLayer, Path, install, let_read, stop_reading, uninstall
from adapterkit.model.labels import LabelSet
from adapterkit.model.modules import modules_below
from adapterkit.results import AdapterStatus
from adapterkit.tensors import gradients, size_of


class SharedTensors(nn.Module):
    """The one copy; `.to(...)` moves it with the model."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            if isinstance(tensor, nn.Parameter):
                self.register_parameter(name, tensor)
            else:
                self.register_buffer(name, tensor)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name."""
        return {name: t for name, t in (*self._parameters.items(), *self._buffers.items()) if t is not None}

    def equals(self, other: Self) -> bool:
        """Whether both are fixed, with the same names, and the same values, dtypes and devices under them."""
        if self._parameters or other._parameters:
            return False
        ours, theirs = self.tensors(), other.tensors()
        return ours.keys() == theirs.keys() and all(_same(tensor, theirs[name]) for name, tensor in ours.items())


class SharedView(Mapping[str, Tensor]):
    """What a method's layers hold of the shared tensors: names, looked up anew each time.

    Attributes:
        module: the tensors themselves; adapters whose tensors are equal have one.
    """

    def __init__(self, module: SharedTensors) -> None:
        self.module = module

    def __getitem__(self, name: str) -> Tensor:
        held = self.module._parameters
        tensor = held[name] if name in held else self.module._buffers[name]
        assert tensor is not None
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.module.tensors())

    def __len__(self) -> int:
        return len(self.module.tensors())

    def part(self) -> None:
        """Have a copy of one's own from now on, to be written to."""
        self.module = SharedTensors({name: tensor.clone() for name, tensor in self.module.tensors().items()})

    def join(self, others: Iterable[SharedTensors]) -> None:
        """Use one of the others instead, if it is equal."""
        self.module = next((other for other in others if other.equals(self.module)), self.module)


def _same(one: Tensor, other: Tensor) -> bool:
    if one.is_meta or one.device != other.device or one.dtype != other.dtype:
        return False
    return torch.equal(one, other)


@dataclass
class Adapter:
    """One adapter: its config and, by module path, its layers, heads and trained biases.

    Attributes:
        hosts: the adapted modules of the model, by path.
        aliases: for hosts that several paths lead to, the others, by path.
        readers: modules of the model that read the weights of hosts, or of what heads stand for, and where below them.
        tables: the heads that are the base's embeddings with other values, because its vocabulary was resized.
        labels: the label set of its heads, or `None` if it has none of its own.
        lent: parameters that require gradients for a block, or for a graph, and else would not.
        dimmed: those that required gradients until other adapters were activated, or this one was merged.
    """

    name: str
    config: AdapterConfig
    hosts: dict[str, nn.Module] = field(default_factory=dict)
    aliases: dict[str, tuple[str, ...]] = field(default_factory=dict)
    layers: dict[str, AdapterLayer] = field(default_factory=dict)
    heads: dict[str, nn.Module] = field(default_factory=dict)
    biases: dict[str, BiasLayer] = field(default_factory=dict)
    tables: frozenset[str] = frozenset()
    readers: dict[nn.Module, tuple[Path, ...]] = field(default_factory=dict)
    shared: SharedView | None = None
    labels: LabelSet | None = None
    lent: list[nn.Parameter] = field(default_factory=list)
    dimmed: list[nn.Parameter] = field(default_factory=list)

    def parts(self) -> Iterator[tuple[str, str, nn.Module]]:
        """`(container, path, module)` of everything that is installed at a host."""
        for container, group in ((LAYERS, self.layers), (HEADS, self.heads), (BIASES, self.biases)):
            for path, module in group.items():
                yield container, path, module

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """`(<path>.<local>, parameter)` of everything that trains; a shared one's name has no path."""
        if self.shared is not None:
            yield from self.shared.module.named_parameters()
        for _, path, module in self.parts():
            for local, parameter in module.named_parameters():
                yield f"{path}.{local}", parameter

    def parameters(self) -> list[nn.Parameter]:
        """Everything that trains, each once."""
        held = [p for module in self.modules() for p in module._parameters.values() if p is not None]
        return list({id(p): p for p in held}.values())

    def modules(self) -> Iterator[nn.Module]:
        """Every module that is the adapter's, shared tensors included."""
        shared = () if self.shared is None else (self.shared.module,)
        return modules_below((*self.layers.values(), *self.heads.values(), *self.biases.values(), *shared))

    def trains(self) -> bool:
        """Whether any parameter requires a gradient."""
        return any(p.requires_grad for module in self.modules() for p in module._parameters.values() if p is not None)

    def may_train(self) -> bool:
        """The same by the first and the last part's, which costs as much for any number of layers.

        That is enough to see what the user says about the whole model; parameters that were lit here are in `lent`.
        """
        for held in self._ends:
            for parameter in held.values():
                if parameter is not None and parameter.requires_grad:
                    return True
        return False

    @cached_property
    def _ends(self) -> list[dict[str, nn.Parameter | None]]:
        """Where the first and the last part hold their parameters."""
        parts = [*self.layers.values(), *self.heads.values(), *self.biases.values()]
        ends = dict.fromkeys((parts[0], parts[-1])) if parts else ()
        return [module._parameters for module in modules_below(ends) if module._parameters]

    def light(self, *, lent: bool) -> None:
        """Let all parameters require gradients: until `dim`, if `lent`."""
        self.dimmed, lit = [], gradients.light(self.parameters())
        self.lent = [*self.lent, *lit] if lent else []

    def light_again(self) -> None:
        """Let those parameters require gradients, for a time, that did so before `dim`."""
        self.lent += gradients.light(self.dimmed)
        self.dimmed = []

    def dim(self, parameters: Sequence[nn.Parameter]) -> None:
        """Let these require no gradients, as soon as no graph holds them."""
        dimmed, self.lent = gradients.dim(parameters)
        self.dimmed = [*self.dimmed, *dimmed]

    def status(self, *, active: bool, merged: bool, notes: tuple[str, ...] = ()) -> AdapterStatus:
        """This adapter's row in the table of all."""
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
        )

    def memory_keys(self) -> Iterator[str]:
        """Every key that this adapter has in the model's own state dict."""
        for container, path, module in self.parts():
            for place in (path, *self.aliases.get(path, ())):
                for local in module.state_dict(keep_vars=True):
                    yield f"{place}.{container}.{self.name}.{local}"
        if self.shared is not None:
            for local in self.shared:
                yield f"{SHARED}.{self.name}.{local}"

    def head_paths(self) -> dict[str, int]:
        """Every path of the modules in whose place its heads stand; heads that are tied have one number."""
        found: dict[str, int] = {}
        for path, head in self.heads.items():
            number = id(next(head.parameters(), head))
            found |= dict.fromkeys((path, *self.aliases.get(path, ())), number)
        return found

    def install(self, active: Active) -> None:
        """Register every part at its host."""
        for reader, paths in self.readers.items():
            let_read(reader, self.name, paths)
        for container, path, module in self.parts():
            install(self.hosts[path], path, container, self.name, module, active)

    def uninstall(self) -> None:
        """Take every part away from its host."""
        for container, path, _ in self.parts():
            uninstall(self.hosts[path], container, self.name)
        for reader in self.readers:
            stop_reading(reader, self.name)


def acting_heads(adapters: Sequence[Adapter], chosen: str | None) -> tuple[str, ...]:
    """Whose heads act when these adapters are active together; the chosen one's win.

    Raises:
        UnknownNameError: the chosen one is not among them.
        ConfigError: two have a head at one module, and none is chosen.
    """
    if chosen is not None and chosen not in [r.name for r in adapters]:
        raise unknown("adapter to be activated", chosen, [r.name for r in adapters])
    owners: dict[str, str] = {}
    for adapter in adapters:
        for path in adapter.heads:
            other = owners.setdefault(path, adapter.name)
            if other != adapter.name and chosen is None:
                raise ConfigError(
                    f"{other!r} and {adapter.name!r} each have their own {path!r}, and only one can act. Say which: "
                    f"heads={other!r}."
                )
    for path, name in owners.items():
        _warn_of_passed_over(path, name, adapters)
    # The last head at a module is the one that acts.
    return tuple(sorted((r.name for r in adapters if r.heads), key=lambda name: name == chosen))


def _warn_of_passed_over(head: str, owner: str, adapters: Sequence[Adapter]) -> None:
    """A head stands in place of its module, so what another adapter changes in that module does not act."""
    for adapter in adapters:
        if adapter.name == owner or head in adapter.heads:
            continue
        inside = [p for p in (*adapter.layers, *adapter.biases) if p == head or p.startswith(head + ".")]
        if inside:
            warnings.warn(
                f"While {owner!r} has its head at {head!r}, what {adapter.name!r} changes at {inside[0]!r} "
                "does not act.",
                AdapterWarning,
                stacklevel=4,
            )
