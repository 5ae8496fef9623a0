"""Sign conflicts: the entries on which two changes pull in opposite directions, which TIES would resolve."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from adapterkit.combining import working
from adapterkit.kinds import Factors

# Up to this many entries of a layer are looked at; of a larger one as many whole rows as make them up. The standard
# error of a share is then 0.1 % where entries are independent.
MOST_ENTRIES = 1 << 18
# Entries of each change in memory at once.
_BLOCK = 1 << 20


@dataclass(frozen=True)
class Conflict:
    """How two changes of one shape disagree in sign, entry by entry.

    Attributes:
        entries: entries of the layer.
        seen: how many of them were looked at: all, or a sample of whole rows.
        opposed: those that have opposite signs, as a number out of `entries`.
        total: `sum of |a| + |b|` over the layer.
        lost: `sum of min(|a|, |b|)` over the opposed: what TIES drops, and what each takes from the other in a sum.
    """

    entries: int
    seen: int
    opposed: float
    total: float
    lost: float

    @property
    def share(self) -> float:
        """Entries that disagree; 1/2 for independent changes."""
        return self.opposed / self.entries if self.entries else 0.0

    @property
    def mass(self) -> float:
        """`lost / total`, 0 to 1/2; about 0.15 for independent Gaussian entries of one size."""
        return self.lost / self.total if self.total else 0.0

    def __add__(self, other: Conflict) -> Conflict:
        return Conflict(
            self.entries + other.entries,
            self.seen + other.seen,
            self.opposed + other.opposed,
            self.total + other.total,
            self.lost + other.lost,
        )


NONE = Conflict(0, 0, 0.0, 0.0, 0.0)


def sign_conflicts(sources: Sequence[Factors], most: int = MOST_ENTRIES) -> dict[tuple[int, int], Conflict]:
    """The sign conflicts of every pair of these changes, which have one shape.

    For `a` and `b`: entries with `a b < 0`, their number and `sum of min(|a|, |b|)` over them. Rows are made from the
    factors, a block at a time. Where the layer has more than `most` entries, `most // in` rows are drawn
    without replacement by a fixed seed, and sums are scaled up.
    """
    out, inside = sources[0].up.shape[0], sources[0].down.shape[1]
    rows = _sample(out, max(1, most // inside), sources[0].up.device)
    sums = {pair: torch.zeros(3, dtype=torch.float64) for pair in combinations(range(len(sources)), 2)}
    for block in _blocks(sources, rows):
        for i, j in sums:
            sums[i, j] += _of_block(block[i], block[j])
    scale = out / len(rows)
    found = {pair: (scale * values).tolist() for pair, values in sums.items()}
    return {pair: Conflict(out * inside, len(rows) * inside, *values) for pair, values in found.items()}


def _sample(out: int, count: int, device: torch.device) -> Tensor:
    if count >= out:
        return torch.arange(out, device=device)
    drawn = torch.randperm(out, generator=torch.Generator().manual_seed(0))[:count]
    return drawn.sort().values.to(device)


def _blocks(sources: Sequence[Factors], rows: Tensor) -> Iterator[list[Tensor]]:
    """The changes' entries in these rows, as many rows at a time as fit into a block."""
    for chunk in rows.split(max(1, _BLOCK // sources[0].down.shape[1])):
        yield [working(f.up)[chunk.to(f.up.device)] @ working(f.down) for f in sources]


def _of_block(a: Tensor, b: Tensor) -> Tensor:
    b = b.to(a)
    opposed = (a * b.sign()) < 0  # the product of two small numbers may be zero
    sizes = a.abs(), b.abs()
    lost = torch.minimum(*sizes)[opposed]
    return torch.stack([n.sum().to(a.dtype) for n in (opposed, sizes[0] + sizes[1], lost)]).cpu().double()
