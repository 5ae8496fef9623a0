"""Change: what merging adapters changes in one module. It is planned and checked before anything is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from adapterkit.contract import AdapterLayer, DenseLayer, default_registry, widened
from adapterkit.errors import StateError, UnsupportedError
from adapterkit.forward import BiasLayer, Strength, strength_at
from adapterkit.kinds import AddTile, LayerKind, tiles
from adapterkit.merging.obstacles import is_writable, obstacle
from adapterkit.merging.places import Place, overlaps, own, put_copy
from adapterkit.model import Adapter, BaseModules
from adapterkit.tensors import without_autocast

# Rank of exact factors up to which multiplying by them is faster than building the change.
THIN = 25


@dataclass(frozen=True)
class Part:
    """One layer of the adapter `name` that is merged, and what its change is multiplied by."""

    name: str
    layer: AdapterLayer
    scale: float = 1.0

    def adder(self, dtype: torch.dtype) -> tuple[AddTile, bool, Tensor | None]:
        """How to add this change to a weight: `add`, whether it wants small tiles, and the change of the bias.

        It is made anew each time, because the factors of all layers at once may be larger than the model.
        """
        layer, scale = self.layer, self.scale
        if isinstance(layer, DenseLayer) and (layer.rank is None or layer.rank > THIN):
            wide = widened(layer, dtype)
            whole = None if layer.tile is not None else wide.change().to(dtype)

            def add_tile(block: Tensor, rows: slice, columns: slice) -> None:
                part = wide.tile(rows, columns).to(dtype) if whole is None else whole[rows, columns]
                block.add_(part, alpha=scale)

            return add_tile, True, None
        factors = default_registry.method(layer.method).factors(layer, dtype)
        assert factors is not None
        up, down = factors.up.to(dtype), factors.down.to(dtype)

        def add(block: Tensor, rows: slice, columns: slice) -> None:
            block.addmm_(up[rows], down[:, columns], alpha=scale)

        return add, False, None if factors.bias is None else factors.bias * scale


@dataclass
class Change:
    """What is merged into one module.

    Attributes:
        parts: the adapter layers in the order in which they act.
        biases: the trained biases, each with what its shift is multiplied by.
        shifts_bias: a part has factors that change the bias.
        head: the adapter that has its own copy of the module and a change of it, such as a resized embedding. The
            change goes into that copy.
        tied: the written tensors that share memory with another tensor of the model, with the key of that tensor.
    """

    path: str
    module: nn.Module
    kind: LayerKind | None
    parts: list[Part] = field(default_factory=list)
    biases: list[tuple[BiasLayer, float]] = field(default_factory=list)
    shifts_bias: bool = False
    head: str | None = None
    tied: dict[str, str] = field(default_factory=dict)

    @property
    def general(self) -> bool:
        """Whether a part is merged by its method's own rule and not as a sum."""
        return not all(part.layer.additive for part in self.parts)

    @property
    def changes_bias(self) -> bool:
        """Whether the bias changes, if there is one."""
        return self.general or self.shifts_bias or bool(self.biases)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the written tensors. The module may compute one instead of holding it."""
        held = () if self.kind is None else self.kind.held(self.module)
        has_bias = isinstance(getattr(self.module, "bias", None), Tensor)
        return (*held, "bias") if self.changes_bias and has_bias and "bias" not in held else held

    @property
    def touched(self) -> dict[str, Tensor]:
        """The module's own parameters and buffers that are written."""
        found = {name: own(self.module, name) for name in self.names}
        return {name: tensor for name, tensor in found.items() if tensor is not None}


@torch.no_grad()
def plan(
    adapters: Sequence[Adapter], modules: BaseModules, *, untie: bool, scales: Mapping[str, Strength] | None = None
) -> list[Change]:
    """What merging these adapters changes, checked as far as possible without the weights' values.

    Args:
        untie: tied weights are allowed.
        scales: what the changes of some adapters are multiplied by.

    Raises:
        UnsupportedError: an adapter layer, or a module, into which nothing can be merged.
        StateError: a weight that is tied to another module, or a missing bias.
    """
    changes: dict[nn.Module, Change] = {}
    for adapter in adapters:
        default_registry.method_of(adapter.config).check_no_call(f"Adapter {adapter.name!r} cannot be merged")
        strength = (scales or {}).get(adapter.name, 1.0)
        for path, layer in adapter.layers.items():
            scale = strength_at(strength, path)
            if scale is None:
                continue
            module = adapter.heads.get(path, adapter.hosts[path])
            head = adapter.name if path in adapter.heads else None
            change = changes.setdefault(module, Change(path, module, layer.kind, head=head))
            change.kind = layer.kind
            change.parts.append(Part(adapter.name, layer, scale))
            change.shifts_bias |= _shifts_bias(adapter, path, layer)
        for path, bias in adapter.biases.items():
            module, scale = adapter.hosts[path], strength_at(strength, path)
            if scale is not None:
                changes.setdefault(module, Change(path, module, None)).biases.append((bias, scale))
    places = {Place(change.module, name): change for change in changes.values() for name in change.touched}
    heads = {m: f"{path} of {a.name!r}" for a in adapters for path, head in a.heads.items() for m in head.modules()}
    for place, other in overlaps(modules, places, heads).items():
        places[place].tied[place.name] = other
    for change in changes.values():
        _check(change, untie)
    return list(changes.values())


def _shifts_bias(adapter: Adapter, path: str, layer: AdapterLayer) -> bool:
    """Whether the factors of a layer change the bias.

    Raises:
        UnsupportedError: the layer cannot be merged.
    """
    if isinstance(layer, DenseLayer):
        return False
    method = default_registry.method_of(adapter.config)
    factors = method.factors(layer)
    if factors is None and (layer.additive or not method.merges(layer)):
        raise UnsupportedError(
            f"Adapter {adapter.name!r} cannot be merged: its layer at {path!r} has no change of the layer's own shape. "
            "Leave it active instead."
        )
    if factors is None:
        has_bias = isinstance(getattr(adapter.hosts[path], "bias", None), Tensor)
        method.check_shapes(layer, path, has_bias=has_bias)
    return factors is not None and factors.bias is not None


def _check(change: Change, untie: bool) -> None:
    kind = change.kind or default_registry.kind_of(change.module)
    reason = obstacle(change.module, kind, change.names)
    if reason is not None:
        raise UnsupportedError(
            f"Nothing can be merged into {change.path!r}: {reason}. Or leave the adapter active, which is right as it "
            "is; or register a layer kind that vouches for such layers (LayerKind.vouches)."
        )
    for name, other in sorted(change.tied.items()) if not untie else ():
        if other == "itself":
            raise StateError(
                f"'{change.path}.{name}' is expanded: several of its numbers are one in memory, and would change "
                f"together. Merge with untie=True to give each its own, or leave {change.path!r} out of the adapter."
            )
        raise StateError(
            f"'{change.path}.{name}' is tied to another module: it shares memory with {other!r}, which would change "
            f"with it. Merge with untie=True to give {change.path!r} a {name} of its own, or leave it out of the "
            "adapter."
        )
    if change.shifts_bias and "bias" not in change.touched:
        raise StateError(f"{change.path!r} has no bias to merge the adapter's into. Leave the adapter active instead.")


def check_in_memory(changes: Sequence[Change]) -> None:
    """Raise `StateError` if a weight that changes is not in memory, or nothing can be written to it."""
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


def give_own_memory(change: Change) -> None:
    """Give the written tensors that are tied memory of their own."""
    for name, tensor in change.touched.items():
        if name in change.tied:
            put_copy(change.module, name, tensor)


@torch.no_grad()
def merge_module(change: Change, *, safe: bool = False) -> None:
    """Write the merged weight and bias of one module, rounded once from float32 (float64 for float64).

    Raises:
        StateError: with `safe`, a value is not finite. The module has changed already; the caller restores it.
    """
    module, kind = change.module, change.kind
    weight, bias = merged_values(change, in_place=not change.general)
    if kind is not None:
        held = own(module, "weight")  # a sum was made in it; a method's own rule gives another tensor
        if held is None or weight.untyped_storage().data_ptr() != held.untyped_storage().data_ptr():
            kind.write(module, weight)
    held = own(module, "bias")
    if held is not None and bias is not None and change.changes_bias:
        held.copy_(bias)
    if safe:
        check_finite(change, *change.touched.values())


@without_autocast()
def merged_values(change: Change, *, in_place: bool = False) -> tuple[Tensor, Tensor | None]:
    """The merged weight `(out, in)` and bias in float32, or float64 for float64.

    Args:
        in_place: add to the weight that the module's kind reads, tile by tile, without another tensor of its size. Only
            for sums.
    """
    module, kind, base = change.module, change.kind, own(change.module, "bias")
    weight = torch.zeros(0) if kind is None else kind.read(module)
    work = torch.promote_types(weight.dtype, torch.float32)
    weight = weight if in_place else weight.to(work, copy=True)
    bias = None if base is None else base.detach().to(torch.promote_types(base.dtype, torch.float32), copy=True)
    adders: list[tuple[AddTile, bool]] = []
    for part in change.parts:
        if part.layer.additive:
            add, tiled, shift = part.adder(work)
            adders.append((add, tiled))
        else:
            tiles.add(weight, adders, work)
            adders, shift = [], None
            method = default_registry.method(part.layer.method)
            weight, bias = method.merge(part.layer, weight, bias, where=repr(change.path))
        if shift is not None and bias is not None:
            bias = bias + shift.to(bias.dtype)
    if adders:
        tiles.add(weight, adders, work)
    for trained, scale in change.biases:
        assert bias is not None
        assert base is not None
        bias = bias + trained.shift(base).to(bias.dtype) * scale
    return weight, bias


def check_finite(change: Change, *values: Tensor | None) -> None:
    """Raise `StateError` if a merged value is not finite."""
    for value in values:
        # What is not merged may be on the meta device.
        if value is not None and not value.is_meta and not torch.isfinite(value).all():
            names = ", ".join(repr(part.name) for part in change.parts) or "a trained bias"
            raise StateError(
                f"Merging {names} into {change.path!r} gives values that are not finite. Nothing was changed; "
                "look at the adapter's parameters for nan or for scales out of range."
            )
