"""What does it cost to combine two adapters into a new one, exactly, truncated, and by TIES?

`hand` makes each layer's tensors and nothing else; adapterkit and PEFT also make the adapter that holds them. PEFT's
`linear` and `ties` work on the factors (`space="factors"` here), which gives another result than combining the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

import adapterkit as ak
from benchmarks.check import same
from benchmarks.libraries import RANK, adapter_parameters, give_values, names, ours, theirs
from benchmarks.models import Stack
from benchmarks.runner import Case, Goal, Run, Way

WEIGHTS = {"a0": 0.7, "a1": 0.3}
Pairs = list[tuple[Tensor, Tensor]]


def cases(tiny: bool) -> Iterator[Case]:
    """Many small layers, then a few of each width."""
    many = Both(1 if tiny else 4, 32 if tiny else 512)
    yield many.case("combine exactly (cat)", _cat, {}, {"combination_type": "cat"})
    yield many.case("combine the factors (linear)", _linear, {"space": "factors"}, {"combination_type": "linear"})
    yield many.case(
        "combine the factors by TIES",
        _ties,
        {"space": "factors", "method": "ties", "density": 0.5},
        {"combination_type": "ties", "density": 0.5},
    )
    for hidden in (32,) if tiny else (512, 1024):
        both = many if hidden == many.hidden else Both(1, hidden)
        svd = {"combination_type": "svd", "svd_rank": RANK} if both is not many else None
        yield both.case("combine to rank 16", _truncated, {"rank": RANK}, svd)


class Both:
    """Two adapters of the same values in each library."""

    def __init__(self, blocks: int, hidden: int) -> None:
        self.hidden, self.layers = hidden, 7 * blocks
        self.ours: ak.Adapters = ours(lambda: Stack(blocks, hidden), 2)
        self.peft: Any = theirs(lambda: Stack(blocks, hidden), 2)
        for i in range(2):
            for model in (self.ours.model, self.peft):
                give_values(adapter_parameters(model, f"a{i}"), i)
        self.free = names()
        self.made: tuple[list[str], list[str]] = ([], [])  # PEFT's, ours
        self.pairs = [self._pairs(self.ours.model, name) for name in WEIGHTS]

    def _pairs(self, model: Any, name: str) -> Pairs:
        values = [p.detach() for _, p in adapter_parameters(model, name)]
        return [(up, down) for down, up in zip(values[::2], values[1::2], strict=True)]

    def case(self, what: str, by_hand: Callable[[Pairs, Pairs], Pairs], fields: Mapping[str, Any], theirs: Any) -> Case:
        """One row of the table."""
        ways = {
            "hand": Way(lambda: lambda: by_hand(*self.pairs), _changes),
            "adapterkit": self._made(self.ours, lambda new: self.ours.combine(new, WEIGHTS, **fields)),
        }
        if theirs is not None:
            add = self.peft.add_weighted_adapter
            ways["peft"] = self._made(self.peft, lambda new: add(list(WEIGHTS), list(WEIGHTS.values()), new, **theirs))
        return Case(f"{what}, {self.layers} layers of {self.hidden}", ways, (Goal(1.5),), close, seconds=6.0)

    def _made(self, library: Any, make: Callable[[str], object]) -> Way:
        """A new adapter each time; those made are deleted before the next measurement."""
        made = self.made[library is self.ours]
        remove = getattr(library, "remove", None) or library.delete_adapter

        def run() -> None:
            made.append(next(self.free))
            make(made[-1])

        def prepare() -> Run:
            while made:
                remove(made.pop())
            return run

        model = getattr(library, "model", library) if library is self.ours else library
        return Way(prepare, lambda _: _changes(self._pairs(model, made[-1])))


def close(results: Mapping[str, Any]) -> None:
    """The changes of the weights are the same."""
    same(results, 1e-3, 1e-4)


def _changes(pairs: Pairs) -> list[Tensor]:
    return [up @ down for up, down in pairs]


def _cat(one: Pairs, two: Pairs) -> Pairs:
    v, w = WEIGHTS.values()
    return [
        (torch.cat([v * up, w * other], 1), torch.cat([down, under]))
        for (up, down), (other, under) in zip(one, two, strict=True)
    ]


def _linear(one: Pairs, two: Pairs) -> Pairs:
    v, w = (weight**0.5 for weight in WEIGHTS.values())
    return [(v * up + w * other, v * down + w * under) for (up, down), (other, under) in zip(one, two, strict=True)]


def _truncated(one: Pairs, two: Pairs) -> Pairs:
    found = []
    for up, down in _cat(one, two):
        (q, r), (p, s) = torch.linalg.qr(up), torch.linalg.qr(down.t())
        u, values, vh = torch.linalg.svd(r @ s.t())
        root = values[:RANK].sqrt()
        found.append((q @ (u[:, :RANK] * root), (root[:, None] * vh[:RANK]) @ p.t()))
    return found


def _ties(one: Pairs, two: Pairs) -> Pairs:
    return [(_elected(up, other), _elected(down, under)) for (up, down), (other, under) in zip(one, two, strict=True)]


def _elected(one: Tensor, other: Tensor) -> Tensor:
    """TIES at density 0.5: what is below the middle is dropped, then the mean of those with the sign of the sum."""
    stack = torch.stack([one, other])
    sizes = stack.abs().flatten(1)
    least = sizes.kthvalue(sizes.shape[1] - sizes.shape[1] // 2 + 1, dim=1).values
    stack = torch.where(stack.abs() >= least[:, None, None], stack, 0.0)
    sign = torch.where(stack.sum(0) >= 0, 1.0, -1.0)
    agree = stack.sign() == sign
    weights = torch.tensor(list(WEIGHTS.values())).sqrt()[:, None, None]
    result: Tensor = (stack * weights * agree).sum(0) / agree.sum(0).clamp(min=1)
    return result
