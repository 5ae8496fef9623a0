"""Combining several adapters into one, on a model or in files."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection, Mapping, MutableMapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adapterkit.combining import lowrank
from adapterkit.combining.heads import combine_heads
from adapterkit.combining.methods import Choices, combine_factors
from adapterkit.combining.new_adapter import Changes, check_finite
from adapterkit.contract import AdapterConfig, AdapterLayer, Method, default_registry
from adapterkit.errors import ConfigError, StateError, UnsupportedError, UsageError, warn
from adapterkit.kinds import Factors, LayerKind
from adapterkit.model import Adapter, LabelSet, finite_number, inside
from adapterkit.results import CombineReport
from adapterkit.tensors import module_slots


def check_sources(sources: object) -> None:
    """Raise `ConfigError` unless these are adapters and their weights."""
    if not isinstance(sources, Mapping) or not sources:
        raise UsageError(f"combine takes adapters and their weights, {{'a': 0.7, 'b': 0.3}}, not {sources!r}.")
    for name, weight in sources.items():
        finite_number(weight, f"The weight of {str(name)!r}")


@dataclass(frozen=True)
class Source:
    """One adapter to combine, on a model or in files.

    Attributes:
        kinds: the layer kind of each target, by path.
        heads: the tensors of its heads; `tables` names the heads that are embeddings.
        biases: its trained biases, by the path of their module.
        change: returns its exact change at a path, in a given dtype or a wider one; see `exact_change`.
        base_bias: returns the base's bias at a path.
    """

    name: str
    weight: float
    config: AdapterConfig
    kinds: Mapping[str, LayerKind]
    heads: Mapping[str, Mapping[str, Tensor]]
    tables: Collection[str]
    biases: Mapping[str, Tensor]
    labels: LabelSet | None
    change: Callable[[str, torch.dtype], Factors]
    base_bias: Callable[[str], Tensor]

    @classmethod
    def of(cls, adapter: Adapter, weight: float) -> Source:
        """The source for an adapter on a model."""
        method = default_registry.method_of(adapter.config)

        def base_bias(path: str) -> Tensor:
            kept = adapter.biases[path].base
            found = adapter.hosts[path].bias if kept is None else kept
            assert isinstance(found, Tensor)
            return found.detach()

        return cls(
            name=adapter.name,
            weight=weight,
            config=adapter.config,
            kinds={path: layer.kind for path, layer in adapter.layers.items()},
            heads={path: {n: s.tensor for n, s in module_slots(head)} for path, head in adapter.heads.items()},
            tables=adapter.tables,
            biases={path: layer.bias.detach() for path, layer in adapter.biases.items()},
            labels=adapter.labels,
            change=lambda path, dtype: exact_change(method, adapter.layers[path], adapter.name, path, dtype),
            base_bias=base_bias,
        )


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
    check_values(found, name, path)
    return found


def check_values(factors: Factors, name: str, path: str) -> None:
    """Raise `StateError` if the change of an adapter has no values, or values that are not finite."""
    if factors.down.is_meta:
        raise StateError(f"Adapter {name!r} has no values at {path!r}: it is on the meta device.")
    if not lowrank.all_finite(*factors[:3]):
        raise StateError(f"Adapter {name!r} has values at {path!r} that are not finite.")


def _check_same_base(sources: Sequence[Source]) -> None:
    bases = {s.config.base_model_name_or_path: s.name for s in sources if s.config.base_model_name_or_path}
    if len(bases) > 1:
        listed = ", ".join(f"{own!r} of {base!r}" for base, own in bases.items())
        raise ConfigError(
            f"The adapters were trained on different bases: {listed}. If these are names of one model, pass "
            "same_base=True."
        )


def _check_not_replaced(sources: Sequence[Source], heads: Collection[str]) -> None:
    """Raise `ConfigError` if one of the chosen heads replaces a module that a source without it changes."""
    for source in sources:
        others = [head for head in heads if head not in source.heads]
        replaced = [path for path in (*source.kinds, *source.biases) if inside(path, others) is not None]
        if replaced:
            raise ConfigError(
                f"The chosen head replaces {replaced[0]!r}, which {source.name!r} changes, so the result cannot have "
                "both. Choose another head, or heads='drop'."
            )


@torch.no_grad()
def mix(
    name: str,
    sources: Sequence[Source],
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
    choices.check()
    for source in sources:
        what = f"Adapter {source.name!r} cannot be combined or converted"
        default_registry.method_of(source.config).check_no_call(what)
    if not choices.same_base:
        _check_same_base(sources)
    heads, labels = combine_heads(sources, choices.heads)
    _check_not_replaced(sources, heads)
    factors: MutableMapping[str, Factors] = {} if store is None else store
    errors, ranks, most = {}, {}, {}
    pruned = bool(choices.density)
    for path in order:
        having = [source for source in sources if path in source.kinds]
        found = [source.change(path, dtype) for source in having]
        most[path] = min(found[0].up.shape[0], found[0].down.shape[1])
        generator = None
        if choices.seed is not None:  # it depends only on the seed and the target, in every process
            number = (choices.seed * 0x9E3779B1 + zlib.crc32(path.encode())) % (1 << 63)
            generator = torch.Generator(found[0].up.device).manual_seed(number)
        try:
            made, errors[path] = combine_factors(found, [source.weight for source in having], choices, generator)
        except ConfigError as error:
            raise ConfigError(f"{path!r}: {error}") from error
        check_finite(name, path, *made[:3])
        factors[path], ranks[path] = made, made.rank
        pruned = pruned and not (made.up.any() and made.down.any())
    if pruned:
        warn(f"{name!r} changes no weight: density = {choices.density} keeps none of the entries.")
    biases = _biases(sources)
    for path, held in (*heads.items(), *((path, {"bias": bias}) for path, bias in biases.items())):
        check_finite(name, path, *held.values())
    changes = Changes(
        factors=factors,
        kinds={path: kind for source in sources for path, kind in source.kinds.items()},
        fields=_shared_fields(sources, heads=bool(heads)),
        biases=biases,
        heads=heads,
        tables=frozenset(path for source in sources for path in source.tables if path in heads),
        labels=labels,
    )
    return changes, CombineReport(name, choices.to, ranks, errors, tuple(heads), lowrank.clipped(choices.rank, most))


def _shared_fields(sources: Sequence[Source], *, heads: bool) -> dict[str, str]:
    """The fields that name the base and the task, where all adapters agree; the task only if there is a head."""
    found = {}
    for name in ("base_model_name_or_path", "revision", *(["task_type"] if heads else [])):
        values = {getattr(source.config, name) for source in sources}
        if len(values) == 1 and None not in values:
            (found[name],) = values
    return found


def _biases(sources: Sequence[Source]) -> dict[str, Tensor]:
    """The trained biases `base + sum of w_i (own_i - base)`. The base is not needed if the weights add up to 1."""
    found: dict[str, Tensor] = {}
    for path in dict.fromkeys(path for source in sources for path in source.biases):
        having = [source for source in sources if path in source.biases]
        found[path] = torch.stack([source.weight * source.biases[path] for source in having]).sum(0)
        rest = 1.0 - sum(source.weight for source in having)
        if rest:
            found[path] += rest * having[0].base_bias(path).to(found[path].dtype)
    return found
