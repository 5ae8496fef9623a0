"""Sources of plain factors for the tests of reports: no model, float64, seeded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import adapterkit as ak
from adapterkit.report.measuring import AdapterFinding


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def low_rank(out: int, inside: int, rank: int, seed: int = 0) -> ak.Factors:
    return ak.Factors(normal(out, rank, seed=seed), normal(rank, inside, seed=seed + 500))


def source(
    name: str,
    factors: Mapping[str, ak.Factors | None],
    base: Mapping[str, float] | None = None,
    config: ak.AdapterConfig | None = None,
    **fields: Any,
) -> AdapterFinding:
    numbers = sum(t.numel() for f in factors.values() if f for t in f[:2])
    return AdapterFinding(
        name=name,
        config=config or ak.config("lora", target_modules=["x"]),
        kinds=dict.fromkeys(factors, "Linear"),
        factors=factors.__getitem__,
        base_norm=(base or {}).get,
        parameters=numbers,
        in_layers=numbers,
        **fields,
    )


MODULES = ("attn.q", "mlp.up")


def stack(layers: int, modules: Sequence[str] = MODULES, seed: int = 0, rank: int = 3) -> dict[str, ak.Factors]:
    """A change at each module of each layer of a stack."""
    return {
        f"model.layers.{i}.{m}": low_rank(8, 6, rank, seed=seed + 31 * i + j)
        for i in range(layers)
        for j, m in enumerate(modules)
    }
