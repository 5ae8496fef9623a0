"""Combining the changes of several adapters at one target, in the chosen space."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from adapterkit.combining.lowrank import as_factors, common_bases, exact, keep, svd, working
from adapterkit.contract import Combiner, Options
from adapterkit.errors import ConfigError
from adapterkit.kinds import Factors, numerical_rank

Space = Literal["delta", "factors", "core"]
SPACES = ("delta", "factors", "core")


@dataclass(frozen=True)
class Recipe:
    """The choices of one call of `combine`, for every target."""

    combiner: Combiner
    linear: bool
    space: Space
    options: Options
    rank: int | None = None
    energy: float | None = None
    isotropize: bool = False


def combine_factors(sources: Sequence[Factors], weights: Sequence[float], recipe: Recipe) -> tuple[Factors, float]:
    """Combine several changes at one target into one.

    Args:
        sources: the factors of each, `(out, r_t)` and `(r_t, in)`; the ranks may differ.
        weights: one for each source; they may be negative.

    Returns:
        The factors of the result, and the relative error of truncation.
    """
    sources = _alike(sources if recipe.space == "factors" else [f.folded() for f in sources])
    bias = _combined_bias(sources, weights, recipe)
    decomposed = recipe.isotropize or recipe.rank is not None or recipe.energy is not None
    if recipe.space == "delta" and not (recipe.linear or recipe.combiner.rotates):
        dense = _on_dense(sources, weights, recipe)
        if not decomposed:
            return as_factors(dense, sources)._replace(bias=bias), 0.0
        parts = exact(dense)
    else:
        combined = _on_few(sources, weights, recipe)
        too_wide = combined.rank > min(combined.up.shape[0], combined.down.shape[1])
        if not (too_wide or decomposed):
            return combined._replace(bias=bias), 0.0
        parts = svd(combined)
    if recipe.isotropize:
        parts = isotropic(*parts)
    return keep(*parts, bias, rank=recipe.rank, energy=recipe.energy)


def _on_few(sources: Sequence[Factors], weights: Sequence[float], recipe: Recipe) -> Factors:
    """Combine without a dense matrix."""
    if recipe.space == "factors":
        return _on_factors(sources, weights, recipe)
    if not recipe.linear:
        return _in_core(sources, weights, recipe)
    ups = [f.up * w for f, w in zip(sources, weights, strict=True)]
    return Factors(torch.cat(ups, dim=1), torch.cat([f.down for f in sources]))


def _alike(sources: Sequence[Factors]) -> list[Factors]:
    """The same changes in one dtype, that of sums."""
    dtype = working(torch.cat([f.up[:0, :0] for f in sources])).dtype
    return [f._replace(up=f.up.detach().to(dtype), down=f.down.detach().to(dtype)) for f in sources]


def _on_factors(sources: Sequence[Factors], weights: Sequence[float], recipe: Recipe) -> Factors:
    """A and B separately, as in PEFT: both have the weight `sqrt(|w s|)` with the scaling `s`; A has the sign."""
    ranks = {f.rank for f in sources}
    if len(ranks) > 1:
        raise ConfigError(
            f"space='factors' combines the factors entry by entry, so all ranks must be equal, not {sorted(ranks)}. "
            "Use space='delta' or space='core'."
        )
    scaled = [w * float(f.scale) for f, w in zip(sources, weights, strict=True)]
    sizes = torch.tensor([math.sqrt(abs(x)) for x in scaled], dtype=torch.float64)
    signs = torch.tensor([1.0 if x >= 0 else -1.0 for x in scaled], dtype=torch.float64)
    downs = torch.stack([f.down for f in sources])
    ups = torch.stack([f.up for f in sources])
    down = recipe.combiner.function(downs, sizes * signs, recipe.options)
    return Factors(recipe.combiner.function(ups, sizes, recipe.options), down)


def _in_core(sources: Sequence[Factors], weights: Sequence[float], recipe: Recipe) -> Factors:
    """The small matrices `M_t = U^T up_t down_t V`, combined, in their common bases."""
    left, right = common_bases(sources)
    cores = torch.stack([(left.t() @ f.up) @ (f.down @ right.t()) for f in sources])
    return Factors(left @ _apply(recipe, cores, weights), right)


def _on_dense(sources: Sequence[Factors], weights: Sequence[float], recipe: Recipe) -> Tensor:
    return _apply(recipe, torch.stack([f.delta() for f in sources]), weights)


def _apply(recipe: Recipe, stack: Tensor, weights: Sequence[float]) -> Tensor:
    """Apply the combiner. Sources with negative weights are negated first, so that the signs of `w X` are elected."""
    given = torch.tensor(weights, dtype=stack.dtype, device=stack.device)
    signs = torch.where(given < 0, -1.0, 1.0).to(stack).view(-1, *(1,) * (stack.dim() - 1))
    return recipe.combiner.function(stack * signs, given.abs(), recipe.options)


def _combined_bias(sources: Sequence[Factors], weights: Sequence[float], recipe: Recipe) -> Tensor | None:
    """The weighted sum of the changes of the bias, for every method: a vector has few entries."""
    found = [w * f.scale * working(f.bias) for f, w in zip(sources, weights, strict=True) if f.bias is not None]
    return torch.stack(found).sum(0) if found else None


def isotropic(u: Tensor, s: Tensor, vh: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Replace all singular values of a change by their mean (Iso-C, Marczak et al. 2025, arXiv 2502.04959).

    Values that are zero up to rounding are left out.
    """
    count = numerical_rank(s, len(s))
    if count == 0:
        return u, s, vh
    return u[:, :count], s[:count].mean().expand(count), vh[:count]
