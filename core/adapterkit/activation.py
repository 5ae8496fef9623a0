"""Activation: which adapters of a model act now."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from adapterkit import gradients, threads
from adapterkit.acting import State
from adapterkit.errors import ConfigError, StateError
from adapterkit.interrupts import uninterrupted
from adapterkit.record import AdapterRecord, acting_heads
from adapterkit.roster import Roster
from adapterkit.wrapped import check_averaged, reshard


class Activation(Roster):
    """The part of `Adapters` that switches."""

    def activate(self, *names: str, trainable: bool = True, heads: str | None = None) -> None:
        """Let these adapters act, and no others; their heads and label sets go with them. No name: none.

        That is so in every thread, but where a thread is in a block (`activated`, `disabled`, `per_sample`): called in
        a block, it holds in that block alone. Switching costs the same whatever the number of layers and of adapters,
        but for setting `requires_grad` where `trainable` asks for another state than there is.

        A graph keeps the adapters that it was made with: switching takes no gradient from a loss whose backward
        is still to come, and gradient checkpointing computes again what was computed. So parameters that a graph holds
        go on requiring gradients until the first switch after it is gone.

        Args:
            trainable: whether their parameters require gradients. All others' do not.
            heads: whose head acts, where two of them have their own copy of one module.

        Raises:
            UnknownNameError: no such adapter.
            ConfigError: a name twice, or two heads for one module and no choice.
            StateError: an adapter that is merged, or on modules that were replaced since (with `trainable=False` the
                first forward says so), or one to be trained that DDP, FSDP or DeepSpeed around the model do not know.
        """
        records, acting = self._chosen("activate", names, heads, trainable)
        with uninterrupted(), threads.lock:
            block, before = self._active.in_block, self._active.state
            for record in records if trainable else ():
                record.light(lent=block)
            trains = names if trainable else ()
            state = State(names, acting, trains, still=block and not trainable, asleep=before.asleep)
            state.first = lambda: self._check_present("activate", *state.names)
            self._active.become(state)
            self._settle(None if block else before.trains)
            if not trainable and any(record.lent for record in records):
                state.still = True
            self._live.follow_labels(self._records, acting)

    @contextmanager
    def activated(self, *names: str, trainable: bool = True, heads: str | None = None) -> Iterator[None]:
        """`activate` for the length of a `with` block, in this thread; afterwards all is as it was before.

        Other threads do not notice, but those that are started in the block: they act as it does as long as they live.
        So do tasks given to a `ThreadPoolExecutor` in it. Tasks of one asyncio loop share a thread, and so its blocks.
        A `backward` may come after the block. No `requires_grad` is taken away in a block: with `trainable=False` the
        adapters act as constants.
        """
        records, acting = self._chosen("activated", names, heads, trainable)
        asleep = self._active.state.asleep
        state = State(names, acting, names if trainable else (), still=not trainable, asleep=asleep)
        state.first = lambda: self._check_present("activated", *state.names)
        with self._block(state, records if trainable else ()):
            yield

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The bare model, heads and label set included, for the length of a `with` block, in this thread.

        Raises:
            StateError: something is merged.
        """
        if self._merged.names:
            merged = ", ".join(map(repr, self._merged.names))
            raise StateError(f"There is no bare model while {merged} is merged. Call unmerge() first.")
        self._check_live()
        with self._block(State(), ()):
            yield

    @contextmanager
    def _block(self, state: State, trained: Collection[AdapterRecord]) -> Iterator[None]:
        """What `state` says acts in this thread, and these adapters train, until the end."""
        self._check_trainable(trained)
        with threads.lock:
            for record in trained:
                record.light(lent=True)
            block = self._active.enter(state)
        try:
            self._live.follow_labels(self._records, state.heads)
            yield
        finally:
            with threads.lock:
                self._active.leave(block)
                self._settle()
            if self._host is not None:  # else detached meanwhile
                self._live.follow_labels(self._records, self._active.heads)

    def _chosen(
        self, call: str, names: tuple[str, ...], heads: str | None, trainable: bool
    ) -> tuple[list[AdapterRecord], tuple[str, ...]]:
        """These adapters, and whose heads act with them."""
        records = [self._record(name) for name in names]
        if len(set(names)) < len(names):
            raise ConfigError(f"{call}{names!r} names an adapter twice.")
        for name in names:
            self._check_not_merged(name)
        acting = acting_heads([*map(self._record, self._merged.names), *records], heads)
        if trainable:
            self._check_present(call, *names)
            self._check_trainable(records)
        return records, acting

    def _check_trainable(self, records: Collection[AdapterRecord]) -> None:
        for record in records:
            check_averaged(self.model, record)
        reshard(self.model)  # the flags of its shards are those that FSDP2 goes by

    def _trained(self) -> list[tuple[AdapterRecord, list[nn.Parameter]]]:
        """What requires gradients now."""
        return [(record, [p for p in record.parameters() if p.requires_grad]) for record in self._records.values()]

    def _return_to(self, before: State, trained: list[tuple[AdapterRecord, list[nn.Parameter]]]) -> None:
        """Undo `activate`."""
        with threads.lock:
            for _, parameters in trained:
                gradients.light(parameters)
            self._active.become(before)
        self._live.follow_labels(self._records, before.heads)

    def _set_merged(self, records: Sequence[AdapterRecord], acting: tuple[str, ...]) -> None:
        """These are in the weights now: they act nowhere else, and the heads of all that are act everywhere."""
        merged, names = self._merged.names, tuple(record.name for record in records)
        heads = tuple(name for name in acting if name in merged)
        reshard(self.model)
        with threads.lock:
            own = self._active.state
            self._active.each(lambda state: state.merged(names, heads))
            if own.rows is None:
                self._active.state.heads = acting
            self._active.merged = merged
            for record in records:
                record.dimmed = []
                record.dim(record.parameters())
        self._live.follow_labels(self._records, self._active.heads)

    def _set_unmerged(self, records: Sequence[AdapterRecord]) -> None:
        """Nothing is merged any more."""
        with threads.lock:
            self._active.each(lambda state: state.unmerged([r.name for r in records if r.dimmed]))
            self._active.merged = ()
            for record in records:
                record.light_again()
                if record.name in self._active.default.trains:
                    record.lent = []
        self._live.follow_labels(self._records, self._active.heads)

    def _settle(self, trained: Collection[str] | None = None) -> None:
        """Take `requires_grad` from parameters to which it was lent and that need it no more.

        Args:
            trained: adapters that trained up to now; everything of theirs, and of others that may train: `None`: not.
        """
        if self._host is None:  # detached meanwhile
            return
        reshard(self.model)
        wanted = {name for state in self._active.states() for name in state.trains}
        for name, record in self._records.items():
            if name in wanted:
                continue
            if trained is not None and (name in trained or record.lent or record.may_train()):
                record.dim(record.parameters())
            elif record.lent:
                record.dim(record.lent)
