"""Activation: which adapters of a model act now."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from adapterkit.errors import ConfigError, StateError
from adapterkit.record import AdapterRecord, acting_heads
from adapterkit.roster import Roster


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
            StateError: an adapter that is merged.
        """
        records = [self._record(name) for name in names]
        if len(set(names)) < len(names):
            raise ConfigError(f"activate{names!r} names an adapter twice.")
        for name in names:
            self._check_not_merged(name)
        acting = acting_heads([*map(self._record, self._merged.names), *records], heads)
        self._set_trainable(names if trainable else ())
        self._set_active(names, acting)

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

    def _state(self) -> tuple[list[AdapterRecord], ...]:
        """What acts, whose heads do and what is trainable; not by name, for adapters may be renamed meanwhile."""
        groups = (self._active.names, self._active.heads, self._trainable)
        return tuple([self._records[name] for name in group] for group in groups)

    def _return_to(self, state: tuple[list[AdapterRecord], ...]) -> None:
        """Give back a state, but for adapters that are gone."""
        if self._host is None:  # detached meanwhile
            return
        names, heads, trained = (tuple(r.name for r in group if self._records.get(r.name) is r) for group in state)
        merged = self._merged.names
        self._set_trainable(tuple(n for n in trained if n not in merged))
        own_heads = tuple(n for n in self._active.heads if n in merged and n not in heads)
        self._set_active(tuple(n for n in names if n not in merged), own_heads + heads)

    def _set_active(self, names: tuple[str, ...], heads: tuple[str, ...]) -> None:
        names, heads = (tuple(n for n in group if n in self._records) for group in (names, heads))
        self._active.become(names, heads)
        self._live.follow_labels(self._records, heads)

    def _set_trainable(self, names: tuple[str, ...]) -> None:
        names = tuple(n for n in names if n in self._records)
        for name in {*self._trainable, *names}:
            self._records[name].set_trainable(name in names)
        self._trainable = names
