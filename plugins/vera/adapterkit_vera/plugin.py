"""The hooks through which adapterkit uses VeRA."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import reduce

import torch
from torch import Tensor

from adapterkit import AdapterConfig, AdapterLayer, AdapterWarning, Factors, KeyRule, Target, hookimpl
from adapterkit_vera.config import VeraConfig
from adapterkit_vera.layer import VeraLayer, projections

SHARED = ("vera_A", "vera_B")


@hookimpl
def config_type() -> type[AdapterConfig]:
    return VeraConfig


@hookimpl
def key_rule(config: VeraConfig) -> KeyRule:
    derived = frozenset[str]() if config.save_projection else frozenset(SHARED)
    return KeyRule(prefix="vera_lambda_", shared=SHARED, derived=derived)


@hookimpl
def prepare(targets: Sequence[Target], config: VeraConfig) -> Mapping[str, Tensor]:
    sizes = max(t.in_features for t in targets), max(t.out_features for t in targets)
    dtype = reduce(torch.promote_types, (t.dtype for t in targets))
    # Those that a file will bring are not made first.
    device = torch.device("meta") if targets[0].load and config.save_projection else targets[0].device
    made = projections(config.r, *sizes, config.projection_prng_key, device)
    return {name: tensor.to(dtype) for name, tensor in zip(SHARED, made, strict=True)}


@hookimpl
def inject(target: Target, config: VeraConfig, shared: Mapping[str, Tensor]) -> AdapterLayer:
    return VeraLayer(target, config, shared)


@hookimpl
def factors(layer: VeraLayer) -> Factors:
    return layer.factors()


@hookimpl
def from_file(config: VeraConfig, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """All as they are; but a file whose projections are not used, and are others than those used, is odd."""
    held = [tensors.get(name) for name in SHARED]
    down, up = held
    if config.save_projection or down is None or up is None or down.dim() != 2 or up.dim() != 2:
        return tensors
    made = projections(config.r, down.shape[1], up.shape[0], config.projection_prng_key, torch.device("cpu"))
    if not all(torch.equal(own.to(theirs.dtype), theirs.cpu()) for own, theirs in zip(made, (down, up), strict=True)):
        warnings.warn(
            f"This file holds projections {', '.join(SHARED)} that are not those of its projection_prng_key = "
            f"{config.projection_prng_key}, and says save_projection = false, so they are not used. If the adapter was "
            "trained with them, set save_projection to true in its adapter_config.json.",
            AdapterWarning,
            stacklevel=2,
        )
    return tensors
