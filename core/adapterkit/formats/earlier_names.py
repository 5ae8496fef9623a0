"""Names that transformers gave a model's layers in earlier versions, or gives them with another head or none.

transformers has a table of them for each class, by which it reads old checkpoints. Adapters are read by it too.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from adapterkit.contract import AdapterConfig, KeyRule, exactly
from adapterkit.errors import AdapterError, CheckpointError
from adapterkit.formats.layouts import beginnings
from adapterkit.kinds import LayerKind
from adapterkit.model import BaseModules, layer_tensors, select_on

# What `inspect` says of a file with such names.
EARLIER = "in names of an earlier transformers"
Rename = Callable[[str], tuple[str, list[str]]]


def todays_paths(modules: BaseModules, keys: Iterable[str], *, other_class: bool) -> dict[str, str]:
    """The modules that these keys call otherwise than the model, with the model's own paths.

    Args:
        keys: without PEFT's prefix.
        other_class: also names that differ only by the prefix of the model without a head (`"model."`, `"bert."`).
    """
    if not hasattr(type(modules.model), "base_model_prefix"):
        return {}
    known = set(modules.all_paths)
    leaves = {path for module, paths in modules.paths_of.items() if not module._modules for path in paths}
    places = {key: beginnings(key) for key in keys}
    unknown = [key for key in places if leaves.isdisjoint(places[key])]
    if not unknown:
        return {}
    rename = renaming(modules.model, {f"{path}.weight" for path in known}, other_class=other_class)
    found: dict[str, str] = {}
    for key in in_order(unknown):
        for path in places[key]:
            if path in known or path in found:
                break
            today = rename(f"{path}.weight")[0].removesuffix(".weight")
            if today in known:
                found[path] = today
                break
    return found


def in_todays_names(tensors: Mapping[str, Tensor], moved: Mapping[str, str]) -> dict[str, Tensor]:
    """The same tensors, with today's paths of the modules in their keys.

    Raises:
        CheckpointError: a tensor is there under both names.
    """
    found: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        path = next((path for path in beginnings(key) if path in moved), None)
        today = key if path is None else moved[path] + key.removeprefix(path)
        if today in found:
            raise CheckpointError(
                f"There are two tensors for {today!r}: under its name of today and under one of an earlier version of "
                "transformers."
            )
        found[today] = tensor
    return found


def with_todays_names(
    config: AdapterConfig,
    rule: KeyRule,
    tensors: Mapping[str, Tensor],
    moved: Mapping[str, str],
    modules: BaseModules,
    layers: Mapping[str, LayerKind],
) -> AdapterConfig:
    """The config of an adapter whose keys have been renamed: it selects the layers that the tensors are for.

    Args:
        tensors: by their keys in today's names.
        moved: see `todays_paths`.
    """
    if not moved:
        return config
    earlier, paths = config, layer_tensors(tensors, rule, layers)
    before = {today: path for path, today in moved.items()}
    fields: dict[str, Any] = {}
    for name in ("target_modules", "exclude_modules", "modules_to_save"):
        if isinstance(held := getattr(config, name), tuple):
            fields[name] = tuple(dict.fromkeys(_todays(entry, moved) for entry in held))
    for name in config.patterns:
        fields[name] = {moved.get(entry, entry): value for entry, value in (getattr(config, name) or {}).items()}
    config = selecting(config.replace(**fields), paths, modules, layers)
    values = {
        own: {path: getattr(earlier.at(before.get(path, path)), own) for path in paths}
        for own in config.patterns.values()
    }
    if all(getattr(config.at(path), own) == value for own in values for path, value in values[own].items()):
        return config
    found = type(config).with_values(values)
    return config.replace(**{name: getattr(found, name) for name in (*values, *config.patterns)})


def _todays(name: str, moved: Mapping[str, str]) -> str:
    """A module's path of today, which its own new path tells or that of a module inside it."""
    for path, today in moved.items():
        rest = path.removeprefix(name)
        if path == name or (rest.startswith(".") and path != rest and today.endswith(rest)):
            return today.removesuffix(rest)
    return name


def selecting(
    config: AdapterConfig, paths: Collection[str], modules: BaseModules | None, layers: Iterable[str]
) -> AdapterConfig:
    """A config that selects these layers of the model: the same one if it does, else one that names them.

    A list of names may select more: layers that the file should have and lacks. Without paths the config stays.

    Args:
        layers: all that are known.
    """
    try:
        found = set() if modules is None else set(select_on(modules, config).paths)
    except AdapterError:
        found = set[str]()
    narrowed = config.exclude_modules is not None or config.layers_to_transform is not None
    may_be_more = isinstance(config.target_modules, tuple) and not narrowed
    if not paths or found == set(paths) or (may_be_more and found > set(paths)):
        return config
    names = exactly(paths, layers)
    return config.replace(target_modules=names, exclude_modules=None, layers_to_transform=None, layers_pattern=None)


def in_order(names: Iterable[str]) -> list[str]:
    """The order in which transformers renames: some renamings depend on what came before."""
    return sorted(names, key=importlib.import_module("transformers.core_model_loading").dot_natural_key)


def renaming(model: nn.Module, known: set[str], *, other_class: bool = True) -> Rename:
    """From a name in the checkpoint to one in the model, and to those in the model that it is converted into."""
    prefix = getattr(model, "base_model_prefix", "")

    def placed(name: str) -> str:
        """The name with the base model's prefix added or removed, if that is what the model has."""
        if not prefix or not other_class or name in known:
            return name
        return next((n for n in (name.removeprefix(f"{prefix}."), f"{prefix}.{name}") if n in known), name)

    loading = importlib.import_module("transformers.core_model_loading")
    mapping = importlib.import_module("transformers.conversion_mapping")
    if not hasattr(model, "config"):
        return lambda name: (name, [])
    conversions = mapping.get_model_conversion_mapping(model)
    renamings = [c for c in conversions if isinstance(c, loading.WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, loading.WeightConverter)]
    by_source = {source: c for c in converters for source in c.source_patterns}

    def rename(name: str) -> tuple[str, list[str]]:
        found, _ = loading.rename_source_key(name, renamings, [], None, None)
        found, source = loading.rename_source_key(found, [], converters, None, None)
        if source is not None:
            first, *others = by_source[source].target_patterns
            made = [placed(key) for key in (found, *(found.replace(first, other) for other in others))]
            if not known.isdisjoint(made):
                return found, made
        found = placed(found)
        return (found if found in known else placed(name)), []

    return rename
