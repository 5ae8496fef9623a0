"""Verdicts: what a report's numbers amount to, in plain words, each with its rule."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from adapterkit.report.findings import AdapterFinding, Findings, PairFinding
from adapterkit.report.grid import Grid
from adapterkit.report.heat import number, percent

# The share of the targets that a rank has to serve; a few hard ones should not set the rank of all.
TARGETS_SERVED = 0.95
# A disturbance below the first costs an adapter little, above the second much. Measured by examples/disturbance.py with
# three LoRA adapters of two tasks on MiniLM and one of random directions, in two runs: sums of unrelated adapters
# below 0.02 kept 95 % of an adapter's accuracy or more, those from 0.02 to 0.05 84 % to 99 %, those above 85 % or less.
# Two adapters of one task, which agree, kept 86 % or more at any disturbance up to 1.2, and lost up to 56 % subtracted.
UNDISTURBED, DISTURBED = 0.02, 0.05
MERGE = "Can they be merged"
# An angle of 45 degrees: more of what the other adds lies along the adapter's own change than across it.
MOSTLY = math.sqrt(0.5)


@dataclass(frozen=True)
class Verdict:
    """One answer.

    Attributes:
        question: what it answers.
        about: the adapters that it is about.
        headline: the answer in a sentence.
        reasons: the numbers behind it, and what to do.
        rule: how it was come to.
        call: the line of Python that does it, or none.
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
    """Which layers matter and which rank is enough, for each adapter; for each pair, whether it can be merged."""
    found: list[Verdict] = []
    for adapter in findings.adapters:
        if any(layer.norm for layer in adapter.layers.values()):
            found += [which_layers(adapter, grid), which_rank(adapter)]
        else:
            found.append(_nothing(adapter.name))
    return found + [whether_to_merge(findings, pair) for pair in findings.pairs]


def _nothing(name: str) -> Verdict:
    return Verdict(
        "Which layers matter",
        (name,),
        "None: it changes no weight that could be measured.",
        ("Every delta is zero (it was not trained), or its method has no low-rank form.",),
        "Only changes of the form dW = up @ down are measured.",
    )


def sizes(adapter: AdapterFinding) -> dict[str, float]:
    """Each target's size: `|dW| / |W|` where the base's weights are known, else `|dW|`."""
    return {path: (layer.relative or 0.0) if adapter.has_base else layer.norm for path, layer in adapter.layers.items()}


def which_layers(adapter: AdapterFinding, grid: Grid) -> Verdict:
    """How concentrated the change is, and where."""
    squares = {path: size**2 for path, size in sizes(adapter).items()}
    ranked = sorted(squares, key=squares.__getitem__, reverse=True)
    half, most = _count(squares, ranked, 0.5), _count(squares, ranked, 0.99)
    count, idle = len(ranked), len(ranked) - most
    reasons = [f"Largest: {', '.join(_with_size(adapter, grid, path) for path in ranked[:3])}."]
    for name, at, label in (("layer", 0, grid.label), ("module", 1, lambda column: column or "single layers")):
        shares = _shares(squares, {path: grid.places[path][at] for path in squares})
        if len(shares) > 2:
            listed = ", ".join(f"{label(key)} {100 * share:.0f} %" for key, share in list(shares.items())[:3])
            reasons.append(f"By {name}: {listed}.")
    if idle:
        reasons.append(f"The {_targets(idle)} that changed least hold{'s' if idle == 1 else ''} 1 % of it.")
    return Verdict(
        "Which layers matter",
        (adapter.name,),
        f"Half of the change is in {half} of {_targets(count)} ({math.ceil(count / 2)} if all were alike).",
        tuple(reasons),
        f"Layers: targets by squared size ({'|dW|/|W|' if adapter.has_base else '|dW|'}, Frobenius norms), which adds "
        "up. A large change is where training acted. To adapt fewer layers, keep those in strong colour in the heat "
        "map and test what that costs.",
    )


def which_rank(adapter: AdapterFinding) -> Verdict:
    """The rank that serves nearly all targets, and what cutting to it saves."""
    layers = [layer for layer in adapter.layers.values() if layer.norm]
    trained = max(layer.rank for layer in layers)
    needed90, needed99 = _serves([x.rank90 for x in layers]), _serves([x.rank99 for x in layers])
    served = sum(layer.rank99 <= needed99 for layer in layers)
    used = sum(layer.effective_rank for layer in layers) / len(layers)
    own, cut = (
        sum(n * sum(x.shape) for x, n in zip(layers, ranks, strict=True))
        for ranks in ([x.rank for x in layers], [x.rank99 for x in layers])
    )
    reasons = [
        f"Rank {needed90} keeps 90 %. The factors have rank {trained}; the effective rank is {used:.1f} on average."
    ]
    if cut < own:
        reasons.append(
            f"Each target cut to its own rank for 99 %: {cut:,} numbers as plain factors, "
            f"{100 - 100 * cut / own:.0f} % fewer than {own:,}; each change is off by at most 10 % of its norm."
        )
    if needed99 < trained:
        reasons.append(f"Trained again, rank {needed99} would do.")
    else:
        reasons.append("Some targets use all of their rank: a larger one may be worth a trial there.")
    return Verdict(
        "Which rank is enough",
        (adapter.name,),
        f"Rank {needed99} keeps 99 % of the energy in {100 * served / len(layers):.0f} % of the targets "
        f"({served} of {len(layers)}).",
        tuple(reasons),
        f"Rank: the smallest that keeps 99 % of the squared singular values in {100 * TARGETS_SERVED:.0f} % of the "
        "targets. What is cut off is then at most 10 % of a change in the Frobenius norm (the square root of 1 %), and "
        "32 % where 90 % are kept; no other matrix of that rank comes closer (Eckart and Young 1936). "
        "In a trial (examples/disturbance.py) adapters cut to 99 % answered as before.",
        f"adapters.convert({adapter.name!r}, to='lora', name={adapter.name + '-cut'!r}, energy=0.99)"
        if cut < own
        else "",
    )


def whether_to_merge(findings: Findings, pair: tuple[int, int]) -> Verdict:
    """Whether two adapters can become one, and by which method to start."""
    first, second = (findings.adapters[i] for i in pair)
    found = findings.pairs[pair]
    about = first.name, second.name
    bases = [a.source.config.base_model_name_or_path for a in (first, second)]
    extra = [f"Their configs name different bases: {bases[0]} and {bases[1]}."] if _differ(bases) else []
    if found.other_shape:
        return Verdict(
            MERGE,
            about,
            "No: they are adapters of models of different sizes.",
            (f"{_targets(len(found.other_shape))} with two shapes, the first {found.other_shape[0]}.", *extra),
            "Merging: a sum needs changes of one shape.",
        )
    shared = first.source.kinds.keys() & second.source.kinds.keys()
    if not shared:
        return Verdict(
            MERGE,
            about,
            "Yes, and the weights lose nothing: they change different layers.",
            ("They share no target, so their sum is both, as they are.", *extra),
            "Merging: adapters without a shared target are added as they are.",
            _call(first, second, "linear"),
        )
    idle = [adapter.name for adapter in (first, second) if not adapter.norm]
    if idle or not found.layers:
        measured = f"{' and '.join(idle)} with no change" if idle else "no target of both with changes"
        return Verdict(
            MERGE,
            about,
            "It cannot be told from the weights.",
            (f"They share {_targets(len(shared))}, and there is {measured} that could be measured.", *extra),
            "Merging: changes of zero, and those of a method without a low-rank form, have nothing to compare.",
        )
    return _of_meeting(first, second, found, extra)


def _of_meeting(first: AdapterFinding, second: AdapterFinding, found: PairFinding, extra: list[str]) -> Verdict:
    """The verdict on two adapters that share targets."""
    inside = found.inside
    worst = max(inside)
    at = inside.index(worst)
    victim, other = ((first, second), (second, first))[at]
    along = _along(found, at)
    if worst < UNDISTURBED:
        headline = "Yes: they hardly meet. Start with a plain sum, weights 1."
        call = _call(first, second, "linear")
    elif along >= MOSTLY * worst:
        share = 1 / (1 + max(_along(found, 0), _along(found, 1)))
        headline = f"Yes: where they meet they agree. Start with a plain sum of weights near {share:.1f}."
        call = _call(first, second, "linear", weight=round(share, 1))
    elif along <= -MOSTLY * worst:
        headline = "Rather not: they undo each other. Keep them apart, or let signs be elected (TIES)."
        call = _call(first, second, "ties")
    elif worst < DISTURBED:
        headline = "With some loss: they use some of the same directions for different things. Start with tsv."
        call = _call(first, second, "tsv")
    else:
        headline = "With loss: they use the same directions for different things. Keep them apart, or try tsv first."
        call = _call(first, second, "tsv")
    reasons = [
        f"In the directions that {victim.name} uses, {other.name} adds {percent(worst)} % of {victim.name}'s size "
        f"({percent(abs(along))} % {'along' if along >= 0 else 'against'} its change); the other way "
        f"{percent(min(inside))} %.",
        f"Cosine {number(found.cosine or 0.0)}. Shared output directions {number(found.columns)}, input directions "
        f"{number(found.rows)}; random ones share {number(found.chance[0])} and {number(found.chance[1])}.",
        f"Signs differ on {percent(found.signs.share)} % of the entries (50 % is chance): "
        f"{percent(found.signs.mass)} % of the magnitude, which TIES would drop.",
    ]
    ratio = first.norm / second.norm
    if not 0.5 <= ratio <= 2:
        large, small = (first, second) if ratio > 1 else (second, first)
        times = max(ratio, 1 / ratio)
        reasons.append(f"{large.name} is {times:.1f} times as large as {small.name}: test {small.name} first.")
    return Verdict(MERGE, (first.name, second.name), headline, (*reasons, *extra), _RULE, call)


_RULE = (
    "Merging: by the disturbance, what one adapter adds inside the other's directions (90 % of the energy), relative "
    f"to the other's size. Below {100 * UNDISTURBED:.0f} % a plain sum. In a trial with LoRA adapters on MiniLM "
    "(examples/disturbance.py), sums of unrelated adapters below that kept 95 % of an adapter's accuracy or more, from "
    f"there to {100 * DISTURBED:.0f} % they kept 84 to 99 %, above it at most 85 %. Beyond the first it counts whether "
    "what is added lies along the other's change (within 45°: adapters of one task kept 86 % or more at any "
    "disturbance), against it (they lost up to 56 %) or across; then tsv, which turns the directions apart (Gargiulo "
    "et al. 2025). Weights show what collides, not what it costs: test every task after a merge."
)


def _along(found: PairFinding, at: int) -> float:
    """What the other adds along the very change of one of the two, relative to it: `<f, g> / |f|^2`."""
    total = sum(layer.inner for layer in found.layers.values())
    return total / found.norms[at] ** 2 if found.norms[at] else 0.0


def _call(first: AdapterFinding, second: AdapterFinding, method: str, weight: float = 1.0) -> str:
    more = {"linear": "", "ties": ", density=0.5"}.get(method, "")
    named = "" if method == "linear" else f", method={method!r}{more}"
    heads = ", heads=…" if first.source.heads or second.source.heads else ""
    return f"adapters.combine('both', {{{first.name!r}: {weight:g}, {second.name!r}: {weight:g}}}{named}{heads})"


def _differ(bases: Sequence[str | None]) -> bool:
    return None not in bases and len(set(bases)) > 1


def _count(squares: Mapping[str, float], ranked: Sequence[str], share: float) -> int:
    """How many of the largest hold this share of the sum."""
    so_far, total = 0.0, sum(squares.values())
    for i, path in enumerate(ranked):
        so_far += squares[path]
        if so_far >= share * total * (1 - 1e-12):
            return i + 1
    return len(ranked)


def _serves(ranks: Sequence[int]) -> int:
    """The smallest rank that is enough for `TARGETS_SERVED` of them."""
    ordered = sorted(ranks)
    return ordered[math.ceil(TARGETS_SERVED * len(ordered)) - 1]


def middle(ranks: Sequence[int]) -> int:
    """The upper median."""
    return math.ceil(median(ranks)) if ranks else 0


def _with_size(adapter: AdapterFinding, grid: Grid, path: str) -> str:
    layer = adapter.layers[path]
    row, column = grid.places[path]
    name = " ".join(filter(None, (grid.label(row), column)))
    return f"{name} ({percent(layer.relative or 0.0)} %)" if adapter.has_base else f"{name} ({layer.norm:.3g})"


def _shares(squares: Mapping[str, float], groups: Mapping[str, str]) -> dict[str, float]:
    """The share of the sum in each group, largest first."""
    total = sum(squares.values())
    sums: dict[str, float] = {}
    for path, square in squares.items():
        sums[groups[path]] = sums.get(groups[path], 0.0) + square / total
    return dict(sorted(sums.items(), key=lambda item: -item[1]))


def _targets(count: int) -> str:
    return f"{count} target" + ("s" if count != 1 else "")
