"""Change: what merging adapters changes in one module, planned before anything is touched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from adapterkit.contract import AdapterLayer, DenseLayer, default_registry, widened
from adapterkit.errors import StateError, UnsupportedError
from adapterkit.forward import BiasLayer
from adapterkit.kinds import AddTile, LayerKind
from adapterkit.merging.obstacles import is_writable, obstacle, own
from adapterkit.merging.shared_memory import Place, overlaps
from adapterkit.model import Adapter, BaseModules

# Rank of exact factors up to which multiplying by them is faster than building the change.
THIN = 25


@dataclass(frozen=True)
class Part:
    """One adapter layer that is merged.

    Attributes:
        additive: whether its change is a sum; else its method's own merge rule is asked.
        biased: whether it changes the bias as well.
        scale: what its change is multiplied by.
    """

    adapter: Adapter
    layer: AdapterLayer
    additive: bool
    biased: bool = False
    scale: float = 1.0

    @classmethod
    def of(cls, adapter: Adapter, path: str, scale: float = 1.0) -> Self:
        """The layer of an adapter at `path`, asked how it can be merged; what it answers is dropped again.

        Raises:
            UnsupportedError: it cannot.
        """
        layer, method = adapter.layers[path], default_registry.method_of(adapter.config)
        if isinstance(layer, DenseLayer):
            return cls(adapter, layer, additive=True, scale=scale)
        found = method.factors(layer)
        if found is None and (layer.additive or not method.merges(layer)):
            raise UnsupportedError(
                f"Adapter {adapter.name!r} cannot be merged: its layer at {path!r} has no change of the layer's own "
                "shape. Leave it active instead."
            )
        return cls(adapter, layer, found is not None, found is not None and found.bias is not None, scale)

    def adder(self, dtype: torch.dtype) -> Adder:
        """How to add this change, made anew each time: factors of all layers at once may be larger than the model."""
        layer, scale = self.layer, self.scale
        if isinstance(layer, DenseLayer) and (layer.rank is None or layer.rank > THIN):
            wide = widened(layer, dtype)
            whole = None if layer.tile is not None else wide.change().to(dtype)

            def add_tile(block: Tensor, rows: slice, columns: slice) -> None:
                part = wide.tile(rows, columns).to(dtype) if whole is None else whole[rows, columns]
                block.add_(part, alpha=scale)

            return Adder(add_tile)
        factors = default_registry.method_of(self.adapter.config).factors(layer, dtype)
        assert factors is not None
        up, down = factors.up.to(dtype), factors.down.to(dtype)
        bias = None if factors.bias is None else factors.bias.to(dtype) * scale

        def add(block: Tensor, rows: slice, columns: slice) -> None:
            block.addmm_(up[rows], down[:, columns], alpha=scale)

        return Adder(add, bias, tiled=False)


class Adder(NamedTuple):
    """A change to be added to a weight and, where there is one, to its bias.

    Attributes:
        tiled: whether small tiles are better than the whole weight at once.
    """

    add: AddTile
    bias: Tensor | None = None
    tiled: bool = True


@dataclass
class Change:
    """What is about to be merged into one module.

    Attributes:
        parts: adapter layers in the order they act.
        biases: trained biases, each with what its shift is multiplied by.
        tied: what the change writes to that shares memory with another tensor of the model, and that one's name.
        head: the adapter whose own copy of the module it is, where it has both a copy and a change of it: a resized
            embedding. The change belongs into that copy.
    """

    path: str
    module: nn.Module
    kind: LayerKind | None
    parts: list[Part] = field(default_factory=list)
    biases: list[tuple[BiasLayer, float]] = field(default_factory=list)
    tied: dict[str, str] = field(default_factory=dict)
    head: str | None = None

    @property
    def general(self) -> bool:
        """Whether some method's own merge rule has a say."""
        return not all(part.additive for part in self.parts)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of what the change writes to; the module need not have it as a tensor of its own."""
        held = () if self.kind is None else self.kind.held(self.module)
        changes_bias = self.general or self.biases or any(part.biased for part in self.parts)
        has_bias = isinstance(getattr(self.module, "bias", None), Tensor)
        return (*held, "bias") if changes_bias and has_bias and "bias" not in held else held

    @property
    def touched(self) -> dict[str, Tensor]:
        """The module's own parameters and buffers that the change writes to."""
        found = {name: own(self.module, name) for name in self.names}
        return {name: tensor for name, tensor in found.items() if tensor is not None}


@torch.no_grad()
def plan(
    adapters: Sequence[Adapter], modules: BaseModules, *, untie: bool, scales: Mapping[str, float] | None = None
) -> list[Change]:
    """What merging these adapters changes, checked as far as it can be without weights; nothing is changed yet.

    Args:
        scales: what the changes of some adapters are multiplied by.

    Raises:
        UnsupportedError: an adapter layer that cannot be merged.
        StateError: a weight that is tied to another module, or a bias that is not there.
    """
    changes: dict[nn.Module, Change] = {}
    for adapter in adapters:
        scale = (scales or {}).get(adapter.name, 1.0)
        for path, layer in adapter.layers.items():
            module, head = adapter.hosts[path], None
            if path in adapter.heads:
                module, head = adapter.heads[path], adapter.name
            change = changes.setdefault(module, Change(path, module, layer.kind, head=head))
            change.kind = layer.kind
            change.parts.append(Part.of(adapter, path, scale))
        for path, bias in adapter.biases.items():
            module = adapter.hosts[path]
            changes.setdefault(module, Change(path, module, None)).biases.append((bias, scale))
    places = {Place(change.module, name): change for change in changes.values() for name in change.touched}
    for place, other in overlaps(modules, places).items():
        places[place].tied[place.name] = other
    for change in changes.values():
        _check(change, untie)
    return list(changes.values())


def _check(change: Change, untie: bool) -> None:
    kind = change.kind or default_registry.kind_of(change.module)
    reason = obstacle(change.module, kind, change.names)
    if reason is not None:
        raise UnsupportedError(
            f"Nothing can be merged into {change.path!r}: {reason}. Or leave the adapter active, which is right as it "
            "is; or register a layer kind that vouches for such layers (LayerKind.vouches)."
        )
    for name in sorted(change.tied) if not untie else ():
        if change.tied[name] == "itself":
            raise StateError(
                f"'{change.path}.{name}' is expanded: several of its numbers are one in memory, and would change "
                f"together. Merge with untie=True to give each its own, or leave {change.path!r} out of the adapter."
            )
        raise StateError(
            f"'{change.path}.{name}' is tied to another module: it shares memory with {change.tied[name]!r}, which "
            f"would change with it. Merge with untie=True to give {change.path!r} a {name} of its own, or leave it out "
            "of the adapter."
        )
    if any(part.biased for part in change.parts) and "bias" not in change.touched:
        raise StateError(f"{change.path!r} has no bias to merge the adapter's into. Leave the adapter active instead.")


def parted_names(changes: Sequence[Change], modules: BaseModules) -> set[str]:
    """Every name in the model's state dict of what the changes give memory of its own."""
    return {
        f"{path}.{name}"
        for change in changes
        for name in change.tied
        for path in modules.paths_of.get(change.module, ())
    }


def check_in_memory(changes: Sequence[Change]) -> None:
    """Raise `StateError` if the weights to be changed are elsewhere, or cannot be written to."""
    for change in changes:
        for name, tensor in change.touched.items():
            where = f"'{change.path}.{name}'"
            if tensor.is_meta:
                raise StateError(f"{where} is not in memory (meta device or offloaded); nothing can be merged there.")
            if tensor.is_inference() and not torch.is_inference_mode_enabled():
                raise StateError(
                    f"{where} was made under torch.inference_mode(), and torch refuses writes to it outside of that. "
                    "Merge under torch.inference_mode(), or load the model outside of it."
                )
            if tensor.device.type == "cpu" and not is_writable(tensor):
                raise StateError(
                    f"{where} is in read-only memory (a file that is mapped?). Copy it first: layer.{name} = "
                    f"torch.nn.Parameter(layer.{name}.clone())."
                )
        weight, kind = change.touched.get("weight"), change.kind
        if kind is not None and weight is not None and weight.numel() != kind.out_features * kind.in_features:
            raise StateError(
                f"'{change.path}.weight' has the shape {tuple(weight.shape)}, and the adapter was made for a "
                f"{kind.name} of {kind.out_features} x {kind.in_features}: it was replaced since."
            )
