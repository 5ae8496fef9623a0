"""Measures of changes in factored form: their size, their rank, the similarity of two. No dense matrix is made.

Everything is computed in float32 (float64 for float64 factors) on the device of the factors.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adapterkit.combining.lowrank import finite_product, rank_for_energy, svd, working
from adapterkit.kinds import Factors


class Overlap(NamedTuple):
    """How much two subspaces of `R^n` with dimensions `k` and `l` have in common.

    Attributes:
        similarity: the mean squared cosine of their principal angles, 0 to 1; see `overlap`.
        chance: its average for two random subspaces of these dimensions, `max(k, l) / n`.
    """

    similarity: float
    chance: float


def spectrum(factors: Factors) -> Tensor:
    """The singular values of `up @ down`, `(min(r, out, in),)`, descending.

    With the QR decompositions `up = Qu Ru` and `down^T = Qd Rd` they are the singular values of `Ru Rd^T`.
    """
    up, down = working(factors.up), working(factors.down)
    ru, rd = (torch.linalg.qr(m, mode="r").R for m in (up, down.t()))
    values: Tensor = torch.linalg.svdvals(finite_product(ru, rd))
    return values


def size(s: Tensor) -> float:
    """The Frobenius norm of a matrix with these singular values, `sqrt(sum of s_i^2)`, without overflow."""
    largest = float(s.max()) if len(s) else 0.0
    return largest * float((s / largest).norm()) if largest else 0.0


def norm(factors: Factors) -> float:
    """The Frobenius norm of `up @ down`."""
    return size(spectrum(factors))


def effective_rank(s: Tensor) -> float:
    """`exp(H)` with the entropy `H` of `p_i = s_i / sum of s`: 1 for one direction, k for k equal ones, 0 for none.

    Source: Roy and Vetterli 2007, "The effective rank".
    """
    values = s.cpu().double()
    total = float(values.sum())
    if not total:
        return 0.0
    return math.exp(float(torch.special.entr(values / total).sum()))


def figures(s: Tensor) -> dict[str, Any]:
    """What the singular values of a change tell, as arguments of `LayerInspection` and of the report's `LayerFinding`.

    Returns:
        Its Frobenius norm `norm`, its `effective_rank`, and `rank_90` and `rank_99`: how few of the values have 90 and
        99 % of the sum of their squares.
    """
    ranks = {f"rank_{percent}": rank_for_energy(s, percent / 100) for percent in (90, 99)}
    return {"norm": size(s), "effective_rank": effective_rank(s), **ranks}


def inner(f: Factors, g: Factors) -> float:
    """The inner product of two changes of one shape, `sum of dW_f * dW_g`.

    Computed as `sum of (up_f^T up_g) * (down_f down_g^T)`, from products of small matrices.
    """
    dtype = torch.promote_types(working(f.up).dtype, working(g.up).dtype)
    ups = f.up.detach().to(dtype).t() @ g.up.detach().to(dtype)
    downs = f.down.detach().to(dtype) @ g.down.detach().to(dtype).t()
    return float((ups * downs).sum())


def cosine(f: Factors, g: Factors) -> float:
    """`inner(f, g) / (norm(f) norm(g))`, -1 to 1; 0 if one of them is zero."""
    one, other = _unit(f), _unit(g)
    return max(-1.0, min(1.0, inner(one, other)))


def _unit(factors: Factors) -> Factors:
    """The same change scaled to norm 1, because products of extreme values are 0 or inf. Zero stays zero."""
    u, s, vh = svd(factors)
    return Factors(u * (s / (size(s) or 1.0)), vh)


def overlap(u: Tensor, v: Tensor) -> Overlap:
    """How much two subspaces have in common, given orthonormal columns `u (n, k)` and `v (n, l)`.

    `|u^T v|_F^2 / min(k, l)`: the mean squared cosine of their principal angles. It is 0 if they are orthogonal, and 1
    if one contains the other. Source: the normalised similarity of Hu et al. 2021 (arXiv 2106.09685, section 7.2).
    """
    n, k, l = u.shape[0], u.shape[1], v.shape[1]  # noqa: E741 - the letters of the formula
    if not k or not l:
        return Overlap(0.0, 0.0)
    shared = float((u.t() @ v.to(u.dtype)).square().sum()) / min(k, l)
    return Overlap(min(shared, 1.0), max(k, l) / n)
