"""Measures of factored changes, against the same measures of the dense matrices."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.core.test_lowrank import dense, factored, normal

import adapterkit as ak
from adapterkit.combining import measures


@st.composite
def pairs(draw: st.DrawFn) -> tuple[ak.Factors, ak.Factors]:
    out, inside = draw(st.integers(1, 7)), draw(st.integers(1, 7))
    return draw(factored(out=out, inside=inside)), draw(factored(out=out, inside=inside))


@given(factors=factored())
@settings(max_examples=60, deadline=None)
def test_spectrum_and_norm_are_the_dense_matrix_s(factors: ak.Factors) -> None:
    matrix = dense(factors)
    found = measures.spectrum(factors)
    assert torch.allclose(found, torch.linalg.svdvals(matrix)[: len(found)], atol=1e-10)
    assert measures.norm(factors) == pytest.approx(float(matrix.norm()), rel=1e-10, abs=1e-12)


@given(both=pairs())
@settings(max_examples=60, deadline=None)
def test_inner_product_and_cosine_are_the_dense_matrices(both: tuple[ak.Factors, ak.Factors]) -> None:
    a, b = map(dense, both)
    expected = sum(float(x) * float(y) for x, y in zip(a.flatten(), b.flatten(), strict=True))
    sizes = float(a.norm()) * float(b.norm())
    assert measures.inner(*both) == pytest.approx(expected, abs=1e-9 * max(1.0, sizes))
    assert measures.cosine(*both) == pytest.approx(expected / sizes if sizes else 0.0, abs=1e-9)


@given(factors=factored(), weight=st.sampled_from([-3.0, -1e-30, 1e-30, 1.0, 1e30]))
@settings(max_examples=40, deadline=None)
def test_cosine_of_a_change_with_a_multiple_of_itself_is_the_sign(factors: ak.Factors, weight: float) -> None:
    expected = math.copysign(1.0, weight) if bool(dense(factors).any()) else 0.0
    assert measures.cosine(factors, factors._replace(up=factors.up * weight)) == pytest.approx(expected)


@given(values=st.lists(st.floats(0.001, 1e6), min_size=1, max_size=9))
@settings(max_examples=60, deadline=None)
def test_effective_rank_is_the_exponential_of_the_entropy(values: list[float]) -> None:
    total = math.fsum(values)
    entropy = -math.fsum(v / total * math.log(v / total) for v in values)
    found = measures.effective_rank(torch.tensor(values, dtype=torch.float64))
    assert found == pytest.approx(math.exp(entropy), rel=1e-9)
    assert 1 - 1e-9 <= found <= len(values) + 1e-9


@pytest.mark.parametrize(("n", "k", "l"), [(20, 3, 3), (12, 2, 6), (30, 1, 10)])
def test_random_subspaces_overlap_by_chance_as_much_as_documented(n: int, k: int, l: int) -> None:  # noqa: E741
    found = []
    for seed in range(300):
        u, v = (torch.linalg.qr(normal(n, d, seed=2 * seed + i)).Q for i, d in enumerate((k, l)))
        found.append(measures.overlap(u, v))
    assert found[0].chance == max(k, l) / n
    assert sum(o.similarity for o in found) / len(found) == pytest.approx(max(k, l) / n, rel=0.1)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_float32_at_the_edge_of_its_range(scale: float) -> None:
    plain = ak.Factors(normal(6, 4).float(), normal(4, 5, seed=1).float())
    scaled = plain._replace(up=plain.up * scale)
    other = ak.Factors(normal(6, 2, seed=2).float() * scale, normal(2, 5, seed=3).float())
    assert measures.norm(scaled) == pytest.approx(measures.norm(plain) * scale, rel=1e-4)
    assert measures.cosine(scaled, other) == pytest.approx(
        measures.cosine(plain, other._replace(up=other.up / scale)), abs=1e-5
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_measured_in_float32(dtype: torch.dtype) -> None:
    half = ak.Factors(normal(6, 4).to(dtype), normal(4, 5, seed=1).to(dtype))
    assert measures.spectrum(half).dtype == torch.float32
    assert measures.norm(half) == pytest.approx(float(dense(half).norm()), rel=1e-5)
    mixed = ak.Factors(half.up.double(), half.down.double())
    assert measures.cosine(half, mixed) == pytest.approx(1.0, abs=1e-5)
