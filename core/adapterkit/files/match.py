"""Matching given tensors with an adapter on a model: which tensors are its own, and which of them fit."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import takewhile

import torch
from torch import Tensor, nn

from adapterkit.contract import (
    SHARED,
    Method,
    default_registry,
    part_name,
    split_memory_key,
    unwrapped_key,
)
from adapterkit.errors import AdapterWarning, CheckpointError, warn
from adapterkit.formats import algorithms_in, in_names_of, layers_of
from adapterkit.forward import original_class
from adapterkit.model import Adapter, BaseModules, Fit, sort_for
from adapterkit.results import LoadReport
from adapterkit.tensors import Slot, module_slots, shape_of, whole

Values = list[tuple[Slot, Tensor]]


def file_places(adapter: Adapter) -> Iterator[tuple[str, str, Slot]]:
    """Each tensor of the adapter: its key in a file, PEFT's prefix left out; its key in the model; its place."""
    name = part_name(adapter.name)
    for container, path, module in adapter.parts():
        place = adapter.place_in_file(container, path)
        for local, slot in module_slots(module):
            yield f"{place}.{local}", f"{path}.{container}.{name}.{local}", slot
    if adapter.shared is not None:
        for local, slot in module_slots(adapter.shared):
            yield local, f"{SHARED}.{name}.{local}", slot


def from_model_keys(adapter: Adapter, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """This adapter's tensors in a full state dict, by their keys in a file, and the keys of no adapter."""
    known = {place: path for path in adapter.hosts for place in adapter.places(path)}
    found, others = {}, []
    for key, tensor in tensors.items():
        container, path, local = split_memory_key(key, adapter.name) or ("", "", "")
        path = unwrapped_key(path)
        path = known.get(path, known.get(path.removeprefix("module."), ""))
        if not container:
            others.append(key)
        elif container == SHARED:
            found[local] = tensor
        elif not path:  # at a layer that this adapter has not
            found[key] = tensor
        else:
            found[f"{adapter.place_in_file(container, path)}.{local}"] = tensor
    return found, others


def match_adapter(
    adapter: Adapter, method: Method, model: nn.Module, tensors: Mapping[str, Tensor]
) -> tuple[Values, LoadReport]:
    """The places of given tensors in an adapter; nothing is written.

    Args:
        tensors: keys as in a file, of any program, or a full state dict of an adapted model.
    """
    check_tensors(tensors)
    rule = method.key_rule(adapter.config)
    own, others = from_model_keys(adapter, tensors)
    if own.keys() & {key for key, _, _ in file_places(adapter)}:  # a full state dict
        tensors = own
    else:
        others, modules = [], BaseModules(model)
        tensors = in_names_of(tensors, modules)
        read = method.read(tensors, layers_of(modules), {}, adapter.config)
        tensors = tensors if read is None else read[1]
    fit = Fit(rule)
    found = sort_for(adapter, adapter.layers, tensors, rule, shared=adapter.shared is not None)
    values: Values = []
    for container, path, module in adapter.parts():
        values += fit.match(module, found.of(container, path), f"{adapter.place_in_file(container, path)}.")
    if adapter.shared is not None:
        values += fit.match(adapter.shared, found.shared, "")
    fit.add_rest(found)
    ignore_known_keys(fit, model, tensors)
    fit.ignored += others
    return values, fit.report()


def ignore_known_keys(fit: Fit, model: nn.Module, tensors: Mapping[str, Tensor], passed: Collection[str] = ()) -> None:
    """Ignore what has no place and needs none: keys of other models (`passed`), and what the base has already."""
    unexpected, fit.unexpected = fit.unexpected, []
    for key in unexpected:
        known = key in passed or (key in tensors and equals_base(model, key, tensors[key]))
        (fit.ignored if known else fit.unexpected).append(key)


def check_tensors(tensors: object) -> None:
    """Raise `CheckpointError` unless this is a mapping from names to tensors with values."""
    if not isinstance(tensors, Mapping):
        raise CheckpointError(f"A state dict is a mapping from names to tensors, not a {type(tensors).__name__}.")
    for key, tensor in tensors.items():
        if not isinstance(key, str) or not isinstance(tensor, Tensor):
            raise CheckpointError(
                f"A state dict is a mapping from names to tensors; at {key!r} there is a {type(tensor).__name__}."
            )
        if tensor.is_meta:
            raise CheckpointError(f"The state dict has no values of {key!r}: it is on the meta device.")


def of_base(model: nn.Module, key: str) -> Tensor | None:
    """What the model has under a key of a file."""
    *path, name = key.replace(".base_layer.", ".").split(".")
    module: nn.Module | None = model
    for part in path:
        module = module._modules.get(part) if module is not None else None
    return None if module is None else {**module._buffers, **module._parameters}.get(name)


def equals_base(model: nn.Module, key: str, tensor: Tensor) -> bool:
    """Whether a tensor under a key of the base model equals what the model has there."""
    own = of_base(model, key)
    return own is not None and not own.is_meta and same_values(own, tensor)


def same_values(own: Tensor, tensor: Tensor) -> bool:
    """Whether a tensor of the base equals one of a file, in the file's dtype."""
    if shape_of(own) != tensor.shape:
        return False
    wide = torch.float32 if tensor.is_floating_point() and tensor.dtype.itemsize == 1 else tensor.dtype
    return torch.equal(whole([own])[0].to(tensor.dtype).to(wide), tensor.to(own.device, wide))


def warn_of_misfit(where: object, report: LoadReport) -> None:
    """Warn of what does not fit, for a load that is not strict; `where` is what holds the tensors."""
    warn(AdapterWarning(f"{where}:", report))


def refuse(
    report: LoadReport,
    name: str,
    where: str,
    model: nn.Module | None = None,
    layers: Collection[str] = (),
    *,
    has_strict: bool = False,
) -> None:
    """Raise the `CheckpointError` of a strict load, which says why it does not fit and names the first keys.

    Args:
        layers: the paths of the adapter's layers.
        has_strict: whether the caller has an argument `strict`.
    """
    hint = "; strict=False loads what fits" if has_strict else ""
    whole = [key for key in report.unexpected if model is not None and of_base(model, key) is not None]
    causes = _causes(report, whole, model, layers)
    raise CheckpointError(
        f"{where} does not fit adapter {name!r}: {'; '.join(causes)}. Nothing was changed{hint}.", report
    )


def _causes(report: LoadReport, whole: Collection[str], model: nn.Module | None, layers: Collection[str]) -> list[str]:
    """What explains each sort of keys that does not fit; `whole`: unexpected tensors that the model itself has."""
    prefixes = _prefixes(report.missing, report.unexpected)
    if prefixes is not None:
        theirs, ours = (prefix.removesuffix(".") for prefix in prefixes)
        cure = "it is for another class of this model"
        if not theirs or not ours:
            inside = f"what this model has at {ours!r}" if ours else f"a model that has this one at {theirs!r}"
            cure = f"it is for {inside}: load it there"
        return [f"where this model's names begin with {ours!r}, the file's begin with {theirs!r}; {cure}"]
    causes = []
    if report.missing and all(key.endswith(".base_layer.bias") for key in report.missing):
        causes.append(
            "it lacks the biases that were trained: with bias='lora_only' PEFT 0.7 and some later versions did not "
            "save them, so they are lost"
        )
    elif report.missing:
        causes.append("the adapter on this model needs tensors that are missing (another base, or other targets?)")
    empty = [mismatch.key for mismatch in report.mismatched if 0 in mismatch.found]
    if empty:
        causes.append(
            f"{empty[0]!r} has no values ({len(empty)} such): it was saved under DeepSpeed's ZeRO-3 or FSDP, which had "
            "not gathered it, and only the checkpoints of that training have the values"
        )
    if len(report.mismatched) > len(empty):
        causes.append("some have other shapes (a base of another size, or another rank?)")
    if whole:
        causes.append(
            f"it holds {', '.join(map(repr, [*whole][:3]))} of the base in full, with other values. If these were "
            "trained with the adapter, name their modules in modules_to_save of its config"
        )
    algorithms, others = algorithms_in(key for key in report.unexpected if key not in whole)
    reasons = [no_layer(model, key, layers) for key in others if model is not None]
    known = list(dict.fromkeys(filter(None, reasons)))
    unknown = len(reasons) < len(others) or None in reasons
    return causes + algorithms + known[:1] + (["some belong to nothing on this model"] if unknown else [])


def no_layer(model: nn.Module, key: str, layers: Collection[str]) -> str | None:
    """Why a tensor of a file belongs to no layer of the adapter, where the model has a module; `None`: it has none.

    Args:
        layers: the paths of the adapter's layers.
    """
    path, module = "", model
    for part in key.split("."):
        inner = module._modules.get(part)
        if inner is None:
            break
        path, module = f"{path}.{part}" if path else part, inner
    if path in layers:
        return None
    if default_registry.kind_of(module) is not None:
        return (
            f"it has tensors for {path!r}, which its config does not select (target_modules, exclude_modules). Select "
            "the layer in the config, or take its tensors out of the file"
        )
    if not module._parameters:
        return None
    return (
        f"it has {key!r}, and {path!r} is a {original_class(module).__name__} here and has no such layers. An earlier "
        "version of transformers may have them (experts of a mixture, routers): merge the adapter there, or with PEFT, "
        "which converts such files"
    )


def _prefixes(missing: Sequence[str], unexpected: Sequence[str]) -> tuple[str, str] | None:
    """What all names of a file begin with where the model's begin otherwise, and what these begin with."""
    given = set(unexpected)
    for key in unexpected if missing else ():
        theirs, ours = key.split("."), missing[0].split(".")
        pairs = zip(reversed(theirs), reversed(ours), strict=False)
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))  # parts at the end
        there, here = ("".join(f"{part}." for part in parts[: len(parts) - same]) for parts in (theirs, ours))
        names = not any(part.isdecimal() for part in (there + here).split("."))  # else it is another layer of a stack
        if same and names and all(m.startswith(here) and there + m.removeprefix(here) in given for m in missing):
            return there, here
    return None
