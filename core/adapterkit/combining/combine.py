"""Combining several adapters into one, on a model or in files."""

from __future__ import annotations

import sys
import warnings
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from adapterkit.combining import lowrank
from adapterkit.combining.heads import combine_heads
from adapterkit.combining.methods import SPACES, Recipe, Space, combine_factors
from adapterkit.combining.new_adapter import Changes, check_can_result, check_finite
from adapterkit.contract import AdapterConfig, AdapterLayer, MajoritySign, Method, Options, combiners, default_registry
from adapterkit.errors import AdapterWarning, ConfigError, StateError, UnsupportedError
from adapterkit.kinds import Factors, LayerKind
from adapterkit.model import Adapter, LabelSet
from adapterkit.results import CombineReport
from adapterkit.tensors import module_slots


@dataclass(frozen=True, kw_only=True)
class Choices:
    """The choices for one combination; see `Adapters.combine`."""

    method: str = "linear"
    space: Space = "delta"
    rank: int | None = None
    energy: float | None = None
    to: str = "lora"
    heads: str | None = None
    density: float | None = None
    majority_sign_method: MajoritySign = "total"
    seed: int | None = None
    isotropize: bool = False

    def recipe(self) -> Recipe:
        """Check the choices, and return them for every target.

        Raises:
            ConfigError, UnknownNameError: a choice is invalid.
            UnsupportedError: the method cannot be a result.
        """
        combiner = default_registry.combiner(self.method)
        combiners.check_options(self.method, combiner, self.density, self.majority_sign_method)
        _check_choices(self.space, self.rank, self.energy, self.seed)
        check_can_result(default_registry.method(self.to))
        options = Options(self.density or 1.0, self.majority_sign_method)
        linear = self.method == "linear"
        return Recipe(combiner, linear, self.space, options, self.rank, self.energy, self.isotropize)


def check_sources(sources: object) -> None:
    """Raise `ConfigError` unless these are adapters and their weights."""
    if not isinstance(sources, Mapping) or not sources:
        raise ConfigError(f"combine takes adapters and their weights, {{'a': 0.7, 'b': 0.3}}, not {sources!r}.")
    for name, weight in sources.items():
        if not _is_finite(weight):
            raise ConfigError(f"The weight of {name!r} is {weight!r}, but it must be a finite number.")


def check_same_base(configs: Mapping[str, AdapterConfig]) -> None:
    """Raise `ConfigError` if the adapters' configs name different base models."""
    bases = {c.base_model_name_or_path: name for name, c in configs.items() if c.base_model_name_or_path}
    if len(bases) > 1:
        listed = ", ".join(f"{name!r} of {base!r}" for base, name in bases.items())
        raise ConfigError(
            f"The adapters were trained on different bases: {listed}. If these are names of one model, pass "
            "same_base=True."
        )


@dataclass(frozen=True)
class Source:
    """One adapter to combine, on a model or in files.

    Attributes:
        kinds: the layer kind of each target, by path.
        heads: the tensors of its heads; `tables` names the heads that are embeddings.
        biases: its trained biases, by the path of their module.
        change: returns its exact change at a path, in a given dtype or a wider one; see `exact_change`.
        shift: returns its change of the bias at a path.
    """

    name: str
    config: AdapterConfig
    kinds: Mapping[str, LayerKind]
    heads: Mapping[str, Mapping[str, Tensor]]
    tables: frozenset[str]
    biases: Mapping[str, Tensor]
    labels: LabelSet | None
    change: Callable[[str, torch.dtype], Factors]
    shift: Callable[[str], Tensor]

    @classmethod
    def of(cls, adapter: Adapter) -> Source:
        """The source for an adapter on a model."""
        method = default_registry.method_of(adapter.config)

        def shift(path: str) -> Tensor:
            base = adapter.hosts[path].bias
            assert isinstance(base, Tensor)
            return adapter.biases[path].shift(base).detach()

        return cls(
            name=adapter.name,
            config=adapter.config,
            kinds={path: layer.kind for path, layer in adapter.layers.items()},
            heads={path: {n: s.tensor for n, s in module_slots(head)} for path, head in adapter.heads.items()},
            tables=adapter.tables,
            biases={path: layer.bias.detach() for path, layer in adapter.biases.items()},
            labels=adapter.labels,
            change=lambda path, dtype: exact_change(method, adapter.layers[path], adapter.name, path, dtype),
            shift=shift,
        )


@torch.no_grad()
def mix(
    name: str,
    sources: Sequence[Source],
    weights: Sequence[float],
    choices: Choices,
    order: Sequence[str],
    store: MutableMapping[str, Factors] | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Changes, CombineReport]:
    """The changes of the adapter that combines these sources.

    Args:
        order: the paths of all targets, in the order of the work.
        store: keeps the result of each target until all are known.
        dtype: the changes are computed in this dtype or a wider one.
    """
    recipe = choices.recipe()
    heads, labels = combine_heads(sources, choices.heads)
    _warn_of_replaced(sources, heads)
    factors: MutableMapping[str, Factors] = {} if store is None else store
    errors, ranks, most = {}, {}, {}
    for path, having in _targets(sources, weights, order, heads):
        found = [source.change(path, dtype) for source, _ in having]
        most[path] = min(found[0].up.shape[0], found[0].down.shape[1])
        try:
            made, errors[path] = combine_factors(
                found, [w for _, w in having], _seeded(recipe, choices.seed, path, found[0])
            )
        except ConfigError as error:
            raise ConfigError(f"{path!r}: {error}") from error
        check_finite(name, path, made)
        factors[path], ranks[path] = made, made.rank
    changes = Changes(
        factors=factors,
        kinds={path: kind for source in sources for path, kind in source.kinds.items()},
        fields=_shared_fields(sources, heads=bool(heads)),
        biases=_biases(sources, weights, heads),
        heads=heads,
        tables=frozenset(path for source in sources for path in source.tables if path in heads),
        labels=labels,
    )
    return changes, CombineReport(name, choices.to, ranks, errors, tuple(heads), lowrank.clipped(recipe.rank, most))


def _targets(
    sources: Sequence[Source], weights: Sequence[float], order: Sequence[str], heads: Collection[str]
) -> Iterator[tuple[str, list[tuple[Source, float]]]]:
    """Each target in order, with the adapters that change it and their weights."""
    count = 0
    for path in order:
        pairs = zip(sources, weights, strict=True)
        having = [(source, w) for source, w in pairs if path in source.kinds and not _replaced(path, source, heads)]
        if having:
            count += 1
            yield path, having
    if not count:
        raise ConfigError("The chosen heads replace every layer that the adapters change. Choose other heads.")


def _is_finite(weight: object) -> bool:
    """Whether this is a number in the range of float; comparisons with `nan` are false."""
    if isinstance(weight, bool):
        return False
    number: Any = weight if isinstance(weight, Real) else float("nan")
    return bool(abs(number) <= sys.float_info.max)


def _shared_fields(sources: Sequence[Source], *, heads: bool) -> dict[str, str]:
    """The fields that name the base and the task, where all adapters agree; the task only if there is a head."""
    found = {}
    for name in ("base_model_name_or_path", "revision", *(["task_type"] if heads else [])):
        values = {getattr(source.config, name) for source in sources}
        if len(values) == 1 and None not in values:
            (found[name],) = values
    return found


def _check_choices(space: object, rank: object, energy: object, seed: object) -> None:
    if space not in SPACES:
        raise ConfigError(f"space = {space!r} must be one of {', '.join(map(repr, SPACES))}.")
    lowrank.check_size(rank, energy)
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
        raise ConfigError(f"seed = {seed!r} must be a whole number or None.")


def _replaced(path: str, source: Source, heads: Collection[str]) -> bool:
    """Whether a head of the result, which is not this adapter's, replaces the layer at `path`."""
    inside = [head for head in heads if path == head or path.startswith(head + ".")]
    return any(head not in source.heads for head in inside)


def _warn_of_replaced(sources: Sequence[Source], heads: Collection[str]) -> None:
    lost = [(s.name, path) for s in sources for path in (*s.kinds, *s.biases) if _replaced(path, s, heads)]
    if lost:
        name, path = lost[0]
        warnings.warn(
            f"The chosen head replaces a layer that {name!r} changes, {path!r}. This change is not in the result.",
            AdapterWarning,
            stacklevel=6,  # the caller of combine, behind the frames of torch.no_grad and inference_mode
        )


def _seeded(recipe: Recipe, seed: int | None, path: str, factors: Factors) -> Recipe:
    """The recipe with a generator that depends only on the seed and the target."""
    if seed is None:
        return recipe
    number = (seed * 0x9E3779B1 + zlib.crc32(path.encode())) % (1 << 63)  # the same in every process
    generator = torch.Generator(factors.up.device).manual_seed(number)
    return replace(recipe, options=replace(recipe.options, generator=generator))


def exact_change(method: Method, layer: AdapterLayer, name: str, path: str, dtype: torch.dtype) -> Factors:
    """The exact change of an adapter at one of its targets, computed in this dtype or a wider one.

    A number that scales the change stays in `scale`.

    Raises:
        UnsupportedError: the change has no low-rank form.
        StateError: the change has no values, or values that are not finite.
    """
    found = method.factors(layer, dtype, scaled=False)
    if found is None:
        instead = "Merge it (adapters.merge), or activate" if method.merges(layer) else "Activate"
        raise UnsupportedError(
            f"Adapter {name!r} ({method.name}) has no low-rank change of the weight at {path!r}, so "
            f"it cannot be combined or converted. {instead} it beside the others instead."
        )
    if found.down.is_meta:
        raise StateError(f"Adapter {name!r} has no values at {path!r}: it is on the meta device.")
    if not lowrank.all_finite(*found[:3]):
        raise StateError(f"Adapter {name!r} has values at {path!r} that are not finite.")
    return found


def _biases(sources: Sequence[Source], weights: Sequence[float], heads: Collection[str]) -> dict[str, Tensor]:
    """The trained biases: the bias of the base plus the weighted sum of the changes of each adapter.

    That is `base + sum of w_i (own_i - base)`. If the weights add up to 1 it is `sum of w_i own_i`, without the base.
    """
    found: dict[str, Tensor] = {}
    for path in dict.fromkeys(path for source in sources for path in source.biases):
        pairs = zip(sources, weights, strict=True)
        having = [(source, w) for source, w in pairs if path in source.biases and not _replaced(path, source, heads)]
        if not having:
            continue
        own = [(source.biases[path], weight) for source, weight in having]
        if sum(weight for _, weight in having) == 1.0:
            found[path] = torch.stack([weight * bias for bias, weight in own]).sum(0)
            continue
        shifts = [weight * source.shift(path) for source, weight in having]
        found[path] = own[0][0] - having[0][0].shift(path) + torch.stack(shifts).sum(0)
    return found
