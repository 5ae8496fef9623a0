"""Combining the changes of several adapters at one target, in the chosen space."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from adapterkit.combining.lowrank import as_factors, check_size, common_bases, dense_svd, keep, svd, working
from adapterkit.combining.new_adapter import check_can_result
from adapterkit.contract import Combiner, CombinerOptions, MajoritySign, combiners, default_registry
from adapterkit.errors import ConfigError, UsageError
from adapterkit.kinds import Factors, numerical_rank

Space = Literal["delta", "factors", "core"]


@dataclass(frozen=True, kw_only=True)
class Choices:
    """The choices for one combination; see `Adapters.combine`."""

    method: str = "linear"
    space: Space = "delta"
    rank: int | None = None
    energy: float | None = None
    to: str = "lora"
    heads: str | None = None
    density: float | None = None
    majority_sign_method: MajoritySign = "total"
    seed: int | None = None
    isotropize: bool = False
    same_base: bool = False

    def check(self) -> None:
        """Check what can be checked without the adapters.

        Raises:
            UsageError, UnknownNameError: a choice is invalid, or the method cannot be a result.
        """
        combiner = default_registry.combiner(self.method)
        combiners.check_options(self.method, combiner, self.density, self.majority_sign_method)
        if self.space not in get_args(Space):
            raise UsageError(f"space = {self.space!r} must be one of {', '.join(map(repr, get_args(Space)))}.")
        check_size(self.rank, self.energy)
        if self.seed is not None and (isinstance(self.seed, bool) or not isinstance(self.seed, int)):
            raise UsageError(f"seed = {self.seed!r} must be a whole number or None.")
        check_can_result(default_registry.method(self.to))


def combine_factors(
    sources: Sequence[Factors],
    weights: Sequence[float],
    choices: Choices,
    generator: torch.Generator | None = None,
) -> tuple[Factors, float]:
    """Combine several changes at one target into one.

    Args:
        sources: the factors of each, `(out, r_t)` and `(r_t, in)`; the ranks may differ.
        weights: one for each source; they may be negative.
        generator: of random masks.

    Returns:
        The factors of the result, and the relative error of truncation.
    """
    combiner, linear = default_registry.combiner(choices.method), choices.method == "linear"
    options = CombinerOptions(choices.density or 1.0, choices.majority_sign_method, generator)
    # The change of the bias is a weighted sum for every method: a vector has few entries.
    shifts = [w * f.scale * working(f.bias) for f, w in zip(sources, weights, strict=True) if f.bias is not None]
    bias = torch.stack(shifts).sum(0) if shifts else None
    dtype = working(torch.cat([f.up[:0, :0] for f in sources])).dtype
    sources = [f if choices.space == "factors" else f.folded() for f in sources]
    sources = [f._replace(up=f.up.detach().to(dtype), down=f.down.detach().to(dtype)) for f in sources]
    needs_svd = choices.isotropize or choices.rank is not None or choices.energy is not None
    if choices.space == "delta" and not combiner.rotates:
        matrix = _apply(combiner, [f.delta() for f in sources], weights, options)
        if not needs_svd:
            return as_factors(matrix, sources)._replace(bias=bias), 0.0
        parts = dense_svd(matrix)
    else:
        if choices.space == "factors":
            result = _on_factors(sources, weights, combiner, options)
        elif linear:
            ups = [f.up * w for f, w in zip(sources, weights, strict=True)]
            result = Factors(torch.cat(ups, dim=1), torch.cat([f.down for f in sources]))
        else:  # the small matrices `M_t = U^T up_t down_t V` in the common bases
            left, right = common_bases(sources)
            cores = [(left.t() @ f.up) @ (f.down @ right.t()) for f in sources]
            result = Factors(left @ _apply(combiner, cores, weights, options), right)
        if not needs_svd and result.rank <= min(result.up.shape[0], result.down.shape[1]):
            return result._replace(bias=bias), 0.0
        parts = svd(result)
    if choices.isotropize:
        parts = isotropic(*parts)
    return keep(*parts, bias, rank=choices.rank, energy=choices.energy)


def _apply(
    combiner: Combiner, matrices: Sequence[Tensor], weights: Sequence[float], options: CombinerOptions
) -> Tensor:
    """Apply the combiner. Matrices with negative weights are negated first, so that the signs of `w X` are elected."""
    stack = torch.stack([-matrix if weight < 0 else matrix for matrix, weight in zip(matrices, weights, strict=True)])
    return combiner(stack, torch.tensor(weights, dtype=stack.dtype, device=stack.device).abs(), options)


def _on_factors(
    sources: Sequence[Factors], weights: Sequence[float], combiner: Combiner, options: CombinerOptions
) -> Factors:
    """A and B separately, as in PEFT: both have the weight `sqrt(|w s|)` with the scaling `s`; A has the sign."""
    ranks = {f.rank for f in sources}
    if len(ranks) > 1:
        raise ConfigError(
            f"space='factors' combines the factors entry by entry, so all ranks must be equal, not {sorted(ranks)}. "
            "Use space='delta' or space='core'."
        )
    scaled = [w * float(f.scale) for f, w in zip(sources, weights, strict=True)]
    ups, downs = (torch.stack(found) for found in zip(*((f.up, f.down) for f in sources), strict=True))
    both = torch.tensor(scaled, dtype=torch.float64, device=ups.device)
    down = combiner(downs, both.abs().sqrt() * both.sign(), options)
    return Factors(combiner(ups, both.abs().sqrt(), options), down)


def isotropic(u: Tensor, s: Tensor, vh: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Replace all singular values of a change by their mean (Iso-C, Marczak et al. 2025, arXiv 2502.04959).

    Values that are zero up to rounding are left out.
    """
    count = numerical_rank(s, len(s))
    if count == 0:
        return u, s, vh
    return u[:, :count], s[:count].mean().expand(count), vh[:count]
