"""Combining adapters by their files alone: `ak.combine_files`."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from adapterkit.combining import Choices, Space, Workspace, check_same_base, check_sources, mix
from adapterkit.contract import MajoritySign
from adapterkit.disk.base import Base
from adapterkit.disk.opened import Opened, names_of, open_adapter, stand_in, working_dtype
from adapterkit.disk.output import check_dtype, output_place, write_adapter
from adapterkit.files import FactorSpool, short_names
from adapterkit.forward import Active
from adapterkit.model import Adapter, BaseModules
from adapterkit.results import CombineReport


def combine_files(  # noqa: PLR0913 - those of Adapters.combine, and what files need
    sources: Mapping[str | Path, float],
    out: str | Path,
    *,
    method: str = "linear",
    space: Space = "delta",
    rank: int | None = None,
    energy: float | None = None,
    to: str = "lora",
    heads: str | None = None,
    density: float | None = None,
    majority_sign_method: MajoritySign = "total",
    seed: int | None = None,
    isotropize: bool = False,
    same_base: bool = False,
    base: str | Path | nn.Module | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> CombineReport:
    """Combine adapters by their files alone into a new adapter folder: `Adapters.combine` without the model.

    The tensors are the same, bit for bit, as those of `Adapters.combine` and `save` on the model. The sources are
    mapped; each target's result is made, written and dropped, so that memory does not grow with their number.

    A layer's sizes come from the adapter's own tensors, so the base is not needed. Where they do not tell (VeRA), the
    base's `config.json` does: that of `base`, or of the config's `base_model_name_or_path` if it is a folder here.
    LoHa's tensors tell a convolution or an embedding from a linear layer only where they have a core: give `base`
    where there may be some. Biases that adapters trained need the base's values, unless the weights add up to 1.

    Args:
        sources: folders (or hub ids) and their weights. An adapter is called by its folder's name.
        out: the folder to write. It appears when it is complete.
        method, space, rank, energy, to, density, majority_sign_method, seed, isotropize, same_base: see
            `Adapters.combine`.
        heads: as there; one adapter's by its folder's name, or by its place as it is written in `sources`.
        base: the base model's folder or hub id, or the model itself, on the meta device or not.
        dtype: of the result's layers; `None`: float32, or float64 if a source has such tensors. Heads keep theirs.
        overwrite: replace an adapter that `out` holds already. Without it that is an error, other than with
            `Adapters.save`: what is to be combined lies in folders of the same sort.

    Raises:
        CheckpointError: a source is no adapter, damaged, of another base, or does not tell its layers' sizes.
        ConfigError, UnknownNameError, UnsupportedError, StateError: as `Adapters.combine`; `out` is a source.
        SaveError: `out` is there already, or cannot be written.
    """
    check_sources(sources)
    check_dtype(dtype)
    choices = Choices(
        method=method,
        space=space,
        rank=rank,
        energy=energy,
        to=to,
        heads=_named(heads, sources),
        density=density,
        majority_sign_method=majority_sign_method,
        seed=seed,
        isotropize=isotropize,
    )
    choices.recipe()
    given = Base.of(base)
    names = names_of(list(sources))
    opened = [open_adapter(place, name, base=given) for place, name in zip(sources, names, strict=True)]
    place = output_place(out, [adapter.files.folder for adapter in opened], overwrite=overwrite)
    weights = [float(weight) for weight in sources.values()]
    return _combined(opened, weights, choices, place, given, dtype=dtype, same_base=same_base)


def _combined(
    opened: Sequence[Opened],
    weights: Sequence[float],
    choices: Choices,
    place: Path,
    base: Base | None,
    *,
    dtype: torch.dtype | None,
    same_base: bool,
) -> CombineReport:
    with FactorSpool(place.parent, lambda: release(opened)) as spool:
        adapter, report, model = combined(opened, weights, choices, place.name, spool, base, same_base=same_base)
        write_adapter(adapter, model, place, dtype=dtype, mapped=[spool, *(adapter.mapped for adapter in opened)])
    return report


def combined(
    opened: Sequence[Opened],
    weights: Sequence[float],
    choices: Choices,
    name: str,
    spool: FactorSpool,
    base: Base | None,
    *,
    same_base: bool = False,
) -> tuple[Adapter, CombineReport, nn.Module]:
    """The combination of adapters that are opened, its changes in the spool, and the stand-in that it is on."""
    working = working_dtype(opened)
    model = stand_in(opened, working)
    adapters = [adapter.adapter(model)[0] for adapter in opened]
    if not same_base:
        check_same_base(adapters)
    space = Workspace(model, Active(), spool, working, torch.device("cpu"))
    adapter, report = mix(name, adapters, weights, choices, space)
    adapter.config = adapter.config.replace(target_modules=_target_names(adapter, model, opened, base))
    return adapter, report, model


def release(opened: Sequence[Opened]) -> None:
    """Have no page of their files in memory."""
    for adapter in opened:
        adapter.mapped.release()


def _named(heads: str | None, sources: Mapping[str | Path, float]) -> str | None:
    """The adapter's name, where a place is given as `sources` has it."""
    names = dict(zip(map(str, sources), names_of(list(sources)), strict=True))
    return heads if heads is None else names.get(str(heads), heads)


def _target_names(adapter: Adapter, model: nn.Module, opened: Sequence[Opened], base: Base | None) -> tuple[str, ...]:
    """`target_modules` of the result: short names only where nothing else in the model has them."""
    paths = [] if base is None else BaseModules(base.model).all_paths
    if adapter.layers.keys() <= set(paths):
        return short_names(adapter.layers, paths)
    tails = {_tail(path) for path in adapter.layers}
    others = any(_tail(path) in tails and path not in adapter.layers for path in BaseModules(model).all_paths)
    if not others and all(any(_vouches(adapter, tail, adapter.layers) for adapter in opened) for tail in tails):
        return tuple(sorted(tails))
    return tuple(sorted(adapter.layers))


def _vouches(adapter: Opened, tail: str, paths: Collection[str]) -> bool:
    """Whether the adapter's own config says that the modules of this name are these and no more."""
    config: Any = adapter.config
    filtered = config.exclude_modules or config.layers_to_transform is not None or config.modules_to_save
    listed = isinstance(config.target_modules, tuple) and tail in config.target_modules
    own = {path for path in adapter.layers if _tail(path) == tail}
    return listed and not filtered and own == {path for path in paths if _tail(path) == tail}


def _tail(path: str) -> str:
    return path.rpartition(".")[2]
