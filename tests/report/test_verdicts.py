"""What a report concludes, from adapters that were made so that the answer is known."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from tests.report.sources import low_rank, normal, source, stack
from torch import Tensor

import adapterkit as ak
from adapterkit.report import Report
from adapterkit.report.heatmaps import Grid
from adapterkit.report.measuring import measure
from adapterkit.report.sources import Source
from adapterkit.report.verdicts import Verdict, verdicts


def found(*sources: Source) -> list[Verdict]:
    findings = measure(sources)
    return verdicts(findings, Grid.of(findings.paths))


def of_spectrum(values: list[float], out: int = 12, inside: int = 10, seed: int = 0) -> ak.Factors:
    u, v = (torch.linalg.qr(normal(n, len(values), seed=seed + n)).Q for n in (out, inside))
    return ak.Factors(u * torch.tensor(values, dtype=torch.float64), v.t())


def in_columns(start: int, change: Tensor) -> ak.Factors:
    """A change whose outputs and inputs are the coordinates from `start` on."""
    up, down = torch.zeros(40, change.shape[0]), torch.zeros(change.shape[1], 40)
    up[start : start + change.shape[0]] = torch.eye(change.shape[0])
    down[:, start : start + change.shape[1]] = torch.eye(change.shape[1])
    return ak.Factors(up.double() @ change, down.double())


def merging(f: ak.Factors, g: ak.Factors) -> Verdict:
    return found(source("a", {"p": f}), source("b", {"p": g}))[-1]


def layer_parameters(adapters: ak.Adapters) -> Callable[[str], list[Tensor]]:
    """The parameters of an adapter that are not its head's."""
    return lambda name: [p for key, p in adapters.named_parameters(name) if "classifier" not in key]


def test_a_change_in_one_layer_is_found_there() -> None:
    changes = stack(10, ("q",))
    changes["model.layers.7.q"] = changes["model.layers.7.q"]._replace(up=100 * changes["model.layers.7.q"].up)
    layers = found(source("a", changes))[0]
    assert layers.headline.startswith("Half of the change is in 1 of 10 targets (5 if all were alike)")
    assert "Largest: layers.7 q" in layers.reasons[0]
    assert any(r.startswith("By layer: layers.7 100 %") for r in layers.reasons)
    assert any("The 9 targets with the smallest change hold 1 %" in r for r in layers.reasons)


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


def test_the_call_for_the_rank_does_what_the_verdict_says() -> None:
    from tests.combining import adapted
    from tests.models import build

    adapters = adapted(build("bert"), {"a": {"r": 8}}, ["query", "value"])
    rank = adapters.report().verdicts[1]
    assert rank.call
    eval(rank.call, {"adapters": adapters})
    kept = adapters.report("a-cut").findings.adapters[0]
    whole = adapters.report("a").findings.adapters[0]
    assert {p: x.rank for p, x in kept.layers.items()} == {p: x.rank99 for p, x in whole.layers.items()}
    size = sum(x.rank * sum(x.shape) for x in kept.layers.values())
    assert any(f"{size:,} parameters instead of" in r for r in rank.reasons)


@pytest.mark.parametrize(
    ("method", "fields", "saves"),
    [("lora", {"r": 8}, True), ("vera", {"r": 8}, False), ("loha", {"r": 3}, False)],
)
def test_a_conversion_that_makes_the_adapter_larger_is_not_a_saving(
    method: str, fields: dict[str, int], saves: bool
) -> None:
    """A VeRA adapter trains two vectors a layer, and LoHa factors of rank r give a change of rank r * r."""
    from tests.combining import randomise
    from tests.models import build

    adapters = ak.attach(build("bert"))
    torch.manual_seed(0)
    adapters.add("a", ak.config(method, target_modules=["query"], **fields), num_labels=3)
    randomise(adapters, "a", 0)
    rank = adapters.report().verdicts[1]
    adapters.convert("a", to="lora", name="cut", energy=0.99)
    sizes = [sum(layer.numel() for layer in layers) for layers in map(layer_parameters(adapters), ("a", "cut"))]
    assert (sizes[1] < sizes[0]) == saves
    assert bool(rank.call) == saves
    assert any(f"{sizes[1]:,} parameters instead of {sizes[0]:,}" in reason for reason in rank.reasons)
    assert any(reason.startswith("Cutting saves nothing") for reason in rank.reasons) != saves


def test_a_method_without_a_low_rank_form_is_named() -> None:
    """Its targets are counted, no number is printed for them, and no call is suggested that would fail."""
    from tests.combining import scaling_method
    from tests.models import build

    plugin = scaling_method(mergeable=True)
    ak.register(plugin)
    try:
        adapters = ak.attach(build("bert"))
        adapters.add("p", plugin.config(target_modules=["query"], modules_to_save=None))
        adapters.add("l", ak.config("lora", target_modules=["value"], modules_to_save=None))
        alone, _, both = adapters.report().verdicts
    finally:
        ak.default_registry.unregister("scale")
    assert str(alone) == (
        "p: Its changes cannot be measured.\n  The method 'scale' has no low-rank form of its change at 2 targets."
    )
    assert (both.headline, both.call) == ("Yes, without loss: they change different layers.", "")


def test_an_adapter_that_uses_all_its_rank_is_told_so() -> None:
    rank = found(source("a", {"layers.0.q": of_spectrum([1.0] * 4), "layers.1.q": of_spectrum([1.0] * 4)}))[1]
    assert "Some targets use all of their rank" in rank.reasons[-1]
    assert not rank.call


def test_an_adapter_that_was_not_trained_changes_nothing() -> None:
    (verdict,) = found(source("a", {"p": low_rank(4, 3, 2)._replace(up=torch.zeros(4, 2).double())}))
    assert verdict.headline == "It changes nothing."
    assert verdict.reasons == ("The change is zero at 1 target: the adapter was not trained there.",)


def test_there_is_no_verdict_on_merging_what_cannot_be_measured() -> None:
    zeros, change = of_spectrum([0.0, 0.0]), of_spectrum([2.0, 1.0])
    for first, second, name in ((change, zeros, "b"), (zeros, change, "a"), (zeros, zeros, "a or b")):
        found_ = merging(first, second)
        assert found_.headline == "The weights do not tell."
        assert found_.reasons == (f"They share 1 target, but no change of {name} can be measured.",)
    formless = dataclasses.replace(
        source("b", {"p": change, "q": change}), factors=lambda p: change if p == "q" else None
    )
    verdict = found(source("a", {"p": change}), formless)[-1]
    assert verdict.reasons == ("They share 1 target, but at none of them can both changes be measured.",)
    assert verdict.call == ""


def test_a_change_that_overflows_is_refused() -> None:
    huge = ak.Factors(torch.full((4, 1), 1e30), torch.full((1, 4), 1e30))
    with pytest.raises(ak.StateError, match=r"Adapter 'a' has a change at 'p' that is too large for torch.float32"):
        found(source("a", {"p": huge}))


def test_adapters_of_other_layers_are_merged_without_loss() -> None:
    verdict = found(source("a", {"p": low_rank(4, 3, 2)}), source("b", {"q": low_rank(4, 3, 2)}))[-1]
    assert verdict.headline == "Yes, without loss: they change different layers."
    assert verdict.call == "adapters.combine('both', {'a': 1, 'b': 1})"


def test_adapters_of_models_of_two_sizes_are_not_merged() -> None:
    verdict = found(source("a", {"p": low_rank(4, 3, 2)}), source("b", {"p": low_rank(5, 3, 2)}))[-1]
    assert verdict.headline == "No: they are adapters of models of different sizes."


def test_adapters_that_do_not_meet_are_summed() -> None:
    verdict = merging(in_columns(0, normal(4, 4)), in_columns(20, normal(4, 4, seed=1)))
    assert verdict.headline == "Yes: they hardly interact. Start with a plain sum, weights 1."


def test_adapters_that_agree_are_averaged() -> None:
    """Twice the same change: weights of a half give it back."""
    change = low_rank(8, 6, 3)
    verdict = merging(change, change)
    assert verdict.headline.startswith("Yes: they agree in the directions that they share.")
    assert verdict.call == "adapters.combine('both', {'a': 0.5, 'b': 0.5})"


def test_adapters_that_oppose_each_other_are_kept_apart() -> None:
    change = low_rank(8, 6, 3)
    verdict = merging(change, change._replace(up=-0.8 * change.up))
    assert verdict.headline.startswith("Rather not: they undo each other.")
    assert "method='ties', density=" in verdict.call
    assert any("Signs differ in 100 % of the entries" in r for r in verdict.reasons)


def test_adapters_of_the_same_directions_for_other_things_start_with_tsv() -> None:
    verdict = merging(in_columns(0, normal(6, 6)), in_columns(0, normal(6, 6, seed=1)))
    assert verdict.headline.startswith("With loss: they use the same directions for different things.")
    assert "method='tsv'" in verdict.call


def test_a_little_in_the_same_directions_costs_a_little() -> None:
    far = in_columns(20, 5 * normal(6, 6, seed=1))
    near = in_columns(0, 0.05 * normal(6, 6, seed=2))
    both = ak.Factors(torch.cat([far.up, near.up], 1), torch.cat([far.down, near.down]))
    first = in_columns(0, normal(6, 6))
    whole = measure([source("a", {"p": first}), source("b", {"p": both})]).pairs[0, 1]
    assert 0.02 <= max(whole.inside) < 0.05
    assert merging(first, both).headline.startswith("With some loss")


def test_a_much_larger_adapter_is_named() -> None:
    small = low_rank(8, 6, 2)
    verdict = merging(small, low_rank(8, 6, 2, seed=3)._replace(up=10 * low_rank(8, 6, 2, seed=3).up))
    assert any(r.startswith("b is ") and "times as large as a: test a first." in r for r in verdict.reasons)


def test_bases_of_two_names_are_told() -> None:
    configs = [ak.config("lora", target_modules=["p"], base_model_name_or_path=n) for n in ("org/one", "org/two")]
    sources = [source(n, {"p": low_rank(4, 3, 2)}, config=c) for n, c in zip("ab", configs, strict=True)]
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
        assert verdict.rule in report.html or "&#" in report.html
    assert repr(report) == "<Report on 'a', 'b': print it to see its verdicts, or save(path)>"
