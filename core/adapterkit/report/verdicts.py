"""What a report concludes from its numbers: each verdict in plain words, with the rule behind it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from adapterkit.report.heatmaps import Grid, number, percent
from adapterkit.report.measuring import AdapterFinding, Findings, PairFinding

# The share of the targets for which a rank must be enough: a few hard targets should not set the rank of all.
TARGETS_SERVED = 0.95
# A disturbance below the first value costs an adapter little, above the second much. Measured by
# examples/disturbance.py with three LoRA adapters of two tasks on MiniLM and one of random directions, in two runs.
# Sums of unrelated adapters below 0.02 kept 95 % of an adapter's accuracy or more, those from 0.02 to 0.05 84 % to
# 99 %, those above 85 % or less. Two adapters of one task, which agree, kept 86 % or more at any disturbance up to 1.2,
# and lost up to 56 % when one was subtracted from the other.
UNDISTURBED, DISTURBED = 0.02, 0.05
# An angle of 45 degrees: more of what the other adds lies along the adapter's own change than across it.
MOSTLY = math.sqrt(0.5)

LAYERS, RANK, MERGE = "Which layers matter", "Which rank is enough", "Can they be merged"


@dataclass(frozen=True)
class Verdict:
    """One answer.

    Attributes:
        question: the question that it answers.
        about: the adapters that it is about.
        headline: the answer in a sentence.
        reasons: the numbers behind it, and what to do.
        rule: how the answer follows from the numbers.
        call: the line of Python that does what the answer suggests, or `""`.
    """

    question: str
    about: tuple[str, ...]
    headline: str
    reasons: tuple[str, ...]
    rule: str
    call: str = ""

    def __str__(self) -> str:
        lines = [f"{' and '.join(self.about)}: {self.headline}", *(f"  {reason}" for reason in self.reasons)]
        return "\n".join([*lines, f"  {self.call}"] if self.call else lines)


def verdicts(findings: Findings, grid: Grid) -> list[Verdict]:
    """Which layers matter and which rank is enough, for each adapter; for each pair, whether to merge it."""
    found: list[Verdict] = []
    for adapter in findings.adapters:
        found += [which_layers(adapter, grid), which_rank(adapter)] if adapter.norm else [nothing_measured(adapter)]
    return found + [whether_to_merge(findings, pair) for pair in findings.pairs]


def nothing_measured(adapter: AdapterFinding) -> Verdict:
    """The verdict on an adapter without a change that has a size."""
    formless = len(adapter.without_factors)
    reasons = []
    if formless:
        method = adapter.source.config.method
        reasons.append(f"The method {method!r} has no low-rank form of its change at {count(formless)}.")
    if adapter.layers:
        reasons.append(f"The change is zero at {count(len(adapter.layers))}: the adapter was not trained there.")
    return Verdict(
        LAYERS,
        (adapter.name,),
        "Its changes cannot be measured." if formless else "It changes nothing.",
        tuple(reasons),
        "Only changes of the form dW = up @ down are measured.",
    )


def which_layers(adapter: AdapterFinding, grid: Grid) -> Verdict:
    """How concentrated the change is, and where."""
    squares = {path: size**2 for path, size in adapter.sizes().items()}
    ranked = sorted(squares, key=squares.__getitem__, reverse=True)
    half = _count(squares, ranked, 0.5)
    idle = len(ranked) - _count(squares, ranked, 0.99)

    def named(path: str) -> str:
        layer, (row, column) = adapter.layers[path], grid.places[path]
        size = f"{percent(layer.relative or 0.0)} %" if adapter.has_base else f"{layer.norm:.3g}"
        return f"{' '.join(filter(None, (grid.label(row), column)))} ({size})"

    reasons = [f"Largest: {', '.join(map(named, ranked[:3]))}."]
    for what, at in (("layer", 0), ("module", 1)):
        shares: dict[str, float] = {}
        for path, square in squares.items():
            place = grid.places[path][at]
            shares[place] = shares.get(place, 0.0) + square / sum(squares.values())
        if len(shares) > 2:
            most = sorted(shares, key=lambda place: -shares[place])[:3]
            listed = (f"{grid.label(p) if at == 0 else p or 'single layers'} {100 * shares[p]:.0f} %" for p in most)
            reasons.append(f"By {what}: {', '.join(listed)}.")
    if idle:
        reasons.append(f"The {count(idle)} with the smallest change hold{'s' * (idle == 1)} 1 % of it.")
    return Verdict(
        LAYERS,
        (adapter.name,),
        f"Half of the change is in {half} of {count(len(ranked))} ({math.ceil(len(ranked) / 2)} if all were alike).",
        tuple(reasons),
        f"Layers: targets are compared by squared size ({'|dW|/|W|' if adapter.has_base else '|dW|'}, Frobenius "
        "norms), because squared sizes add up. A large change shows where training acted. To adapt fewer layers, keep "
        "those in strong colour in the heat map and test what that costs.",
    )


def which_rank(adapter: AdapterFinding) -> Verdict:
    """The rank that is enough for nearly all targets, and what cutting to it saves."""
    layers = [layer for layer in adapter.layers.values() if layer.norm]
    trained = max(layer.rank for layer in layers)
    needed90, needed99 = (_enough([getattr(x, rank) for x in layers]) for rank in ("rank90", "rank99"))
    served = sum(layer.rank99 <= needed99 for layer in layers)
    used = sum(layer.effective_rank for layer in layers) / len(layers)
    own = adapter.source.in_layers
    cut = sum(max(x.rank99, 1) * sum(x.shape) for x in adapter.layers.values())
    saves = cut < own and not adapter.without_factors
    reasons = [
        f"Rank {needed90} keeps 90 %. The factors have rank {trained}; the effective rank is {used:.1f} on average."
    ]
    if saves:
        reasons.append(
            f"As LoRA with each target cut to its own rank for 99 %, the adapter has {cut:,} parameters instead of "
            f"{own:,} ({100 - 100 * cut / own:.0f} % fewer), and the error of each change is at most 10 % of its norm."
        )
    elif cut > own:
        reasons.append(
            f"Cutting saves nothing: as LoRA with each target cut to its own rank for 99 %, the adapter would have "
            f"{cut:,} parameters instead of {own:,}."
        )
    if needed99 < trained:
        reasons.append(f"If you train again with LoRA, rank {needed99} is enough.")
    else:
        reasons.append("Some targets use all of their rank: a larger rank may be worth a try there.")
    return Verdict(
        RANK,
        (adapter.name,),
        f"Rank {needed99} keeps 99 % of the energy in {100 * served / len(layers):.0f} % of the targets "
        f"({served} of {len(layers)}).",
        tuple(reasons),
        f"Rank: the smallest that keeps 99 % of the squared singular values in {100 * TARGETS_SERVED:.0f} % of the "
        "targets. The part that is cut off is then at most 10 % of a change in the Frobenius norm (the square root of "
        "1 %), and 32 % for 90 %; no other matrix of that rank comes closer (Eckart and Young 1936). In a trial "
        "(examples/disturbance.py) adapters cut to 99 % gave the same answers as before.",
        f"adapters.convert({adapter.name!r}, to='lora', name={adapter.name + '-cut'!r}, energy=0.99)" if saves else "",
    )


def whether_to_merge(findings: Findings, pair: tuple[int, int]) -> Verdict:
    """Whether two adapters can become one, and which method to try first."""
    first, second = (findings.adapters[i] for i in pair)
    found = findings.pairs[pair]
    shared = first.source.kinds.keys() & second.source.kinds.keys()
    still = [adapter.name for adapter in (first, second) if not adapter.norm]
    call, rule = "", "Merging: changes are compared where both adapters have a low-rank change that is not zero."
    if found.other_shape:
        headline = "No: they are adapters of models of different sizes."
        reasons = [f"{count(len(found.other_shape))} with two shapes, the first {found.other_shape[0]}."]
        rule = "Merging: a sum needs changes of one shape."
    elif not shared:
        headline = "Yes, without loss: they change different layers."
        reasons = ["They share no target, so their sum leaves both as they are."]
        rule = "Merging: adapters without a shared target do not affect each other's weights."
        call = _call(first, second, "")
    elif still or not found.layers:
        headline = "The weights do not tell."
        if still:
            reasons = [f"They share {count(len(shared))}, but no change of {' or '.join(still)} can be measured."]
        else:
            reasons = [f"They share {count(len(shared))}, but at none of them can both changes be measured."]
    else:
        headline, reasons, call = _compare(first, second, found)
        rule = _RULE
    bases = {a.source.config.base_model_name_or_path for a in (first, second)}
    if len(bases) > 1 and None not in bases:
        reasons.append(f"Their configs name different bases: {' and '.join(sorted(filter(None, bases)))}.")
    return Verdict(MERGE, (first.name, second.name), headline, tuple(reasons), rule, call)


def _compare(first: AdapterFinding, second: AdapterFinding, found: PairFinding) -> tuple[str, list[str], str]:
    """Headline, reasons and call for two adapters that share targets."""
    # What the other adds along the very change of each, relative to it: <f, g> / |f|^2.
    along_each = [found.inner / norm**2 for norm in found.norms]
    worst = max(found.inside)
    at = found.inside.index(worst)
    victim, other = ((first, second), (second, first))[at]
    along = along_each[at]
    if worst < UNDISTURBED:
        headline = "Yes: they hardly interact. Start with a plain sum, weights 1."
        call = _call(first, second, "")
    elif along >= MOSTLY * worst:
        weight = round(1 / (1 + max(along_each)), 1)
        headline = (
            f"Yes: they agree in the directions that they share. Start with a plain sum of weights near {weight}."
        )
        call = _call(first, second, "", weight)
    elif along <= -MOSTLY * worst:
        headline = "Rather not: they undo each other. Keep them apart, or resolve signs by election (TIES)."
        call = _call(first, second, ", method='ties', density=0.5")
    elif worst < DISTURBED:
        headline = "With some loss: they use some of the same directions for different things. Start with tsv."
        call = _call(first, second, ", method='tsv'")
    else:
        headline = "With loss: they use the same directions for different things. Keep them apart, or try tsv first."
        call = _call(first, second, ", method='tsv'")
    reasons = [
        f"In the directions that {victim.name} uses, {other.name} adds {percent(worst)} % of {victim.name}'s size "
        f"({percent(abs(along))} % {'along' if along >= 0 else 'against'} its change); in the other direction it is "
        f"{percent(min(found.inside))} %.",
        f"Cosine {number(found.cosine)}. Shared output directions {number(found.columns.similarity)}, input directions "
        f"{number(found.rows.similarity)}; random adapters share {number(found.columns.chance)} and "
        f"{number(found.rows.chance)}.",
        f"Signs differ in {percent(found.signs.share)} % of the entries (50 % is chance). TIES would drop "
        f"{percent(found.signs.weighted)} % of the magnitude.",
    ]
    ratio = first.norm / second.norm
    if not 0.5 <= ratio <= 2:
        large, small = (first, second) if ratio > 1 else (second, first)
        times = max(ratio, 1 / ratio)
        reasons.append(f"{large.name} is {times:.1f} times as large as {small.name}: test {small.name} first.")
    return headline, reasons, call


_RULE = (
    "Merging: decided by the disturbance, what one adapter adds in the other's directions (90 % of the energy), "
    f"relative to the other's size. Below {100 * UNDISTURBED:.0f} % a plain sum is enough. In a trial with LoRA "
    "adapters on MiniLM (examples/disturbance.py), sums of unrelated adapters below that kept 95 % of an adapter's "
    f"accuracy or more, those up to {100 * DISTURBED:.0f} % kept 84 to 99 %, those above it at most 85 %. Above the "
    "first value the direction decides. If what is added lies along the other's change (within 45°), they agree: "
    "adapters of one task kept 86 % or more at any disturbance. If it lies against it, they lost up to 56 %. Across "
    "it, tsv turns the directions apart (Gargiulo et al. 2025). The weights show what collides, not what it costs: "
    "test every task after a merge."
)


def _call(first: AdapterFinding, second: AdapterFinding, method: str, weight: float = 1.0) -> str:
    """The call of `combine`, or nothing if a method has no low-rank form, which `combine` needs."""
    if first.without_factors or second.without_factors:
        return ""
    heads = ", heads=…" if first.source.heads or second.source.heads else ""
    return f"adapters.combine('both', {{{first.name!r}: {weight:g}, {second.name!r}: {weight:g}}}{method}{heads})"


def _count(squares: Mapping[str, float], ranked: Sequence[str], share: float) -> int:
    """How many of the largest hold this share of the sum."""
    so_far, total = 0.0, sum(squares.values())
    for i, path in enumerate(ranked):
        so_far += squares[path]
        if so_far >= share * total * (1 - 1e-12):
            return i + 1
    return len(ranked)


def _enough(ranks: Sequence[int]) -> int:
    """The smallest rank that is enough for `TARGETS_SERVED` of them."""
    return sorted(ranks)[math.ceil(TARGETS_SERVED * len(ranks)) - 1]


def count(number: int, what: str = "target") -> str:
    """`1 target`, `2 targets`."""
    return f"{number} {what}" + "s" * (number != 1)
