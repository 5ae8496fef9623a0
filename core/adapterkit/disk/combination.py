"""Combining adapters by their files alone: `ak.combine_files`."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapterkit.combining import Choices, Space, check_sources, mix
from adapterkit.contract import MajoritySign, default_registry
from adapterkit.disk.adapter_file import AdapterContent, AdapterFile, names_of, natural, output_place
from adapterkit.disk.model import Base
from adapterkit.errors import CheckpointError, usage
from adapterkit.files import FactorSpool, short_names
from adapterkit.forward import trained_dtype
from adapterkit.kinds import LayerKind
from adapterkit.model import BaseModules, inside
from adapterkit.results import CombineReport
from adapterkit.tensors import default_modes


@usage()
@default_modes()
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
        overwrite: replace an adapter that `out` holds already. Without it that is an error, unlike in
            `Adapters.save`, because the sources are such folders too.

    Raises:
        CheckpointError: a source is not an adapter, is damaged, is of another base, or does not tell its layers' sizes.
        ConfigError, UnknownNameError, UnsupportedError, StateError: as `Adapters.combine`; `out` is a source.
        SaveError: `out` is there already, or cannot be written.
    """
    check_sources(sources)
    names = dict(zip(map(str, sources), names_of(list(sources)), strict=True))
    choices = Choices(
        method=method,
        space=space,
        rank=rank,
        energy=energy,
        to=to,
        heads=names.get(str(heads), heads),
        density=density,
        majority_sign_method=majority_sign_method,
        seed=seed,
        isotropize=isotropize,
        same_base=same_base,
    )
    choices.check()
    given = Base.of(base)
    opened = [AdapterFile.open(place, given, name=names[str(place)]) for place in sources]
    place = output_place(out, [adapter.files.folder for adapter in opened], dtype, overwrite=overwrite)
    weights = [float(weight) for weight in sources.values()]

    def release() -> None:
        for adapter in opened:
            adapter.mapped.release()

    with FactorSpool(place.parent, release) as spool:
        result, report = combined(opened, weights, choices, place.name, spool, given)
        result.write(place, dtype, spool.release)
    return report


def combined(
    opened: Sequence[AdapterFile],
    weights: Sequence[float],
    choices: Choices,
    name: str,
    spool: FactorSpool,
    base: Base | None,
    *,
    one_rank: bool = False,
) -> tuple[AdapterContent, CombineReport]:
    """The combination of adapters that are opened; its changes are in the spool.

    Args:
        one_rank: give all changes the largest rank, padded with zeros.
    """
    kinds = _kinds_of_one_base(opened)
    for adapter in opened:
        adapter.check_fits()
    # float64 if one of them has such tensors, else float32, which adapters have on a model of less.
    wide = any(tensor.dtype == torch.float64 for adapter in opened for tensor in adapter.files.tensors.values())
    dtype = torch.float64 if wide else torch.float32
    sources = [adapter.source(weight) for adapter, weight in zip(opened, weights, strict=True)]
    changes, report = mix(name, sources, choices, sorted(kinds, key=natural), spool, dtype)
    if changes.biases:
        rest = other_biases(opened, changes.heads, changes.biases, everywhere=not changes.biases.keys() <= kinds.keys())
        changes = dataclasses.replace(changes, biases={**changes.biases, **rest})
    changes = dataclasses.replace(changes, kinds=kinds)
    if one_rank:
        rank = max((factors.rank for factors in changes.factors.values()), default=0)
        padded = {}
        for path, factors in changes.factors.items():
            missing, up, down = rank - factors.rank, factors.up.flatten(1), factors.down.flatten(1)
            padded[path] = factors._replace(up=F.pad(up, (0, missing)), down=F.pad(down, (0, 0, 0, missing)))
        changes = dataclasses.replace(changes, factors=padded)
    names = _target_names(list(changes.factors), opened, base)
    return AdapterContent.of(changes, default_registry.method(choices.to), dtype, target_modules=names), report


def other_biases(
    opened: Sequence[AdapterFile], heads: Collection[str], biases: Collection[str], *, everywhere: bool
) -> dict[str, Tensor]:
    """The base's biases that belong to a result which trains biases, and that none of its sources trained.

    They are those of layers that only sources without trained biases change, and those in heads that are left out.

    Args:
        heads, biases: of the result, by the paths of their modules.
        everywhere: it has all biases of the model, and not those of its layers alone.

    Raises:
        StateError: the files do not tell them.
    """
    paths = [path for adapter in opened for path, kind in adapter.kinds.items() if not kind.lookup]
    if everywhere:
        dropped = [(path, head) for a in opened for path, head in a.heads.items() if path not in heads]
        paths += [
            f"{path}.{key}".removesuffix(".bias") for path, head in dropped for key in head if key.endswith("bias")
        ]

    def tells(adapter: AdapterFile, path: str) -> bool:
        """Whether the adapter has the bias at this path if the base has one."""
        trained = adapter.config.trained_biases
        return inside(path, adapter.heads) is None and (
            trained == "all" or (trained != "none" and path in adapter.kinds)
        )

    lacking = [path for path in paths if path not in biases and not any(tells(adapter, path) for adapter in opened)]
    knowing = next((adapter for adapter in opened if adapter.base is not None), opened[0])
    found = {path: bias for path in lacking if (bias := knowing.base_bias(path)) is not None}
    return {path: bias.to(trained_dtype(bias.dtype)) for path, bias in found.items()}


def _target_names(targets: Sequence[str], opened: Sequence[AdapterFile], base: Base | None) -> tuple[str, ...]:
    """`target_modules` of the result: short names only where nothing else in the model has them."""
    paths = [] if base is None else BaseModules(base.model).all_paths
    if set(targets) <= set(paths):
        return short_names(targets, paths)

    def named(paths: Iterable[str], name: str) -> set[str]:
        return {path for path in paths if path.rpartition(".")[2] == name}

    def vouches(adapter: AdapterFile, name: str) -> bool:
        """Whether the adapter's own config says that the modules of this name are these and no more."""
        config: Any = adapter.config
        filtered = config.exclude_modules or config.layers_to_transform is not None or config.modules_to_save
        listed = isinstance(config.target_modules, tuple) and name in config.target_modules
        return bool(listed and not filtered and named(adapter.kinds, name) == named(targets, name))

    names = short_names(targets, {path for adapter in opened for path in adapter.paths})
    sure = all(any(vouches(adapter, name) for adapter in opened) for name in names)
    return names if sure else tuple(sorted(targets))


def _kinds_of_one_base(adapters: Sequence[AdapterFile]) -> dict[str, LayerKind]:
    """The kind of each changed layer. If adapters say different kinds, the most specific one counts."""
    kinds: dict[str, tuple[str, LayerKind]] = {}
    biases: dict[str, tuple[str, Tensor]] = {}

    def check(same: bool, path: str, one: str, other: str, what: str) -> None:
        if not same:
            raise CheckpointError(f"{one!r} and {other!r} are not of one base model: at {path!r} one {what}.")

    for adapter in adapters:
        adapter.check_told()
        for path, kind in adapter.kinds.items():
            name, own = kinds.setdefault(path, (adapter.name, kind))
            one, other = ((k.out_features, k.in_features) for k in (own, kind))
            # A size of 1 may be one that is not known, because its tensor is missing.
            same = all(a == b or 1 in (a, b) for a, b in zip(one, other, strict=True))
            check(same, path, name, adapter.name, f"is for a layer of shape {one}, the other for {other}")
            if kind != own:
                kinds[path] = (name, max(own, kind, key=lambda k: len(k.down_shape(1))))
        for path, bias in adapter.biases.items():
            name, held = biases.setdefault(path, (adapter.name, bias))
            shapes = f"{tuple(held.shape)}, the other one of {tuple(bias.shape)}"
            check(held.shape == bias.shape, path, name, adapter.name, f"trains a bias of shape {shapes}")
    return {path: kind for path, (_, kind) in kinds.items()}
