"""Linear algebra of factored matrices: singular values and optimal truncation, without the dense product.

With the QR decompositions `up = Qu Ru` and `down^T = Qd Rd` (`Qu (out, k)`, `Qd (in, k)`), the singular values of
`up @ down` are those of the small core `Ru Rd^T`. Its singular vectors are those of the core, rotated by `Qu` and `Qd`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from adapterkit.errors import ConfigError, StateError, UsageError
from adapterkit.kinds import Factors, numerical_rank


def working(tensor: Tensor) -> Tensor:
    """The tensor in the dtype of sums and decompositions: float32, or float64 if it is float64."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))


def all_finite(*tensors: Tensor | None) -> bool:
    """Whether every value is finite."""
    known = (tensor for tensor in tensors if tensor is not None)
    return all(bool((t.float() if t.itemsize == 1 else t).isfinite().all()) for t in known)  # torch asks no float8


def svd(factors: Factors) -> tuple[Tensor, Tensor, Tensor]:
    """The thin singular value decomposition of `up @ down`.

    Returns:
        `u (out, k)`, `s (k,)` descending and `vh (k, in)`, with `k = min(r, out, in)`.

    Raises:
        StateError: the change is too large for the dtype.
    """
    qu, ru = torch.linalg.qr(working(factors.up))
    qd, rd = torch.linalg.qr(working(factors.down).t())
    u, s, vh = torch.linalg.svd(finite_product(ru, rd), full_matrices=False)
    return qu @ u, s, vh @ qd.t()


def finite_product(ru: Tensor, rd: Tensor) -> Tensor:
    """`ru rd^T`, of which a decomposition exists.

    Raises:
        StateError: it has values that are not finite.
    """
    product = ru @ rd.t()
    if not product.is_meta and not bool(product.isfinite().all()):
        raise StateError(f"The change of a layer is too large for {product.dtype}, or not finite.")
    return product


def dense_svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The singular value decomposition of a dense `(out, in)` matrix, without the zero values.

    For a float32 matrix W it comes from the eigenvectors of `W W^T` (or of `W^T W`, if that is smaller) in float64.
    Squaring halves the number of correct digits, and half of the digits of float64 are more than float32 has. This is
    up to 3 times as fast as an SVD in float32.
    """
    matrix = working(matrix)
    if matrix.dtype == torch.float32:
        wide = matrix.shape[0] <= matrix.shape[1]
        rows = (matrix if wide else matrix.t()).double()
        squares, vectors = torch.linalg.eigh(rows @ rows.t())
        s, u = squares.clamp(min=0).sqrt().flip(0), vectors.flip(1)
        vh = (u.t() @ rows) / s.clamp(min=torch.finfo(s.dtype).tiny)[:, None]
        u, vh = (u, vh) if wide else (vh.t(), u.t())
    else:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    count = max(1, numerical_rank(s.to(matrix.dtype), max(matrix.shape)))
    return u[:, :count].to(matrix), s[:count].to(matrix), vh[:count].to(matrix)


def squares(s: Tensor) -> Tensor:
    """The squares of singular values in float64, relative to the largest: those of extreme values are 0 or inf."""
    largest = float(s.max()) if len(s) else 0.0
    return (s.cpu().double() / (largest or 1.0)).square()


def rank_for_energy(s: Tensor, share: float) -> int:
    """The smallest number of singular values with this share of the sum of squares; 0 if all are zero.

    If a change is cut to these, its error is at most `sqrt(1 - share)` of its Frobenius norm: 10 % for 0.99.
    """
    sums = squares(s).cumsum(0)
    if not len(s) or not sums[-1]:
        return 0
    return int((sums >= share * sums[-1] * (1 - 1e-12)).int().argmax()) + 1


def balanced(u: Tensor, s: Tensor, vh: Tensor) -> Factors:
    """Factors of `u diag(s) vh` that share the singular values evenly: `up = u sqrt(s)`, `down = sqrt(s) vh`."""
    root = s.sqrt()
    return Factors(u * root, root[:, None] * vh)


def keep(
    u: Tensor, s: Tensor, vh: Tensor, bias: Tensor | None, *, rank: int | None, energy: float | None
) -> tuple[Factors, float]:
    """The best approximation of `u diag(s) vh` in the Frobenius norm (Eckart and Young 1936); at least of rank 1.

    Args:
        rank: keep at most this many singular values.
        energy: keep the smallest number of singular values with this share of the sum of their squares.

    Returns:
        The factors, and the relative error `|dW - result| / |dW|`.
    """
    count = len(s) if rank is None else min(rank, len(s))
    if energy is not None:
        count = min(count, rank_for_energy(s, energy))
    count = max(count, 1)
    total, left_out = float(squares(s).sum()), float(squares(s)[count:].sum())
    kept = balanced(u[:, :count], s[:count], vh[:count])
    return kept._replace(bias=bias), (left_out / total) ** 0.5 if total else 0.0


def as_factors(matrix: Tensor, sources: Sequence[Factors]) -> Factors:
    """Factors of a dense matrix that was made from the changes `sources`, without decomposing it.

    If its columns are combinations of the columns of the sources (nothing was pruned), the factors have the small
    common rank. Otherwise nothing is known about its rank: one factor is the matrix itself, bit for bit, and the other
    an identity.
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
    """Orthonormal bases that contain all these changes (Core Space, Panariello et al. 2025, arXiv 2509.17786).

    Returns:
        `u (out, k)`, the left singular vectors of `[up_1 ... up_T]`, and `vh (l, in)`, the right singular vectors of
        the stacked downs; every `up_t @ down_t` equals `u u^T up_t down_t vh^T vh`.
    """
    bases = []
    for stacked in (torch.cat([f.up for f in sources], dim=1), torch.cat([f.down for f in sources]).t()):
        q, r = torch.linalg.qr(working(stacked))
        bases.append(q @ torch.linalg.svd(r, full_matrices=False)[0])
    return bases[0], bases[1].t()


def check_size(rank: object, energy: object) -> None:
    """Raise `ConfigError` if both are given, or if the one that is given is out of range."""
    if rank is not None and energy is not None:
        raise UsageError("Give rank= or energy=, not both.")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise UsageError(f"rank = {rank!r} must be a whole number of at least 1.")
    is_number = isinstance(energy, int | float) and not isinstance(energy, bool)
    if energy is not None and not (is_number and 0.0 < energy <= 1.0):  # type: ignore[operator]
        raise UsageError(f"energy = {energy!r} must be a share of the squared singular values: above 0, at most 1.")


def clipped(rank: int | None, most: Mapping[str, int]) -> tuple[str, ...]:
    """The layers that cannot have this rank. They get their largest possible rank, which `most` holds for each layer.

    Raises:
        ConfigError: no layer can have this rank.
    """
    paths = tuple(path for path, size in most.items() if rank is not None and rank > size)
    if paths and len(paths) == len(most):
        widest = max(most, key=most.__getitem__)
        raise ConfigError(
            f"rank = {rank} is larger than any of the selected layers can have. The largest is {most[widest]}, "
            f"min(out, in) of {widest!r}."
        )
    return paths
