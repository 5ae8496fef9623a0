"""Combination: new adapters out of those there are."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from adapterkit import combiners, lowrank
from adapterkit.combine import SPACES, Recipe, Space, combine_factors
from adapterkit.combiners import MajoritySign, Options
from adapterkit.errors import ConfigError, UnsupportedError
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
        """
        self._check_new_name(name)
        records = self._sources(sources, same_base=same_base)
        recipe = _recipe(method, space, rank, energy, Options(density or 1.0, majority_sign_method), isotropize)
        combiners.check_options(method, recipe.combiner, density, majority_sign_method)
        target_method = default_registry.method(to)
        check_can_result(target_method)
        new_heads, labels = combine_heads(records, heads)
        changes, errors = self._changes(records, list(sources.values()), recipe, seed)
        record = build_result(name, changes, target_method, self.model, self._active)
        for path, head in new_heads.items():
            record.heads[path] = head
            record.hosts[path] = self.model.get_submodule(path)
        record.labels = labels
        self._install(record)
        ranks = {path: factors.rank for path, factors in changes.factors.items()}
        return CombineReport(name, to, ranks, errors, tuple(new_heads))

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
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not abs(weight) < float("inf"):
                raise ConfigError(f"The weight of {name!r} is {weight!r}; it must be a finite number.")
        bases = {r.config.base_model_name_or_path: r.name for r in records if r.config.base_model_name_or_path}
        if len(bases) > 1 and not same_base:
            listed = ", ".join(f"{name!r} of {base!r}" for base, name in bases.items())
            raise ConfigError(
                f"The adapters were trained on different bases: {listed}. If these are names of one model, say "
                "same_base=True."
            )
        return records

    def _changes(
        self, records: list[AdapterRecord], weights: list[float], recipe: Recipe, seed: int | None
    ) -> tuple[Changes, dict[str, float]]:
        walk = Walk(self.model)
        factors: dict[str, Factors] = {}
        errors: dict[str, float] = {}
        kinds = {path: layer.kind for record in records for path, layer in record.layers.items()}
        if recipe.rank is not None:
            _check_rank_fits(recipe.rank, kinds)
        for path in in_model_order(list(kinds), walk):
            having = [(r, w) for r, w in zip(records, weights, strict=True) if path in r.layers]
            found = [_factors_of(record, path) for record, _ in having]
            options = _seeded(recipe, seed, path, found[0])
            factors[path], errors[path] = combine_factors(found, [w for _, w in having], options)
        return Changes(factors, kinds, _biases(records, weights)), errors


def _recipe(
    method: str, space: str, rank: int | None, energy: float | None, options: Options, isotropize: bool
) -> Recipe:
    combiner = default_registry.combiner(method)
    if space not in SPACES:
        raise ConfigError(f"space = {space!r} must be one of {', '.join(map(repr, SPACES))}.")
    lowrank.check_size(rank, energy)
    return Recipe(combiner, method == "linear", space, options, rank, energy, isotropize)  # type: ignore[arg-type]


def _seeded(recipe: Recipe, seed: int | None, path: str, factors: Factors) -> Recipe:
    """The recipe with a generator that depends on the seed and the target alone, not on what came before."""
    if seed is None:
        return recipe
    generator = torch.Generator(factors.up.device).manual_seed(hash_of(seed, path))
    options = Options(recipe.options.density, recipe.options.majority_sign_method, generator)
    return Recipe(**{**recipe.__dict__, "options": options})


def hash_of(seed: int, path: str) -> int:
    """A number that is the same in every process."""
    import zlib

    return (seed * 0x9E3779B1 + zlib.crc32(path.encode())) % (1 << 63)


def _factors_of(record: AdapterRecord, path: str) -> Factors:
    found = default_registry.method_of(record.config).factors(record.layers[path])
    if found is None:
        raise UnsupportedError(
            f"Adapter {record.name!r} ({record.config.method}) has no low-rank change at {path!r}, so it cannot be "
            "combined. Merge it instead (adapters.merge), or activate it beside the others."
        )
    return found


def _check_rank_fits(rank: int, kinds: Mapping[str, object]) -> None:
    for path, kind in kinds.items():
        most = min(kind.out_features, kind.in_features)  # type: ignore[attr-defined]
        if rank > most:
            raise ConfigError(f"rank = {rank} is more than {path!r} can have: min(out, in) = {most} there.")


def _biases(records: list[AdapterRecord], weights: list[float]) -> dict[str, torch.Tensor]:
    """Trained biases: the base's and the weighted sum of what each adapter changed in it."""
    found: dict[str, torch.Tensor] = {}
    for record, weight in zip(records, weights, strict=True):
        for path, layer in record.biases.items():
            start = found.get(path, layer.base.detach())
            found[path] = start + weight * (layer.bias - layer.base).detach()
    return found
