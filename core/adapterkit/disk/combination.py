"""Combining adapters by their files alone: `ak.combine_files`."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adapterkit.combining import Choices, Space, check_sources, mix
from adapterkit.contract import MajoritySign, default_registry
from adapterkit.disk.adapter_file import AdapterFile, Result, check_dtype, names_of, natural, output_place
from adapterkit.disk.model import Base
from adapterkit.errors import CheckpointError
from adapterkit.files import FactorSpool, short_names
from adapterkit.kinds import LayerKind
from adapterkit.model import BaseModules
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
        same_base=same_base,
    )
    choices.check()
    given = Base.of(base)
    names = names_of(list(sources))
    opened = [AdapterFile.open(place, given, name=name) for place, name in zip(sources, names, strict=True)]
    place = output_place(out, [adapter.files.folder for adapter in opened], overwrite=overwrite)
    weights = list(map(float, sources.values()))
    with FactorSpool(place.parent, lambda: release(opened)) as spool:
        result, report = combined(opened, weights, choices, place.name, spool, given)
        result.write(place, dtype, [spool, *(adapter.mapped for adapter in opened)])
    return report


def combined(
    opened: Sequence[AdapterFile],
    weights: Sequence[float],
    choices: Choices,
    name: str,
    spool: FactorSpool,
    base: Base | None,
) -> tuple[Result, CombineReport]:
    """The combination of adapters that are opened; its changes are in the spool."""
    kinds = check_one_base(opened)
    for adapter in opened:
        adapter.check_fits()
    sources = [adapter.source(weight) for adapter, weight in zip(opened, weights, strict=True)]
    # float64 if one of them has such tensors, else float32, which adapters have on a model of less.
    wide = any(tensor.dtype == torch.float64 for adapter in opened for tensor in adapter.files.tensors.values())
    dtype = torch.float64 if wide else torch.float32
    changes, report = mix(name, sources, choices, sorted(kinds, key=natural), spool, dtype)
    changes = dataclasses.replace(changes, kinds=kinds)
    result = Result.of(changes, default_registry.method(choices.to), dtype)
    config = result.config.replace(target_modules=_target_names(list(changes.factors), opened, base))
    return dataclasses.replace(result, config=config), report


def release(opened: Sequence[AdapterFile]) -> None:
    """Have no page of their files in memory."""
    for adapter in opened:
        adapter.mapped.release()


def _named(heads: str | None, sources: Mapping[str | Path, float]) -> str | None:
    """The adapter's name, where a place is given as `sources` has it."""
    names = dict(zip(map(str, sources), names_of(list(sources)), strict=True))
    return heads if heads is None else names.get(str(heads), heads)


def _target_names(targets: Sequence[str], opened: Sequence[AdapterFile], base: Base | None) -> tuple[str, ...]:
    """`target_modules` of the result: short names only where nothing else in the model has them."""
    paths = [] if base is None else BaseModules(base.model).all_paths
    if set(targets) <= set(paths):
        return short_names(targets, paths)
    tails = {_tail(path) for path in targets}
    known = {path for adapter in opened for path in adapter.paths}
    others = any(_tail(path) in tails and path not in targets for path in known)
    if not others and all(any(_vouches(adapter, tail, targets) for adapter in opened) for tail in tails):
        return tuple(sorted(tails))
    return tuple(sorted(targets))


def _vouches(adapter: AdapterFile, tail: str, paths: Collection[str]) -> bool:
    """Whether the adapter's own config says that the modules of this name are these and no more."""
    config: Any = adapter.config
    filtered = config.exclude_modules or config.layers_to_transform is not None or config.modules_to_save
    listed = isinstance(config.target_modules, tuple) and tail in config.target_modules
    own = {path for path in adapter.kinds if _tail(path) == tail}
    return listed and not filtered and own == {path for path in paths if _tail(path) == tail}


def _tail(path: str) -> str:
    return path.rpartition(".")[2]


def check_one_base(adapters: Sequence[AdapterFile]) -> dict[str, LayerKind]:
    """What each layer is that one of them changes: the most particular of what they say.

    Raises:
        CheckpointError: they are not of one base model.
    """
    known: dict[str, tuple[str, LayerKind]] = {}
    biases: dict[str, tuple[str, Tensor]] = {}

    def refuse_sizes(path: str, one: str, other: str, what: str, *shapes: tuple[int, ...]) -> None:
        raise CheckpointError(
            f"{one!r} and {other!r} are not of one base model: at {path!r} one {what} of shape {shapes[0]}, the other "
            f"for {shapes[1]}."
        )

    for adapter in adapters:
        adapter.check_told()
        for path, kind in adapter.kinds.items():
            name, own = known.setdefault(path, (adapter.name, kind))
            one, two = ((k.out_features, k.in_features) for k in (own, kind))
            # A size of 1 may be one that is not known, because its tensor is missing.
            if any(a != b and 1 not in (a, b) for a, b in zip(one, two, strict=True)):
                refuse_sizes(path, name, adapter.name, "is for a layer", one, two)
            known[path] = (name, max(own, kind, key=lambda k: len(k.down_shape(1))))
        for path, bias in adapter.biases.items():
            name, held = biases.setdefault(path, (adapter.name, bias))
            if held.shape != bias.shape:
                refuse_sizes(path, name, adapter.name, "trains a bias", tuple(held.shape), tuple(bias.shape))
    return {path: kind for path, (_, kind) in known.items()}
