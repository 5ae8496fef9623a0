"""Slow, literal forms of what the library computes, in float64, written from the papers' texts: one entry at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Matrix = Tensor
Oracle = Callable[[Sequence[Tensor], Sequence[float], float, str], Tensor]


def linear(sources: Sequence[Tensor], weights: Sequence[float], density: float = 1.0, sign: str = "total") -> Tensor:
    total = torch.zeros_like(sources[0])
    for source, weight in zip(sources, weights, strict=True):
        total = total + weight * source
    return total


def trimmed(source: Tensor, density: float) -> Tensor:
    """All but the `int(density n)` entries of largest magnitude set to zero (TIES, step 1)."""
    flat = source.flatten().tolist()
    keep = sorted(range(len(flat)), key=lambda i: -abs(flat[i]))[: int(density * len(flat))]
    result = torch.zeros(len(flat), dtype=source.dtype)
    for i in keep:
        result[i] = flat[i]
    return result.view_as(source)


def magnitude_prune(sources: Sequence[Tensor], weights: Sequence[float], density: float, sign: str) -> Tensor:
    return linear([trimmed(s, density) for s in sources], weights)


def elected(sources: Sequence[Tensor], weights: Sequence[float], sign: str) -> Tensor:
    """Entry by entry: the sign of the sum (or of most), then the mean of those that have it (TIES, steps 2 and 3)."""
    result = torch.zeros(sources[0].numel(), dtype=sources[0].dtype)
    for i in range(result.numel()):
        values = [float(s.flatten()[i]) for s in sources]
        votes = sum(values) if sign == "total" else sum((v > 0) - (v < 0) for v in values)
        winner = 1 if votes >= 0 else -1
        agreeing = [w * v for v, w in zip(values, weights, strict=True) if v * winner > 0]
        result[i] = sum(agreeing) / len(agreeing) if agreeing else 0.0
    return result.view_as(sources[0])


def ties(sources: Sequence[Tensor], weights: Sequence[float], density: float, sign: str) -> Tensor:
    """Of the sources as they are to be added: one of negative weight counts as its negative."""
    signed = [s if w >= 0 else -s for s, w in zip(sources, weights, strict=True)]
    return elected([trimmed(s, density) for s in signed], [abs(w) for w in weights], sign)


def tsv(sources: Sequence[Tensor], weights: Sequence[float], density: float = 1.0, sign: str = "total") -> Tensor:
    """TSV-Merge (arXiv 2412.00081, algorithm 1), on the dense matrices."""
    taking_part = [(s, w) for s, w in zip(sources, weights, strict=True) if w and bool(s.any())]
    parts = [(torch.linalg.svd(s, full_matrices=False), w, int(torch.linalg.matrix_rank(s))) for s, w in taking_part]
    if not parts:
        return torch.zeros_like(sources[0])
    most = min(sources[0].shape)
    share = most if sum(k for *_, k in parts) <= most else max(1, most // len(parts))
    u = torch.cat([d.U[:, : min(k, share)] for d, _, k in parts], dim=1)
    v = torch.cat([d.Vh[: min(k, share)] for d, _, k in parts])
    s = torch.cat([w * d.S[: min(k, share)] for d, w, k in parts])
    p, _, q = torch.linalg.svd(u, full_matrices=False)
    a, _, b = torch.linalg.svd(v, full_matrices=False)
    return p @ q @ torch.diag(s) @ a @ b


def isotropic(matrix: Tensor) -> Tensor:
    """Iso-C: every singular value that is not zero becomes their mean."""
    rank = int(torch.linalg.matrix_rank(matrix))
    if rank == 0:
        return matrix
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, :rank] @ vh[:rank] * s[:rank].mean()


def best(matrix: Tensor, rank: int) -> Tensor:
    """The best approximation of this rank, from the dense decomposition."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, :rank] @ torch.diag(s[:rank]) @ vh[:rank]


def rank_for(matrix: Tensor, energy: float) -> int:
    """The fewest singular values with this share of the sum of squares."""
    squares = [float(s) ** 2 for s in torch.linalg.svdvals(matrix)]
    total, so_far = math.fsum(squares), 0.0
    for i, square in enumerate(squares):
        so_far += square
        if so_far >= energy * total * (1 - 1e-12):
            return i + 1
    return len(squares)


COMBINERS: dict[str, Oracle] = {"linear": linear, "ties": ties, "magnitude_prune": magnitude_prune, "tsv": tsv}
