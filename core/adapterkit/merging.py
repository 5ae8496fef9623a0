"""Merging: working adapters into the weights, and giving the weights back bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from adapterkit import tiles
from adapterkit.biases import BiasLayer
from adapterkit.change import Change, Part
from adapterkit.errors import StateError
from adapterkit.headcast import give_dtypes_back
from adapterkit.keys import BIASES
from adapterkit.kinds import LayerKind
from adapterkit.plain import own, put
from adapterkit.record import AdapterRecord
from adapterkit.registry import default_registry


@dataclass
class Kept:
    """The parameters and buffers of one module before merging.

    Attributes:
        tensors: the objects themselves.
        values: what they held, if kept; not of those that were tied, to which nothing was written.
    """

    module: nn.Module
    tensors: dict[str, Tensor]
    values: dict[str, Tensor]

    def leave_resized(self) -> None:
        """Forget the tensors in whose place there are larger or smaller ones now."""
        for name, tensor in list(self.tensors.items()):
            now, value = own(self.module, name), self.values.get(name, tensor)
            if now is None or now.shape != value.shape or tensor.shape != value.shape:
                del self.tensors[name]

    def give_back(self) -> None:
        """The same objects with the same bits."""
        for name, tensor in self.tensors.items():
            put(self.module, name, tensor)
            if name in self.values:
                with torch.no_grad():
                    tensor.copy_(self.values[name])

    def add(self, later: Kept) -> None:
        """Keep also what a later merge was the first to write to."""
        for name in later.tensors.keys() - self.tensors.keys():
            self.tensors[name] = later.tensors[name]
            self.values |= {n: value for n, value in later.values.items() if n == name}


@dataclass
class Merged:
    """What is merged now.

    Attributes:
        names: the merged adapters, the first merged first.
        kept: the base's parameters by module; empty where they were not kept.
        heads: those of them whose own copy of a module has their change in it.
    """

    names: tuple[str, ...] = ()
    keeps_base: bool = True
    kept: dict[nn.Module, Kept] = field(default_factory=dict)
    heads: frozenset[str] = frozenset()


@torch.no_grad()
def carry_out(changes: Sequence[Change], state: Merged, *, safe: bool, keep_base: bool) -> None:
    """Merge, all or nothing.

    Args:
        state: where the base's parameters are kept, those of earlier merges included.
        safe: raise, and change nothing, if a merged value would not be finite.
        keep_base: keep what is replaced.
    """
    if not keep_base:  # nothing could be given back afterwards, so try what may fail first
        for change in changes:
            if safe or change.general:
                values = _merged_values(change)
                _check_finite(change, *values if safe else ())
    done: dict[nn.Module, Kept] = {}
    try:
        for change in changes:
            done[change.module] = _keep(change, values=keep_base)
            merge_module(change, safe=safe)
    except BaseException:
        for kept in done.values() if keep_base else ():
            kept.give_back()
        raise
    state.heads |= {change.head for change in changes if change.head is not None}
    for module, kept in done.items():
        state.kept.setdefault(module, kept).add(kept)  # the first merge's are the base's


def give_back(state: Merged) -> None:
    """Undo every merge."""
    for kept in state.kept.values():
        kept.give_back()


def take_heads(records: Sequence[AdapterRecord], model: nn.Module) -> None:
    """Make the adapters' heads the model's own modules; the last one's where several have one."""
    heads = {record.hosts[path]: head for record in records for path, head in record.heads.items()}
    for module, head in heads.items():
        give_dtypes_back(head, module)
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in heads:
                parent._modules[name] = heads[child]


def _keep(change: Change, *, values: bool) -> Kept:
    touched = change.touched
    biases = change.module._modules.get(BIASES)
    for layer in biases.children() if biases is not None and "bias" in touched else ():
        assert isinstance(layer, BiasLayer)
        layer.keep_base(touched["bias"])
    own_values = {n: t.detach().clone() for n, t in touched.items() if n not in change.tied} if values else {}
    kept = Kept(change.module, touched, own_values)
    for name in change.tied:
        fresh = touched[name].detach().clone()
        is_parameter = isinstance(touched[name], nn.Parameter)
        put(change.module, name, nn.Parameter(fresh, touched[name].requires_grad) if is_parameter else fresh)
    return kept


@torch.no_grad()
def merge_module(change: Change, *, safe: bool = False) -> None:
    """Write the merged weight and bias of one module, rounded once from float32 (float64 for float64).

    Raises:
        StateError: with `safe`, a value that is not finite; it is written already.
    """
    module, kind = change.module, change.kind
    if change.general:
        assert kind is not None
        weight, bias = _merged_values(change)
        kind.write(module, weight)
        if bias is not None:
            own(module, "bias").copy_(bias)  # type: ignore[union-attr]
    else:
        shifts = _add_changes(kind, module, change.parts) if kind is not None else []
        _add_biases(change, shifts)
    if safe:
        _check_finite(change, *change.touched.values())


def _add_changes(kind: LayerKind, module: nn.Module, parts: Sequence[Part]) -> list[Tensor]:
    """`W += sum of dW_i`, tile by tile, with no dense delta; the shifts of the bias come back."""
    weight = kind.read(module)
    work = torch.promote_types(weight.dtype, torch.float32)
    adders = [part.adder(work) for part in parts]
    tiles.add(weight, [(adder.add, adder.tiled) for adder in adders], work)
    if not _is_view(weight, module):
        kind.write(module, weight)
    return [adder.bias for adder in adders if adder.bias is not None]


def _is_view(weight: Tensor, module: nn.Module) -> bool:
    held = own(module, "weight")
    return held is not None and weight.untyped_storage().data_ptr() == held.untyped_storage().data_ptr()


def _add_biases(change: Change, shifts: Sequence[Tensor]) -> None:
    bias = own(change.module, "bias")
    if bias is None or not (shifts or change.biases):
        return
    work = torch.promote_types(bias.dtype, torch.float32)
    total = bias.to(work, copy=True)
    for shift in shifts:
        total += shift.to(work)
    for layer, scale in change.biases:
        total += layer.shift(bias).to(work) * scale
    bias.copy_(total)


def _merged_values(change: Change) -> tuple[Tensor, Tensor | None]:
    """The merged canonical weight and bias in float32, by each method's own rule; the module is not changed."""
    assert change.kind is not None or not change.parts
    module, kind = change.module, change.kind
    base = own(module, "bias")
    bias = None if base is None else base.detach().to(torch.promote_types(base.dtype, torch.float32), copy=True)
    weight = torch.zeros(0)
    if kind is not None:
        weight = kind.read(module)
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)
    for part in change.parts:
        if part.additive:
            adder = part.adder(weight.dtype)
            tiles.add(weight, [(adder.add, adder.tiled)], weight.dtype)
            if adder.bias is not None and bias is not None:
                bias = bias + adder.bias.to(bias.dtype)
        else:
            method = default_registry.method_of(part.record.config)
            weight, bias = method.merge(part.layer, weight, bias, where=repr(change.path))
    for trained, scale in change.biases:
        assert bias is not None
        assert base is not None
        bias = bias + trained.shift(base).to(bias.dtype) * scale
    return weight, bias


def _check_finite(change: Change, *values: object) -> None:
    for value in values:
        # On the meta device is what is not merged, where only that was read.
        if isinstance(value, Tensor) and not value.is_meta and not torch.isfinite(value).all():
            names = ", ".join(repr(part.record.name) for part in change.parts) or "a trained bias"
            raise StateError(
                f"Merging {names} into {change.path!r} gives values that are not finite. Nothing was changed; "
                "look at the adapter's parameters for nan or for scales out of range."
            )
