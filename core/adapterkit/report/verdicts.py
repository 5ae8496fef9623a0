"""What a report concludes from its numbers: each verdict in plain words, with the rule behind it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from adapterkit.report.heatmaps import Places, number, percent
from adapterkit.report.measuring import AdapterFinding, Findings, PairFinding
from adapterkit.results import counted, in_lines

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
_MEASURED = "Only changes of the form dW = up @ down are measured."
_RANK_RULE = (
    f"Rank: the smallest that keeps 99 % of the squared singular values in {100 * TARGETS_SERVED:.0f} % of the "
    "targets. The part that is cut off is then at most 10 % of a change in the Frobenius norm (the square root of "
    "1 %), and 32 % for 90 %; no other matrix of that rank comes closer (Eckart and Young 1936). In a trial "
    "(examples/disturbance.py) adapters cut to 99 % gave the same answers as before."
)
_MERGE_RULE = (
    "Merging: decided by the disturbance, what one adapter adds in the other's directions (90 % of the energy), "
    f"relative to the other's size. Below {100 * UNDISTURBED:.0f} % a plain sum is enough. In a trial with LoRA "
    "adapters on MiniLM (examples/disturbance.py), sums of unrelated adapters below that kept 95 % of an adapter's "
    f"accuracy or more, those up to {100 * DISTURBED:.0f} % kept 84 to 99 %, those above it at most 85 %. Above the "
    "first value the direction decides. If what is added lies along the other's change (within 45°), they agree: "
    "adapters of one task kept 86 % or more at any disturbance. If it lies against it, they lost up to 56 %. Across "
    "it, tsv turns the directions apart (Gargiulo et al. 2025). Adapters without a shared target do not affect each "
    "other's weights. The weights show what collides, not what it costs: test every task after a merge."
)


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
    reasons: Sequence[str]
    rule: str
    call: str = ""

    def __str__(self) -> str:
        lines = [f"{' and '.join(self.about)}: {self.headline}", *(f"  {reason}" for reason in self.reasons)]
        return in_lines([*lines, f"  {self.call}"] if self.call else lines)


def verdicts(findings: Findings, places: Places) -> list[Verdict]:
    """Which layers matter and which rank is enough, for each adapter; for each pair, whether to merge it."""
    found: list[Verdict] = []
    for adapter in findings.adapters:
        found += [which_layers(adapter, places), which_rank(adapter)] if adapter.norm else [nothing_measured(adapter)]
    adapters = findings.adapters
    return found + [whether_to_merge(adapters[i], adapters[j], pair) for (i, j), pair in findings.pairs.items()]


def nothing_measured(adapter: AdapterFinding) -> Verdict:
    """The verdict on an adapter without a change that has a size."""
    formless, zero = (
        counted(len(paths), "target") if paths else "" for paths in (adapter.without_factors, adapter.layers)
    )
    reasons = []
    if formless:
        reasons.append(f"The method {adapter.config.method!r} has no low-rank form of its change at {formless}.")
    if zero:
        reasons.append(f"The change is zero at {zero}: the adapter was not trained there.")
    if not (formless or zero):
        reasons.append("It has no layers: all that it does is in the model's call.")
    headline = "It changes nothing." if zero and not formless else "Its changes cannot be measured."
    return Verdict(LAYERS, (adapter.name,), headline, reasons, _MEASURED)


def which_layers(adapter: AdapterFinding, places: Places) -> Verdict:
    """How concentrated the change is, and where."""
    squares = {path: size**2 for path, size in adapter.sizes().items()}
    ranked = sorted(squares, key=squares.__getitem__, reverse=True)
    targets = counted(len(ranked), "target")
    total, half, so_far = sum(squares.values()), 0, 0.0
    while so_far < 0.5 * total * (1 - 1e-12):
        so_far += squares[ranked[half]]
        half += 1
    largest = []
    for path in ranked[:3]:
        layer = adapter.layers[path]
        size = f"{percent(layer.relative or 0.0)} %" if adapter.has_base else f"{layer.norm:.3g}"
        largest.append(f"{' '.join(filter(None, places[path]))} ({size})")
    reasons = [f"Largest: {', '.join(largest)}."]
    for at, what in enumerate(("layer", "module")):
        shares: dict[str, float] = {}
        for path, square in squares.items():
            place = places[path][at] or "single layers"
            shares[place] = shares.get(place, 0.0) + square / total
        if len(shares) > 2:
            most = sorted(shares, key=lambda place: -shares[place])[:3]
            reasons.append(f"By {what}: {', '.join(f'{place} {100 * shares[place]:.0f} %' for place in most)}.")
    return Verdict(
        LAYERS,
        (adapter.name,),
        f"Half of the change is in {half} of {targets} ({math.ceil(len(ranked) / 2)} if all were alike).",
        reasons,
        f"Layers: targets are compared by squared size ({'|dW|/|W|' if adapter.has_base else '|dW|'}, Frobenius "
        "norms), because squared sizes add up. A large change shows where training acted. To adapt fewer layers, keep "
        "those in strong colour in the heat map and test what that costs.",
    )


def which_rank(adapter: AdapterFinding) -> Verdict:
    """The rank that is enough for nearly all targets, and what cutting to it saves."""
    layers = [layer for layer in adapter.layers.values() if layer.norm]
    enough = math.ceil(TARGETS_SERVED * len(layers)) - 1
    needed90 = sorted(layer.rank_90 for layer in layers)[enough]
    needed99 = sorted(layer.rank_99 for layer in layers)[enough]
    served = sum(layer.rank_99 <= needed99 for layer in layers)
    trained = max(layer.rank for layer in layers)
    used = sum(layer.effective_rank for layer in layers) / len(layers)
    own = adapter.in_layers
    cut = sum(max(layer.rank_99, 1) * sum(layer.shape) for layer in adapter.layers.values())
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
    headline = (
        f"Rank {needed99} keeps 99 % of the energy in {100 * served / len(layers):.0f} % of the targets "
        f"({served} of {len(layers)})."
    )
    call = f"adapters.convert({adapter.name!r}, to='lora', name={adapter.name + '-cut'!r}, energy=0.99)"
    return Verdict(RANK, (adapter.name,), headline, reasons, _RANK_RULE, call if saves else "")


def whether_to_merge(first: AdapterFinding, second: AdapterFinding, found: PairFinding) -> Verdict:
    """Whether two adapters can become one, and which method to try first."""
    shared = len(first.kinds.keys() & second.kinds.keys())
    share = f"They share {counted(shared, 'target')}"
    still = [adapter.name for adapter in (first, second) if not adapter.norm]
    call = ""
    if found.other_shape:
        headline = "No: they are adapters of models of different sizes."
        reasons = [f"{counted(len(found.other_shape), 'target')} with two shapes, the first {found.other_shape[0]}."]
    elif not shared:
        headline = "Yes, without loss: they change different layers."
        reasons = ["They share no target, so their sum leaves both as they are."]
        call = _call(first, second)
    elif still:
        headline = "The weights do not tell."
        reasons = [f"{share}, but no change of {' or '.join(still)} can be measured."]
    elif not found.layers:
        headline = "The weights do not tell."
        reasons = [f"{share}, but at none of them can both changes be measured."]
    else:
        headline, call = _decide(first, second, found)
        reasons = _compare(first, second, found)
    bases = {a.config.base_model_name_or_path for a in (first, second)}
    if len(bases) > 1 and None not in bases:
        reasons.append(f"Their configs name different bases: {' and '.join(sorted(filter(None, bases)))}.")
    return Verdict(MERGE, (first.name, second.name), headline, reasons, _MERGE_RULE, call)


def _along(found: PairFinding) -> tuple[float, float]:
    """What the other adds along the very change of each, relative to it: `<f, g> / |f|^2`, and back."""
    return found.inner / found.norms[0] ** 2, found.inner / found.norms[1] ** 2


def _decide(first: AdapterFinding, second: AdapterFinding, found: PairFinding) -> tuple[str, str]:
    """Headline and call for two adapters that share targets."""
    worst = max(found.inside)
    along = _along(found)[found.inside.index(worst)]
    if worst < UNDISTURBED:
        return "Yes: they hardly interact. Start with a plain sum, weights 1.", _call(first, second)
    if along >= MOSTLY * worst:
        weight = round(1 / (1 + max(_along(found))), 1)
        headline = "Yes: they agree in the directions that they share. Start with a plain sum of weights near"
        return f"{headline} {weight}.", _call(first, second, weight=weight)
    if along <= -MOSTLY * worst:
        headline = "Rather not: they undo each other. Keep them apart, or resolve signs by election (TIES)."
        return headline, _call(first, second, ", method='ties', density=0.5")
    headline = "With loss: they use the same directions for different things. Keep them apart, or try tsv first."
    if worst < DISTURBED:
        headline = "With some loss: they use some of the same directions for different things. Start with tsv."
    return headline, _call(first, second, ", method='tsv'")


def _compare(first: AdapterFinding, second: AdapterFinding, found: PairFinding) -> list[str]:
    """The numbers behind the decision."""
    at = found.inside.index(max(found.inside))
    victim, other = ((first, second), (second, first))[at]
    along = _along(found)[at]
    reasons = [
        f"In the directions that {victim.name} uses, {other.name} adds {percent(max(found.inside))} % of "
        f"{victim.name}'s size ({percent(abs(along))} % {'along' if along >= 0 else 'against'} its change); in the "
        f"other direction it is {percent(min(found.inside))} %.",
        f"Cosine {number(found.cosine)}. Shared output directions {number(found.columns.similarity)}, input directions "
        f"{number(found.rows.similarity)}; random adapters share {number(found.columns.chance)} and "
        f"{number(found.rows.chance)}.",
        f"Signs differ in {percent(found.opposed)} % of the entries (50 % is chance).",
    ]
    small, large = sorted((first, second), key=lambda adapter: adapter.norm)
    if large.norm > 2 * small.norm:
        times = large.norm / small.norm
        reasons.append(f"{large.name} is {times:.1f} times as large as {small.name}: test {small.name} first.")
    return reasons


def _call(first: AdapterFinding, second: AdapterFinding, method: str = "", weight: float = 1.0) -> str:
    """The call of `combine`, or nothing if a method has no low-rank form, which `combine` needs."""
    if first.without_factors or second.without_factors:
        return ""
    heads = ", heads=…" if first.heads or second.heads else ""
    return f"adapters.combine('both', {{{first.name!r}: {weight:g}, {second.name!r}: {weight:g}}}{method}{heads})"
