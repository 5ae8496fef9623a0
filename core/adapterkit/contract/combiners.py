"""Combiners: methods that make one change from several. Each is a pure function on stacked tensors.

`stack` has shape `(T, ...)`, one slice a source, `weights` shape `(T,)`; the result has the shape of a slice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from adapterkit.errors import AdapterError, PluginError, UsageError
from adapterkit.kinds import numerical_rank

MajoritySign = Literal["total", "frequency"]


@dataclass(frozen=True)
class CombinerOptions:
    """The options of a combiner.

    Attributes:
        density: the share of the entries to keep, for combiners that prune.
        majority_sign_method: `"total"`: the sign of the sum; `"frequency"`: the sign most sources have.
        generator: the generator of random masks; `None`: torch's default generator.
    """

    density: float = 1.0
    majority_sign_method: MajoritySign = "total"
    generator: torch.Generator | None = None


@dataclass(frozen=True)
class Combiner:
    """One method of combination.

    Attributes:
        function: `(stack, weights, options) -> result`.
        prunes: whether it needs a density.
        rotates: whether the result rotates with its inputs, `f(P X Q) = P f(X) Q` for orthonormal `P`, `Q`. It is then
            computed in a small common basis, never on the dense change, and takes stacks of matrices `(T, m, n)`.
    """

    function: Callable[[Tensor, Tensor, CombinerOptions], Tensor]
    prunes: bool = False
    rotates: bool = False

    def __call__(self, stack: Tensor, weights: Tensor, options: CombinerOptions) -> Tensor:
        """The result for these sources.

        Raises:
            PluginError: the function failed, or gave something else than a tensor of the shape of a slice.
        """
        name = getattr(self.function, "__name__", "the function")
        try:
            found: object = self.function(stack, weights, options)
        except AdapterError:
            raise
        except Exception as error:
            raise PluginError(f"The combiner {name} raised {type(error).__name__}: {error}.") from error
        if not isinstance(found, Tensor) or found.shape != stack.shape[1:]:
            given = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
            raise PluginError(f"The combiner {name} returned {given}; it must be shape {tuple(stack.shape[1:])}.")
        return found

    def is_rotated(self) -> bool:
        """Whether the result of two random matrices rotates with them, as `rotates` says."""
        random = torch.Generator().manual_seed(0)
        p, q = (torch.linalg.qr(torch.randn(4, 4, generator=random, dtype=torch.float64))[0] for _ in "PQ")
        stack, weights = torch.randn(2, 4, 4, generator=random, dtype=torch.float64), torch.tensor([0.7, 0.3]).double()
        turned, plain = (
            self(x, weights, CombinerOptions(0.5, generator=torch.Generator().manual_seed(0)))
            for x in (p @ stack @ q, stack)
        )
        return torch.allclose(turned, p @ plain @ q)


def linear(stack: Tensor, weights: Tensor, options: CombinerOptions) -> Tensor:
    """`sum of w_t X_t`: task arithmetic (Ilharco et al. 2022, arXiv 2212.04089)."""
    return (stack * weights.to(stack).view(-1, *(1,) * (stack.dim() - 1))).sum(0)


def magnitude_prune(stack: Tensor, weights: Tensor, options: CombinerOptions) -> Tensor:
    """`linear` of the sources with only their largest entries, a share of `density` of each."""
    return linear(_keep_largest(stack, options.density), weights, options)


def ties(stack: Tensor, weights: Tensor, options: CombinerOptions) -> Tensor:
    """TIES (Yadav et al. 2023, arXiv 2306.01708): trim, elect a sign for each entry, mean of those that agree."""
    return _elect(_keep_largest(stack, options.density), weights, options)


def dare_linear(stack: Tensor, weights: Tensor, options: CombinerOptions) -> Tensor:
    """DARE (Yu et al. 2023, arXiv 2311.03099): drop entries at random, rescale the rest by `1 / density`, add."""
    return linear(_keep_some(stack, options), weights, options)


def dare_ties(stack: Tensor, weights: Tensor, options: CombinerOptions) -> Tensor:
    """DARE's dropping, then the sign election of TIES."""
    return _elect(_keep_some(stack, options), weights, options)


def tsv(stack: Tensor, weights: Tensor, options: CombinerOptions) -> Tensor:
    """Task singular vectors (Gargiulo et al. 2025, arXiv 2412.00081).

    The leading singular vectors of all sources, as many of each as fit, are concatenated and made orthonormal by
    Procrustes: `U = P Q^T` of `[U_1 ... U_T] = P D Q^T`, and `V` likewise. The result is
    `U diag(w_1 S_1, ..., w_T S_T) V^T`. If all singular vectors fit, none is left out.
    """
    u, s, vh = torch.linalg.svd(stack, full_matrices=False)
    # A source without a change, or with weight 0, needs no directions.
    ranks = [numerical_rank(row, max(stack.shape[1:])) if w else 0 for row, w in zip(s, weights, strict=True)]
    most, taking_part = min(stack.shape[1:]), sum(rank > 0 for rank in ranks)
    if not taking_part:
        return torch.zeros_like(stack[0])
    if sum(ranks) > most:
        ranks = [min(rank, max(1, most // taking_part)) for rank in ranks]
    left = torch.cat([u[t, :, :k] for t, k in enumerate(ranks)], dim=1)
    right = torch.cat([vh[t, :k] for t, k in enumerate(ranks)])
    values = torch.cat([weights[t].to(s) * s[t, :k] for t, k in enumerate(ranks)])
    left, right = map(_orthonormal, (left, right))
    return (left * values) @ right


def _orthonormal(matrix: Tensor) -> Tensor:
    """The nearest matrix with orthonormal rows or columns (orthogonal Procrustes)."""
    p, _, qh = torch.linalg.svd(matrix, full_matrices=False)
    nearest: Tensor = p @ qh
    return nearest


def _keep_largest(stack: Tensor, density: float) -> Tensor:
    """Each slice with its `int(density * n)` entries of largest magnitude, the others zero."""
    flat = stack.flatten(1)
    count = int(density * flat.shape[1])
    if count >= flat.shape[1]:
        return stack
    mask = torch.zeros_like(flat, dtype=torch.bool)
    mask.scatter_(1, flat.abs().topk(count, dim=1, sorted=False).indices, True)
    return (flat * mask).view_as(stack)


def _keep_some(stack: Tensor, options: CombinerOptions) -> Tensor:
    if options.density >= 1.0:
        return stack
    chance = torch.full_like(stack[0], options.density)
    masks = [torch.bernoulli(chance, generator=options.generator) for _ in stack]  # one after another, as PEFT does
    return stack * torch.stack(masks) / options.density


def _elect(stack: Tensor, weights: Tensor, options: CombinerOptions) -> Tensor:
    votes = stack if options.majority_sign_method == "total" else stack.sign()
    majority = torch.where(votes.sum(0) >= 0, 1.0, -1.0).to(stack.dtype)
    agreeing = (stack * majority).clamp_(min=0)  # zero where a source has no value, or the other sign
    count = (agreeing > 0).sum(0, dtype=stack.dtype).clamp_(min=1)
    total: Tensor = torch.tensordot(weights.to(stack), agreeing, dims=1)
    return total.mul_(majority).div_(count)


BUILTIN: Mapping[str, Combiner] = {
    "linear": Combiner(linear, rotates=True),
    "ties": Combiner(ties, prunes=True),
    "dare_linear": Combiner(dare_linear, prunes=True),
    "dare_ties": Combiner(dare_ties, prunes=True),
    "magnitude_prune": Combiner(magnitude_prune, prunes=True),
    "tsv": Combiner(tsv, rotates=True),
}


def check_options(name: str, combiner: Combiner, density: float | None, majority_sign_method: str) -> None:
    """Raise `UsageError` if an option is invalid for this combiner."""
    if combiner.prunes and density is None:
        raise UsageError(f"method {name!r} prunes. Pass density=, the share of entries to keep (0.2 is common).")
    if density is not None and not combiner.prunes:
        raise UsageError(f"method {name!r} keeps every entry, so density = {density!r} has no effect. Leave it out.")
    if density is not None and (not isinstance(density, int | float) or not 0.0 < density <= 1.0 or density is True):
        raise UsageError(f"density = {density!r} must be above 0 and at most 1.")
    if majority_sign_method not in ("total", "frequency"):
        raise UsageError(f"majority_sign_method = {majority_sign_method!r} must be 'total' or 'frequency'.")
