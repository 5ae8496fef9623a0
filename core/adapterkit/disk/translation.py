"""Files of other programs read as if they were PEFT's, with the base's layers or with what the keys tell of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from torch import Tensor, nn

from adapterkit.contract import DOTTED, component, default_registry
from adapterkit.disk.base import Base
from adapterkit.disk.contents import split_key, without_values
from adapterkit.errors import CheckpointError, PluginError
from adapterkit.files import AdapterFiles, check_foreign, layers_of, of_component, recognise
from adapterkit.kinds import LayerKind
from adapterkit.model import BaseModules


def translated(
    files: AdapterFiles, base: Base | None, part: str | None = None, *, keep_names: bool = False
) -> tuple[AdapterFiles, dict[str, nn.Module]]:
    """A bare file as an adapter folder would hold it, and its layers by path.

    Args:
        base: the model that it is for; `None`: paths are as the file's keys spell them, without the part of the
            pipeline.
        part: the component of a pipeline to take.
        keep_names: call each layer what the file does, whatever that stands for.

    Raises:
        CheckpointError: no method knows it, it is for several models, or its names do not tell the layers' paths.
    """
    check_foreign(files.tensors, files.folder)
    tensors = of_component(files.tensors, part)
    modules = _layers(files, tensors, keep_names) if base is None else {}
    kinds = _kinds(modules) if base is None else layers_of(BaseModules(base.model))
    method, config = recognise(tensors, kinds, files.metadata, files.folder)
    rule = method.key_rule(config)
    read = method.from_file(config, tensors, kinds)
    splits = (split_key(key, rule) for key in read)
    paths = [path for path in dict.fromkeys(split[0] for split in splits if split) if path in kinds]
    layers = {path: modules[path] if base is None else base.layer(path) for path in paths}
    return dataclasses.replace(files, config=config.to_dict(), tensors=dict(read)), layers


def _kinds(modules: Mapping[str, nn.Module]) -> dict[str, LayerKind]:
    kinds = {path: default_registry.kind_of(module) for path, module in modules.items()}
    return {path: kind for path, kind in kinds.items() if kind is not None}


def _layers(files: AdapterFiles, tensors: Mapping[str, Tensor], keep_names: bool) -> dict[str, nn.Module]:
    """The layers as the keys alone tell them, of whichever method."""
    found: dict[str, nn.Module] = {}
    empty = without_values(tensors)
    for name in default_registry.methods():
        try:
            found |= default_registry.method(name).layers_in_file(empty, None) or {}
        except PluginError:  # `recognise` tells of it, if nobody else knows the file
            continue
    if keep_names:
        return found
    parts = {component(name) for name in found}
    if len(parts) > 1:
        listed = ", ".join(map(repr, sorted(parts - {""})))
        raise CheckpointError(f"{files.folder} is for several models of a pipeline: {listed}. Say component=.")
    flat = next((name for name in found if component(name) not in ("", *DOTTED)), None)
    if flat is not None:
        raise CheckpointError(
            f"{files.folder}: its names, such as {flat!r}, have '_' for '.', so the layers' paths cannot be told from "
            "them. Give base=, the model that it is for."
        )
    return {name.removeprefix(f"{component(name)}.") if component(name) else name: m for name, m in found.items()}
