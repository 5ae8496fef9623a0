"""Extraction from two checkpoints, layer by layer: `ak.extract_files`."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from adapterkit.combining import config_to_extract, extracted
from adapterkit.contract import default_registry
from adapterkit.disk.adapter_file import AdapterContent, output_place
from adapterkit.disk.checkpoint import Checkpoint
from adapterkit.disk.model import MappedModel, skeleton
from adapterkit.door import real_path
from adapterkit.errors import UsageError, usage
from adapterkit.files import EVERYWHERE, FactorSpool, model_folder, short_names
from adapterkit.model import BaseModules, Match, copy_head, select, task_type
from adapterkit.results import CombineReport
from adapterkit.tensors import default_modes


@usage()
@default_modes()
@torch.no_grad()
def extract_files(  # noqa: PLR0913 - those of ak.extract, and what files need
    base: str | Path,
    tuned: str | Path,
    out: str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    target_modules: str | Sequence[str] = "all-linear",
    exclude_modules: str | Sequence[str] | None = None,
    modules_to_save: str | Sequence[str] | None = "auto",
    to: str = "lora",
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> CombineReport:
    """The adapter of low rank that comes closest to a full fine-tune, from two checkpoints: `ak.extract` on disk.

    Its numbers are those of `ak.extract`. One layer's weights are in memory at a time, and the results wait in a file.

    Args:
        base, tuned: folders, or hub ids, with `config.json` and safetensors weights, in one file or in shards, of one
            architecture. The base may lack the task's head, and the tuned model's may have other classes.
        out: the folder to write. It appears when it is complete.
        rank, energy, target_modules, exclude_modules, modules_to_save, to: see `ak.extract`; paths are the tuned
            model's.
        dtype: of the result's layers; `None`: float32, or float64 for checkpoints of that. Heads keep theirs.
        overwrite: replace an adapter that `out` holds already.

    Raises:
        CheckpointError: a folder is not a model, is damaged, or lacks a tensor that is needed.
        SelectionError: nothing selected.
        ConfigError: neither or both sizes, or `out` is one of the models.
        StateError: weights that are not finite.
        SaveError: `out` is there already, or cannot be written.
    """
    config = config_to_extract(rank, energy, to, target_modules, exclude_modules, modules_to_save)
    folders = [model_folder(folder) for folder in (base, tuned)]
    place = output_place(out, folders, dtype, overwrite=overwrite)
    if any(real_path(place).is_relative_to(real_path(folder)) for folder in folders):
        raise UsageError(f"{place} is inside one of the models; give the output another place.")
    model = skeleton(folders[1])
    before, after = (MappedModel(copy.deepcopy(model), Checkpoint.open(folder)) for folder in folders)
    working = torch.float64 if torch.float64 in {p.dtype for p in before.model.parameters()} else torch.float32
    selection = select(model.to(working), config)
    heads = {path: copy_head(after.module(path), path) for path in selection.heads}

    def layers(match: Match) -> tuple[nn.Module, nn.Module]:
        before.release()
        after.release()
        return before.module(match.path), after.module(match.path)

    modules = BaseModules(model)
    adapted = [model.get_submodule(path) for path in (*(match.path for match in selection.targets), *selection.heads)]
    with FactorSpool(place.parent, lambda: None) as spool:
        changes, report = extracted(place.name, selection, layers, rank, energy, to, heads, model, spool)
        names = short_names(changes.factors, modules.all_paths)
        fields = {"base_model_name_or_path": str(base), "target_modules": names}
        if heads and (task := task_type(model)):
            fields["task_type"] = task
        result = AdapterContent.of(changes, default_registry.method(to), working, **fields)
        if any(len(modules.paths_of[module]) > 1 for module in adapted):
            result.metadata = {EVERYWHERE: "true"}
        result.write(place, dtype, spool.release)
    return report
