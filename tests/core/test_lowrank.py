"""Truncation and decompositions of factored matrices, against the dense ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests import oracles
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import adapterkit as ak
from adapterkit.combining import lowrank
from adapterkit.combining import methods as combine

DTYPES = {torch.float64: 1e-10, torch.float32: 2e-4, torch.bfloat16: 2e-4, torch.float16: 2e-4}
SIZES = st.integers(1, 7)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@st.composite
def factored(draw: st.DrawFn, dtype: torch.dtype = torch.float64, out: int = 0, inside: int = 0) -> ak.Factors:
    """Factors of every shape: r above min(out, in), single rows, zero matrices, dependent rows."""
    out, inside, rank = out or draw(SIZES), inside or draw(SIZES), draw(st.integers(1, 9))
    seed = draw(st.integers(0, 99))
    up, down = normal(out, rank, seed=seed), normal(rank, inside, seed=seed + 100)
    if draw(st.booleans()):
        down[-1] = down[0]
    up = up * draw(st.sampled_from([0.0, 1.0, 1.0, 1.0]))
    return ak.Factors(up.to(dtype), down.to(dtype))


def dense(factors: ak.Factors) -> Tensor:
    return factors.up.double() @ factors.down.double()


def truncate(factors: ak.Factors, rank: int | None = None, energy: float | None = None) -> tuple[ak.Factors, float]:
    return lowrank.keep(*lowrank.svd(factors), factors.bias, rank=rank, energy=energy)


def close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    size = max(float(expected.norm()), 1e-300)
    assert float((found.double() - expected).norm()) <= tolerance * size + tolerance * (float(expected.norm()) == 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(data=st.data(), rank=st.integers(1, 8))
@settings(max_examples=25, deadline=None)
def test_truncation_is_the_best_of_its_rank_and_states_its_error(
    dtype: torch.dtype, data: st.DataObject, rank: int
) -> None:
    factors = data.draw(factored(dtype))
    kept, error = truncate(factors, rank=rank)
    matrix = dense(factors)
    assert kept.rank <= rank
    left_out = float((matrix - oracles.best(matrix, rank)).norm())
    size = float(matrix.norm())
    assert float((matrix - dense(kept)).norm()) <= left_out + DTYPES[dtype] * size
    assert error == pytest.approx(left_out / size if size else 0.0, abs=10 * DTYPES[dtype])


@given(factors=factored(), energy=st.floats(0.01, 1.0))
@settings(max_examples=60, deadline=None)
def test_energy_takes_as_few_singular_values_as_reach_it(factors: ak.Factors, energy: float) -> None:
    kept, error = truncate(factors, energy=energy)
    matrix = dense(factors)
    if float(matrix.norm()) > 0:
        assert abs(kept.rank - oracles.rank_for(matrix, energy)) <= (energy > 1 - 1e-9)
        assert error**2 <= 1 - energy + 1e-9


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [(torch.float64, s) for s in (1e-150, 1e-20, 1e150)] + [(torch.float32, s) for s in (1e-30, 1e30)],
)
def test_extreme_scales_truncate_as_others_do(dtype: torch.dtype, scale: float) -> None:
    plain = ak.Factors(normal(6, 4).to(dtype), normal(4, 5, seed=1).to(dtype))
    scaled = plain._replace(up=plain.up * scale)
    kept, error = truncate(scaled, rank=2)
    assert error == pytest.approx(truncate(plain, rank=2)[1], rel=1e-3 if dtype == torch.float32 else 1e-6)
    close(dense(kept) / scale, oracles.best(dense(plain), 2), 1e-4 if dtype == torch.float32 else 1e-9)
    assert truncate(scaled, energy=0.8)[0].rank == oracles.rank_for(dense(plain), 0.8)


@given(data=st.data(), count=st.integers(1, 5))
@settings(max_examples=40, deadline=None)
def test_common_bases_are_orthonormal_and_hold_every_change(data: st.DataObject, count: int) -> None:
    out, inside = data.draw(SIZES), data.draw(SIZES)
    sources = [data.draw(factored(out=out, inside=inside)) for _ in range(count)]
    left, right = lowrank.common_bases(sources)
    for basis, stack in (
        (left, torch.cat([f.up for f in sources], dim=1)),
        (right.t(), torch.cat([f.down for f in sources]).t()),
    ):
        assert torch.allclose(basis.t() @ basis, torch.eye(basis.shape[1], dtype=torch.float64), atol=1e-10)
        rotated = basis.t() @ stack @ stack.t() @ basis  # diagonal: they are the singular vectors of the stack
        assert torch.allclose(rotated, torch.diag(rotated.diagonal()), atol=1e-8)
    for f in sources:
        assert torch.allclose(left @ (left.t() @ dense(f) @ right.t()) @ right, dense(f), atol=1e-9)


class Largest(TorchDispatchMode):
    """The number of entries of the largest tensor that any operation makes."""

    entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.entries = max(self.entries, tensor.numel())
        return result


@pytest.mark.parametrize("isotropize", [False, True])
@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize(("method", "space"), [("linear", "delta"), ("tsv", "delta"), ("ties", "core")])
def test_no_dense_matrix_is_made_where_factors_do(method: str, space: Any, rank: int | None, isotropize: bool) -> None:
    out, inside, ranks = 900, 700, (4, 6, 2)
    sources = [ak.Factors(normal(out, r, seed=r), normal(r, inside, seed=9 + r)) for r in ranks]
    recipe = combine.Choices(method=method, space=space, density=0.5, rank=rank, isotropize=isotropize)
    with Largest() as largest:
        combine.combine_factors(sources, [1.0, -0.5, 0.2], recipe)
    assert largest.entries <= out * sum(ranks)


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (7, 7)])
@pytest.mark.parametrize("rank", [1, 3, 6])
@pytest.mark.parametrize("scale", [1e-18, 1.0, 1e15])
def test_the_decomposition_of_a_float32_matrix_is_as_exact_as_float32(
    shape: tuple[int, int], rank: int, scale: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    up, down = torch.randn(shape[0], rank, generator=generator), torch.randn(rank, shape[1], generator=generator)
    matrix = (up @ down) * scale
    u, s, vh = lowrank.dense_svd(matrix)
    assert u.dtype == s.dtype == vh.dtype == torch.float32
    assert len(s) == rank
    wanted = torch.linalg.svdvals(matrix.double())[:rank]
    torch.testing.assert_close(s.double(), wanted, rtol=1e-5, atol=1e-6 * float(wanted[0]))
    for basis in (u.t() @ u, vh @ vh.t()):
        torch.testing.assert_close(basis, torch.eye(rank), rtol=0, atol=1e-5)
    assert float((u * s @ vh - matrix).norm() / matrix.norm()) < 1e-6


def test_the_zero_matrix_has_one_value_that_is_zero() -> None:
    kept, error = truncate(ak.Factors(torch.zeros(3, 2), torch.ones(2, 4)), energy=0.5)
    assert (kept.rank, error) == (1, 0.0)
    assert not dense(kept).any()
    assert lowrank.rank_for_energy(torch.zeros(3), 0.5) == lowrank.rank_for_energy(torch.zeros(0), 0.5) == 0
    u, s, vh = lowrank.dense_svd(torch.zeros(3, 5))
    assert (u.shape, s.tolist(), vh.shape) == ((3, 1), [0.0], (1, 5))
    assert lowrank.all_finite(u, s, vh, None)
    assert not lowrank.all_finite(torch.tensor([1.0, float("inf"), float("-inf")]))
    assert lowrank.all_finite(torch.full((2,), 3e38))


@pytest.mark.parametrize("shape", [(5, 12), (12, 5)])
def test_a_dense_matrix_is_its_own_factor_bit_for_bit_unless_its_sources_have_room_for_it(
    shape: tuple[int, int],
) -> None:
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(shape, generator=generator)
    source = ak.Factors(torch.randn(shape[0], 2, generator=generator), torch.randn(2, shape[1], generator=generator))
    other = ak.Factors(torch.randn(shape[0], 1, generator=generator), torch.randn(1, shape[1], generator=generator))
    found = lowrank.as_factors(dense, [source, other])
    assert found.rank == 5
    assert torch.equal(found.delta(), dense)
    small = lowrank.as_factors(source.delta() - 2 * other.delta(), [source, other])
    assert small.rank == 3
    torch.testing.assert_close(small.delta(), source.delta() - 2 * other.delta(), rtol=1e-4, atol=1e-5)
    assert lowrank.as_factors(torch.zeros(shape), [source, other]).rank == 1
