"""Combination: new adapters out of those there are."""

from __future__ import annotations

import sys
import warnings
import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from adapterkit import combiners, lowrank
from adapterkit.combine import SPACES, Recipe, Space, combine_factors
from adapterkit.combiners import MajoritySign, Options
from adapterkit.errors import AdapterWarning, ConfigError, StateError, UnsupportedError
from adapterkit.factors import Factors
from adapterkit.headmix import combine_heads
from adapterkit.merger import Merger
from adapterkit.record import AdapterRecord
from adapterkit.registry import default_registry
from adapterkit.reports import CombineReport
from adapterkit.result import Changes, build_result, check_can_result, in_model_order
from adapterkit.walk import Walk


class Combination(Merger):
    """The part of `Adapters` that combines and converts."""

    @torch.no_grad()
    def combine(  # noqa: PLR0913 - three independent choices and what they need
        self,
        name: str,
        sources: Mapping[str, float],
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
    ) -> CombineReport:
        """Add an adapter that is a combination of others. It is not activated.

        With `method="linear"` in delta space the result is exactly `sum of w_i dW_i`, whatever the ranks and the
        (additive) methods of the sources. A target that only some sources have is combined from those.

        Args:
            name: of the new adapter.
            sources: the adapters and their weights; negative ones subtract.
            method: `"linear"`, `"ties"`, `"dare_linear"`, `"dare_ties"`, `"magnitude_prune"`, `"tsv"`, or what an
                extension adds.
            space: `"delta"` works on dW itself; `"core"` on its coordinates in the sources' common subspace (small
                matrices, no dense one); `"factors"` on A and B apart, which is what PEFT does.
            rank, energy: truncate the result optimally, to a rank or to a share of the squared singular
                values. Neither: exact, ranks add up.
            to: the method of the result; one with the hook `from_factors`.
            heads: what becomes of the heads: an adapter's name, `"average"`, `"concat"` or `"drop"`.
            density, majority_sign_method, seed: for the methods that prune, elect signs and draw.
            isotropize: give the result's singular values their mean.
            same_base: combine even if the adapters' configs name different base models.

        Raises:
            ConfigError: arguments that make no sense; heads and no choice; adapters of different bases.
            UnknownNameError: no such adapter, method or space.
            UnsupportedError: an adapter whose change has no low-rank form.
            StateError: an adapter, or a result, with values that are not finite.
        """
        self._check_new_name(name)
        records = self._sources(sources, same_base=same_base)
        combiner = default_registry.combiner(method)
        combiners.check_options(method, combiner, density, majority_sign_method)
        _check_choices(space, rank, energy, seed)
        options = Options(density or 1.0, majority_sign_method)
        recipe = Recipe(combiner, method == "linear", space, options, rank, energy, isotropize)
        target_method = default_registry.method(to)
        check_can_result(target_method)
        new_heads, labels = combine_heads(records, heads)
        _warn_of_replaced(records, new_heads)
        weights = [float(weight) for weight in sources.values()]
        factors, errors = self._combined(records, weights, recipe, seed, new_heads)
        kinds = {path: layer.kind for record in records for path, layer in record.layers.items()}
        changes = Changes(factors, kinds, _biases(records, weights, new_heads), new_heads, labels)
        record = build_result(name, changes, target_method, self.model, self._active)
        record.config = record.config.replace(**_shared_fields(records, heads=bool(new_heads)))
        self._install(record)
        return CombineReport(name, to, {path: f.rank for path, f in factors.items()}, errors, tuple(new_heads))

    def convert(
        self, source: str, *, to: str, name: str, rank: int | None = None, energy: float | None = None
    ) -> CombineReport:
        """Add the same adapter in another method's form: exact, unless `rank` or `energy` truncates it.

        LoHa becomes LoRA of rank `r * r`, VeRA LoRA of its own rank, so that what knows only LoRA can serve them.

        Raises:
            UnsupportedError: the source has no low-rank form, or `to` cannot be made from one.
        """
        heads = source if self._record(source).heads else None
        return self.combine(name, {source: 1.0}, to=to, rank=rank, energy=energy, heads=heads)

    def _sources(self, sources: Mapping[str, float], *, same_base: bool) -> list[AdapterRecord]:
        if not isinstance(sources, Mapping) or not sources:
            raise ConfigError(f"combine takes adapters and their weights, {{'a': 0.7, 'b': 0.3}}, not {sources!r}.")
        records = [self._record(name) for name in sources]
        for name, weight in sources.items():
            if not _is_finite(weight):
                raise ConfigError(f"The weight of {name!r} is {weight!r}; it must be a finite number.")
        bases = {r.config.base_model_name_or_path: r.name for r in records if r.config.base_model_name_or_path}
        if len(bases) > 1 and not same_base:
            listed = ", ".join(f"{name!r} of {base!r}" for base, name in bases.items())
            raise ConfigError(
                f"The adapters were trained on different bases: {listed}. If these are names of one model, say "
                "same_base=True."
            )
        return records

    def _combined(
        self,
        records: list[AdapterRecord],
        weights: list[float],
        recipe: Recipe,
        seed: int | None,
        heads: Collection[str],
    ) -> tuple[dict[str, Factors], dict[str, float]]:
        """The combined change and its error at each target, in the order of the model."""
        factors: dict[str, Factors] = {}
        errors: dict[str, float] = {}
        for path in in_model_order([path for record in records for path in record.layers], Walk(self.model)):
            pairs = zip(records, weights, strict=True)
            having = [(r, w) for r, w in pairs if path in r.layers and not _replaced(path, r, heads)]
            if not having:
                continue
            found = [_factors_of(record, path) for record, _ in having]
            _check_rank_fits(recipe.rank, path, found[0])
            seeded = _seeded(recipe, seed, path, found[0])
            try:
                factors[path], errors[path] = combine_factors(found, [w for _, w in having], seeded)
            except ConfigError as error:
                raise ConfigError(f"{path!r}: {error}") from error
        if not factors:
            raise ConfigError("The heads that were chosen take the place of every layer that the adapters change.")
        return factors, errors


def _is_finite(weight: object) -> bool:
    """Whether it is a number that a float can hold; `nan` compares as false."""
    if isinstance(weight, bool):
        return False
    number: Any = weight if isinstance(weight, Real) else float("nan")
    return bool(abs(number) <= sys.float_info.max)


def _shared_fields(records: Sequence[AdapterRecord], *, heads: bool) -> dict[str, str]:
    """Fields of the configs that say where the adapters are from, if all agree; the task needs its head."""
    found = {}
    for name in ("base_model_name_or_path", "revision", *(["task_type"] if heads else [])):
        values = {getattr(record.config, name) for record in records}
        if len(values) == 1 and None not in values:
            (found[name],) = values
    return found


def _check_choices(space: object, rank: object, energy: object, seed: object) -> None:
    if space not in SPACES:
        raise ConfigError(f"space = {space!r} must be one of {', '.join(map(repr, SPACES))}.")
    lowrank.check_size(rank, energy)
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
        raise ConfigError(f"seed = {seed!r} must be a whole number or None.")


def _replaced(path: str, record: AdapterRecord, heads: Collection[str]) -> bool:
    """Whether a head of the result, which is not this adapter's, stands where its change at `path` would act."""
    inside = [head for head in heads if path == head or path.startswith(head + ".")]
    return any(head not in record.heads for head in inside)


def _warn_of_replaced(records: Sequence[AdapterRecord], heads: Collection[str]) -> None:
    lost = [(r.name, path) for r in records for path in (*r.layers, *r.biases) if _replaced(path, r, heads)]
    if lost:
        name, path = lost[0]
        warnings.warn(
            f"The chosen head takes the place of what {name!r} changes at {path!r}, which is not in the result.",
            AdapterWarning,
            stacklevel=4,  # the caller of combine, behind the frame of torch.no_grad
        )


def _seeded(recipe: Recipe, seed: int | None, path: str, factors: Factors) -> Recipe:
    """The recipe with a generator that depends on the seed and the target alone, not on what came before."""
    if seed is None:
        return recipe
    number = (seed * 0x9E3779B1 + zlib.crc32(path.encode())) % (1 << 63)  # the same in every process
    generator = torch.Generator(factors.up.device).manual_seed(number)
    return replace(recipe, options=replace(recipe.options, generator=generator))


def _factors_of(record: AdapterRecord, path: str) -> Factors:
    method = default_registry.method_of(record.config)
    found = method.factors(record.layers[path])
    if found is None:
        instead = "Merge it (adapters.merge), or activate" if "merge" in method.hooks else "Activate"
        raise UnsupportedError(
            f"Adapter {record.name!r} ({record.config.method}) has no low-rank change of the weight at {path!r}, so it "
            f"cannot be combined or converted. {instead} it beside the others instead."
        )
    if found.down.is_meta:
        raise StateError(f"Adapter {record.name!r} has no values at {path!r}: it is on the meta device.")
    if not all(bool(torch.isfinite(t).all()) for t in found[:3] if t is not None):
        raise StateError(f"Adapter {record.name!r} has values at {path!r} that are not finite.")
    return found


def _check_rank_fits(rank: int | None, path: str, factors: Factors) -> None:
    most = min(factors.up.shape[0], factors.down.shape[1])
    if rank is not None and rank > most:
        raise ConfigError(f"rank = {rank} is more than {path!r} can have: min(out, in) = {most} there.")


def _biases(records: list[AdapterRecord], weights: list[float], heads: Collection[str]) -> dict[str, Tensor]:
    """Trained biases: the base's and the weighted sum of what each adapter changed in it."""
    found: dict[str, Tensor] = {}
    for record, weight in zip(records, weights, strict=True):
        for path, layer in record.biases.items():
            if not _replaced(path, record, heads):
                bias = record.hosts[path]._parameters["bias"]
                assert bias is not None
                shift = layer.shift(bias).detach()
                found[path] = found.get(path, layer.bias.detach() - shift) + weight * shift
    return found
