"""Loading: an adapter for a model from what a folder or a file holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from adapterkit.contract import AdapterConfig, KeyRule, Names
from adapterkit.errors import CheckpointError, SelectionError, warn
from adapterkit.files.differences import with_differences
from adapterkit.files.match import equals_base, ignore_known_keys, no_layer, refuse, warn_of_misfit
from adapterkit.formats import AdapterFiles, translate
from adapterkit.forward import Active, original_class
from adapterkit.model import (
    Adapter,
    BaseModules,
    Fit,
    LabelSet,
    LayerBuilder,
    build_adapter,
    heads_in_file,
    select_on,
)
from adapterkit.results import LoadReport
from adapterkit.tensors import shape_of

# In a file's metadata: modules that have several paths are adapted under all of them.
EVERYWHERE = "adapterkit_every_path"


def load_adapter(  # noqa: PLR0913 - what is loaded onto what, how, and what messages say
    model: nn.Module,
    name: str,
    files: AdapterFiles,
    active: Active,
    *,
    strict: bool | None,
    has_strict: bool = False,
    dtype: torch.dtype | str | None,
    component: str | None = None,
    device: torch.device | None = None,
) -> tuple[Adapter, LoadReport]:
    """Build the adapter that a folder or a file holds, with its values, not installed yet.

    Args:
        strict: `None`: what does not fit is in the report, and nowhere else.
        has_strict: whether the caller has an argument `strict`, for messages.
        device: of what the file does not hold; `None`: where the model computes.

    Raises:
        CheckpointError: with `strict`, anything missing, unexpected or mismatched.
        SelectionError: its config selects nothing on this model.
    """
    modules = BaseModules(model)
    found = translate(files, modules, component=component)
    tensors, method, config = dict(found.tensors), found.method, found.config
    zero_differences: tuple[str, ...] = ()  # they change nothing
    if files.config is None:
        tensors, changed, zero_differences = with_differences(found, modules)
        config = config.replace(modules_to_save=changed or config.modules_to_save)
    config = config.replace(modules_to_save=_heads_in_file(config, modules, tensors))
    try:
        selection = select_on(modules, config)
    except SelectionError:
        _check_of_this_model(method.key_rule(config), tensors, modules, config, files)
        raise
    tables = _tables_in_file(modules, selection.heads, tensors)
    optional = {*(f"{path}.bias" for path in tables), *(f"{p}.weight" for p, first in tables.items() if p != first)}
    fit = Fit(method.key_rule(config), optional)  # `build_adapter` fills it
    adapter, _ = build_adapter(
        modules,
        name,
        LayerBuilder(method, config, fit, cast=dtype != "file"),
        dataclasses.replace(selection, heads=(*selection.heads, *tables)),
        active,
        tensors,
        dtype=None if dtype == "file" else dtype,
        device=device,
    )
    adapter.tables = frozenset(tables)
    for path, first in tables.items():
        adapter.heads[path]._parameters["weight"] = adapter.heads[first]._parameters["weight"]
    fit.ignored += [*zero_differences, *(key for key in found.passed if key not in tensors)]
    ignore_known_keys(fit, model, tensors, found.passed)
    report = fit.report()
    if strict and not report.ok:
        refuse(report, name, str(files.folder), model, adapter.layers, has_strict=has_strict)
    if strict is not None:
        _warn(files, adapter, report)
    adapter.labels = _labels(model, adapter, files)
    return adapter, report


def _check_of_this_model(
    rule: KeyRule, tensors: Mapping[str, Tensor], modules: BaseModules, config: AdapterConfig, files: AdapterFiles
) -> None:
    """Raise `CheckpointError` if the model has none of the layers that the file has tensors for."""
    there = set(modules.all_paths)
    layers = {split[0]: key for key in tensors if (split := rule.split(key, there)) is not None}
    if not layers or not there.isdisjoint(layers):
        return
    first, base = next(iter(layers)), config.base_model_name_or_path
    reason = no_layer(modules.model, layers[first], ())
    raise CheckpointError(
        f"{files.folder}: {reason}."
        if reason
        else f"{files.folder} is an adapter of another model: this {original_class(modules.model).__name__} has none "
        f"of its {len(layers)} layers, such as {first!r}." + (f" It was trained on {base!r}." if base else "")
    )


def _warn(files: AdapterFiles, adapter: Adapter, report: LoadReport) -> None:
    """Warn of what does not fit, and of modules with several paths in a file that may be PEFT's (no `EVERYWHERE`)."""
    if not report.ok:
        warn_of_misfit(files.folder, report)
    adapted = {*adapter.layers, *({*adapter.heads} - adapter.tables)}
    path = next((path for path in adapter.aliases if path in adapted), None)
    if path is not None and files.config is not None and EVERYWHERE not in files.metadata:
        warn(
            f"{files.folder}: {path!r} is one module with {', '.join(map(repr, adapter.aliases[path]))}, so its "
            "adapter acts under each of these paths. The file does not say that it was trained so: PEFT, which writes "
            "such files too, adapts the first path alone, and the outputs differ from PEFT's."
        )


def _heads_in_file(config: AdapterConfig, modules: BaseModules, keys: Collection[str]) -> tuple[str, ...] | str | None:
    """The modules that `modules_to_save` named to PEFT.

    PEFT also lists modules that do not exist; such an entry is dropped if no key of the file has it. A module whose
    path merely ends like an entry is a head if the file has all its parameters.
    """
    wanted = config.modules_to_save
    if wanted is None or isinstance(wanted, str):
        return wanted
    names = Names(wanted)
    modules_at = {path: module for module, paths in modules.paths_of.items() for path in paths}
    for path in modules_at:
        names.match(path)
    kept = [n for n in wanted if n in names.used or any(f".{n}." in f".{key}" for key in keys)]
    for path in heads_in_file(keys, wanted):
        module = modules_at.get(path) if names.match(path) is None else None
        held = [] if module is None else [f"{path}.{local}" in keys for local, _ in module.named_parameters()]
        kept += [path] if held and all(held) else []
    return tuple(kept) or None


def _tables_in_file(modules: BaseModules, heads: Collection[str], tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Embeddings that the file holds in full, as PEFT writes them when the vocabulary was resized.

    Returns:
        For the path of each table, the path of the table whose tensor it gets: its own; or that of the table that it is
        tied to, where the file has only that one's tensor, or the same values twice.
    """
    get = getattr(modules.model, "get_output_embeddings", None)
    output = get() if callable(get) else None
    found: dict[str, str] = {}
    for module, paths in modules.paths_of.items():
        inside = any(path == head or path.startswith(f"{head}.") for head in heads for path in paths)
        if inside or not (isinstance(module, nn.Embedding) or module is output):
            continue
        keys = (key for path in paths for key in (f"{path}.weight", f"{path}.base_layer.weight") if key in tensors)
        key = next((key for key in keys if not equals_base(modules.model, key, tensors[key])), None)
        if key is None:
            continue
        assert isinstance(module.weight, Tensor)
        own, shape = shape_of(module.weight)[0], tensors[key].shape
        if len(shape) == 2 and shape[0] != own:
            path = key.removesuffix(".weight").removesuffix(".base_layer")
            raise CheckpointError(
                f"The file holds its own {path!r} with {shape[0]:,} rows; the model's has {own:,}. It was trained with "
                f"a resized vocabulary: call model.resize_token_embeddings({shape[0]}) first."
            )
        found[paths[0]] = paths[0]
    for table in [*found]:
        weight = modules.model.get_submodule(table)._parameters["weight"]
        held = tensors.get(f"{table}.weight", tensors.get(f"{table}.base_layer.weight"))
        tied = [paths[0] for m, paths in modules.paths_of.items() if m._parameters.get("weight") is weight]
        for path in tied if found[table] == table else ():
            again = tensors.get(f"{path}.weight", held if path not in found else None)
            if path not in heads and again is not None and held is not None and torch.equal(again, held):
                found[path] = table
    return found


def _labels(model: nn.Module, adapter: Adapter, files: AdapterFiles) -> LabelSet | None:
    """The label set that the file holds; else one with as many classes as its heads have rows."""
    labels, own = LabelSet.from_metadata(files.metadata), LabelSet.of(model)
    layers: list[tuple[int, int | None]] = []
    for path, head in adapter.heads.items():
        before = dict(adapter.hosts[path].named_modules())
        linear = [(local, m.out_features) for local, m in head.named_modules() if isinstance(m, nn.Linear)]
        layers += [(rows, getattr(before.get(local), "out_features", None)) for local, rows in linear]
    if labels is None:
        return LabelSet.of_rows(layers, own) if own is not None and adapter.heads else None
    size, counts = len(labels.id2label), [rows for rows, _ in layers]
    if own is not None and counts and size not in (len(own.id2label), *counts):
        raise CheckpointError(
            f"{files.folder}: the file's label set has {size} classes, and no layer of its heads has that many "
            "rows. It is damaged; save the adapter again."
        )
    return labels
