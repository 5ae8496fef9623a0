"""Giving tensors to an adapter: which key is whose, judged by the adapter's own structure."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from adapterkit.contract import (
    BIASES,
    HEADS,
    SHARED,
    Method,
    file_key,
    split_memory_key,
    strip_file_prefix,
    unwrapped_key,
)
from adapterkit.errors import AdapterWarning, CheckpointError, StateError
from adapterkit.files.folder import AdapterFiles
from adapterkit.files.places import Slot, slots
from adapterkit.files.recognising import layers_of, passed_over
from adapterkit.model import Adapter, BaseModules
from adapterkit.results import LoadReport, Mismatch
from adapterkit.tensors import is_hooked, real_value, shape_of, uninterrupted, whole

# In a file's metadata: modules that have several paths are adapted under all of them.
EVERYWHERE = "adapterkit_every_path"
_BASE_LAYER = ".base_layer."


def to_file(adapter: Adapter, method: Method, source: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The adapter's tensors under the keys of PEFT's file format.

    Args:
        source: a full state dict of the model to take the values from; the model's own if `None`.
    """
    rule, places = method.key_rule(adapter.config), slots(adapter)
    if source is None:
        values = {key: real_value(slot.owner, slot.name) for key, slot in places.items()}
    else:
        check_tensors(source)
        found, _ = _from_full(adapter, source)
        others = sorted(found.keys() - places.keys() - source.keys())  # a module of the model may be called like ours
        if others:
            raise CheckpointError(
                f"The state dict has {len(others)} tensors of adapter {adapter.name!r} for which "
                f"the adapter on this model has no place, such as {others[0]!r}."
            )
        found = {key: found[key] for key in places if key in found}
        values = dict(zip(found, whole(list(found.values())), strict=True))
        lacking = sorted(key for key in set(places) - set(values) if not rule.derives(key))
        if lacking:
            raise CheckpointError(
                f"The state dict lacks {len(lacking)} of adapter {adapter.name!r}'s tensors, such as {lacking[0]!r}."
            )
    # Of the adapter layers and shared tensors: what the method's save rule is asked about.
    own = {key for key, slot in places.items() if slot.layer is not None} | set(adapter.shared or ())
    written = method.to_file(adapter.config, {k: v for k, v in values.items() if k in own and not rule.derives(k)})
    result = {file_key("", k) if k in rule.shared else _full_key(k): v for k, v in written.items()}
    return result | {_full_key(k): v for k, v in values.items() if k not in own}


def _full_key(key: str) -> str:
    return file_key(*key.rsplit(".", 1)) if "." in key else file_key("", key)


def _from_full(adapter: Adapter, source: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """This adapter's tensors in a full state dict, under their keys in a file, and the keys of no adapter."""
    known = {path: path for path in adapter.hosts}
    known |= {alias: path for path, aliases in adapter.aliases.items() for alias in aliases}
    found, others = {}, []
    for key, tensor in source.items():
        split = split_memory_key(key, adapter.name)
        if split is None:
            others.append(key)
            continue
        container, path, local = split
        path = unwrapped_key(path)
        path = known.get(path, known.get(path.removeprefix("module."), ""))
        if container == SHARED:
            found[local] = tensor
        elif path:
            inside = container in (HEADS, BIASES) and path in adapter.layers
            found[f"{path}{_BASE_LAYER if inside else '.'}{local}"] = tensor
        else:  # at a layer that this adapter has not
            found[key] = tensor
    return found, others


@dataclass
class Fit:
    """How given tensors fit an adapter, before anything is changed."""

    report: LoadReport
    values: list[tuple[Slot, Tensor]]


def fit(
    adapter: Adapter,
    method: Method,
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    *,
    from_file: bool = True,
    optional: Collection[str] = (),
    passed: Collection[str] = (),
) -> Fit:
    """Find the place of every given tensor.

    Args:
        tensors: keys as in a file, PEFT's prefix optional, or a full state dict of an adapted model.
        from_file: whether the prefix is still to be removed and the method's `from_file` to be asked.
        optional: keys that are not missed, and not reported either.
        passed: keys of other models, to be ignored.
    """
    check_tensors(tensors)
    rule = method.key_rule(adapter.config)
    places = slots(adapter)
    own, others = _from_full(adapter, tensors)
    base_keys: tuple[str, ...] = ()
    derived: tuple[str, ...] = ()
    if own.keys() & places.keys():  # a full state dict
        tensors, base_keys = own, tuple(others)
    else:
        if from_file:
            tensors, passed = _from_file(method, adapter, model, tensors)
        derived = tuple(key for key in tensors if key in places and rule.derives(key))
        tensors = {key: tensor for key, tensor in tensors.items() if key not in derived}
    values, mismatched, rest = _place(tensors, places | _aliased(adapter, places))
    given = {slot.key for slot, _ in values} | {m.key for m in mismatched} | set(derived) | set(optional)
    absent = [key for key in places if key not in given]
    ignored = tuple(k for k in rest if k in passed or equals_base(model, k, tensors[k]) or _is_head_again(k, adapter))
    report = LoadReport(
        missing=tuple(key for key in absent if not rule.may_lack(key)),
        unexpected=tuple(key for key in rest if key not in ignored),
        mismatched=tuple(mismatched),
        exempt=tuple(key for key in absent if rule.may_lack(key)),
        ignored=derived + ignored + base_keys,
    )
    return Fit(report, values)


def _place(
    tensors: Mapping[str, Tensor], places: Mapping[str, Slot]
) -> tuple[list[tuple[Slot, Tensor]], list[Mismatch], list[str]]:
    """Tensors with their slots, those of a shape that does not fit there, and the keys that have no slot."""
    values, mismatched, rest = [], [], []
    for key, tensor in tensors.items():
        slot = places.get(key)
        if slot is None:
            rest.append(key)
        elif not tensor.is_floating_point() and slot.tensor.is_floating_point():
            raise CheckpointError(
                f"{key!r} holds {tensor.dtype}, and floating numbers are needed: it is quantised, or damaged."
            )
        elif slot.tensor.shape != tensor.shape and not slot.takes(tensors, key):
            mismatched.append(Mismatch(key, tuple(tensor.shape), tuple(slot.tensor.shape)))
        else:
            values.append((slot, tensor))
    return values, mismatched, rest


def _from_file(
    method: Method, adapter: Adapter, model: nn.Module, tensors: Mapping[str, Tensor]
) -> tuple[Mapping[str, Tensor], set[str]]:
    """The tensors as the method reads them, and the keys that are other models' of a pipeline."""
    layers, given = layers_of(BaseModules(model)), strip_file_prefix(tensors)
    read = method.from_file(adapter.config, given, layers)
    return read, passed_over(given, read, layers)


def check_tensors(tensors: object) -> None:
    """Raise `CheckpointError` if this is no mapping from names to tensors with values."""
    if not isinstance(tensors, Mapping):
        raise CheckpointError(f"A state dict is a mapping from names to tensors, not a {type(tensors).__name__}.")
    for key, tensor in tensors.items():
        if not isinstance(key, str) or not isinstance(tensor, Tensor):
            raise CheckpointError(
                f"A state dict is a mapping from names to tensors; at {key!r} there is a {type(tensor).__name__}."
            )
        if tensor.is_meta:
            raise CheckpointError(f"The state dict has no values of {key!r}: it is on the meta device.")


def _aliased(adapter: Adapter, places: Mapping[str, Slot]) -> dict[str, Slot]:
    return {
        alias + key.removeprefix(path): slot
        for path, aliases in adapter.aliases.items()
        for key, slot in places.items()
        if key.startswith(path + ".")
        for alias in aliases
    }


def _is_head_again(key: str, adapter: Adapter) -> bool:
    """PEFT writes biases of heads twice more with `bias="all"`: the same value, and one that does not act."""
    return any(key.startswith((f"{path}.modules_to_save.", f"{path}.original_module.")) for path in adapter.heads)


def equals_base(model: nn.Module, key: str, tensor: Tensor) -> bool:
    """Whether a tensor under a key of the base model equals what the model has there."""
    *path, name = key.replace(_BASE_LAYER, ".").split(".")
    module: nn.Module | None = model
    for part in path:
        module = module._modules.get(part) if module is not None else None
    own = None if module is None else {**module._buffers, **module._parameters}.get(name)
    if own is None or shape_of(own) != tensor.shape or own.is_meta:
        return False
    wide = torch.float32 if tensor.is_floating_point() and tensor.dtype.itemsize == 1 else tensor.dtype
    return torch.equal(whole([own])[0].to(tensor.dtype).to(wide), tensor.to(own.device, wide))


def refuse(report: LoadReport, name: str, where: str) -> None:
    """Raise what a strict load raises when something does not fit.

    Raises:
        CheckpointError: always, naming the first keys of each sort.
    """
    reasons = []
    if report.missing:
        reasons.append("the adapter on this model needs tensors that are missing (another base, or other targets?)")
    if report.mismatched:
        reasons.append("some have other shapes (another base model size, or another rank?)")
    if report.unexpected:
        reasons.append("some belong to nothing on this model")
    raise CheckpointError(
        f"{where} does not fit adapter {name!r}: {'; '.join(reasons)}. Nothing was changed; strict=False loads what "
        f"fits.\n{report}"
    )


def put(
    values: Iterable[tuple[Slot, Tensor]], *, assign: bool, dtypes: Mapping[str, torch.dtype] | None = None
) -> None:
    """Move tensors to their places, all or none: assigned to a new adapter, copied into one that is in use.

    What is assigned has memory of its own. A file may hold one tensor under two keys, or a method read two of its
    tensors from one; training one of them must not change the other, and kernels round by where a tensor begins.
    """
    values = list(values)
    given = whole([tensor for _, tensor in values])
    values = [(slot, tensor) for (slot, _), tensor in zip(values, given, strict=True)]
    for slot, _ in values:
        if is_hooked(slot.owner) and slot.tensor.is_meta:
            raise StateError(
                f"{slot.key!r} is offloaded by accelerate, so nothing can be written there. Load the adapter first and "
                "offload the model then, or load it under another name."
            )
    undo: list[tuple[Slot, Tensor, Tensor | None]] = []
    taken: set[int] = set()
    with torch.no_grad(), uninterrupted():
        try:
            for slot, tensor in values:
                own = slot.tensor
                copied = not assign and own.shape == tensor.shape and not own.is_meta
                undo.append((slot, own, own.clone() if copied else None))
                if copied:
                    own.copy_(tensor)
                else:
                    device = tensor.device if own.is_meta else own.device
                    dtype = dtypes.get(slot.key, own.dtype) if dtypes else own.dtype
                    slot.assign(_apart(tensor.to(device, dtype).contiguous(), taken))
        except BaseException:
            for slot, own, value in undo:
                slot.restore(own)
                if value is not None:
                    own.copy_(value)
            raise


def _apart(value: Tensor, taken: set[int]) -> Tensor:
    """The tensor, or a copy of it if it is a part of other memory, or of memory that is taken."""
    storage = value.untyped_storage()
    if storage.nbytes() > value.nbytes or storage.data_ptr() in taken:
        value = value.clone()
    taken.add(value.untyped_storage().data_ptr())
    return value


def warn_of(files: AdapterFiles, adapter: Adapter, report: LoadReport) -> None:
    """Tell what does not fit, and that a file without `EVERYWHERE` may be PEFT's, trained for one path of a module."""
    folder = files.folder
    if not report.ok:
        warnings.warn(f"{folder}: {report}", AdapterWarning, stacklevel=5)
    for path, others in (
        adapter.aliases.items() if files.config is not None and EVERYWHERE not in files.metadata else ()
    ):
        if path in adapter.layers or path in {*adapter.heads} - adapter.tables:
            warnings.warn(
                f"{folder}: {path!r} is one module with {', '.join(map(repr, others))}, so its adapter acts under each "
                "of these paths. The file does not say that it was trained so: PEFT, which writes such files too, "
                "adapts the first path alone, and the outputs differ from PEFT's.",
                AdapterWarning,
                stacklevel=5,
            )
            return
