"""One adapter out of several, from their parts alone, wherever the values are."""

from __future__ import annotations

import sys
import warnings
import zlib
from collections.abc import Collection, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from adapterkit.combining import lowrank
from adapterkit.combining.heads import combine_heads
from adapterkit.combining.methods import SPACES, Recipe, Space, combine_factors
from adapterkit.combining.result import Changes, build_result, check_can_result, check_finite, in_model_order
from adapterkit.contract import MajoritySign, Options, combiners, default_registry
from adapterkit.errors import AdapterWarning, ConfigError, StateError, UnsupportedError
from adapterkit.forward import Active
from adapterkit.kinds import Factors
from adapterkit.model import Adapter, BaseModules
from adapterkit.results import CombineReport
from adapterkit.tensors import widened


@dataclass(frozen=True, kw_only=True)
class Choices:
    """What is chosen for one combination; see `Adapters.combine`."""

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
        """The choices checked, as every target's combination gets them.

        Raises:
            ConfigError, UnknownNameError: choices that make no sense.
            UnsupportedError: a method that cannot be a result.
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
            raise ConfigError(f"The weight of {name!r} is {weight!r}; it must be a finite number.")


def check_same_base(adapters: Sequence[Adapter]) -> None:
    """Raise `ConfigError` if the adapters' configs name different base models."""
    bases = {r.config.base_model_name_or_path: r.name for r in adapters if r.config.base_model_name_or_path}
    if len(bases) > 1:
        listed = ", ".join(f"{name!r} of {base!r}" for base, name in bases.items())
        raise ConfigError(
            f"The adapters were trained on different bases: {listed}. If these are names of one model, say "
            "same_base=True."
        )


@dataclass
class Workspace:
    """Where a combination is worked out.

    Attributes:
        model, active: what the result will be on.
        store: keeps each target's result until all are known.
        dtype: changes are worked out in this one at least.
        device: where the result is; `None`: where the model computes.
    """

    model: nn.Module
    active: Active
    store: MutableMapping[str, Factors] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    device: torch.device | None = None


@torch.no_grad()
def mix(
    name: str, adapters: Sequence[Adapter], weights: Sequence[float], choices: Choices, space: Workspace
) -> tuple[Adapter, CombineReport]:
    """The combination of these adapters, not installed yet."""
    recipe = choices.recipe()
    heads, labels = combine_heads(adapters, choices.heads)
    _warn_of_replaced(adapters, heads)
    factors, errors, ranks, most = space.store, {}, {}, {}
    for path, having in _targets(adapters, weights, space.model, heads):
        found = [factors_at(adapter, path, space.dtype) for adapter, _ in having]
        most[path] = min(found[0].up.shape[0], found[0].down.shape[1])
        try:
            made, errors[path] = combine_factors(
                found, [w for _, w in having], _seeded(recipe, choices.seed, path, found[0])
            )
        except ConfigError as error:
            raise ConfigError(f"{path!r}: {error}") from error
        check_finite(name, path, made)
        factors[path], ranks[path] = made, made.rank
    clipped = lowrank.clipped(recipe.rank, most)
    kinds = {path: layer.kind for adapter in adapters for path, layer in adapter.layers.items()}
    changes = Changes(factors, kinds, _biases(adapters, weights, heads), heads, labels)
    to = default_registry.method(choices.to)
    adapter = build_result(name, changes, to, space.model, space.active, device=space.device)
    adapter.config = adapter.config.replace(**_shared_fields(adapters, heads=bool(heads)))
    adapter.tables = frozenset(path for r in adapters for path in r.tables if path in heads)
    return adapter, CombineReport(name, choices.to, ranks, errors, tuple(heads), clipped)


def _targets(
    adapters: Sequence[Adapter], weights: Sequence[float], model: nn.Module, heads: Collection[str]
) -> Iterator[tuple[str, list[tuple[Adapter, float]]]]:
    """Each target in the order of the model, with the adapters that change it there and their weights."""
    count = 0
    for path in in_model_order([path for adapter in adapters for path in adapter.layers], BaseModules(model)):
        pairs = zip(adapters, weights, strict=True)
        having = [(r, w) for r, w in pairs if path in r.layers and not _replaced(path, r, heads)]
        if having:
            count += 1
            yield path, having
    if not count:
        raise ConfigError("The heads that were chosen take the place of every layer that the adapters change.")


def _is_finite(weight: object) -> bool:
    """Whether it is a number that a float can hold; `nan` compares as false."""
    if isinstance(weight, bool):
        return False
    number: Any = weight if isinstance(weight, Real) else float("nan")
    return bool(abs(number) <= sys.float_info.max)


def _shared_fields(adapters: Sequence[Adapter], *, heads: bool) -> dict[str, str]:
    """Fields of the configs that say where the adapters are from, if all agree; the task needs its head."""
    found = {}
    for name in ("base_model_name_or_path", "revision", *(["task_type"] if heads else [])):
        values = {getattr(adapter.config, name) for adapter in adapters}
        if len(values) == 1 and None not in values:
            (found[name],) = values
    return found


def _check_choices(space: object, rank: object, energy: object, seed: object) -> None:
    if space not in SPACES:
        raise ConfigError(f"space = {space!r} must be one of {', '.join(map(repr, SPACES))}.")
    lowrank.check_size(rank, energy)
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
        raise ConfigError(f"seed = {seed!r} must be a whole number or None.")


def _replaced(path: str, adapter: Adapter, heads: Collection[str]) -> bool:
    """Whether a head of the result, which is not this adapter's, stands where its change at `path` would act."""
    inside = [head for head in heads if path == head or path.startswith(head + ".")]
    return any(head not in adapter.heads for head in inside)


def _warn_of_replaced(adapters: Sequence[Adapter], heads: Collection[str]) -> None:
    lost = [(r.name, path) for r in adapters for path in (*r.layers, *r.biases) if _replaced(path, r, heads)]
    if lost:
        name, path = lost[0]
        warnings.warn(
            f"The chosen head takes the place of what {name!r} changes at {path!r}, which is not in the result.",
            AdapterWarning,
            stacklevel=6,  # the caller of combine, behind the frames of torch.no_grad and inference_mode
        )


def _seeded(recipe: Recipe, seed: int | None, path: str, factors: Factors) -> Recipe:
    """The recipe with a generator that depends on the seed and the target alone, not on what came before."""
    if seed is None:
        return recipe
    number = (seed * 0x9E3779B1 + zlib.crc32(path.encode())) % (1 << 63)  # the same in every process
    generator = torch.Generator(factors.up.device).manual_seed(number)
    return replace(recipe, options=replace(recipe.options, generator=generator))


def factors_at(adapter: Adapter, path: str, dtype: torch.dtype = torch.float32) -> Factors:
    """The exact change of an adapter at one of its targets, worked out in float32 at least.

    Raises:
        UnsupportedError: it has no low-rank form.
        StateError: it has no values, or values that are not finite.
    """
    method, layer = default_registry.method_of(adapter.config), adapter.layers[path]
    with widened(layer, dtype):
        found = method.factors(layer)
    if found is None:
        instead = "Merge it (adapters.merge), or activate" if "merge" in method.hooks else "Activate"
        raise UnsupportedError(
            f"Adapter {adapter.name!r} ({adapter.config.method}) has no low-rank change of the weight at {path!r}, so "
            f"it cannot be combined or converted. {instead} it beside the others instead."
        )
    if found.down.is_meta:
        raise StateError(f"Adapter {adapter.name!r} has no values at {path!r}: it is on the meta device.")
    if not lowrank.all_finite(*found[:3]):
        raise StateError(f"Adapter {adapter.name!r} has values at {path!r} that are not finite.")
    return found


def _biases(adapters: Sequence[Adapter], weights: Sequence[float], heads: Collection[str]) -> dict[str, Tensor]:
    """Trained biases: the base's and the weighted sum of what each adapter changed in it.

    `base + sum of w_i (own_i - base)`; where the weights add up to 1 that is `sum of w_i own_i`, and no base is needed.
    """
    found: dict[str, Tensor] = {}
    for path in dict.fromkeys(path for adapter in adapters for path in adapter.biases):
        pairs = zip(adapters, weights, strict=True)
        having = [(r, w) for r, w in pairs if path in r.biases and not _replaced(path, r, heads)]
        if not having:
            continue
        own = [(adapter.biases[path].bias.detach(), weight) for adapter, weight in having]
        if sum(weight for _, weight in having) == 1.0:
            found[path] = torch.stack([weight * bias for bias, weight in own]).sum(0)
            continue
        shifts = [weight * _shift(adapter, path) for adapter, weight in having]
        found[path] = own[0][0] - _shift(having[0][0], path) + torch.stack(shifts).sum(0)
    return found


def _shift(adapter: Adapter, path: str) -> Tensor:
    base = adapter.hosts[path].bias
    assert isinstance(base, Tensor)
    layer = adapter.biases[path]
    if layer.base is None and base.is_meta:
        raise StateError(
            f"Adapter {adapter.name!r} trains the bias of {path!r}, and its files do not tell what that was before. "
            "Give base=, the folder of the model with its weights, or weights that add up to 1."
        )
    return layer.shift(base).detach()
