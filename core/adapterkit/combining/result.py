"""Making an adapter out of changes that are known: the result of combining, converting and extracting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from adapterkit.combining.lowrank import all_finite
from adapterkit.contract import RESULT_HOOKS, Method
from adapterkit.errors import PluginError, StateError, UnsupportedError
from adapterkit.files import module_slots, short_names
from adapterkit.forward import Active
from adapterkit.kinds import Factors, LayerKind
from adapterkit.model import Adapter, BaseModules, Builder, LabelSet, Match, Selection


@dataclass(frozen=True)
class Changes:
    """What the new adapter is to do.

    Attributes:
        factors: the change at each target's path, in the order of the model.
        kinds: what each target is.
        biases: the trained bias of modules, by path.
        heads: the heads by path, and `labels` their label set.
    """

    factors: Mapping[str, Factors]
    kinds: Mapping[str, LayerKind]
    biases: Mapping[str, Tensor] = field(default_factory=dict)
    heads: Mapping[str, nn.Module] = field(default_factory=dict)
    labels: LabelSet | None = None


def check_can_result(method: Method) -> None:
    """Raise `UnsupportedError` if the method cannot be made from factors."""
    lacking = [hook for hook in RESULT_HOOKS if hook not in method.hooks]
    if lacking:
        raise UnsupportedError(
            f"The method {method.name!r} cannot be a result: it has no hook {' and '.join(lacking)}, so no "
            "change can be put into its form. Take to='lora', which can express every low-rank change."
        )


def check_finite(name: str, path: str, factors: Factors) -> None:
    """Raise `StateError` if the change of the adapter to be made has values that are not finite."""
    if not all_finite(*factors[:3]):
        raise StateError(
            f"The change of {name!r} at {path!r} would have values that are not finite. Nothing was changed; look "
            "at the weights and at the sources' scales."
        )


def build_result(
    name: str,
    changes: Changes,
    method: Method,
    model: nn.Module,
    active: Active,
    *,
    device: torch.device | None = None,
) -> Adapter:
    """The adapter of this method whose change at each target is the one given; not installed yet.

    Args:
        device: where it is; `None`: where the model computes.

    Raises:
        UnsupportedError: the method cannot express some of the changes.
    """
    check_can_result(method)
    modules = BaseModules(model)
    ranks = {path: f.rank for path, f in changes.factors.items()}
    config = method.config_from_ranks(
        ranks,
        bias=any(f.bias is not None for f in changes.factors.values()),
        trained_biases=_trained_biases(changes),
    ).replace(target_modules=short_names(changes.factors, modules.all_paths), modules_to_save=None)
    matches = [Match(p, model.get_submodule(p), changes.kinds[p], "a combination") for p in changes.factors]
    builder = Builder(
        modules, method, config, Selection(tuple(matches), tuple(changes.heads), (), ()), load=True, device=device
    )
    adapter, _ = builder.build(name, active)
    with torch.no_grad():
        for path, factors in changes.factors.items():
            _fill(adapter, builder, path, factors)
        _fill_biases(adapter, method, changes)
    adapter.heads = dict(changes.heads)
    adapter.labels = changes.labels
    return adapter


def _fill_biases(adapter: Adapter, method: Method, changes: Changes) -> None:
    lacking = sorted(set(changes.biases) - set(adapter.biases))
    if lacking:
        raise UnsupportedError(
            f"The method {method.name!r} cannot express the trained bias of {lacking[0]!r}. Take to='lora'."
        )
    for path, bias in changes.biases.items():
        own = adapter.biases[path].bias
        adapter.biases[path].bias = nn.Parameter(bias.to(bias.device if own.is_meta else own.device, own.dtype))


def _trained_biases(changes: Changes) -> str:
    if not changes.biases:
        return "none"
    return "targets" if set(changes.biases) <= set(changes.factors) else "all"


def _fill(adapter: Adapter, builder: Builder, path: str, factors: Factors) -> None:
    target, method = builder.targets[path], builder.method
    values = method.from_factors(target, adapter.config, factors)
    if values is None:
        raise UnsupportedError(
            f"The method {method.name!r} cannot express the change at {path!r} ({target.kind.name}, rank "
            f"{factors.rank})."
        )
    places = dict(module_slots(adapter.layers[path]))
    if set(values) != set(places):
        raise PluginError(
            f"The method {method.name!r} ({method.provider}): its hook from_factors gave {sorted(values)} for "
            f"{path!r}; the layer has {sorted(places)}."
        )
    for local, value in values.items():
        places[local].assign(value.to(target.device, target.dtype).contiguous())


def in_model_order(paths: Sequence[str], modules: BaseModules) -> list[str]:
    """These paths in the order of the model's modules."""
    order = {path: i for i, path in enumerate(modules.all_paths)}
    return sorted(set(paths), key=order.__getitem__)
