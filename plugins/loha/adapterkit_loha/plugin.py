"""The hooks through which adapterkit uses LoHa."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from adapterkit import (
    AdapterConfig,
    AdapterLayer,
    Factors,
    ForeignFile,
    KeyRule,
    LayerKind,
    Target,
    hookimpl,
)
from adapterkit_loha import foreign
from adapterkit_loha.config import LoHaConfig
from adapterkit_loha.layer import LoHaLayer


@hookimpl
def config_type() -> type[AdapterConfig]:
    return LoHaConfig


@hookimpl
def key_rule() -> KeyRule:
    return KeyRule(prefix="hada_")


@hookimpl
def inject(target: Target, config: LoHaConfig) -> AdapterLayer:
    return LoHaLayer(target, config)


@hookimpl
def factors(layer: LoHaLayer) -> Factors:
    return layer.factors()


@hookimpl
def from_file(
    config: LoHaConfig, tensors: Mapping[str, Tensor], layers: Mapping[str, LayerKind]
) -> Mapping[str, Tensor]:
    return foreign.renamed(config, tensors, layers)


@hookimpl
def foreign_config(tensors: Mapping[str, Tensor], layers: Mapping[str, LayerKind]) -> AdapterConfig | None:
    return foreign.config_of(tensors, layers)


@hookimpl
def layers_in_file(tensors: Mapping[str, Tensor]) -> Mapping[str, nn.Module]:
    return foreign.layers_of(tensors)


@hookimpl
def to_foreign(
    naming: str,
    config: LoHaConfig,
    tensors: Mapping[str, Mapping[str, Tensor]],
    layers: Mapping[str, LayerKind],
) -> ForeignFile | None:
    return None if naming == "diffusers" else foreign.written(config, tensors, layers)
