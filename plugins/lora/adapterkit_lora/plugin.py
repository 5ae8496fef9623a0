"""The hooks through which adapterkit uses LoRA."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from adapterkit import (
    AdapterConfig,
    AdapterLayer,
    CheckpointError,
    Factors,
    ForeignFile,
    KeyRule,
    LayerKind,
    PatternTable,
    Target,
    hookimpl,
    with_patterns,
)
from adapterkit_lora import foreign
from adapterkit_lora.config import LoraConfig
from adapterkit_lora.layer import LoraLayer

_BIAS_FIELD: Mapping[str, Literal["none", "all", "lora_only"]] = {"none": "none", "targets": "lora_only", "all": "all"}


@hookimpl
def config_type() -> type[AdapterConfig]:
    return LoraConfig


@hookimpl
def key_rule(config: LoraConfig) -> KeyRule:
    # A file of PEFT's has only the trained factors of PiSSA and OLoRA; the first ones come from the base again.
    first = frozenset({"lora_init_A", "lora_init_B"}) if config.trains_residual else frozenset[str]()
    return KeyRule(prefix="lora_", exempt=first)


@hookimpl
def inject(target: Target, config: LoraConfig) -> AdapterLayer:
    return LoraLayer(target, config)


@hookimpl
def factors(layer: LoraLayer) -> Factors | None:
    return layer.factors()


@hookimpl
def config_from_ranks(ranks: Mapping[str, int], bias: bool, trained_biases: str) -> LoraConfig:
    """Scaling 1 everywhere, `lora_alpha = r`; patterns where the rank is not the most frequent one."""
    rank, others = with_patterns(ranks)
    return LoraConfig(
        r=rank,
        lora_alpha=rank,
        rank_pattern=others,
        alpha_pattern=others,
        lora_bias=bias,
        bias=_BIAS_FIELD[trained_biases],
    )


@hookimpl
def from_factors(target: Target, config: LoraConfig, factors: Factors) -> Mapping[str, Tensor] | None:
    """A is `down`, B is `up`."""
    down = factors.down.reshape(target.kind.down_shape(factors.rank))
    up = factors.up.reshape(target.kind.up_shape(factors.rank))
    if target.kind.lookup:
        return {"lora_embedding_A": down, "lora_embedding_B": up} if factors.bias is None else None
    bias = {} if not config.lora_bias else {"lora_B.bias": _or_zeros(factors)}
    return {"lora_A.weight": down, "lora_B.weight": up, **bias}


def _or_zeros(factors: Factors) -> Tensor:
    return factors.up.new_zeros(factors.up.shape[0]) if factors.bias is None else factors.bias


@hookimpl
def to_file(config: LoraConfig, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """PiSSA and OLoRA as plain LoRA of rank 2 r, which loads onto the unchanged base: `[B, -B0] [A; A0]`."""
    if not config.trains_residual:
        return tensors
    written = {}
    for key, tensor in tensors.items():
        first = tensors.get(key.replace("lora_A.weight", "lora_init_A").replace("lora_B.weight", "lora_init_B"))
        if key.endswith("lora_A.weight") and first is not None:
            written[key] = torch.cat([tensor, first])
        elif key.endswith("lora_B.weight") and first is not None:
            written[key] = torch.cat([tensor, -first], dim=1)
    return written


@hookimpl
def from_file(
    config: LoraConfig, tensors: Mapping[str, Tensor], layers: Mapping[str, LayerKind]
) -> Mapping[str, Tensor]:
    """The reverse, for an adapter that is PiSSA or OLoRA here; and other programs' files in PEFT's names."""
    tensors = foreign.renamed(config, tensors, layers)
    if not config.trains_residual:
        return tensors
    read = dict(tensors)
    for key, tensor in tensors.items():
        path, found, _ = key.rpartition(".lora_A.weight")
        rank = _rank(config, path)
        if not found or tensor.shape[0] != 2 * rank:
            continue
        up = tensors.get(f"{path}.lora_B.weight")
        read[key], read[f"{path}.lora_init_A"] = tensor[:rank], tensor[rank:]
        if up is not None:
            read[f"{path}.lora_B.weight"], read[f"{path}.lora_init_B"] = up[:, :rank], -up[:, rank:]
    if config.pissa_iterations is not None and len(read) == len(tensors):
        raise CheckpointError(
            f"These are the trained factors of init_lora_weights={config.init_lora_weights!r} alone. That start is "
            "random, so it cannot be computed again from the base; save the adapter in its converted form instead."
        )
    return read


@hookimpl
def foreign_config(
    tensors: Mapping[str, Tensor], layers: Mapping[str, LayerKind], metadata: Mapping[str, str]
) -> AdapterConfig | None:
    return foreign.config_of(tensors, layers, metadata)


@hookimpl
def to_foreign(
    naming: str, config: LoraConfig, tensors: Mapping[str, Mapping[str, Tensor]], component: str
) -> ForeignFile:
    return foreign.written(naming, config, tensors, component)


@hookimpl
def layers_in_file(tensors: Mapping[str, Tensor]) -> Mapping[str, nn.Module]:
    return foreign.layers_of(tensors)


@hookimpl
def file_config(config: LoraConfig) -> LoraConfig:
    """Twice the rank at the same scaling, for what `to_file` writes."""
    if not config.trains_residual:
        return config
    grow = math.sqrt(2) if config.use_rslora else 2
    return config.replace(
        init_lora_weights=True,
        r=2 * config.r,
        lora_alpha=grow * config.lora_alpha,
        rank_pattern={key: 2 * rank for key, rank in config.rank_pattern.items()},
        alpha_pattern={key: grow * alpha for key, alpha in config.alpha_pattern.items()},
    )


def _rank(config: LoraConfig, path: str) -> int:
    return PatternTable(config.rank_pattern, "rank_pattern").get(path, config.r)
