"""The hooks through which adapterkit uses (IA)3."""

from __future__ import annotations

from torch import Tensor

from adapterkit import AdapterConfig, AdapterLayer, KeyRule, Target, hookimpl
from adapterkit_ia3.config import IA3Config
from adapterkit_ia3.layer import IA3Layer


@hookimpl
def config_type() -> type[AdapterConfig]:
    return IA3Config


@hookimpl
def key_rule() -> KeyRule:
    return KeyRule(prefix="ia3_")


@hookimpl
def inject(target: Target, config: IA3Config) -> AdapterLayer | None:
    if target.kind.lookup and config.scales_input(target.path):
        return None  # row numbers cannot be scaled
    return IA3Layer(target, config)


@hookimpl
def merge(layer: IA3Layer, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return layer.merged(weight, bias)
