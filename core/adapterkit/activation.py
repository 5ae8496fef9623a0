"""Activation: which adapters of a model act now."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from adapterkit.errors import ConfigError, StateError
from adapterkit.perrow import RowState
from adapterkit.record import AdapterRecord, acting_heads
from adapterkit.roster import Roster
from adapterkit.rows import Rows
from adapterkit.wrapped import check_averaged, reshard


@dataclass(frozen=True)
class Snapshot:
    """What acts, to be given back later."""

    names: list[AdapterRecord]
    heads: list[AdapterRecord]
    trained: list[AdapterRecord]
    rows: list[AdapterRecord | None]
    trusted: bool


class Activation(Roster):
    """The part of `Adapters` that switches."""

    def activate(self, *names: str, trainable: bool = True, heads: str | None = None) -> None:
        """Let these adapters act, and no others; their heads and label sets go with them. No name: none.

        Switching costs the same whatever the number of layers and of adapters, but for setting
        `requires_grad` where `trainable` asks for another state than there is.

        Args:
            trainable: whether their parameters require gradients. All others' do not.
            heads: whose head acts, where two of them have their own copy of one module.

        Raises:
            UnknownNameError: no such adapter.
            ConfigError: a name twice, or two heads for one module and no choice.
            StateError: an adapter that is merged, or on modules that were replaced since (with `trainable=False` the
                first forward says so), or one to be trained that DDP, FSDP or DeepSpeed around the model do not know.
        """
        records = [self._record(name) for name in names]
        if len(set(names)) < len(names):
            raise ConfigError(f"activate{names!r} names an adapter twice.")
        for name in names:
            self._check_not_merged(name)
        acting = acting_heads([*map(self._record, self._merged.names), *records], heads)
        if trainable:
            self._check_present("activate", *names)
        for record in records if trainable else ():
            check_averaged(self.model, record)
        self._set_trainable(names if trainable else ())
        self._set_active(names, acting)
        self._active.state.first = partial(self._check_present, "activate", *names)

    @contextmanager
    def activated(self, *names: str, trainable: bool = True, heads: str | None = None) -> Iterator[None]:
        """`activate` for the length of a `with` block; afterwards all is as it was before."""
        before = self._state()
        self.activate(*names, trainable=trainable, heads=heads)
        try:
            yield
        finally:
            self._return_to(before)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The bare model, heads and label set included, for the length of a `with` block.

        Raises:
            StateError: something is merged.
        """
        if self._merged.names:
            merged = ", ".join(map(repr, self._merged.names))
            raise StateError(f"There is no bare model while {merged} is merged. Call unmerge() first.")
        before = self._state()
        self._set_active((), ())
        try:
            yield
        finally:
            self._return_to(before)

    def _state(self) -> Snapshot:
        """What acts, whose heads do and what is trainable; not by name, for adapters may be renamed meanwhile."""
        groups = (self._active.names, self._active.heads, self._trainable)
        names, heads, trained = ([self._records[name] for name in group] for group in groups)
        rows = self._active.state.rows
        named = [] if rows is None else [None if name is None else self._records[name] for name in rows.names]
        return Snapshot(names, heads, trained, named, rows is not None and rows.trusted)

    def _return_to(self, before: Snapshot) -> None:
        """Give back a state, but for adapters that are gone."""
        if self._host is None:  # detached meanwhile
            return
        groups = (before.names, before.heads, before.trained)
        names, heads, trained = (tuple(r.name for r in group if self._records.get(r.name) is r) for group in groups)
        merged = self._merged.names
        self._set_trainable(tuple(n for n in trained if n not in merged))
        if before.rows:
            live = [r is not None and self._records.get(r.name) is r and r.name not in merged for r in before.rows]
            kept = [r.name if r is not None and here else None for r, here in zip(before.rows, live, strict=True)]
            self._set_rows(Rows(kept, trusted=before.trusted))
            return
        own_heads = tuple(n for n in self._active.heads if n in merged and n not in heads)
        self._set_active(tuple(n for n in names if n not in merged), own_heads + heads)

    def _set_rows(self, rows: Rows) -> None:
        """Let each row's adapter act on it; a row's head is its adapter's, else a merged one's."""
        merged = tuple(n for n in self._active.heads if n in self._merged.names)
        heads = merged + tuple(n for n in rows.adapters if self._records[n].heads)
        self._active.state = RowState(rows, self._live.watch(self._active), heads, merged)
        self._live.follow_labels(self._records, heads)

    def _set_active(self, names: tuple[str, ...], heads: tuple[str, ...]) -> None:
        names, heads = (tuple(n for n in group if n in self._records) for group in (names, heads))
        self._active.become(names, heads)
        self._live.follow_labels(self._records, heads)

    def _set_trainable(self, names: tuple[str, ...]) -> None:
        names = tuple(n for n in names if n in self._records)
        reshard(self.model)  # the flags of its shards are those that FSDP2 goes by
        for name in {*self._trainable, *names}:
            self._records[name].set_trainable(name in names)
        self._trainable = names
