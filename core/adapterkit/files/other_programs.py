"""Reading files of other programs: which part of a pipeline a model is, and which method a file belongs to."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from adapterkit.contract import (
    DISABLE_VARIABLE,
    DOTTED,
    FILE_PREFIX,
    AdapterConfig,
    Method,
    component,
    default_registry,
)
from adapterkit.errors import AdapterError, AdapterWarning, CheckpointError, PluginError
from adapterkit.files.folder import CONFIG_FILE
from adapterkit.kinds import LayerKind
from adapterkit.model import BaseModules, layer_tensors


def layers_of(modules: BaseModules) -> dict[str, LayerKind]:
    """Every layer of the model that can hold an adapter, by the path it is known by."""
    return kinds_of({paths[0]: module for module, paths in modules.paths_of.items()})


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same shapes and dtypes on the meta device, of those keys that can be a tensor's of some module."""
    may_be = [key for key in tensors if all(part and not hasattr(nn.Module, part) for part in key.split("."))]
    return {key: torch.empty_like(tensors[key], device="meta") for key in may_be}


def kinds_of(modules: Mapping[str, nn.Module] | None) -> dict[str, LayerKind]:
    """What each of these modules is, of those that can hold an adapter."""
    kinds = {path: default_registry.kind_of(module) for path, module in (modules or {}).items()}
    return {path: kind for path, kind in kinds.items() if kind is not None}


def named_layers(tensors: Mapping[str, Tensor], file: Path, *, keep_names: bool) -> dict[str, LayerKind]:
    """The layers of another program's file, of any method, from its keys alone.

    Args:
        keep_names: call each layer what the file does; else by its path, without the part of a pipeline.

    Raises:
        CheckpointError: the file is for several models, or its names do not tell the layers' paths.
    """
    found: dict[str, LayerKind] = {}
    for name in default_registry.methods():
        try:
            found |= kinds_of(default_registry.method(name).layers_in_file(shapes_of(tensors), None))
        except PluginError:  # `recognise` tells of it, if nobody else knows the file
            continue
    if keep_names:
        return found
    parts = {component(name) for name in found}
    if len(parts) > 1:
        listed = ", ".join(map(repr, sorted(parts - {""})))
        raise CheckpointError(f"{file} is for several models of a pipeline: {listed}. Say component=.")
    flat = next((name for name in found if component(name) not in ("", *DOTTED)), None)
    if flat is not None:
        raise CheckpointError(
            f"{file}: its names, such as {flat!r}, have '_' for '.', so the layers' paths cannot be told from "
            "them. Give base=, the model that it is for."
        )
    return {name.removeprefix(f"{component(name)}.") if component(name) else name: k for name, k in found.items()}


def of_component(tensors: Mapping[str, Tensor], part: str | None) -> dict[str, Tensor]:
    """The tensors of one part of a pipeline; all of them for `None`.

    Raises:
        CheckpointError: there are none.
    """
    kept = {key: tensor for key, tensor in tensors.items() if part is None or component(key) == part}
    if tensors and not kept:
        held = sorted({component(key) for key in tensors} - {""})
        raise CheckpointError(
            f"The file holds nothing of component {part!r}. Its components: {', '.join(map(repr, held)) or 'none'}."
        )
    return kept


def keys_of_other_parts(
    tensors: Mapping[str, Tensor], read: Mapping[str, Tensor], layers: Mapping[str, LayerKind]
) -> set[str]:
    """The keys of pipeline parts for which the method found no layer on this model."""
    own = {path.partition(".")[0] for path in layers}  # GPT-2 has a module called `transformer`
    parts = {key: component(key) for key in tensors}
    found = {part for key, part in parts.items() if key not in read}
    other = set(parts.values()) - found - own - {""}
    return {key for key, part in parts.items() if part in other}


def check_foreign(tensors: Iterable[str], file: Path) -> None:
    """Raise `CheckpointError` if a file has the weights of a PEFT folder, and came without its config."""
    if any(key.startswith(FILE_PREFIX) for key in tensors):
        raise CheckpointError(
            f"{file} has PEFT's keys; the scaling that goes with them is in its {CONFIG_FILE}. Give the "
            "folder that holds both."
        )


def recognise(
    tensors: Mapping[str, Tensor], layers: Mapping[str, LayerKind], metadata: Mapping[str, str], file: Path
) -> tuple[Method, AdapterConfig, Mapping[str, Tensor]]:
    """The method of a file that has no config, and its config and tensors in PEFT's format. Asks every method.

    Raises:
        CheckpointError: none of them knows it, or several do.
    """
    found: list[tuple[Method, AdapterConfig, Mapping[str, Tensor]]] = []
    asked, broken, refused = [], [], []
    for name in default_registry.methods():
        try:
            method = default_registry.method(name)
            read = method.read(tensors, layers, metadata)
        except PluginError as error:
            broken.append(str(error))
        except AdapterError as error:
            refused.append((name, error))
        else:
            asked.append(name)
            found += [] if read is None else [(method, *read)]
    if len(found) + len(refused) > 1:  # some may merely say that the file is theirs
        found = [(m, c, own) for m, c, own in found if layer_tensors(own, m.key_rule(c), layers)]
    if refused and not found:
        raise refused[0][1]
    broken += [f"The method {name!r} refuses it: {error}" for name, error in refused]
    if len(found) == 1:
        for fault in broken:
            warnings.warn(f"{file}: a method could not be asked about it. {fault}", AdapterWarning, stacklevel=6)
        return found[0]
    names = [method.name for method, *_ in found]
    what = f"{file} has no {CONFIG_FILE}, and no method finds layers of its own in it that this model has."
    if names:
        what = (
            f"{file} holds layers of several methods: {', '.join(names)}. Split it into one file for each. Where "
            f"one of them takes a file that is another's, switch it off: {DISABLE_VARIABLE}={names[-1]}."
        )
    lines = [
        what,
        f"Methods asked: {', '.join(asked) or 'none'}.",
        f"Keys in the file: {', '.join(map(repr, list(tensors)[:3])) or 'none'}.",
        f"Layers of the model: {', '.join(map(repr, list(layers)[:3])) or 'none'}.",
        *(f"Not asked: {fault}" for fault in broken),
    ]
    raise CheckpointError(" ".join(lines))
