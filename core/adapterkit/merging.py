"""Merging: working adapters into the weights, and giving the weights back bit for bit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from adapterkit.biases import BiasLayer
from adapterkit.errors import StateError, UnsupportedError
from adapterkit.factors import Factors
from adapterkit.keys import BIASES
from adapterkit.kinds import LayerKind
from adapterkit.layer import AdapterLayer
from adapterkit.record import AdapterRecord
from adapterkit.registry import default_registry
from adapterkit.walk import Walk

# Rows worked on at once are as many as fit here: no second buffer of a weight's size is ever made.
_BLOCK_BYTES = 1 << 21


@dataclass
class Change:
    """What is about to be merged into one module.

    Attributes:
        layers: adapter layers in the order they act, each with the exact factors of its change, or
            `None` where its method's own merge rule is to be asked.
    """

    path: str
    module: nn.Module
    kind: LayerKind | None
    layers: list[tuple[AdapterRecord, AdapterLayer, Factors | None]] = field(default_factory=list)
    biases: list[BiasLayer] = field(default_factory=list)


@dataclass
class Kept:
    """The parameters of one module before merging: the objects themselves and, if kept, their values."""

    module: nn.Module
    parameters: dict[str, nn.Parameter]
    values: dict[str, Tensor]

    def give_back(self) -> None:
        """The same parameter objects with the same bits."""
        for name, parameter in self.parameters.items():
            self.module._parameters[name] = parameter
            with torch.no_grad():
                parameter.copy_(self.values[name])


@dataclass
class Merged:
    """What is merged now.

    Attributes:
        names: the merged adapters, the first merged first.
        were_active: those of them that were active when they were merged, to be active again.
        kept: the base's parameters by module path; empty where they were not kept.
    """

    names: tuple[str, ...] = ()
    were_active: tuple[str, ...] = ()
    keeps_base: bool = True
    kept: dict[str, Kept] = field(default_factory=dict)


@torch.no_grad()
def plan(records: Sequence[AdapterRecord], walk: Walk, *, untie: bool) -> list[Change]:
    """What merging these adapters changes, checked; nothing is changed yet.

    Raises:
        UnsupportedError: an adapter layer that cannot be merged.
        StateError: a weight that is not in memory, or that is tied to another module.
    """
    changes: dict[str, Change] = {}
    for record in records:
        method = default_registry.method_of(record.config)
        for path, layer in record.layers.items():
            found = method.factors(layer)
            if found is None and "merge" not in method.hooks:
                raise UnsupportedError(
                    f"Adapter {record.name!r} cannot be merged: its layer at {path!r} has no change of the layer's own "
                    "shape. Leave it active instead."
                )
            change = changes.setdefault(path, Change(path, record.hosts[path], layer.kind))
            change.kind = layer.kind
            change.layers.append((record, layer, found))
        for path, bias in record.biases.items():
            changes.setdefault(path, Change(path, record.hosts[path], None)).biases.append(bias)
    owners = _owners(walk)
    for change in changes.values():
        _check(change, owners, untie)
    return list(changes.values())


def _owners(walk: Walk) -> dict[nn.Parameter, int]:
    """How many modules have each parameter as their own."""
    owners: dict[nn.Parameter, int] = {}
    for module in (walk.model, *walk.aliases):
        for parameter in {p for p in module._parameters.values() if p is not None}:
            owners[parameter] = owners.get(parameter, 0) + 1
    return owners


def _check(change: Change, owners: Mapping[nn.Parameter, int], untie: bool) -> None:
    for name, parameter in _touched(change).items():
        where = f"{change.path}.{name}"
        if parameter.is_meta:
            raise StateError(f"{where!r} is not in memory (meta device or offloaded); nothing can be merged there.")
        if owners[parameter] > 1 and not untie:
            raise StateError(
                f"{where!r} is tied to another module, which would change with it. Merge with untie=True to give "
                f"{change.path!r} a weight of its own, or leave it out of the adapter."
            )
    biased = any(factors is not None and factors.bias is not None for *_, factors in change.layers)
    if biased and change.module._parameters.get("bias") is None:
        raise StateError(f"{change.path!r} has no bias to merge the adapter's into. Leave the adapter active instead.")


def _touched(change: Change) -> dict[str, nn.Parameter]:
    """The parameters of the module that the change writes to."""
    names = ["weight"] * bool(change.layers)
    general = any(factors is None or factors.bias is not None for *_, factors in change.layers)
    if general or change.biases:
        names.append("bias")
    found = {name: change.module._parameters.get(name) for name in names}
    return {name: p for name, p in found.items() if p is not None}


@torch.no_grad()
def carry_out(changes: Sequence[Change], state: Merged, walk: Walk, *, safe: bool, keep_base: bool) -> None:
    """Merge, all or nothing.

    Args:
        state: where the base's parameters are kept, those of earlier merges included.
        safe: raise, and change nothing, if a merged value would not be finite.
        keep_base: keep what is replaced.
    """
    if not keep_base:  # nothing could be given back afterwards, so try what may fail first
        for change in changes:
            if safe or any(factors is None for *_, factors in change.layers):
                values = _merged_values(change)
                _check_finite(change, *values if safe else ())
    owners = _owners(walk)
    done: dict[str, Kept] = {}
    try:
        for change in changes:
            done[change.path] = _keep(change, owners, values=keep_base)
            _merge_one(change)
            if safe:
                _check_finite(change, change.module.weight, change.module._parameters.get("bias"))
    except BaseException:
        for kept in done.values() if keep_base else ():
            kept.give_back()
        raise
    for path, kept in done.items():
        known = state.kept.setdefault(path, kept)  # the first merge's are the base's
        known.parameters = kept.parameters | known.parameters
        known.values = kept.values | known.values


def give_back(state: Merged) -> None:
    """Undo every merge."""
    for kept in state.kept.values():
        kept.give_back()


def take_heads(records: Sequence[AdapterRecord], model: nn.Module) -> None:
    """Make the adapters' heads the model's own modules; the last one's where several have one."""
    for record in records:
        for path, head in record.heads.items():
            for place in (path, *record.aliases.get(path, ())):
                parent, _, name = place.rpartition(".")
                model.get_submodule(parent)._modules[name] = head


def _keep(change: Change, owners: Mapping[nn.Parameter, int], *, values: bool) -> Kept:
    touched = _touched(change)
    biases = change.module._modules.get(BIASES)
    for layer in biases.children() if biases is not None and "bias" in touched else ():
        assert isinstance(layer, BiasLayer)
        layer.keep_base(touched["bias"])
    kept = Kept(change.module, touched, {n: p.detach().clone() for n, p in touched.items()} if values else {})
    for name, parameter in touched.items():
        if owners.get(parameter, 1) > 1:
            own = nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
            change.module._parameters[name] = own
    return kept


def _merge_one(change: Change) -> None:
    """Write the merged weight and bias of one module, rounded once from float32 (float64 for float64)."""
    module, kind = change.module, change.kind
    if kind is not None and all(factors is not None for *_, factors in change.layers):
        _add_factors(kind, module, [f for *_, f in change.layers if f is not None])
        biases = [f.bias for *_, f in change.layers if f is not None and f.bias is not None]
    elif kind is not None:
        weight, bias = _merged_values(change)
        kind.write(module, weight)
        if bias is not None:
            module._parameters["bias"].copy_(bias)  # type: ignore[union-attr]
        return
    else:
        biases = []
    _add_biases(change, biases)


def _add_factors(kind: LayerKind, module: nn.Module, factors: Sequence[Factors]) -> None:
    """`W += sum of up @ down`, block of rows by block of rows, with no dense delta."""
    weight = kind.read(module)
    work = torch.promote_types(weight.dtype, torch.float32)
    rows = max(1, _BLOCK_BYTES // max(1, weight.shape[1] * work.itemsize))
    for start in range(0, weight.shape[0], rows):
        block = weight[start : start + rows]
        total = block.to(work)  # the block itself where it has this dtype: then it is changed in place
        for f in factors:
            total.addmm_(f.up[start : start + rows].to(work), f.down.to(work))
        if total is not block:
            block.copy_(total)
    if not _is_view(weight, module):
        kind.write(module, weight)


def _is_view(weight: Tensor, module: nn.Module) -> bool:
    own = module.weight
    assert isinstance(own, Tensor)
    return weight.untyped_storage().data_ptr() == own.untyped_storage().data_ptr()


def _add_biases(change: Change, shifts: Sequence[Tensor]) -> None:
    bias = change.module._parameters.get("bias")
    if bias is None or not (shifts or change.biases):
        return
    work = torch.promote_types(bias.dtype, torch.float32)
    total = bias.to(work, copy=True)
    for shift in shifts:
        total += shift.to(work)
    for layer in change.biases:
        total += layer.shift(bias).to(work)
    bias.copy_(total)


def _merged_values(change: Change) -> tuple[Tensor, Tensor | None]:
    """The merged canonical weight and bias in float32, by each method's own rule; the module is not changed."""
    assert change.kind is not None or not change.layers
    module, kind = change.module, change.kind
    own = module._parameters.get("bias")
    bias = None if own is None else own.detach().to(torch.promote_types(own.dtype, torch.float32), copy=True)
    weight = torch.zeros(0)
    if kind is not None:
        weight = kind.read(module)
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)
    for record, layer, factors in change.layers:
        if factors is not None:
            weight = torch.addmm(weight, factors.up.to(weight.dtype), factors.down.to(weight.dtype))
            if factors.bias is not None and bias is not None:
                bias = bias + factors.bias.to(bias.dtype)
        else:
            weight, bias = default_registry.method_of(record.config).merge(layer, weight, bias, where=repr(change.path))
    for trained in change.biases:
        assert bias is not None
        assert own is not None
        bias = bias + trained.shift(own).to(bias.dtype)
    return weight, bias


def _check_finite(change: Change, *values: object) -> None:
    for value in values:
        if isinstance(value, Tensor) and not torch.isfinite(value).all():
            names = ", ".join(repr(record.name) for record, *_ in change.layers) or "a trained bias"
            raise StateError(
                f"Merging {names} into {change.path!r} gives values that are not finite. Nothing was changed; "
                "look at the adapter's parameters for nan or for scales out of range."
            )
