"""What a report measures, against dense float64 matrices, entry by entry."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from tests import oracles
from tests.core.test_lowrank import dense, factored
from tests.core.test_measures import pairs
from tests.report.sources import low_rank, source, stack
from torch import Tensor

import adapterkit as ak
from adapterkit.report.measuring import SUBSPACE_ENERGY, measure, opposed_signs


def leading(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Left and right singular vectors of the dense matrix, as many as hold `SUBSPACE_ENERGY`."""
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    count = oracles.rank_for(matrix, SUBSPACE_ENERGY) if bool(matrix.any()) else 0
    return u[:, :count], vh[:count].t()


def angles(u: Tensor, v: Tensor) -> float:
    """The mean squared cosine of the principal angles between two column spaces, one angle at a time."""
    cosines = torch.linalg.svdvals(u.t() @ v) if u.shape[1] and v.shape[1] else torch.zeros(1)
    return sum(float(c) ** 2 for c in cosines) / len(cosines)


def opposed(a: Tensor, b: Tensor) -> int:
    """How many entries have opposite signs."""
    return sum((x > 0 > y) or (y > 0 > x) for x, y in zip(a.flatten().tolist(), b.flatten().tolist(), strict=True))


@given(both=pairs())
@settings(max_examples=40, deadline=None)
def test_opposite_signs_are_those_of_the_dense_matrices(both: tuple[ak.Factors, ak.Factors]) -> None:
    # What rounding makes of a zero may have any sign.
    a, b = (m.where(m.abs() > 1e-12, 0) for m in map(dense, both))
    expected, found = opposed(a, b) / a.numel(), opposed_signs(*both)
    assert found == pytest.approx(expected) if bool(((a != 0) & (b != 0)).all()) else found >= expected - 1e-9


def test_opposite_changes_conflict_everywhere_equal_ones_nowhere_and_independent_ones_in_half() -> None:
    change = low_rank(5, 4, 2)
    assert opposed_signs(change, change._replace(up=-change.up)) == 1.0
    assert opposed_signs(change, change) == 0.0
    assert opposed_signs(change, change._replace(up=torch.zeros_like(change.up))) == 0.0  # zero has no sign
    assert opposed_signs(low_rank(300, 300, 60), low_rank(300, 300, 60, seed=9)) == pytest.approx(0.5, abs=0.02)


def test_a_sample_of_rows_estimates_what_all_rows_give() -> None:
    both = low_rank(4000, 20, 3), low_rank(4000, 20, 4, seed=9)
    whole, sample = (opposed_signs(*both, most=most) for most in (10**6, 16000))
    assert sample != whole
    assert sample == pytest.approx(whole, abs=0.03)
    assert opposed_signs(*both, most=16000) == sample


@given(both=pairs())
@settings(max_examples=40, deadline=None)
def test_a_pair_is_measured_as_its_dense_matrices(both: tuple[ak.Factors, ak.Factors]) -> None:
    pair = measure([source("a", {"p": both[0]}), source("b", {"p": both[1]})]).pairs[0, 1]
    a, b = map(dense, both)
    (ua, va), (ub, vb) = leading(a), leading(b)
    sizes = float(a.norm()), float(b.norm())
    expected = float((a * b).sum()) / (sizes[0] * sizes[1]) if all(sizes) else 0.0
    assert pair.cosine == pytest.approx(expected, abs=1e-9)
    assert pair.columns.similarity == pytest.approx(angles(ua, ub), abs=1e-8)
    assert pair.rows.similarity == pytest.approx(angles(va, vb), abs=1e-8)
    inside = (ua @ ua.t() @ b @ va @ va.t()).norm(), (ub @ ub.t() @ a @ vb @ vb.t()).norm()
    for found, part, size in zip(pair.inside, inside, sizes, strict=True):
        assert found == pytest.approx(float(part) / size if size else 0.0, abs=1e-8)


def test_a_pair_as_a_whole_is_that_of_all_changes_side_by_side() -> None:
    """A target that one lacks counts as zero there."""
    a, b = stack(3), {**stack(2, seed=7), "model.layers.9.attn.q": low_rank(8, 6, 2, seed=3)}
    found = measure([source("a", a), source("b", b)]).pairs[0, 1]
    vectors = [
        torch.cat([dense(f[path]).flatten() if path in f else torch.zeros(48) for path in sorted({*a, *b})])
        for f in (a, b)
    ]
    assert found.cosine == pytest.approx(float(torch.cosine_similarity(*vectors, dim=0)), abs=1e-9)
    assert set(found.layers) == set(a) & set(b)
    shared = [torch.cat([dense(f[path]).flatten() for path in found.layers]) for f in (a, b)]
    assert found.opposed == pytest.approx(opposed(*shared) / len(shared[0]))
    own = [pair.columns.similarity for pair in found.layers.values()]
    assert found.columns.similarity == pytest.approx(sum(own) / len(own))


@given(factors=factored())
@settings(max_examples=40, deadline=None)
def test_a_layer_is_measured_as_its_dense_matrix(factors: ak.Factors) -> None:
    layer = measure([source("a", {"p": factors}, {"p": 2.0})]).adapters[0].layers["p"]
    matrix = dense(factors)
    assert layer.norm == pytest.approx(float(matrix.norm()), abs=1e-9)
    assert layer.relative == pytest.approx(float(matrix.norm()) / 2)
    assert layer.shape == tuple(matrix.shape)
    assert layer.rank == factors.rank
    assert len(layer.spectrum) == int(torch.linalg.matrix_rank(matrix))
    squares = layer.spectrum.square()
    for rank, share in ((layer.rank_90, 0.9), (layer.rank_99, 0.99)):
        assert float(squares[:rank].sum()) >= share * float(squares.sum()) * (1 - 1e-9)


def test_changes_of_two_shapes_under_one_name_are_no_pair() -> None:
    found = measure([source("a", {"p": low_rank(4, 3, 2)}), source("b", {"p": low_rank(4, 5, 2)})]).pairs[0, 1]
    assert not found.layers
    assert found.other_shape == ["p"]


def test_a_target_without_factors_is_counted_and_not_measured() -> None:
    found = measure([source("a", {"p": None, "q": low_rank(4, 3, 2)})]).adapters[0]
    assert found.without_factors == ("p",)
    assert list(found.layers) == ["q"]


@pytest.mark.parametrize("method", ["lora", "loha", "vera"])
def test_the_sizes_on_a_model_are_those_of_its_weights(method: str) -> None:
    from tests.combining import deltas, randomise
    from tests.models import build

    model = build("bert")
    adapters = ak.attach(model)
    adapters.add("a", ak.config(method, r=3, target_modules=["query", "output.dense"], modules_to_save=None))
    randomise(adapters, "a", 0)
    report = adapters.report("a")
    changes = deltas(adapters, "a")
    found: Mapping[str, Any] = report.findings.adapters[0].layers
    assert set(found) == set(changes)
    for path, change in changes.items():
        weight = model.get_submodule(path).weight
        assert isinstance(weight, Tensor)
        assert found[path].relative == pytest.approx(float(change.norm() / weight.detach().norm()), rel=1e-4)


def test_a_merged_adapter_s_sizes_are_relative_to_the_weights_before() -> None:
    from tests.combining import adapted
    from tests.models import build

    adapters = adapted(build("bert"), {"a": {}}, ["query"])
    before = adapters.report().findings.adapters[0].layers
    adapters.merge("a")
    for path, layer in adapters.report().findings.adapters[0].layers.items():
        assert layer.base_norm == pytest.approx(before[path].base_norm)


def test_independent_noise_adds_next_to_nothing_in_another_s_directions() -> None:
    """Its share is what random subspaces have by chance, `sqrt(k l / (m n))` of its size."""
    f, g = low_rank(400, 300, 4), low_rank(400, 300, 4, seed=5)
    found = measure([source("a", {"p": f}), source("b", {"p": g})]).pairs[0, 1]
    assert max(found.inside) < 4 * math.sqrt(16 / (400 * 300)) * 1.5
