"""What a report concludes, from adapters that were made so that the answer is known."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from html import escape

import pytest
import torch
from tests.combining import randomise, scaling_method
from tests.models import build
from tests.report.sources import low_rank, normal, source, stack
from torch import Tensor

import adapterkit as ak
from adapterkit.report import Report
from adapterkit.report.heatmaps import places_of
from adapterkit.report.measuring import AdapterFinding, measure
from adapterkit.report.verdicts import Verdict, verdicts


def found(*sources: AdapterFinding) -> list[Verdict]:
    findings = measure(sources)
    return verdicts(findings, places_of(path for adapter in sources for path in adapter.layers))


def of_spectrum(values: list[float], out: int = 12, inside: int = 10, seed: int = 0) -> ak.Factors:
    u, v = (torch.linalg.qr(normal(n, len(values), seed=seed + n)).Q for n in (out, inside))
    return ak.Factors(u * torch.tensor(values, dtype=torch.float64), v.t())


def in_columns(start: int, change: Tensor) -> ak.Factors:
    """A change whose outputs and inputs are the coordinates from `start` on."""
    up, down = torch.zeros(40, change.shape[0]), torch.zeros(change.shape[1], 40)
    up[start : start + change.shape[0]] = torch.eye(change.shape[0])
    down[:, start : start + change.shape[1]] = torch.eye(change.shape[1])
    return ak.Factors(up.double() @ change, down.double())


PLAIN_SUM = "adapters.combine('both', {'a': 1, 'b': 1})"


def merging(f: ak.Factors, g: ak.Factors) -> Verdict:
    return found(source("a", {"p": f}), source("b", {"p": g}))[-1]


def test_a_change_in_one_layer_is_found_there() -> None:
    changes = stack(10, ("q",))
    changes["model.layers.7.q"] = changes["model.layers.7.q"]._replace(up=100 * changes["model.layers.7.q"].up)
    layers = found(source("a", changes))[0]
    assert layers.headline.startswith("Half of the change is in 1 of 10 targets (5 if all were alike)")
    assert "Largest: layers.7 q" in layers.reasons[0]
    assert any(r.startswith("By layer: layers.7 100 %") for r in layers.reasons)


def test_size_is_relative_to_the_base_where_that_is_known() -> None:
    """The smaller change is the larger one relative to its weight."""
    changes = {"layers.0.q": of_spectrum([1.0]), "layers.1.q": of_spectrum([4.0])}
    alone = found(source("a", changes))[0]
    beside = found(source("a", changes, {"layers.0.q": 10.0, "layers.1.q": 400.0}))[0]
    assert "Largest: layers.1 q (4)" in alone.reasons[0]
    assert "Largest: layers.0 q (10 %), layers.1 q (1.0 %)" in beside.reasons[0]


def test_the_rank_that_is_enough_serves_95_percent_of_the_targets() -> None:
    """Nineteen of twenty need 2, one needs 6."""
    changes = {f"layers.{i}.q": of_spectrum([10.0, 8.0, 0.1, 0.1, 0.1, 0.1], seed=i) for i in range(19)}
    changes["layers.19.q"] = of_spectrum([1.0] * 6)
    rank = found(source("a", changes))[1]
    assert rank.headline == "Rank 2 keeps 99 % of the energy in 95 % of the targets (19 of 20)."
    assert "If you train again with LoRA, rank 2 is enough." in rank.reasons
    numbers = 22 * (19 * 2 + 6)
    assert any(f"{numbers:,} parameters instead of {22 * 120:,}" in r for r in rank.reasons)
    assert "energy=0.99" in rank.call
    whole = found(source("a", {"layers.0.q": of_spectrum([1.0] * 4), "layers.1.q": of_spectrum([1.0] * 4)}))[1]
    assert "Some targets use all of their rank" in whole.reasons[-1]
    assert not whole.call


@pytest.mark.parametrize(
    ("method", "fields", "saves"),
    [("lora", {"r": 8}, True), ("vera", {"r": 8}, False), ("loha", {"r": 3}, False)],
)
def test_the_call_for_the_rank_is_there_if_it_makes_the_adapter_smaller(
    method: str, fields: dict[str, int], saves: bool
) -> None:
    """A VeRA adapter trains two vectors a layer, and LoHa factors of rank r give a change of rank r * r."""
    adapters = ak.attach(build("bert"))
    torch.manual_seed(0)
    adapters.add("a", ak.config(method, target_modules=["query"], **fields), num_labels=3)
    randomise(adapters, "a", 0)
    rank = adapters.report().verdicts[1]
    call = "adapters.convert('a', to='lora', name='a-cut', energy=0.99)"
    assert rank.call == (call if saves else "")
    eval(call, {"adapters": adapters})
    whole, cut = adapters.report("a", "a-cut").findings.adapters
    assert {p: x.rank for p, x in cut.layers.items()} == {p: x.rank_99 for p, x in whole.layers.items()}
    sizes = [
        sum(p.numel() for key, p in adapters.named_parameters(name) if "classifier" not in key)
        for name in ("a", "a-cut")
    ]
    assert (sizes[1] < sizes[0]) == saves
    assert any(f"{sizes[1]:,} parameters instead of {sizes[0]:,}" in reason for reason in rank.reasons)
    assert any(reason.startswith("Cutting saves nothing") for reason in rank.reasons) != saves


def test_a_method_without_a_low_rank_form_is_named() -> None:
    """Its targets are counted, no number is printed for them, and no call is suggested that would fail."""
    plugin = scaling_method(mergeable=True)
    ak.register(plugin)
    adapters = ak.attach(build("bert"))
    adapters.add("p", plugin.config(target_modules=["query"], modules_to_save=None))
    adapters.add("l", ak.config("lora", target_modules=["value"], modules_to_save=None))
    alone, _, both = adapters.report().verdicts
    assert str(alone) == (
        "p: Its changes cannot be measured.\n  The method 'scale' has no low-rank form of its change at 2 targets."
    )
    assert (both.headline, both.call) == ("Yes, without loss: they change different layers.", "")


def test_an_adapter_that_was_not_trained_changes_nothing() -> None:
    (verdict,) = found(source("a", {"p": low_rank(4, 3, 2)._replace(up=torch.zeros(4, 2).double())}))
    assert verdict.headline == "It changes nothing."
    assert verdict.reasons == ["The change is zero at 1 target: the adapter was not trained there."]


def test_there_is_no_verdict_on_merging_what_cannot_be_measured() -> None:
    zeros, change = of_spectrum([0.0, 0.0]), of_spectrum([2.0, 1.0])
    for first, second, name in ((change, zeros, "b"), (zeros, change, "a"), (zeros, zeros, "a or b")):
        found_ = merging(first, second)
        assert found_.headline == "The weights do not tell."
        assert found_.reasons == [f"They share 1 target, but no change of {name} can be measured."]
    formless = dataclasses.replace(
        source("b", {"p": change, "q": change}), factors=lambda p: change if p == "q" else None
    )
    verdict = found(source("a", {"p": change}), formless)[-1]
    assert verdict.reasons == ["They share 1 target, but at none of them can both changes be measured."]
    assert verdict.call == ""


def test_a_change_that_overflows_is_refused() -> None:
    huge = ak.Factors(torch.full((4, 1), 1e30), torch.full((1, 4), 1e30))
    with pytest.raises(ak.StateError, match=r"Adapter 'a' has a change at 'p' that is too large for torch.float32"):
        found(source("a", {"p": huge}))


CHANGE = low_rank(8, 6, 3)
CROWDED = in_columns(0, normal(6, 6))
# Two changes in other directions, one of them with a small part in the directions of `CROWDED`.
FAR, NEAR = in_columns(20, 5 * normal(6, 6, seed=1)), in_columns(0, 0.05 * normal(6, 6, seed=2))
MERGES: dict[str, tuple[Mapping[str, ak.Factors], Mapping[str, ak.Factors], str, str]] = {
    "other layers": ({"p": CHANGE}, {"q": CHANGE}, "Yes, without loss: they change different layers.", PLAIN_SUM),
    "other sizes": ({"p": CHANGE}, {"p": low_rank(5, 3, 2)}, "No: they are adapters of models of different sizes.", ""),
    "other directions": (
        {"p": CROWDED},
        {"p": in_columns(20, normal(6, 6, seed=1))},
        "Yes: they hardly interact. Start with a plain sum, weights 1.",
        PLAIN_SUM,
    ),
    "twice the same": (
        {"p": CHANGE},
        {"p": CHANGE},
        "Yes: they agree in the directions that they share. Start with a plain sum of weights near 0.5.",
        "adapters.combine('both', {'a': 0.5, 'b': 0.5})",
    ),
    "opposite": (
        {"p": CHANGE},
        {"p": CHANGE._replace(up=-0.8 * CHANGE.up)},
        "Rather not: they undo each other. Keep them apart, or resolve signs by election (TIES).",
        "adapters.combine('both', {'a': 1, 'b': 1}, method='ties', density=0.5)",
    ),
    "the same directions": (
        {"p": CROWDED},
        {"p": in_columns(0, normal(6, 6, seed=1))},
        "With loss: they use the same directions for different things. Keep them apart, or try tsv first.",
        "adapters.combine('both', {'a': 1, 'b': 1}, method='tsv')",
    ),
    "a few of the same directions": (
        {"p": CROWDED},
        {"p": ak.Factors(torch.cat([FAR.up, NEAR.up], 1), torch.cat([FAR.down, NEAR.down]))},
        "With some loss: they use some of the same directions for different things. Start with tsv.",
        "adapters.combine('both', {'a': 1, 'b': 1}, method='tsv')",
    ),
}


@pytest.mark.parametrize(("first", "second", "headline", "call"), MERGES.values(), ids=MERGES.keys())
def test_whether_two_adapters_can_be_merged(
    first: Mapping[str, ak.Factors], second: Mapping[str, ak.Factors], headline: str, call: str
) -> None:
    verdict = found(source("a", first), source("b", second))[-1]
    assert (verdict.headline, verdict.call) == (headline, call)


def test_a_much_larger_adapter_and_another_base_are_named() -> None:
    small = low_rank(8, 6, 2)
    verdict = merging(small, low_rank(8, 6, 2, seed=3)._replace(up=-10 * small.up))
    assert any(r.startswith("b is ") and "times as large as a: test a first." in r for r in verdict.reasons)
    configs = [ak.config("lora", target_modules=["p"], base_model_name_or_path=n) for n in ("org/one", "org/two")]
    sources = [source(n, {"p": small}, config=c) for n, c in zip("ab", configs, strict=True)]
    assert "Their configs name different bases: org/one and org/two." in found(*sources)[-1].reasons


@pytest.mark.parametrize("weight", [0.5, 1.0, 3.0])
def test_the_weight_for_adapters_that_agree_keeps_neither_larger_than_it_was(weight: float) -> None:
    """At weight w a change along `f` is `w (1 + <f, g> / |f|^2)` times what it was."""
    change = low_rank(8, 6, 3)
    verdict = merging(change, change._replace(up=weight * change.up))
    used = float(verdict.call.split("'a': ")[1].split(",")[0])
    along = 1 + max(weight, 1 / weight)
    assert used * along == pytest.approx(1.0, abs=0.05 * along)
    assert math.isfinite(used)


def test_a_report_prints_its_verdicts() -> None:
    report = Report.of([source("a", stack(3)), source("b", stack(3, seed=5))])
    for verdict in report.verdicts:
        assert verdict.headline in str(report)
        assert escape(verdict.rule).replace("&#x27;", "&#39;") in report.html
    assert repr(report) == "<Report on 'a', 'b': print it to see its verdicts, or save(path)>"
