"""Saving an adapter: what its files hold, in PEFT's format, and writing them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from adapterkit.contract import (
    FILE_PREFIX,
    AdapterConfig,
    Method,
    beside,
    default_registry,
    file_key,
    unwrapped_key,
)
from adapterkit.errors import CheckpointError
from adapterkit.files.load import EVERYWHERE
from adapterkit.files.match import check_tensors, file_places, from_model_keys
from adapterkit.files.writing import write_folder
from adapterkit.model import (
    ALL_LINEAR,
    Adapter,
    BaseModules,
    resized_tables,
    tables,
    task_type,
)
from adapterkit.tensors import (
    gathered,
    in_first_process,
    is_sharded,
    module_slots,
    process_groups,
    real_value,
    reshard,
    whole,
)


def save_adapter(
    adapter: Adapter,
    model: nn.Module,
    folder: Path,
    source: Mapping[str, Tensor] | None = None,
    embeddings: bool | None = None,
) -> None:
    """Write an adapter in PEFT's format. Dtypes are kept; tensors that share memory are written apart.

    A sharded adapter is gathered, which every process takes part in, and the first one writes.

    Args:
        source, embeddings: see `file_contents`.

    Raises:
        SaveError: the folder cannot be written; what was there is untouched.
        CheckpointError: the adapter is on the meta device and has no values.
    """
    reshard(model)
    groups = process_groups(adapter.parameters()) if source is None else []
    files = file_contents(adapter, model, source, embeddings=embeddings)
    in_first_process(groups, lambda: write_folder(folder, *files))


def file_contents(
    adapter: Adapter,
    model: nn.Module,
    source: Mapping[str, Tensor] | None = None,
    inside: str = "",
    embeddings: bool | None = None,
) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, str]]:
    """What the files of an adapter hold: the config, the tensors, and the tensors' metadata.

    Args:
        embeddings: whether the model's own tables of embeddings go there too; `None`: if they were resized.
        inside: the path of `model` where it is a part of the adapted one; `source` is of that part, and so are files.
    """
    method, prefix = default_registry.method_of(adapter.config), f"{inside}." if inside else ""
    if inside and source is not None:
        source = {prefix + key: tensor for key, tensor in source.items()}
    if source is None:
        adapter.has_values()
    with gathered(model, adapter.modules()) if source is None else nullcontext():
        config, tensors = adapter_tensors(adapter, method, source)
        tensors |= _tables(adapter, model, source, prefix, embeddings)
    empty = [key for key, tensor in tensors.items() if tensor.is_meta]
    if empty:
        raise CheckpointError(f"Adapter {adapter.name!r} has no values to save: {empty[0]!r} is on the meta device.")
    outer = FILE_PREFIX + prefix
    tensors = {FILE_PREFIX + k.removeprefix(outer) if k.startswith(outer) else k: t for k, t in tensors.items()}
    metadata = adapter.labels.to_metadata() if adapter.labels is not None and adapter.heads else {}
    metadata |= {EVERYWHERE: "true"} if adapter.aliases else {}
    heads = [path for path in adapter.heads if path not in adapter.tables]
    paths = BaseModules(model).all_paths
    base = getattr(model, "name_or_path", None) or getattr(getattr(model, "config", None), "_name_or_path", None)
    base = base if isinstance(base, str) and base else None
    config = file_config(config, adapter.layers, heads, paths, base, prefix)
    if heads and config.task_type is None:
        config = config.replace(task_type=task_type(model))
    return config.to_dict(), tensors, metadata


def _tables(
    adapter: Adapter,
    model: nn.Module,
    source: Mapping[str, Tensor] | None,
    prefix: str,
    wanted: bool | None,
) -> dict[str, Tensor]:
    """The model's tables of embeddings that go to the adapter's file, without those that are its heads anyway."""
    if wanted is False:
        return {}
    modules, found = BaseModules(model), {}
    given = {unwrapped_key(key).removeprefix("module."): tensor for key, tensor in (source or {}).items()}
    heads = [path.removeprefix(prefix) for path in adapter.heads]
    for path, table in (tables if wanted else resized_tables)(modules, heads).items():
        place = prefix + path
        for name, own in table._parameters.items():
            if own is None:
                continue
            value = given.get(f"{place}.{name}")
            if value is None and source is not None and is_sharded(own):
                raise CheckpointError(
                    f"The state dict lacks the model's own '{place}.{name}', which the file must hold."
                )
            key = file_key(beside(place, adapter.layers), name)
            found[key] = real_value(table, name) if value is None else whole([value])[0]
    return found


def adapter_tensors(
    adapter: Adapter, method: Method, source: Mapping[str, Tensor] | None = None
) -> tuple[AdapterConfig, dict[str, Tensor]]:
    """The config and the adapter's tensors by the keys of PEFT's file format.

    Args:
        source: a full state dict of the model to take the values from; the model's own if `None`.

    Raises:
        CheckpointError: `source` lacks some of them, or has some for which there is no place.
    """
    places = {key: slot for key, _, slot in file_places(adapter)}
    if source is None:
        values = {key: real_value(slot.owner, slot.name) for key, slot in places.items()}
    else:
        check_tensors(source)
        found, _ = from_model_keys(adapter, source)
        others = sorted(found.keys() - places.keys() - source.keys())  # a module of the model may be called like ours
        if others:
            raise CheckpointError(
                f"The state dict has {len(others)} tensors of adapter {adapter.name!r} for which "
                f"the adapter on this model has no place, such as {others[0]!r}."
            )
        found = {key: found[key] for key in places if key in found}
        values = dict(zip(found, whole(list(found.values())), strict=True))
        lacking = sorted(set(places) - set(values))
        if lacking:
            raise CheckpointError(
                f"The state dict lacks {len(lacking)} of adapter {adapter.name!r}'s tensors, such as {lacking[0]!r}."
            )
    modules = (*adapter.heads.items(), *adapter.biases.items())
    others = [
        f"{beside(path, adapter.layers)}.{local}" for path, module in modules for local, _ in module_slots(module)
    ]
    rest = {key: values.pop(key) for key in others}
    return file_tensors(method, adapter.config, values, rest)


def file_tensors(
    method: Method, config: AdapterConfig, own: Mapping[str, Tensor], rest: Mapping[str, Tensor]
) -> tuple[AdapterConfig, dict[str, Tensor]]:
    """The config of a file, and its tensors by the keys of PEFT's file format.

    Args:
        own: of layers and shared ones, which the method's save rule is asked about.
        rest: of heads and trained biases.
    """
    rule, (config, written) = method.key_rule(config), method.to_file(config, own)
    shared = {key for key in written if rule.is_shared(key)}
    bare = shared if len(shared) == len(written) else ()  # without tensors of layers, as PEFT's prompts
    tensors = {}
    for key, tensor in (*written.items(), *rest.items()):
        path, _, local = ("", "", key) if key in shared else key.rpartition(".")
        tensors[key if key in bare else file_key(path, local)] = tensor
    return config, tensors


def file_config(
    config: AdapterConfig,
    layers: Collection[str],
    heads: Collection[str],
    paths: Collection[str],
    base: str | None = None,
    prefix: str = "",
) -> AdapterConfig:
    """The config that goes to the file: one that PEFT reads, and that selects exactly these layers.

    Args:
        layers, heads: their paths.
        paths: of all modules of the model.
        base: what the base model is called.
        prefix: what the paths of layers and heads begin with, but not the paths of the model.
    """
    changes: dict[str, Any] = {
        "modules_to_save": tuple(path.removeprefix(prefix) for path in heads if path not in layers) or None,
        "base_model_name_or_path": config.base_model_name_or_path or base,
    }
    resolved = ["layers_to_transform"]
    if "exclude_modules" in config.not_in_files:
        resolved.append("exclude_modules")
    narrowed = any(getattr(config, name) is not None for name in resolved)
    if layers and (prefix or narrowed or config.target_modules in (None, ALL_LINEAR)):
        named = [path.removeprefix(prefix) for path in layers]
        changes |= {  # the layers that are left out may not be known
            "target_modules": tuple(sorted(named)) if narrowed else short_names(named, paths),
            "exclude_modules": None,
            "layers_to_transform": None,
            "layers_pattern": None,
        }
    for patterns in config.patterns if prefix else ():
        if given := getattr(config, patterns):
            changes[patterns] = {key.removeprefix(prefix): value for key, value in given.items()}
    return config.replace(**changes)


def short_names(targets: Collection[str], paths: Iterable[str]) -> tuple[str, ...]:
    """Last parts of the targets' paths if those name nothing else in the model, else the whole paths."""
    tails = {path.rpartition(".")[2] for path in targets}
    others = any(path.rpartition(".")[2] in tails and path not in targets for path in paths)
    return tuple(sorted(targets if others else tails))
