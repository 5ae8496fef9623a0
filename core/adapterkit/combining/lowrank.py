"""Linear algebra of factored matrices: singular values and optimal truncation, never the dense product.

With `up = Qu Ru` and `down^T = Qd Rd` (QR, `Qu (out, k)`, `Qd (in, k)`), the singular values of `up @ down` are
those of the small core `Ru Rd^T`, and its singular vectors are the core's, rotated by `Qu` and `Qd`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from adapterkit.errors import ConfigError
from adapterkit.kinds import Factors, numerical_rank


def working(tensor: Tensor) -> Tensor:
    """The tensor in the dtype that sums and decompositions are made in: float32, or float64 as it is."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))


def svd(factors: Factors) -> tuple[Tensor, Tensor, Tensor]:
    """The thin singular value decomposition of `up @ down`.

    Returns:
        `u (out, k)`, `s (k,)` descending and `vh (k, in)`, with `k = min(r, out, in)`.
    """
    qu, ru = torch.linalg.qr(working(factors.up))
    qd, rd = torch.linalg.qr(working(factors.down).t())
    u, s, vh = torch.linalg.svd(ru @ rd.t(), full_matrices=False)
    return qu @ u, s, vh @ qd.t()


def count_for(s: Tensor, energy: float) -> int:
    """The fewest leading values of `s`, at least one, with this share of the sum of squares."""
    squares = _squares(s)
    reached = squares.cumsum(0) >= energy * float(squares.sum()) * (1 - 1e-12)
    return int(reached.int().argmax()) + 1 if bool(reached.any()) and bool(squares.any()) else max(len(s), 1)


def _squares(s: Tensor) -> Tensor:
    """Squares in proportion: divided by the largest value first, because those of extreme values are 0 or inf."""
    s_max = float(s.max()) if len(s) else 0.0
    return (s.cpu().double() / (s_max or 1.0)).square()


def balanced(u: Tensor, s: Tensor, vh: Tensor) -> Factors:
    """Factors of `u diag(s) vh` that share the singular values evenly: `up = u sqrt(s)`, `down = sqrt(s) vh`."""
    root = s.sqrt()
    return Factors(u * root, root[:, None] * vh)


def truncate(factors: Factors, *, rank: int | None = None, energy: float | None = None) -> tuple[Factors, float]:
    """The best approximation of `up @ down` of a given rank, in the Frobenius norm (Eckart and Young 1936).

    Args:
        rank: at most this many singular values.
        energy: as few singular values as have this share of the sum of their squares.

    Returns:
        The factors, and the relative error `|dW - result| / |dW|`.
    """
    u, s, vh = svd(factors)
    return keep(u, s, vh, factors.bias, rank=rank, energy=energy)


def keep(
    u: Tensor, s: Tensor, vh: Tensor, bias: Tensor | None, *, rank: int | None, energy: float | None
) -> tuple[Factors, float]:
    """The leading part of a singular value decomposition, at least one value of it; see `truncate`."""
    squares = _squares(s)
    total = float(squares.sum())
    count = len(s) if rank is None else min(rank, len(s))
    if energy is not None:
        count = min(count, count_for(s, energy))
    count = max(count, 1)
    left_out = float(squares[count:].sum())
    kept = balanced(u[:, :count], s[:count], vh[:count])
    return kept._replace(bias=bias), (left_out / total) ** 0.5 if total > 0 else 0.0


def exact(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The singular value decomposition of a dense `(out, in)` matrix without its zero part.

    Of a float32 matrix W by the eigenvectors of `W W^T` (or `W^T W`, whichever is smaller) in float64: squaring halves
    the digits, and half of float64's are more than float32 has. Up to 3 times as fast as an SVD in float32.
    """
    matrix = working(matrix)
    u, s, vh = _by_eigenvectors(matrix) if matrix.dtype == torch.float32 else _svd(matrix)
    count = max(1, numerical_rank(s.to(matrix.dtype), max(matrix.shape)))
    return u[:, :count].to(matrix), s[:count].to(matrix), vh[:count].to(matrix)


def _svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u, s, vh


def _by_eigenvectors(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The thin decomposition in float64; the vectors of values that are zero but for rounding are not orthonormal."""
    wide = matrix.shape[0] <= matrix.shape[1]
    rows = (matrix if wide else matrix.t()).double()
    squares, vectors = torch.linalg.eigh(rows @ rows.t())
    s, u = squares.clamp(min=0).sqrt().flip(0), vectors.flip(1)
    vh = (u.t() @ rows) / s.clamp(min=torch.finfo(s.dtype).tiny)[:, None]
    return (u, s, vh) if wide else (vh.t(), s, u.t())


def all_finite(*tensors: Tensor | None) -> bool:
    """Whether every value is finite. A sum has one pass, and is finite only if all that it is of are."""
    given = [tensor for tensor in tensors if tensor is not None]
    return all(bool(t.sum().isfinite()) or bool(t.isfinite().all()) for t in given)


def as_factors(matrix: Tensor, sources: Sequence[Factors]) -> Factors:
    """A dense matrix that was made of the changes `sources`, as factors that are it, without decomposing it.

    If its columns are combinations of the sources' (nothing was left out of them), of their small common rank.
    Else its rank is the smaller side's for all that is known, and an identity is the other factor: bit for bit.
    """
    ups = torch.cat([working(f.up) for f in sources], dim=1)
    if ups.shape[1] < min(matrix.shape):
        basis = torch.linalg.qr(ups)[0]
        inside = Factors(basis, basis.t() @ matrix)
        rounding = torch.finfo(matrix.dtype).eps * max(matrix.shape)
        if bool((matrix - inside.delta()).norm() <= rounding * matrix.norm()):
            u, s, vh = svd(inside)
            count = max(1, numerical_rank(s, max(matrix.shape)))
            return balanced(u[:, :count], s[:count], vh[:count])
    one = torch.eye(min(matrix.shape), dtype=matrix.dtype, device=matrix.device)
    return Factors(one, matrix) if matrix.shape[0] <= matrix.shape[1] else Factors(matrix, one)


def common_bases(sources: Sequence[Factors]) -> tuple[Tensor, Tensor]:
    """Orthonormal bases that all these changes live in (Core Space, Panariello et al. 2025, arXiv 2509.17786).

    Returns:
        `u (out, k)`, the left singular vectors of `[up_1 ... up_T]`, and `vh (l, in)`, the right singular vectors of
        the stacked downs; every `up_t @ down_t` equals `u u^T up_t down_t vh^T vh`.
    """
    ups = torch.cat([working(f.up) for f in sources], dim=1)
    downs = torch.cat([working(f.down) for f in sources])
    q, r = torch.linalg.qr(ups)
    left = q @ torch.linalg.svd(r, full_matrices=False)[0]
    q, r = torch.linalg.qr(downs.t())
    right = q @ torch.linalg.svd(r, full_matrices=False)[0]
    return left, right.t()


def check_size(rank: object, energy: object) -> None:
    """Raise `ConfigError` unless at most one is given, and that one makes sense."""
    if rank is not None and energy is not None:
        raise ConfigError("Give rank= or energy=, not both.")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ConfigError(f"rank = {rank!r} must be a whole number of at least 1.")
    if energy is not None and (
        isinstance(energy, bool) or not isinstance(energy, int | float) or not 0.0 < energy <= 1.0
    ):
        raise ConfigError(f"energy = {energy!r} must be a share of the squared singular values: above 0, at most 1.")


def clipped(rank: int | None, most: Mapping[str, int]) -> tuple[str, ...]:
    """The layers, of those with the `most` that their ranks can be, that cannot have this rank and get their most.

    Raises:
        ConfigError: no layer can have it.
    """
    paths = tuple(path for path, size in most.items() if rank is not None and rank > size)
    if paths and len(paths) == len(most):
        widest = max(most, key=most.__getitem__)
        raise ConfigError(
            f"rank = {rank} is more than {widest!r} can have: min(out, in) = {most[widest]} there, and no other layer "
            "of these can have more."
        )
    return paths
