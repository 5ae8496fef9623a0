"""Adding adapters to the weights, and restoring the weights bit for bit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from adapterkit.contract import BIASES, default_registry
from adapterkit.errors import AdapterError, StateError
from adapterkit.forward import BiasLayer, give_dtypes_back
from adapterkit.kinds import LayerKind, tiles
from adapterkit.merging.changes import Change, Part, check_in_memory, parted_names, plan
from adapterkit.merging.obstacles import own, put
from adapterkit.merging.tied_weights import Parting
from adapterkit.model import Adapter, BaseModules


@dataclass
class Kept:
    """The parameters and buffers of one module from before a merge.

    Attributes:
        tensors: the tensor objects.
        values: their values, if kept. Tied tensors need none, because the merge replaces them and writes to a copy.
        versions: torch's counts of writes to them.
        merged: the counts of writes to the tensors that act now, from when the merge was done.
        whole: the merge of this module is complete.
    """

    module: nn.Module
    path: str
    tensors: dict[str, Tensor]
    values: dict[str, Tensor]
    versions: dict[str, int] = field(default_factory=dict)
    merged: dict[str, int] = field(default_factory=dict)
    whole: bool = False

    @property
    def edited(self) -> list[str]:
        """Tensors that somebody, such as an optimizer or `load_state_dict`, has written to since the merge."""
        now = {name: own(self.module, name) for name in self.merged}
        # In a copy of the model the counts begin at 0.
        return [f"{self.path}.{n}" for n, t in now.items() if t is not None and version_of(t) > self.merged[n]]

    def leave_resized(self) -> None:
        """Forget the tensors that were replaced by larger or smaller ones."""
        for name, tensor in list(self.tensors.items()):
            now, value = own(self.module, name), self.values.get(name, tensor)
            if now is None or now.shape != value.shape or tensor.shape != value.shape:
                del self.tensors[name]

    def give_back(self) -> None:
        """Put the same objects back, with the same bits."""
        self.merged = {}  # later writes change the base
        for name, tensor in self.tensors.items():
            put(self.module, name, tensor)
            if name in self.values:
                with torch.no_grad():
                    tensor.copy_(self.values[name])

    def joined(self, later: Kept) -> Kept:
        """What was before both merges; `self` is from the first one."""
        first = later.tensors.keys() - self.tensors.keys()
        values = {name: value for name, value in later.values.items() if name in first}
        return Kept(self.module, self.path, later.tensors | self.tensors, values | self.values)


Done = list[tuple[Change, Kept]]


@dataclass(frozen=True)
class Merged:
    """What is merged into a model.

    Attributes:
        names: the merged adapters, the first merged first.
        keeps_base: `unmerge` is possible.
        kept: the base's tensors, by module.
        heads: the adapters that are merged into their own copy of a module.
        partings: the ties that were parted.
    """

    names: tuple[str, ...] = ()
    keeps_base: bool = True
    kept: dict[nn.Module, Kept] = field(default_factory=dict)
    heads: frozenset[str] = frozenset()
    partings: tuple[Parting, ...] = ()

    @property
    def edited(self) -> list[str]:
        """Weights that somebody has written to since the merge."""
        return [name for kept in self.kept.values() for name in kept.edited]

    def give_back(self) -> None:
        """Undo every merge. It may be called again if it raises."""
        for kept in self.kept.values():
            kept.give_back()
        for parting in reversed(self.partings):
            parting.undo()

    def _joined(self, names: tuple[str, ...], done: Done, parting: Parting, *, keep_base: bool) -> Merged:
        """What is merged after a further merge."""
        kept = dict(self.kept)
        for change, whole in done:
            new = whole if keep_base else Kept(whole.module, whole.path, whole.tensors, {})
            kept[change.module] = kept[change.module].joined(new) if change.module in kept else new
            kept[change.module].merged = {name: version_of(tensor) for name, tensor in change.touched.items()}
        heads = self.heads | {change.head for change, _ in done if change.head is not None}
        return Merged(self.names + names, self.keeps_base and keep_base, kept, heads, (*self.partings, parting))

    def _count_again(self, edited: Sequence[str]) -> None:
        """The state after an undone merge: its own writes do not count as edits. `edited` was edited before it."""
        for kept in self.kept.values():
            for name in [n for n in kept.merged if f"{kept.path}.{n}" not in edited]:
                tensor = own(kept.module, name)
                if tensor is not None:
                    kept.merged[name] = version_of(tensor)


@contextmanager
def merging(
    model: nn.Module,
    before: Merged,
    adapters: Sequence[Adapter],
    *,
    untie: bool,
    safe: bool,
    keep_base: bool,
    stop: Sequence[object],
) -> Iterator[Merged]:
    """Merge adapters into a model, and undo that if the merge or the block raises.

    Args:
        before: what is merged already.
        untie: part weights that are tied.
        safe, keep_base, stop: see `carry_out`.

    Yields:
        What is merged now.
    """
    modules, done = BaseModules(model), Done()
    changes = plan(adapters, modules, untie=untie)
    check_in_memory(changes)
    parting = Parting.of(model, parted_names(changes, modules))
    edited = before.edited
    try:
        carry_out(changes, done, safe=safe, keep_base=keep_base, stop=stop)
        parting.apply()
        yield before._joined(tuple(a.name for a in adapters), done, parting, keep_base=keep_base)
    except BaseException as error:  # noqa: BLE001 - raised again
        parting.undo()
        raised = take_back(done, error)
        before._count_again(edited)
        raise raised from (None if raised is error else error)


@torch.no_grad()
def carry_out(
    changes: Sequence[Change], done: Done, *, safe: bool, keep_base: bool, stop: Sequence[object] = ()
) -> None:
    """Merge. If it raises, `take_back` undoes it.

    Args:
        done: gets each change when it begins, with what was before.
        safe: raise if a merged value is not finite.
        keep_base: keep what is replaced. Otherwise it is kept only where the change cannot be subtracted again.
        stop: not empty once Ctrl-C was pressed. The merge then stops if it can be undone exactly.
    """
    for change in changes if safe and not keep_base else ():
        _check_finite(change, *_merged_values(change))
    for change in changes:
        if stop and keep_base:
            raise KeyboardInterrupt
        values = keep_base or change.general or (change.kind is not None and change.kind.vouches)
        kept = _kept(change, values=values)
        done.append((change, kept))
        _begin(change)
        merge_module(change, safe=safe)
        kept.whole = True


def take_back(done: Done, error: BaseException) -> BaseException:
    """Undo `carry_out`, which raised `error`. Returns the error to raise, which says what became of the weights."""
    lost, subtracted = _take_back(done)
    note = "Nothing was changed."
    if lost:
        note = f"{lost!r} is partly merged, and with keep_base=False its base is gone: load the base model again."
    elif subtracted:
        note = (
            f"Nothing is merged. With keep_base=False the base is not kept, so the changes of {subtracted} layers were "
            "subtracted again, and their last bits may differ."
        )
    if isinstance(error, Exception) and not isinstance(error, AdapterError):
        where = f" into {done[-1][0].path!r}" if done else ""
        return StateError(f"Merging{where} failed ({type(error).__name__}: {error}). {note}")
    if lost or subtracted:
        error.add_note(note)
    return error


@torch.no_grad()
def _take_back(done: Done) -> tuple[str, int]:
    """Undo the changes. The last one may be incomplete.

    Returns:
        The path of a module that cannot be restored, and how many were restored by subtraction.
    """
    lost, subtracted = "", 0
    for change, kept in reversed(done):
        kept.give_back()
        unkept = kept.tensors.keys() - kept.values.keys() - change.tied.keys()
        if not any(version_of(kept.tensors[name]) != kept.versions[name] for name in unkept):
            continue
        if not kept.whole:
            lost = change.path
            continue
        opposite = [replace(part, scale=-part.scale) for part in change.parts]
        merge_module(replace(change, parts=opposite, biases=[(layer, -scale) for layer, scale in change.biases]))
        subtracted += 1
    return lost, subtracted


def take_heads(adapters: Sequence[Adapter], model: nn.Module) -> None:
    """Make the adapters' heads the model's own modules; the last one's where several have one."""
    heads = {adapter.hosts[path]: head for adapter in adapters for path, head in adapter.heads.items()}
    for module, head in heads.items():
        give_dtypes_back(head, module)
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in heads:
                parent._modules[name] = heads[child]


def _kept(change: Change, *, values: bool) -> Kept:
    touched = change.touched
    copied = {name: t.detach().clone() for name, t in touched.items() if values and name not in change.tied}
    return Kept(change.module, change.path, touched, copied, {name: version_of(t) for name, t in touched.items()})


def _begin(change: Change) -> None:
    """Let trained biases keep their base, and give the module tensors of its own where they are tied."""
    touched = change.touched
    biases = change.module._modules.get(BIASES)
    for layer in biases.children() if biases is not None and "bias" in touched else ():
        assert isinstance(layer, BiasLayer)
        layer.keep_base(touched["bias"])
    for name in change.tied:
        with torch.inference_mode(False):  # it may be trained later
            fresh = touched[name].detach().clone()
        is_parameter = isinstance(touched[name], nn.Parameter)
        put(change.module, name, nn.Parameter(fresh, touched[name].requires_grad) if is_parameter else fresh)


def version_of(tensor: Tensor) -> int:
    """Torch's count of writes to a tensor. It does not count under `inference_mode`."""
    return -1 if tensor.is_inference() else tensor._version


@torch.no_grad()
def merge_module(change: Change, *, safe: bool = False) -> None:
    """Write the merged weight and bias of one module, rounded once from float32 (float64 for float64).

    Raises:
        StateError: with `safe`, a value is not finite. It is written already.
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
    """`W += sum of dW_i`, tile by tile, without a dense delta. Returns the shifts of the bias."""
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
    """The merged canonical weight and bias in float32, by the methods' merge rules. The module does not change."""
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
            method = default_registry.method_of(part.adapter.config)
            weight, bias = method.merge(part.layer, weight, bias, where=repr(change.path))
    for trained, scale in change.biases:
        assert bias is not None
        assert base is not None
        bias = bias + trained.shift(base).to(bias.dtype) * scale
    return weight, bias


def _check_finite(change: Change, *values: object) -> None:
    for value in values:
        # What is not merged may be on the meta device.
        if isinstance(value, Tensor) and not value.is_meta and not torch.isfinite(value).all():
            names = ", ".join(repr(part.adapter.name) for part in change.parts) or "a trained bias"
            raise StateError(
                f"Merging {names} into {change.path!r} gives values that are not finite. Nothing was changed; "
                "look at the adapter's parameters for nan or for scales out of range."
            )
