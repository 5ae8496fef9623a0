"""Making an adapter out of changes that are known: the result of combining, converting and extracting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from adapterkit.combining.lowrank import all_finite
from adapterkit.contract import RESULT_HOOKS, AdapterConfig, AdapterLayer, Method, Target, beside
from adapterkit.errors import PluginError, StateError, UnsupportedError
from adapterkit.files import short_names
from adapterkit.forward import Active
from adapterkit.kinds import Factors, LayerKind
from adapterkit.model import (
    Adapter,
    BaseModules,
    LabelSet,
    LayerBuilder,
    Match,
    Selection,
    build_adapter,
    by_layer,
)
from adapterkit.tensors import module_slots


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
    selection, builder = Selection(tuple(matches), tuple(changes.heads), (), ()), LayerBuilder(method, config)
    with torch.no_grad():
        tensors = _tensors(changes, method, config)
        biases = {f"{beside(path, changes.factors)}.bias": bias for path, bias in changes.biases.items()}
        adapter, _ = build_adapter(modules, name, builder, selection, active, tensors | biases, device=device)
    _check_given(tensors, adapter.layers, builder)
    lacking = sorted(set(changes.biases) - set(adapter.biases))
    if lacking:
        raise UnsupportedError(
            f"The method {method.name!r} cannot express the trained bias of {lacking[0]!r}. Take to='lora'."
        )
    adapter.heads = dict(changes.heads)
    adapter.labels = changes.labels
    return adapter


def _tensors(changes: Changes, method: Method, config: AdapterConfig) -> dict[str, Tensor]:
    """What layers with these changes hold, by keys of a file.

    Raises:
        UnsupportedError: the method cannot express some of the changes.
    """
    found: dict[str, Tensor] = {}
    for path, factors in changes.factors.items():
        target = Target(path, nn.Module(), changes.kinds[path], torch.float32, torch.device("cpu"), load=True)
        values = method.from_factors(target, config, factors)
        if values is None:
            raise UnsupportedError(
                f"The method {method.name!r} cannot express the change at {path!r} ({target.kind.name}, rank "
                f"{factors.rank})."
            )
        found |= {f"{path}.{local}": value for local, value in values.items()}
    return found


def _check_given(tensors: Mapping[str, Tensor], layers: Mapping[str, AdapterLayer], builder: LayerBuilder) -> None:
    """Raise `PluginError` if the hook `from_factors` gave other tensors than the layers have."""
    method = builder.method
    given, _ = by_layer(tensors, builder.rule, {path: path for path in layers})
    for path, layer in layers.items():
        own, found = sorted(local for local, _ in module_slots(layer)), sorted(given.get(path, {}))
        if own != found:
            found = found or sorted(key.removeprefix(f"{path}.") for key in tensors if key.startswith(f"{path}."))
            raise PluginError(
                f"The method {method.name!r} ({method.provider}): its hook from_factors gave {found} for {path!r}; the "
                f"layer has {own}."
            )
    for mismatch in builder.fit.mismatched:
        raise PluginError(
            f"The method {method.name!r} ({method.provider}): its hook from_factors gave {mismatch.key!r} of shape "
            f"{mismatch.found}; the layer's is {mismatch.expected}."
        )


def _trained_biases(changes: Changes) -> str:
    if not changes.biases:
        return "none"
    return "targets" if set(changes.biases) <= set(changes.factors) else "all"


def in_model_order(paths: Sequence[str], modules: BaseModules) -> list[str]:
    """These paths in the order of the model's modules."""
    order = {path: i for i, path in enumerate(modules.all_paths)}
    return sorted(set(paths), key=order.__getitem__)
