"""Names: which tensor of a checkpoint is which tensor of the model."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Names:
    """The names of a checkpoint's tensors, beside those of the model that it is loaded into.

    Attributes:
        of_model: for each name in the checkpoint the name in the model's state dict, where it is one tensor there.
        in_file: the reverse.
        fused: tensors of the model that are made at loading from others, such as experts that are stacked, with the
            names of those in the checkpoint.
        ignored: names in the checkpoint that belong to nothing in the model.
    """

    of_model: Mapping[str, str]
    in_file: Mapping[str, str]
    fused: Mapping[str, tuple[str, ...]]
    ignored: tuple[str, ...]


def match_names(model: nn.Module, names: Iterable[str]) -> Names:
    """Match a checkpoint's names with a model's as transformers does when it loads.

    Names may have been changed since (`gamma` for `weight`), may lack the base model's prefix (`"bert."`) or have it
    where the model does not, and several tensors may become one or one several.
    """
    known = set(model.state_dict(keep_vars=True))
    rename = _renaming(model, known)
    of_model: dict[str, str] = {}
    in_file: dict[str, str] = {}
    fused: dict[str, list[str]] = {}
    ignored = []
    for name in _in_loading_order(names):
        found, made = rename(name)
        for key in made:
            if key in known:
                fused.setdefault(key, []).append(name)
        if made:
            continue
        if found not in known or found in in_file:
            ignored.append(name)
        else:
            of_model[name], in_file[found] = found, name
    return Names(of_model, in_file, {k: tuple(v) for k, v in fused.items()}, tuple(ignored))


def _in_loading_order(names: Iterable[str]) -> list[str]:
    """As transformers sorts them: some of its renamings depend on what came before."""
    try:
        return sorted(names, key=importlib.import_module("transformers.core_model_loading").dot_natural_key)
    except (ModuleNotFoundError, AttributeError):
        return sorted(names)


# From a name in the checkpoint to one in the model, and to those in the model that it is converted into.
Renaming = Callable[[str], tuple[str, list[str]]]


def _renaming(model: nn.Module, known: set[str]) -> Renaming:
    prefix = getattr(model, "base_model_prefix", "")
    try:
        loading = importlib.import_module("transformers.core_model_loading")
        mapping = importlib.import_module("transformers.conversion_mapping")
    except ModuleNotFoundError:  # before transformers 5
        return lambda name: (_with_prefix(_old_renamed(model, name), prefix, known), [])
    if not hasattr(model, "config"):
        return lambda name: (name, [])
    conversions = mapping.get_model_conversion_mapping(model)
    renamings = [c for c in conversions if isinstance(c, loading.WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, loading.WeightConverter)]
    by_source = {source: c for c in converters for source in c.source_patterns}

    def rename(name: str) -> tuple[str, list[str]]:
        found, source = loading.rename_source_key(name, renamings, [], None, None)
        found, source = loading.rename_source_key(found, [], converters, None, None)
        if source is not None:
            first, *others = by_source[source].target_patterns
            made = [found, *(found.replace(first, other) for other in others)]
            placed = [_with_prefix(key, prefix, known) for key in made]
            if any(key in known for key in placed):
                return found, placed
        found = _with_prefix(found, prefix, known)
        return (found if found in known else _with_prefix(name, prefix, known)), []

    return rename


def _with_prefix(name: str, prefix: str, known: set[str]) -> str:
    """The name with the base model's prefix added or removed, if that is what the model has."""
    if not prefix or name in known:
        return name
    short = name.removeprefix(f"{prefix}.")
    return next((n for n in (short, f"{prefix}.{name}") if n in known), name)


def _old_renamed(model: Any, name: str) -> str:
    for ending, new in ((".gamma", ".weight"), (".beta", ".bias")):
        if name.endswith(f"LayerNorm{ending}"):
            name = name.removesuffix(ending) + new
    for pattern, new in (getattr(model, "_checkpoint_conversion_mapping", None) or {}).items():
        name, count = re.subn(pattern, new, name)
        if count:
            break
    return name
