"""Whether a model's vocabulary was resized since the model was made or loaded, and the embeddings to save then.

New rows of an embedding are random, so an adapter that was trained with them needs them: its file holds the embeddings,
as PEFT's files do.
"""

from __future__ import annotations

import dis
import inspect
from collections.abc import Collection
from pathlib import Path
from typing import Any

from torch import nn

from adapterkit.model.modules import BaseModules


def resized_tables(modules: BaseModules, without: Collection[str] = ()) -> dict[str, nn.Module]:
    """`tables` if the vocabulary was resized, else nothing."""
    return tables(modules, without) if _was_resized(modules.model) else {}


def resized_keys(modules: BaseModules) -> set[str]:
    """The keys of both embeddings in the model's state dict if the vocabulary was resized, else nothing."""
    found = tables(modules, tied=True) if _was_resized(modules.model) else {}
    return {f"{path}.{name}" for path, table in found.items() for name in table._parameters}


def tables(modules: BaseModules, without: Collection[str] = (), *, tied: bool = False) -> dict[str, nn.Module]:
    """The input and the output embedding of a transformers model by path, except those at the paths `without`.

    Args:
        tied: both of two tied embeddings, and not only the first: they are one table.
    """
    found: dict[str, nn.Module] = {}
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        try:
            table = getattr(modules.model, getter)()
        except (AttributeError, NotImplementedError):
            continue
        path, *_ = modules.paths_of.get(table, ("",))
        weight = table._parameters.get("weight") if path and path not in without else None
        if weight is not None and (tied or all(other._parameters["weight"] is not weight for other in found.values())):
            found[path] = table
    return found


def _was_resized(model: Any) -> bool:
    """Judged by the base's config if it is on this machine, or else by the traces of `resize_token_embeddings`."""
    now = _size(getattr(model, "config", None))
    if now is None:
        return False
    base = _size(_base_config(model))
    if base is not None:
        return now != base
    if "vocab_size" in model.__dict__ and not any(_stores_size(cls) for cls in type(model).__mro__):
        return True
    return any(module.__dict__.get("vocab_size", now) != now for module in model.modules())


def _size(config: Any) -> int | None:
    try:
        size = getattr(config.get_text_config(), "vocab_size", None)
    except (AttributeError, ValueError):  # not a config of transformers, or one with several texts
        size = getattr(config, "vocab_size", None)
    return size if isinstance(size, int) else None


def _base_config(model: Any) -> Any:
    """The config from the folder or the hub's cache that the model was loaded from. The network is not used."""
    name, kind = getattr(model, "name_or_path", None), type(model.config)
    if not isinstance(name, str) or not name:
        return None
    try:
        if not Path(name).is_dir():
            from huggingface_hub import try_to_load_from_cache

            found = try_to_load_from_cache(name, "config.json", revision=getattr(model.config, "_commit_hash", None))
            if not isinstance(found, str):
                return None
            name = str(Path(found).parent)
        return kind.from_pretrained(name, local_files_only=True)
    except Exception:  # noqa: BLE001 - whatever is wrong with that folder
        return None


def _stores_size(cls: type) -> bool:
    """Whether the class's own `__init__` sets an attribute `vocab_size`."""
    made = cls.__dict__.get("__init__")
    code = getattr(inspect.unwrap(made), "__code__", None) if callable(made) else None
    return code is not None and any(
        step.opname == "STORE_ATTR" and step.argval == "vocab_size" for step in dis.get_instructions(code)
    )
