"""State dicts of wrapped models: names that PEFT, DDP, torch.compile and others put into their keys."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapterkit.contract import FILE_PREFIX, default_registry, unwrapped_key
from adapterkit.errors import CheckpointError
from adapterkit.formats.layouts import AdapterFiles, beginnings
from adapterkit.formats.refused import check_loaded
from adapterkit.kinds import LayerKind

# PEFT calls an adapter "default", and diffusers "default_0", between the name of its parameter and "weight".
_NAME = re.compile(r"default(?:_\d+)?")
# PEFT's outermost name, which shared tensors have alone.
_BASE = "base_model."
# Models that hold the one that is trained: DDP's, and the pipelines of DiffSynth.
_WRAPPERS = ("module.", "pipe.dit.")
# Those that PEFT has adapted together with what they hold, and PEFT's own below its outermost.
_INNER = ("module.", _BASE)
# A head that PEFT trains, and the base's own beside it.
_HEAD, _ORIGINAL = ".modules_to_save", ".original_module."
# Where training scripts keep the tensors in what they save, beside an optimizer's state, an epoch and the like.
_INSIDE = (
    *("state_dict", "model_state_dict", "model_state", "model", "module", "lora_state_dict", "lora", "adapter"),
    *("network", "params"),
)
_DEPTH = 4


def tensors_in(loaded: Any, file: Path) -> dict[str, Tensor]:
    """The tensors by name in what `torch.load` gave: a state dict, or one that a training script put inside others.

    Raises:
        CheckpointError, UnsupportedError: it is neither, and what it is.
    """
    held = loaded
    for _ in range(_DEPTH):
        inside = {} if not isinstance(held, Mapping) or any(isinstance(v, Tensor) for v in held.values()) else held
        held = next((inside[name] for name in _INSIDE if isinstance(inside.get(name), Mapping)), held)
    check_loaded(held, file)
    if not isinstance(held, Mapping) or not all(
        isinstance(key, str) and isinstance(value, Tensor) and value.layout == torch.strided
        for key, value in held.items()
    ):
        raise CheckpointError(f"{file} holds no mapping from names to tensors.")
    return dict(held)


def unwrapped(files: AdapterFiles, layers: Mapping[str, LayerKind] | None) -> AdapterFiles:
    """Clean the keys of a state dict that a training script dumped: `module.base_model.model.x.lora_A.default.weight`.

    It takes away what wrappers put before a key (`module.`) or into it (`_orig_mod.`), whatever stands before PEFT's
    prefix, a second such prefix, and the adapter's name. Files without these are given back as they are.

    Raises:
        CheckpointError: two keys are for one place.
    """
    tensors, before, known = dict[str, Tensor](), dict[str, str](), layers or {}
    outer, name = _outer(files.tensors, known), _name_in(files)
    doubled = not any(path.startswith(FILE_PREFIX) for path in known)  # a module may be called `base_model`
    heads = {key.partition(_HEAD)[0] for key in files.tensors if _HEAD in key}
    for key, tensor in files.tensors.items():
        if _ORIGINAL in key and key.partition(_ORIGINAL)[0] in heads:
            continue
        short = unwrapped_key(key.removeprefix(outer))
        while doubled and short.startswith(FILE_PREFIX * 2):
            short = short.removeprefix(FILE_PREFIX)
        short = _without_name(short, name)
        if short in tensors:
            raise CheckpointError(
                f"{files.folder}: both {before[short]!r} and {key!r} are for {short!r}, so it holds several "
                "adapters. Save the one that you mean with PEFT's save_pretrained(selected_adapters=[...])."
            )
        tensors[short], before[short] = tensor, key
    tensors = _without_inner(tensors, known)
    if tensors.keys() == files.tensors.keys():
        return files
    # A state dict has shared tensors, such as VeRA's projections, again at each layer.
    shared = {key.removeprefix(_BASE): t for key, t in tensors.items() if key.count(".") == 1 and key.startswith(_BASE)}
    once = {}
    for key, tensor in tensors.items():
        own = shared.get(key.rpartition(".")[2])
        if own is None or key.count(".") == 1 or not torch.equal(own, tensor):
            once[key] = tensor
    return files.read_as("a wrapped model's state dict", once)


def _without_inner(tensors: dict[str, Tensor], layers: Mapping[str, LayerKind]) -> dict[str, Tensor]:
    """Without wrappers' names between PEFT's prefix and the paths of the model, if every key has them."""
    shared = {key for key in tensors if key.count(".") == 1 and key.startswith(_BASE)}
    rest = {key: key.removeprefix(FILE_PREFIX) for key in tensors if key not in shared}
    inner = ""
    while all(layers.keys().isdisjoint(beginnings(key.removeprefix(inner))) for key in rest.values()):
        wrapper = next((w for w in _INNER if all(key.startswith(inner + w) for key in rest.values())), None)
        if wrapper is None or not rest or not layers:
            return tensors
        inner += wrapper
    named = {key: key.removesuffix(short) + short.removeprefix(inner) for key, short in rest.items()}
    return {named.get(key, key): tensor for key, tensor in tensors.items()}


def _name_in(files: AdapterFiles) -> str | None:
    """The adapter's name, if every tensor of the method has it behind its own name: `lora_A.mine.weight`."""
    if files.config is None or "peft_type" not in files.config:
        return None
    method = default_registry.claim(files.config, files.folder)
    rule, found = method.key_rule(method.config_type()()), list[set[str]]()
    for key in files.tensors:
        parts = key.split(".")[-3:]
        behind = {after for part, after in pairwise(parts) if rule.owns(part)} - {"weight", "bias"}
        if behind or any(map(rule.owns, parts)):
            found.append(behind)
            if not behind:  # as a rule with the first key
                return None
    common = set.intersection(*found) if found else set()
    return next(iter(common), None)


def _without_name(key: str, name: str | None) -> str:
    """A key without the adapter's name, which follows a parameter (`lora_A.default.weight`) or `modules_to_save`.

    Args:
        name: one that is in every key; those that PEFT and diffusers give are taken away without.
    """
    parts = key.split(".") if name is not None or "default" in key else []
    for i in range(1, len(parts)):
        if (parts[i] == name or _NAME.fullmatch(parts[i])) and "_" in parts[i - 1]:
            return ".".join(parts[:i]).removesuffix(_HEAD) + "".join(f".{part}" for part in parts[i + 1 :])
    return key


def _outer(tensors: Mapping[str, Tensor], layers: Mapping[str, LayerKind]) -> str:
    """What wrappers put before every key: `module.`, or a path before PEFT's prefix; never a path of the model."""
    first = next((key for key in tensors if FILE_PREFIX in key), next(iter(tensors), ""))
    prefix = FILE_PREFIX if FILE_PREFIX in first else ""
    outer = first[: first.index(prefix)]
    while not prefix and (wrapper := next((w for w in _WRAPPERS if first.startswith(outer + w)), None)):
        outer += wrapper
    shared = all(key.startswith(outer) for key in tensors if prefix in key)
    return outer if shared and not any(f"{path}.".startswith(outer + prefix) for path in layers) else ""
