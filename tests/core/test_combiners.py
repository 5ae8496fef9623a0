"""Each way to combine against its literal form, in every space, and the hook that adds one."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests import oracles
from tests.combining import adapted
from tests.core.test_lowrank import close, dense, factored, normal
from torch import Tensor

import adapterkit as ak
from adapterkit.combining import Choices
from adapterkit.combining import methods as combine
from adapterkit.combining.lowrank import common_bases
from adapterkit.contract.combiners import BUILTIN, CombinerOptions

SIGNS = ("total", "frequency")
WEIGHTS = st.sampled_from([1.0, 0.5, -0.7, 2.0, 0.0])


def recipe(method: str, space: Any = "delta", density: Any = 1.0, sign: Any = "total", **more: Any) -> Choices:
    density = density if BUILTIN[method].prunes else None
    return Choices(method=method, space=space, density=density, majority_sign_method=sign, **more)


@st.composite
def sources_and_weights(draw: st.DrawFn) -> tuple[list[ak.Factors], list[float]]:
    out, inside, count = draw(st.integers(1, 6)), draw(st.integers(1, 6)), draw(st.integers(1, 4))
    sources = [draw(factored(out=out, inside=inside)) for _ in range(count)]
    return sources, [draw(WEIGHTS) for _ in range(count)]


@pytest.mark.parametrize("space", ["delta", "core"])
@pytest.mark.parametrize("method", ["linear", "ties", "magnitude_prune"])
@given(given_sources=sources_and_weights(), density=st.sampled_from([0.1, 0.5, 0.9, 1.0]), sign=st.sampled_from(SIGNS))
@settings(max_examples=40, deadline=None)
def test_each_method_is_its_literal_form(
    method: str, space: str, given_sources: tuple[list[ak.Factors], list[float]], density: float, sign: str
) -> None:
    """On dense matrices, or on the small ones in the common bases."""
    sources, weights = given_sources
    found, error = combine.combine_factors(sources, weights, recipe(method, space, density, sign))
    left, right = common_bases(sources) if space == "core" else (None, None)
    matrices = [dense(f) if left is None else left.t() @ dense(f) @ right.t() for f in sources]
    expected = oracles.COMBINERS[method](matrices, weights, density, sign)
    expected = expected if left is None else left @ expected @ right
    assert torch.allclose(dense(found), expected, atol=1e-9)
    assert error == 0.0
    assert found.rank <= max(1, min(expected.shape))


def independent(out: int, inside: int, ranks: tuple[int, ...]) -> list[ak.Factors]:
    return [ak.Factors(normal(out, r, seed=i), normal(r, inside, seed=i + 70)) for i, r in enumerate(ranks)]


@pytest.mark.parametrize("space", ["delta", "core"])
@pytest.mark.parametrize("ranks", [(2, 2), (1, 3, 2), (4, 4, 4), (6, 6), (1,), (2, 2, 2, 2)], ids=str)
def test_tsv_is_its_papers_algorithm_on_dense_matrices(ranks: tuple[int, ...], space: str) -> None:
    sources = independent(7, 6, ranks)
    weights = [1.0, -0.5, 0.3, 0.7][: len(ranks)]
    found, _ = combine.combine_factors(sources, weights, recipe("tsv", space))
    close(dense(found), oracles.tsv([dense(f) for f in sources], weights), 1e-9)


@pytest.mark.parametrize("other", ["zero", "weightless"])
def test_tsv_makes_no_room_for_sources_that_do_nothing(other: str) -> None:
    first, second = independent(7, 6, (3, 3))
    if other == "zero":
        second = second._replace(up=second.up * 0)
    found, _ = combine.combine_factors([first, second], [1.0, float(other == "zero")], recipe("tsv"))
    close(dense(found), dense(first), 1e-10)
    nothing, _ = combine.combine_factors([first], [0.0], recipe("tsv"))
    assert not dense(nothing).any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@given(given_sources=sources_and_weights())
@settings(max_examples=40, deadline=None)
def test_isotropising_gives_every_singular_value_their_mean(
    dtype: torch.dtype, given_sources: tuple[list[ak.Factors], list[float]]
) -> None:
    sources, weights = given_sources
    cast = [ak.Factors(f.up.to(dtype), f.down.to(dtype)) for f in sources]
    found, _ = combine.combine_factors(cast, weights, recipe("linear", isotropize=True))
    summed = oracles.linear([dense(f) for f in sources], weights)
    values = torch.linalg.svdvals(summed)
    if bool(((values > 1e-14) & (values < 1e-3)).any()):
        return  # too near to singular for the rank to be the same in both
    close(dense(found), oracles.isotropic(summed) if float(summed.abs().max()) > 1e-12 else summed, 5e-4)


def test_isotropising_does_not_raise_rounding_to_a_change() -> None:
    same = ak.Factors(normal(20, 3).float(), normal(3, 30, seed=1).float())
    found, _ = combine.combine_factors([same] * 12, [1.0] * 12, recipe("linear", isotropize=True))
    values = torch.linalg.svdvals(dense(found))
    assert int((values > 1e-3 * values.max()).sum()) == 3


def test_dare_drops_with_the_chance_asked_for_and_keeps_the_mean() -> None:
    ones, options = (
        torch.ones(1, 400, 500, dtype=torch.float64),
        CombinerOptions(0.2, generator=torch.Generator().manual_seed(0)),
    )
    kept = BUILTIN["dare_linear"].function(ones, torch.ones(1), options)
    assert set(kept.unique().tolist()) == {0.0, 5.0}
    assert float(kept.mean()) == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dare_is_the_rest_of_its_method_behind_its_masks(method: str) -> None:
    stack, weights = normal(3, 4, 5), [0.5, 2.0, 1.0]
    draw = torch.Generator().manual_seed(3)
    masks = [torch.bernoulli(torch.full((4, 5), 0.4, dtype=torch.float64), generator=draw) for _ in range(3)]
    dropped = [s * m / 0.4 for s, m in zip(stack, masks, strict=True)]
    options = CombinerOptions(0.4, generator=torch.Generator().manual_seed(3))
    found = BUILTIN[method].function(stack, torch.tensor(weights), options)
    plain = oracles.linear(dropped, weights) if method == "dare_linear" else oracles.elected(dropped, weights, "total")
    assert torch.allclose(found, plain)


@pytest.mark.parametrize("method", BUILTIN)
@pytest.mark.parametrize("space", ["delta", "factors", "core"])
@given(factors=factored(), scale=st.sampled_from([1.0, 0.25, -3.0]))
@settings(max_examples=12, deadline=None)
def test_one_source_of_weight_one_comes_back(method: str, space: str, factors: ak.Factors, scale: float) -> None:
    factors = factors._replace(scale=scale)
    found, _ = combine.combine_factors([factors], [1.0], recipe(method, space))
    assert torch.allclose(dense(found), dense(factors.folded()), atol=1e-9)


@pytest.mark.parametrize("method", [m for m in BUILTIN if not m.startswith("dare")])
@pytest.mark.parametrize("space", ["delta", "factors", "core"])
def test_the_order_of_the_sources_does_not_matter(method: str, space: str) -> None:
    sources, weights = independent(6, 7, (2, 2, 2)), [1.0, -0.5, 0.25]
    there, _ = combine.combine_factors(sources, weights, recipe(method, space, 0.5))
    back, _ = combine.combine_factors(sources[::-1], weights[::-1], recipe(method, space, 0.5))
    assert torch.allclose(dense(there), dense(back), atol=1e-10)


def test_sources_of_different_dtypes_are_combined_in_the_widest() -> None:
    a, b = independent(6, 7, (2, 3))
    half = ak.Factors(b.up.half(), b.down.half())
    for method, space in (("linear", "delta"), ("ties", "delta"), ("ties", "core"), ("tsv", "core")):
        found, _ = combine.combine_factors([a, half], [1.0, 1.0], recipe(method, space))
        exact = [a, ak.Factors(half.up.double(), half.down.double())]
        expected, _ = combine.combine_factors(exact, [1.0, 1.0], recipe(method, space))
        assert found.up.dtype == torch.float64
        close(dense(found), dense(expected), 1e-12)


OPTIONS = {
    "density missing": ({"method": "ties"}, r"method 'ties' prunes\. Pass density=, the share of entries to keep"),
    **{
        f"density {value}": ({"method": "ties", "density": value}, f"density = {value!r} must be above 0 and at most 1")
        for value in (0.0, 2, float("nan"), True, "half")
    },
    **{f"rank {value}": ({"rank": value}, f"rank = {value} must be a whole number of at") for value in (0, True, 2.0)},
    **{
        f"energy {value}": ({"energy": value}, f"energy = {value!r} must be a share of the squared singular values")
        for value in (0.0, 1.5, float("nan"), True, "all")
    },
    "both": ({"rank": 2, "energy": 0.5}, "Give rank= or energy=, not both"),
    "density idle": ({"density": 0.5}, r"method 'linear' keeps every entry, so density = 0\.5 has no effect"),
    "sign": ({"majority_sign_method": "most"}, r"majority_sign_method = 'most' must be 'total' or 'frequency'"),
    "method": ({"method": "tie"}, r"Unknown method of combination 'tie'\. Available: 'dare_.*Did you mean 'ties'\?"),
    "method type": ({"method": ["ties"]}, r"Unknown method of combination \['ties'\]"),
    "space": ({"space": "weights"}, r"space = 'weights' must be one of 'delta', 'factors', 'core'"),
    "seed": ({"seed": 1.5}, r"seed = 1\.5 must be a whole number or None"),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_options_that_make_no_sense_are_named(case: str) -> None:
    fields, message = OPTIONS[case]
    adapters = adapted(torch.nn.Sequential(torch.nn.Linear(4, 4)), {"a": {}}, ["0"])
    with pytest.raises(ak.AdapterError, match=message):
        adapters.combine("c", {"a": 1.0}, **fields)
    assert adapters.names == ("a",)


def extension(answer: Any) -> ModuleType:
    @ak.hookimpl
    def combiners() -> Any:
        if isinstance(answer, Exception):
            raise answer
        return answer

    plugin = ModuleType("more_combiners")
    plugin.combiners = combiners  # type: ignore[attr-defined]
    return plugin


def first(stack: Tensor, weights: Tensor, options: CombinerOptions) -> Tensor:
    return stack[0]


def test_an_extension_adds_a_way_to_combine_until_it_is_retracted() -> None:
    plugin = extension({"first": ak.Combiner(first)})
    ak.default_registry.extend(plugin)
    assert ak.default_registry.combiner("first").function is first
    ak.default_registry.retract(plugin)
    with pytest.raises(ak.UnknownNameError, match="Unknown method of combination 'first'"):
        ak.default_registry.combiner("first")
    with pytest.raises(ak.UnknownNameError, match="Unknown extension <module 'more_combiners'>"):
        ak.default_registry.retract(plugin)


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda stack, weights, options: 1 / 0, "The combiner <lambda> raised ZeroDivisionError: division by zero."),
        (lambda stack, weights, options: None, "The combiner <lambda> returned a NoneType; it must be shape (4, 4)."),
        (
            lambda stack, weights, options: stack,
            "The combiner <lambda> returned shape (2, 4, 4); it must be shape (4, 4).",
        ),
    ],
)
def test_a_combiner_that_fails_is_named(function: Any, said: str) -> None:
    with pytest.raises(ak.PluginError) as caught:
        ak.Combiner(function)(torch.ones(2, 4, 4), torch.ones(2), CombinerOptions())
    assert str(caught.value) == said
