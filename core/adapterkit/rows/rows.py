"""Rows: which adapter each row of a batch has, and where these rows are in a tensor.

With `n` rows named, a tensor `(n k, ...)` is read as `(n, k, ...)`: each row has `k` entries one after another, its
beams, its tokens, or both.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor


class Rows:
    """Which adapter each row of the batch has.

    Args:
        names: one for each row; `None`: no adapter.
        trusted: the user says that the first dimension of every layer's input is the batch.

    Attributes:
        adapters: the adapters named, each once, in an order that does not depend on the rows'.
        uniform: all rows have the same adapter.
    """

    def __init__(self, names: Sequence[str | None], *, trusted: bool = False) -> None:
        self.names, self.trusted = tuple(names), trusted
        self.count = len(self.names)
        self.adapters = tuple(sorted({name for name in self.names if name is not None}))
        self.uniform = len(set(self.names)) == 1
        self._kept: dict[Any, Any] = {}
        # What is compiled reads the assignment from this alone, so that it serves every assignment.
        self._all_have = None not in self.names
        self._places = torch.tensor([(*self.adapters, None).index(name) for name in self.names], device="cpu")

    def having(self, *adapters: str) -> list[int]:
        """The rows that have one of these adapters."""
        return [i for i, name in enumerate(self.names) if name in adapters]

    def lacking(self, adapters: Collection[str]) -> list[int]:
        """The rows that have none of these adapters."""
        return [i for i, name in enumerate(self.names) if name not in adapters]

    def slots(self, adapters: tuple[str, ...], device: torch.device) -> Tensor:
        """`(n,)`, to be compiled: the place of each row's adapter in `adapters`; 0 for a row that has none of them."""
        places = [adapters.index(n) if n in adapters else 0 for n in (*self.adapters, None)]
        return torch.tensor(places, device=device)[self._places.to(device)]

    def groups(self, adapters: tuple[str, ...], device: torch.device) -> tuple[Tensor, Tensor]:
        """The rows sorted by adapter, `(len(adapters) * most,)`, and each row's place there, `(n,)`.

        An adapter with fewer than `most` rows repeats its first row. A row that has none of these adapters is at 0.
        """
        key = ("groups", adapters, device)
        if key not in self._kept:
            owns = [self.having(name) for name in adapters]
            most = max(map(len, owns))
            order = [own[i] if i < len(own) else own[0] for own in owns for i in range(most)]
            first = {row: place for place, row in reversed(list(enumerate(order)))}
            places = [first.get(row, 0) for row in range(self.count)]
            self._kept[key] = self._tensor(order, device), self._tensor(places, device)
        found: tuple[Tensor, Tensor] = self._kept[key]
        return found

    def mask(self, adapters: tuple[str, ...], device: torch.device) -> Tensor | None:
        """`(n, 1, 1)`: whether a row has one of these adapters; `None` if all have."""
        if self._all_have and len(adapters) == len(self.adapters):
            return None
        if torch.compiler.is_compiling():
            held = torch.tensor([n in adapters for n in (*self.adapters, None)], device=device)
            return held[self._places.to(device)].view(-1, 1, 1)
        return self._tensor([name in adapters for name in self.names], device).view(-1, 1, 1)

    def pick(self, x: Tensor, rows: Sequence[int]) -> Tensor:
        """The entries of some rows of `x`."""
        return x.view(self.count, -1, *x.shape[1:]).index_select(0, self._tensor(rows, x.device)).flatten(0, 1)

    def join(self, parts: Sequence[tuple[Sequence[int], Tensor]]) -> Tensor:
        """The reverse: one tensor from the entries of disjoint rows, which together are all."""
        order = [row for rows, _ in parts for row in rows]
        back = sorted(range(len(order)), key=order.__getitem__)
        joined = torch.cat([part.unflatten(0, (len(rows), -1)) for rows, part in parts])
        return joined.index_select(0, self._tensor(back, joined.device)).flatten(0, 1)

    def add(self, out: Tensor, parts: Sequence[tuple[Sequence[int], Tensor]]) -> Tensor:
        """`out` with the entries of these rows added, in the wider dtype."""
        rows = self._tensor([row for rows, _ in parts for row in rows], out.device)
        change = torch.cat([part.unflatten(0, (len(rows), -1)) for rows, part in parts])
        dtype = torch.promote_types(out.dtype, change.dtype)
        return out.view(self.count, -1, *out.shape[1:]).to(dtype).index_add(0, rows, change.to(dtype)).flatten(0, 1)

    def _tensor(self, values: Sequence[int], device: torch.device) -> Tensor:
        """These numbers on a device. Kept; compiled, they are a part of what is compiled."""
        if torch.compiler.is_compiling():
            return torch.tensor(values, device=device)
        key = (device, type(values[0]), *values)  # True equals 1
        found: Tensor | None = self._kept.get(key)
        if found is None:
            with torch.inference_mode(False):  # it may be used outside of it, too
                found = self._kept[key] = torch.tensor(values, device=device)
        return found
