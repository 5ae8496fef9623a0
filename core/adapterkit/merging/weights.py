"""Adding adapters to the weights, all or none, and restoring the weights bit for bit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from adapterkit.contract import BIASES
from adapterkit.errors import AdapterError, StateError
from adapterkit.forward import BiasLayer, Strength, give_dtypes_back
from adapterkit.merging.changes import (
    Change,
    check_finite,
    check_in_memory,
    give_own_memory,
    merge_module,
    merged_values,
    plan,
)
from adapterkit.merging.places import Place, own, put
from adapterkit.merging.tied_weights import Parting
from adapterkit.model import Adapter, BaseModules


@dataclass
class Kept:
    """A parameter or buffer as it was before a merge.

    Attributes:
        key: its name in messages.
        tensor: the tensor object that was there.
        value: its values, if kept. A tied tensor needs none, because the merge replaces it and writes to a copy.
        merged: the tensor object that the merge left there.
        writes: torch's count of writes to `merged` so far (`_version`); `None` once the base is back.
    """

    place: Place
    key: str
    tensor: Tensor
    value: Tensor | None
    merged: Tensor
    writes: int | None

    def is_now(self) -> None:
        """What the module has now is what the merge left there."""
        now = own(*self.place)
        if now is not None:
            self.merged, self.writes = now, _writes_to(now)

    @property
    def edited(self) -> bool:
        """Whether somebody has written to the merged tensor, or has put another one in its place."""
        now = own(*self.place)
        return self.writes is not None and (now is not self.merged or _writes_to(now) > self.writes)

    # In a copy of the model torch counts anew.

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "edited": self.edited}

    def __setstate__(self, state: dict[str, Any]) -> None:
        edited = state.pop("edited")
        vars(self).update(state)
        if self.writes is not None:
            self.writes = -2 if edited else _writes_to(self.merged)

    def give_back(self) -> None:
        """Put the same object back, with the same bits."""
        self.writes = None  # later writes change the base
        put(*self.place, self.tensor)
        if self.value is not None:
            with torch.no_grad():
                self.tensor.copy_(self.value)


@dataclass
class Step:
    """The merge of one module: what it changes, what was there before, and whether it is complete."""

    change: Change
    kept: list[Kept]
    whole: bool = False


@dataclass(frozen=True)
class Merged:
    """What is merged into a model.

    Attributes:
        names: the merged adapters, the first merged first.
        keeps_base: `unmerge` is possible.
        kept: the base's tensors.
        heads: the adapters that are merged into their own copy of a module.
        partings: the ties that were parted.
    """

    names: tuple[str, ...] = ()
    keeps_base: bool = True
    kept: dict[Place, Kept] = field(default_factory=dict)
    heads: frozenset[str] = frozenset()
    partings: tuple[Parting, ...] = ()

    @property
    def edited(self) -> list[str]:
        """The weights that somebody has written to since the merge."""
        return [kept.key for kept in self.kept.values() if kept.edited]

    def give_back(self) -> None:
        """Undo every merge. It may be called again if it raises."""
        for kept in self.kept.values():
            kept.give_back()
        for parting in reversed(self.partings):
            parting.undo()

    def give_up_lost(self) -> list[str]:
        """Forget the tensors in whose place there is one of another size, or none. Returns the keys of the latter."""
        computed = []
        for place, kept in [*self.kept.items()]:
            now, before = own(*place), kept.tensor if kept.value is None else kept.value
            if now is None:
                computed.append(kept.key)
            if now is None or not now.shape == before.shape == kept.tensor.shape:
                del self.kept[place]
        return computed

    def _joined(self, names: tuple[str, ...], steps: Sequence[Step], parting: Parting, *, keep_base: bool) -> Merged:
        """The record after a further merge. Each tensor keeps its values from before the first merge."""
        kept = dict(self.kept)
        for new in (new for step in steps for new in step.kept):
            first = kept.get(new.place, new)
            kept[new.place] = replace(first, value=first.value if keep_base else None)
            kept[new.place].is_now()
        heads = self.heads | {step.change.head for step in steps if step.change.head is not None}
        return Merged(self.names + names, self.keeps_base and keep_base, kept, heads, (*self.partings, parting))


@contextmanager
def merging(
    model: nn.Module,
    before: Merged,
    adapters: Sequence[Adapter],
    *,
    untie: bool,
    safe: bool,
    keep_base: bool,
    strengths: Mapping[str, Strength],
    stop: Sequence[object],
) -> Iterator[Merged]:
    """Merge adapters into a model, and undo that if the merge or the block raises.

    Args:
        before: what is merged already.
        untie: part weights that are tied.
        safe: raise if a merged value is not finite.
        keep_base: keep what is replaced. Otherwise it is kept only where the change cannot be subtracted again.
        strengths: what the changes of some adapters are multiplied by.
        stop: not empty once Ctrl-C was pressed. The merge then stops if it can be undone exactly.

    Yields:
        What is merged now.
    """
    modules = BaseModules(model)
    changes = plan(adapters, modules, untie=untie, scales=strengths)
    check_in_memory(changes)
    parted = {f"{p}.{name}" for c in changes for name in c.tied for p in modules.paths_of.get(c.module, [c.path])}
    parting = Parting.of(model, parted)
    unedited, steps = [kept for kept in before.kept.values() if not kept.edited], list[Step]()
    try:
        _carry_out(changes, steps, safe=safe, keep_base=keep_base, stop=stop)
        parting.apply()
        yield before._joined(tuple(a.name for a in adapters), steps, parting, keep_base=keep_base)
    except BaseException as error:
        parting.undo()
        note = _take_back(steps)
        for kept in unedited:  # writing a value back is not an edit
            kept.is_now()
        if isinstance(error, Exception) and not isinstance(error, AdapterError):
            where = f" into {steps[-1].change.path!r}" if steps else ""
            note = note or "Nothing was changed."
            raise StateError(f"Merging{where} failed ({type(error).__name__}: {error}). {note}") from error
        if note:
            error.add_note(note)
        raise


@torch.no_grad()
def _carry_out(
    changes: Sequence[Change], steps: list[Step], *, safe: bool, keep_base: bool, stop: Sequence[object]
) -> None:
    """Merge, module by module; each is in `steps`, with what was there before, when it begins."""
    for change in changes if safe and not keep_base else ():
        check_finite(change, *merged_values(change))
    for change in changes:
        if stop and keep_base:
            raise KeyboardInterrupt
        module, touched = change.module, change.touched
        copied = keep_base or change.general or (change.kind is not None and change.kind.vouches)
        step = Step(change, [])
        for name, tensor in touched.items():
            value = tensor.detach().clone() if copied and name not in change.tied else None
            place, key = Place(module, name), f"{change.path}.{name}"
            step.kept.append(Kept(place, key, tensor, value, merged=tensor, writes=_writes_to(tensor)))
        steps.append(step)
        biases = module._modules.get(BIASES)
        for layer in biases.children() if biases is not None and "bias" in touched else ():
            assert isinstance(layer, BiasLayer)
            layer.keep_base(touched["bias"])
        give_own_memory(change)
        merge_module(change, safe=safe)
        step.whole = True


@torch.no_grad()
def _take_back(steps: Sequence[Step]) -> str:
    """Undo the changes; the last one may be incomplete. Returns what could not be undone exactly, or an empty text."""
    lost, subtracted = "", 0
    for step in reversed(steps):
        change = step.change
        unkept = [kept for kept in step.kept if kept.value is None and kept.place.name not in change.tied]
        written = any(_writes_to(kept.tensor) != kept.writes for kept in unkept)
        for kept in step.kept:
            kept.give_back()
        if written and not step.whole:
            lost = change.path
        elif written:
            opposite = [replace(part, scale=-part.scale) for part in change.parts]
            merge_module(replace(change, parts=opposite, biases=[(layer, -scale) for layer, scale in change.biases]))
            subtracted += 1
    if lost:
        return f"{lost!r} is partly merged, and with keep_base=False its base is gone: load the base model again."
    if subtracted:
        return (
            f"Nothing is merged. With keep_base=False the base is not kept, so the changes of {subtracted} layers were "
            "subtracted again, and their last bits may differ."
        )
    return ""


def _writes_to(tensor: Tensor) -> int:
    """Torch's count of writes to a tensor. It does not count under `inference_mode`."""
    return -1 if tensor.is_inference() else tensor._version


def take_heads(adapters: Sequence[Adapter], model: nn.Module) -> None:
    """Make the adapters' heads the model's own modules; the last one's where several have one."""
    heads = {adapter.hosts[path]: head for adapter in adapters for path, head in adapter.heads.items()}
    for module, head in heads.items():
        give_dtypes_back(head, module)
        hooks = {name: held for name, held in vars(module).items() if "_hook" in name and name != "_hf_hook"}
        vars(head).update(hooks)  # the user's, with the handles that remove them
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in heads:
                parent._modules[name] = heads[child]
