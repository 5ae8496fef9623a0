"""The hooks through which adapterkit uses OFT."""

from __future__ import annotations

from torch import Tensor

from adapterkit import AdapterConfig, AdapterLayer, KeyRule, Target, hookimpl
from adapterkit_oft.config import OFTConfig
from adapterkit_oft.layer import OFTLayer


@hookimpl
def config_type() -> type[AdapterConfig]:
    return OFTConfig


@hookimpl
def key_rule() -> KeyRule:
    return KeyRule(prefix="oft_")


@hookimpl
def inject(target: Target, config: OFTConfig) -> AdapterLayer | None:
    if target.kind.lookup or len(target.kind.down_shape(1)) > 2:
        # An embedding's input is row numbers. A convolution reads patches that overlap: no rotated input
        # gives what a rotated kernel would.
        return None
    return OFTLayer(target, config)


@hookimpl
def merge(layer: OFTLayer, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return layer.merged(weight), bias
