"""Measures of changes in factored form: how large, of which rank, how alike two of them are. Never a dense matrix.

Everything is worked out in float32 (float64 for float64 factors) on the factors' device.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from adapterkit.combining.lowrank import count_for, svd, working
from adapterkit.kinds import Factors, numerical_rank


class Overlap(NamedTuple):
    """How much two subspaces of `R^n` have in common.

    Attributes:
        similarity: mean squared cosine of their principal angles, 0 to 1; see `overlap`.
        chance: what it is on average for two random subspaces of these dimensions: `max(k, l) / n`.
        dimensions: `k` and `l`.
    """

    similarity: float
    chance: float
    dimensions: tuple[int, int]


class Subspaces(NamedTuple):
    """The overlap of what two changes write to (`columns`, of the output) and of what they read (`rows`)."""

    columns: Overlap
    rows: Overlap


def spectrum(factors: Factors) -> Tensor:
    """The singular values of `up @ down`, `(min(r, out, in),)`, descending.

    They are those of `Ru Rd^T`, where `up = Qu Ru` and `down^T = Qd Rd`.
    """
    up, down = working(factors.up), working(factors.down)
    ru, rd = (torch.linalg.qr(m, mode="r").R for m in (up, down.t()))
    values: Tensor = torch.linalg.svdvals(ru @ rd.t())
    return values


def size(s: Tensor) -> float:
    """The Frobenius norm of a matrix with these singular values, `sqrt(sum of s_i^2)`; no overflow on the way."""
    largest = float(s.max()) if len(s) else 0.0
    return largest * float((s / largest).norm()) if largest else 0.0


def norm(factors: Factors) -> float:
    """The Frobenius norm of `up @ down`."""
    return size(spectrum(factors))


def effective_rank(s: Tensor) -> float:
    """`exp(H)` of the entropy `H` of `p_i = s_i / sum of s`: 1 for one direction, k for k equal ones; 0 for none.

    Source: Roy and Vetterli 2007, "The effective rank".
    """
    values = s.cpu().double()
    total = float(values.sum())
    if not total:
        return 0.0
    return math.exp(float(torch.special.entr(values / total).sum()))


def rank_for_energy(s: Tensor, share: float) -> int:
    """How few singular values have this share of the sum of squares; 0 where all are zero.

    A change cut to them is off by `sqrt(1 - share)` of its Frobenius norm at most: 10 % for a share of 0.99.
    """
    return count_for(s, share) if len(s) and bool(s.any()) else 0


def inner(f: Factors, g: Factors) -> float:
    """The inner product of two changes of one shape, `sum of dW_f * dW_g`.

    It is `sum of (up_f^T up_g) * (down_f down_g^T)`, products of small matrices.
    """
    dtype = torch.promote_types(working(f.up).dtype, working(g.up).dtype)
    ups = f.up.detach().to(dtype).t() @ g.up.detach().to(dtype)
    downs = f.down.detach().to(dtype) @ g.down.detach().to(dtype).t()
    return float((ups * downs).sum())


def cosine(f: Factors, g: Factors) -> float:
    """`inner(f, g) / (norm(f) norm(g))`, -1 to 1; 0 where one of them is zero."""
    one, other = _unit(f), _unit(g)
    return max(-1.0, min(1.0, inner(one, other)))


def _unit(factors: Factors) -> Factors:
    """The same change scaled to norm 1: products of extreme values are 0 or inf. Zero stays zero."""
    u, s, vh = svd(factors)
    return Factors(u * (s / (size(s) or 1.0)), vh)


def leading(factors: Factors, energy: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """The leading part of the thin singular value decomposition that holds this share of the energy.

    Returns:
        `u (out, k)`, `s (k,)`, `vh (k, in)`; values that are but rounding are left out, all of a zero change.
    """
    u, s, vh = svd(factors)
    count = numerical_rank(s, max(u.shape[0], vh.shape[1]))
    count = min(count, rank_for_energy(s, energy))
    return u[:, :count], s[:count], vh[:count]


def overlap(u: Tensor, v: Tensor) -> Overlap:
    """What two subspaces have in common, given orthonormal columns `u (n, k)` and `v (n, l)`.

    `|u^T v|_F^2 / min(k, l)`: the mean squared cosine of their principal angles. 0: orthogonal. 1: one lies in
    the other. Source: the normalised similarity of Hu et al. 2021 (arXiv 2106.09685, section 7.2).
    """
    n, k, l = u.shape[0], u.shape[1], v.shape[1]  # noqa: E741 - the letters of the formula
    if not k or not l:
        return Overlap(0.0, 0.0, (k, l))
    shared = float((u.t() @ v.to(u.dtype)).square().sum()) / min(k, l)
    return Overlap(min(shared, 1.0), max(k, l) / n, (k, l))


def subspace_similarity(f: Factors, g: Factors, energy: float = 1.0) -> Subspaces:
    """`overlap` of the column spaces and of the row spaces of two changes of one shape.

    Args:
        energy: only the leading singular vectors with this share of each change's energy; directions that
            hardly matter otherwise count as much as the first.
    """
    (uf, _, vf), (ug, _, vg) = leading(f, energy), leading(g, energy)
    return Subspaces(overlap(uf, ug), overlap(vf.t(), vg.t()))
