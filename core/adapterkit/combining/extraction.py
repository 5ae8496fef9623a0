"""Extraction: an adapter from the difference between the weights of two models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from adapterkit.combining import lowrank
from adapterkit.combining.new_adapter import Changes, check_can_result, check_finite
from adapterkit.contract import AdapterConfig, default_registry
from adapterkit.errors import SelectionError, StateError, UnsupportedError, UsageError
from adapterkit.kinds import Factors
from adapterkit.merging import obstacle
from adapterkit.model import LabelSet, Match, Selection
from adapterkit.results import CombineReport
from adapterkit.tensors import module_slots, seeded

# A weight with both sides longer than this is decomposed by randomised projection if a rank is given, because the cost
# of the exact decomposition grows with the cube of the shorter side.
_LARGE = 1024
_OVERSAMPLING, _ITERATIONS = 16, 4


def config_to_extract(
    rank: int | None, energy: float | None, to: str, *modules: str | Sequence[str] | None
) -> AdapterConfig:
    """A config of the method `to` for an extraction of this size.

    Args:
        modules: its `target_modules`, `exclude_modules` and `modules_to_save`.

    Raises:
        UsageError: not exactly one of `rank` and `energy` is given, or it is invalid; or the method cannot be a result.
    """
    lowrank.check_size(rank, energy)
    if rank is None and energy is None:
        raise UsageError("extract needs rank= or energy=: the exact difference of a full fine-tune has full rank.")
    method = default_registry.method(to)
    check_can_result(method)
    targets, excluded, saved = modules
    return method.config_type()(target_modules=targets, exclude_modules=excluded, modules_to_save=saved)


def extracted(  # noqa: PLR0913, PLR0917 - shared by extraction in memory and on files
    name: str,
    selection: Selection,
    layers: Callable[[Match], tuple[nn.Module, nn.Module]],
    rank: int | None,
    energy: float | None,
    to: str,
    heads: Mapping[str, nn.Module],
    tuned: nn.Module,
    store: MutableMapping[str, Factors] | None = None,
) -> tuple[Changes, CombineReport]:
    """The changes of the adapter that comes closest to the difference of two models.

    Args:
        layers: gives a target's layer in the base and in the tuned model.
        heads: copies of the tuned model's; `tuned` is that model, with or without values.
        store: keeps each target's result until all are known.
    """
    factors: MutableMapping[str, Factors] = {} if store is None else store
    errors, ranks, kinds = {}, {}, {}
    unchanged: dict[str, Factors] = {}
    clipped = lowrank.clipped(rank, {m.path: min(m.kind.out_features, m.kind.in_features) for m in selection.targets})
    for match in selection.targets:
        path = match.path
        made, error = _difference(match, *layers(match), rank, energy)
        if made.bias is None and not made.up.any():
            unchanged[path] = Factors(made.up[:, :1].clone(), made.down[:1].clone())
            continue
        errors[path] = error
        check_finite(name, path, *made[:3])
        factors[path], ranks[path], kinds[path] = made, made.rank, match.kind
    if not ranks:  # the models are the same, and so will the adapter's be
        for match in selection.targets:
            path, made = match.path, unchanged.pop(match.path)
            factors[path], ranks[path], kinds[path], errors[path] = made, made.rank, match.kind, 0.0
    clipped = tuple(path for path in clipped if path in ranks)
    held = {path: {local: slot.tensor for local, slot in module_slots(head)} for path, head in heads.items()}
    report = CombineReport(name, to, ranks, errors, tuple(heads), clipped, tuple(unchanged))
    return Changes(factors, kinds, heads=held, labels=LabelSet.of(tuned) if heads else None), report


def module_of(tuned: nn.Module, path: str) -> nn.Module:
    """The module of that path, or a `SelectionError`."""
    try:
        return tuned.get_submodule(path)
    except AttributeError as error:
        raise SelectionError(
            f"The tuned model has no module {path!r}, so it is not a fine-tune of the base."
        ) from error


def same_layer(tuned: nn.Module, match: Match) -> nn.Module:
    """The layer of the tuned model at a target of the base, or a `SelectionError`."""
    module = module_of(tuned, match.path)
    kind = default_registry.kind_of(module)
    if kind != match.kind:
        raise SelectionError(f"{match.path!r} is {match.kind} in the base, but {kind} in the tuned model.")
    return module


def _difference(
    match: Match, own: nn.Module, other: nn.Module, rank: int | None, energy: float | None
) -> tuple[Factors, float]:
    for module in (own, other):
        reason = None if is_parametrized(module, "weight") else obstacle(module, match.kind, match.kind.held(module))
        if reason is not None:
            raise UnsupportedError(f"{match.path!r} cannot be extracted: {reason}. Leave it out with exclude_modules.")
    before, after = (match.kind.read(m) for m in (own, other))
    if before.is_meta or after.is_meta:
        raise StateError(f"{match.path!r} is on the meta device. Both models must be in memory.")
    delta = lowrank.working(after).to(before.device) - lowrank.working(before)
    if not torch.isfinite(delta).all():
        raise StateError(f"The difference of the models at {match.path!r} has values that are not finite.")
    old, new = own._parameters.get("bias"), other._parameters.get("bias")
    bias = None
    if old is not None and new is not None and not torch.equal(old, new.to(old.device)):
        bias = lowrank.working(new).to(old.device) - lowrank.working(old)
    most = min(delta.shape)
    if rank is None or most <= _LARGE:
        u, s, vh = torch.linalg.svd(delta, full_matrices=False)
        return lowrank.keep(u, s, vh, bias, rank=rank, energy=energy)
    rank = min(rank, most)
    with seeded(0, [delta.device]) as begin:  # the same result at every call
        begin("extract")
        u, s, v = torch.svd_lowrank(delta, min(rank + _OVERSAMPLING, most), niter=_ITERATIONS)
    kept = lowrank.balanced(u[:, :rank], s[:rank], v[:, :rank].t())
    size = float(delta.norm())
    error = float((delta - kept.delta()).norm()) / size if size else 0.0
    return kept._replace(bias=bias), error
