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
    default_registry,
    file_key,
    unwrapped_key,
)
from adapterkit.errors import CheckpointError
from adapterkit.files.fitting import EVERYWHERE, to_file
from adapterkit.files.folder import Writer, write_folder
from adapterkit.files.tensors import write_tensors
from adapterkit.model import (
    ALL_LINEAR,
    Adapter,
    BaseModules,
    resized_tables,
    tables,
)
from adapterkit.tensors import gathered, in_first_process, is_sharded, process_groups, real_value, reshard, whole


def save_adapter(
    adapter: Adapter,
    model: nn.Module,
    folder: Path,
    source: Mapping[str, Tensor] | None = None,
    writer: Writer = write_tensors,
    embeddings: bool | None = None,
) -> None:
    """Write an adapter in PEFT's format. Dtypes are kept; tensors that share memory are written apart.

    A sharded adapter is gathered, which every process takes part in, and the first one writes.

    Args:
        source, writer, embeddings: see `to_files` and `write_folder`.

    Raises:
        SaveError: the folder cannot be written; what was there is untouched.
        CheckpointError: the adapter is on the meta device and has no values.
    """
    reshard(model)
    groups = process_groups(adapter.parameters()) if source is None else []
    files = to_files(adapter, model, source, embeddings=embeddings)
    in_first_process(groups, lambda: write_folder(folder, *files, writer))


def to_files(
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
    with gathered(model, adapter.modules()) if source is None else nullcontext():
        tensors = to_file(adapter, method, source) | _tables(adapter, model, source, prefix, embeddings)
    empty = [key for key, tensor in tensors.items() if tensor.is_meta]
    if empty:
        raise CheckpointError(f"Adapter {adapter.name!r} has no values to save: {empty[0]!r} is on the meta device.")
    outer = FILE_PREFIX + prefix
    tensors = {FILE_PREFIX + k.removeprefix(outer) if k.startswith(outer) else k: t for k, t in tensors.items()}
    metadata = adapter.labels.to_metadata() if adapter.labels is not None and adapter.heads else {}
    metadata |= {EVERYWHERE: "true"} if adapter.aliases else {}
    return file_config(adapter, method, model, prefix).to_dict(), tensors, metadata


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
            key = file_key(f"{place}.base_layer" if place in adapter.layers else place, name)
            found[key] = real_value(table, name) if value is None else whole([value])[0]
    return found


def file_config(adapter: Adapter, method: Method, model: nn.Module, prefix: str = "") -> AdapterConfig:
    """The config that goes to the file: one that PEFT reads, and that selects exactly these layers.

    Args:
        prefix: what the paths of the adapter's layers begin with, and those of `model` do not.
    """
    config = method.file_config(adapter.config)
    heads = tuple(p.removeprefix(prefix) for p in adapter.heads if p not in {*adapter.layers, *adapter.tables})
    changes: dict[str, Any] = {
        "modules_to_save": heads or None,
        "base_model_name_or_path": config.base_model_name_or_path or _name_of(model),
    }
    resolved = ("layers_to_transform", *({"exclude_modules"} & {*config.not_in_files}))
    if prefix or config.target_modules in (None, ALL_LINEAR) or any(getattr(config, n) is not None for n in resolved):
        changes |= {
            "target_modules": short_names(
                [p.removeprefix(prefix) for p in adapter.layers], BaseModules(model).all_paths
            ),
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


def _name_of(model: nn.Module) -> str | None:
    name = getattr(model, "name_or_path", None) or getattr(getattr(model, "config", None), "_name_or_path", None)
    return name if isinstance(name, str) and name else None
