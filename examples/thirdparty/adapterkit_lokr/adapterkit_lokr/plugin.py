"""The hooks through which adapterkit uses LoKr."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from adapterkit import AdapterConfig, AdapterLayer, Factors, KeyRule, LayerKind, Target, hookimpl
from adapterkit_lokr import foreign
from adapterkit_lokr.config import LoKrConfig
from adapterkit_lokr.layer import LoKrLayer


@hookimpl
def config_type() -> type[AdapterConfig]:
    return LoKrConfig


@hookimpl
def key_rule() -> KeyRule:
    return KeyRule(prefix="lokr_")


@hookimpl
def inject(target: Target, config: LoKrConfig) -> AdapterLayer:
    return LoKrLayer(target, config)


@hookimpl
def from_file(
    config: LoKrConfig, tensors: Mapping[str, Tensor], layers: Mapping[str, LayerKind]
) -> Mapping[str, Tensor]:
    return foreign.renamed(config, tensors, layers)


@hookimpl
def foreign_config(tensors: Mapping[str, Tensor], layers: Mapping[str, LayerKind]) -> AdapterConfig | None:
    return foreign.config_of(tensors, layers)


@hookimpl
def factors(layer: LoKrLayer) -> Factors:
    return layer.factors()


@hookimpl
def layers_in_file(tensors: Mapping[str, Tensor]) -> Mapping[str, nn.Module]:
    return foreign.layers_of(tensors)
