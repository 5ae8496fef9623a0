"""One adapter on one model: its config, layers, heads, trained biases and shared tensors."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from torch import nn

from adapterkit.contract import BIASES, HEADS, LAYERS, SHARED, AdapterConfig, AdapterLayer, Shared
from adapterkit.errors import AdapterWarning, ConfigError, unknown
from adapterkit.forward import Active, BiasLayer, Path, install, let_read, stop_reading, uninstall
from adapterkit.model.heads import LabelSet
from adapterkit.model.modules import modules_below
from adapterkit.results import AdapterStatus
from adapterkit.tensors import gradients, size_of


@dataclass
class Adapter:
    """One adapter: its config and, by module path, its layers, heads and trained biases.

    Attributes:
        hosts: the modules of the model that it adapts, by path.
        aliases: the other paths of hosts that several paths lead to, by path.
        readers: modules of the model that read the weights of hosts instead of calling them, and the paths from there.
        tables: the heads that are the base's embeddings, saved because the vocabulary was resized.
        labels: the label set of its heads; `None` if it has none of its own.
        shared: what all layers have in common; adapters whose shared tensors are equal have one.
        steps: how often `Adapters.step` was called while it was active.
        trains_for_now: parameters that require gradients only as long as a block or a graph needs them to.
        trained_before: parameters that required gradients until others were activated or this adapter was merged.
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
    shared: Shared | None = None
    steps: int = 0
    labels: LabelSet | None = None
    trains_for_now: list[nn.Parameter] = field(default_factory=list)
    trained_before: list[nn.Parameter] = field(default_factory=list)

    def share(self, shared: Shared) -> None:
        """Have all layers use this module."""
        self.shared = shared
        for layer in self.layers.values():
            layer.__dict__["shared"] = shared

    def parts(self) -> Iterator[tuple[str, str, nn.Module]]:
        """`(container, path, module)` of everything that is installed at its hosts."""
        for container, group in ((LAYERS, self.layers), (HEADS, self.heads), (BIASES, self.biases)):
            for path, module in group.items():
                yield container, path, module

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """`(<path>.<local>, parameter)` of every parameter; the name of a shared one has no path."""
        if self.shared is not None:
            yield from self.shared.named_parameters()
        for _, path, module in self.parts():
            for local, parameter in module.named_parameters():
                yield f"{path}.{local}", parameter

    def parameters(self) -> list[nn.Parameter]:
        """Every parameter, once."""
        held = [p for module in self.modules() for p in module._parameters.values() if p is not None]
        return list({id(p): p for p in held}.values())

    def modules(self) -> Iterator[nn.Module]:
        """Every module that is the adapter's, shared tensors included."""
        shared = () if self.shared is None else (self.shared,)
        return modules_below((*self.layers.values(), *self.heads.values(), *self.biases.values(), *shared))

    def trains(self) -> bool:
        """Whether any parameter requires a gradient."""
        return any(p.requires_grad for module in self.modules() for p in module._parameters.values() if p is not None)

    def may_train(self) -> bool:
        """`trains()` by the first and the last part alone, so that the cost does not depend on the number of layers.

        It notices a user who sets `requires_grad` on the whole model. `trains_for_now` lists what adapterkit has set.
        """
        for held in self._first_and_last:
            for parameter in held.values():
                if parameter is not None and parameter.requires_grad:
                    return True
        return False

    @cached_property
    def _first_and_last(self) -> list[dict[str, nn.Parameter | None]]:
        """The parameters of the first and the last part, by module."""
        parts = [*self.layers.values(), *self.heads.values(), *self.biases.values()]
        ends = dict.fromkeys((parts[0], parts[-1])) if parts else ()
        return [module._parameters for module in modules_below(ends) if module._parameters]

    def train(self, *, for_now: bool) -> None:
        """Let all parameters require gradients, for good or until `freeze`."""
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
        )

    def state_dict_keys(self) -> Iterator[str]:
        """Every key of the adapter in the model's own state dict."""
        for container, path, module in self.parts():
            for place in (path, *self.aliases.get(path, ())):
                for local in module.state_dict(keep_vars=True):
                    yield f"{place}.{container}.{self.name}.{local}"
        if self.shared is not None:
            for local in self.shared.state_dict(keep_vars=True):
                yield f"{SHARED}.{self.name}.{local}"

    def tie_numbers(self) -> dict[str, int]:
        """Every path of the modules that its heads replace, with a number; tied heads have the same number."""
        found: dict[str, int] = {}
        for path, head in self.heads.items():
            number = id(next(head.parameters(), head))
            found |= dict.fromkeys((path, *self.aliases.get(path, ())), number)
        return found

    def install(self, active: Active) -> None:
        """Register every part at its host."""
        let_read(self.readers, self.name)
        for container, path, module in self.parts():
            install(self.hosts[path], path, container, self.name, module, active)

    def uninstall(self) -> None:
        """Remove every part from its host."""
        for container, path, _ in self.parts():
            uninstall(self.hosts[path], container, self.name)
        stop_reading(self.readers, self.name)


def acting_heads(adapters: Sequence[Adapter], chosen: str | None) -> tuple[str, ...]:
    """The adapters that provide the acting heads when all of these are active; the last one wins: the chosen one.

    Raises:
        UnknownNameError: the chosen one is not among them.
        ConfigError: two have a head at one module, and none is chosen.
    """
    if chosen is not None and chosen not in [r.name for r in adapters]:
        raise unknown("active adapter", chosen, [r.name for r in adapters])
    owners: dict[str, str] = {}
    for adapter in adapters:
        for path in adapter.heads:
            other = owners.setdefault(path, adapter.name)
            if other != adapter.name and chosen is None:
                raise ConfigError(
                    f"{other!r} and {adapter.name!r} each have their own {path!r}, and only one can act. Say which: "
                    f"heads={other!r}."
                )
    for head, owner in owners.items():
        _warn_of_replaced(head, owner, adapters)
    return tuple(sorted((r.name for r in adapters if r.heads), key=lambda name: name == chosen))


def _warn_of_replaced(head: str, owner: str, adapters: Sequence[Adapter]) -> None:
    """A head replaces its module, so other adapters' layers inside that module do not act."""
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
