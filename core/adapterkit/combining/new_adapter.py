"""Building an adapter from known changes: the result of combining, converting and extracting."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from adapterkit.combining.heads import Heads
from adapterkit.combining.lowrank import all_finite
from adapterkit.contract import AdapterConfig, AdapterLayer, Method, beside
from adapterkit.errors import PluginError, StateError
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
    layer_tensors,
)
from adapterkit.tensors import module_slots


@dataclass(frozen=True)
class Changes:
    """The changes that a new adapter makes.

    Attributes:
        factors: the change at each target, by path in the order of the model.
        kinds: the layer kind of each target.
        fields: fields of the new config, such as the name of the base.
        biases: the trained biases, by the path of their module.
        heads: the tensors of the heads; `tables` names the heads that are embeddings; `labels` is their label set.
    """

    factors: Mapping[str, Factors]
    kinds: Mapping[str, LayerKind]
    fields: Mapping[str, str] = field(default_factory=dict)
    biases: Mapping[str, Tensor] = field(default_factory=dict)
    heads: Heads = field(default_factory=dict)
    tables: frozenset[str] = frozenset()
    labels: LabelSet | None = None


def check_can_result(method: Method) -> None:
    """Raise `UsageError` if the method cannot be made from factors."""
    if "from_factors" not in method.hooks:
        raise method.cannot_result()


def check_finite(name: str, path: str, *tensors: Tensor | None) -> None:
    """Raise `StateError` if the new adapter has values there that are not finite."""
    if not all_finite(*tensors):
        raise StateError(
            f"Adapter {name!r} would have values at {path!r} that are not finite. Nothing was changed. "
            "Check the weights, and the values and scales of the sources."
        )


def to_method(changes: Changes, method: Method) -> tuple[AdapterConfig, dict[str, Tensor]]:
    """The changes of layers as a config and tensors of this method.

    Raises:
        UnsupportedError: the method cannot express some of the changes.
    """
    config, tensors = method.from_factors(changes.factors, changes.kinds)
    bias = "none"
    if changes.biases:
        inside = set(changes.biases) <= set(changes.factors)
        bias = f"{config.type_in_files().lower()}_only" if inside else "all"
    return config.replace(**{"modules_to_save": None, "bias": bias, **changes.fields}), dict(tensors)


@torch.no_grad()
def build_result(name: str, changes: Changes, method: Method, model: nn.Module, active: Active) -> Adapter:
    """The adapter of this method that makes these changes on a model; it is not installed yet.

    Raises:
        UnsupportedError: the method cannot express some of the changes.
        StateError: a head or a bias does not fit the model.
    """
    modules = BaseModules(model)
    config, tensors = to_method(changes, method)
    config = config.replace(target_modules=short_names(changes.factors, modules.all_paths))
    matches = [Match(p, model.get_submodule(p), changes.kinds[p], "a combination") for p in changes.factors]
    selection, builder = Selection(tuple(matches), tuple(changes.heads), (), ()), LayerBuilder(method, config)
    parts = [(path, {"bias": bias}) for path, bias in changes.biases.items()] + list(changes.heads.items())
    rest = {f"{beside(p, changes.factors)}.{local}": t for p, held in parts for local, t in held.items()}
    adapter, _ = build_adapter(modules, name, builder, selection, active, tensors | rest)
    check_given(tensors, adapter.layers, builder)
    untrained = {f"{beside(path, changes.factors)}.bias" for path in adapter.biases.keys() - changes.biases.keys()}
    builder.fit.missing = [key for key in builder.fit.missing if key not in untrained]  # these stay the base's
    if not (report := builder.fit.report()).ok:
        raise StateError(f"The heads and biases of {name!r} do not fit this model.", report)
    first: dict[int, Tensor] = {}
    for path, head in adapter.heads.items():  # heads that share a tensor get one parameter
        for local, slot in module_slots(head):
            slot.assign(first.setdefault(id(changes.heads[path][local]), slot.tensor))
    adapter.labels, adapter.tables = changes.labels, changes.tables
    return adapter


def check_given(tensors: Mapping[str, Tensor], layers: Mapping[str, AdapterLayer], builder: LayerBuilder) -> None:
    """Raise `PluginError` if the hook `from_factors` returned other tensors than the layers have."""
    method = builder.method
    given = layer_tensors(tensors, builder.rule, layers)
    for path, layer in layers.items():
        own, found = sorted(local for local, _ in module_slots(layer)), sorted(given.get(path, {}))
        if own != found:
            found = found or sorted(key.removeprefix(f"{path}.") for key in tensors if key.startswith(f"{path}."))
            raise PluginError(
                f"The method {method.name!r} ({method.provider}): its hook from_factors gave {found} for {path!r}; the "
                f"layer has {own}."
            )
    for mismatch in builder.fit.mismatched:
        if mismatch.key in tensors:
            raise PluginError(
                f"The method {method.name!r} ({method.provider}): its hook from_factors gave {mismatch.key!r} of shape "
                f"{mismatch.found}; the layer's is {mismatch.expected}."
            )
