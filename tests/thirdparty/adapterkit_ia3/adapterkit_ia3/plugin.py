"""The hooks through which adapterkit uses (IA)3."""

from __future__ import annotations

from torch import Tensor

from adapterkit import AdapterConfig, AdapterLayer, KeyRule, Target, hookimpl
from adapterkit_ia3.config import IA3Config
from adapterkit_ia3.layer import IA3Layer, initialise


@hookimpl
def config_type() -> type[AdapterConfig]:
    return IA3Config


@hookimpl
def key_rule() -> KeyRule:
    return KeyRule(prefix="ia3_")


@hookimpl
def inject(target: Target, config: IA3Config) -> AdapterLayer | None:
    scales_input = config.scales_input(target.path)
    if scales_input and target.kind.lookup:
        return None  # row numbers cannot be scaled
    layer = IA3Layer(target, scales_input)
    if not target.load:
        initialise(layer, config.init_ia3_weights)
    return layer


@hookimpl
def merge(layer: IA3Layer, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return layer.merged(weight, bias)
