"""Merger: adapters go into the weights, and come out again."""

from __future__ import annotations

import warnings

from torch import nn

from adapterkit.change import check_in_memory, parted_names, plan
from adapterkit.errors import AdapterWarning, ConfigError, StateError
from adapterkit.interrupts import uninterrupted
from adapterkit.merging import Done, Merged, carry_out, give_back, take_back, take_heads
from adapterkit.record import AdapterRecord, acting_heads
from adapterkit.storage import Storage
from adapterkit.ties import Parting
from adapterkit.walk import Walk
from adapterkit.wrapped import refuse_fsdp1, reshard


class Merger(Storage):
    """The part of `Adapters` that merges.

    A merged adapter is a part of the weights: it is not active any more, costs nothing in a forward, and
    acts under whatever is activated beside it, until `unmerge`. Its head, which no weight can take in, goes
    on acting. While anything is merged there is no bare model, so `disabled()` is an error.
    """

    @property
    def merged(self) -> tuple[str, ...]:
        """The merged adapters, the first merged first."""
        return self._merged.names

    def merge(
        self,
        *names: str,
        safe: bool = False,
        keep_base: bool = True,
        untie: bool = False,
        heads: str | None = None,
    ) -> None:
        """Work adapters into the weights: `W + sum of dW_i`, in float32 (float64 for float64), rounded once.

        Additive adapters are added in place from their factors. Others follow in the order given, by their own
        merge rule.

        Args:
            safe: check for values that are not finite, and change nothing if there is one.
            keep_base: keep the replaced weights, for `unmerge`, and to give them back bit for bit where a merge breaks
                off. `False` saves that memory: Ctrl-C waits until the merge is complete, and after an error in the
                middle, such as full memory, what was added is subtracted again, as the message says.
            untie: give a target whose weight is tied to another module a weight of its own. A transformers model is
                told: its files hold what was parted, and its config's flag is cleared. Where the model computes with
                that flag (T5, Switch Transformers) the flag stays, and only transformers 5 and later read such files
                rightly.
            heads: whose head acts, where two have their own copy of one module; `None`: the one that acts now, if
                all of these are active.

        Raises:
            StateError: merged already, modules that were replaced since, weights that are tied or not in memory, or
                values that are not finite.
            UnsupportedError: an adapter that cannot be merged.
        """
        records = self._to_merge(names)
        self._check_not_per_sample("merge")
        self._check_present("merge", *names)
        if keep_base:
            self._check_not_edited("merge")
        rest = [self._record(n) for n in self.active if n not in names]
        if heads is None and set(names) <= set(self.active) and self._active.heads:
            heads = self._active.heads[-1]  # which one acts was settled when they were activated
        acting = acting_heads([*map(self._record, self.merged), *records, *rest], heads)
        refuse_fsdp1(self.model)
        reshard(self.model)  # copies that FSDP2 leaves in place would take the merge with them
        walk = Walk(self.model)
        changes = plan(records, walk, untie=untie)
        check_in_memory(changes)
        parting = Parting.of(self.model, parted_names(changes, walk))
        before, acted, trained = self._merged, self._active.state, self._trained()
        done, edited = Done(), before.edited
        with uninterrupted() as stop:
            try:
                carry_out(changes, done, safe=safe, keep_base=keep_base, stop=stop)
                self._live.part(parting)
                self._merged = before.joined(names, done, keep_base=keep_base)
                self._set_merged(records, acting)
            except BaseException as error:  # noqa: BLE001 - raised again
                self._live.tie(parting)
                raised = take_back(done, error)
                self._merged, self._active.merged = before.counted_again(edited), before.names
                self._return_to(acted, trained)
                raise raised from (None if raised is error else error)

    def unmerge(self) -> None:
        """Give the weights back, every bit as they were before the first merge.

        The adapters that were active when they were merged are active again, before those active now, and train if
        they trained then.

        Raises:
            StateError: nothing is merged, the base was not kept, or a merged module was replaced or written to since.
        """
        self._check_base_kept()
        changed = next(filter(None, map(self._changed, self.merged)), None)
        if changed:
            raise StateError(
                f"unmerge is refused: {changed} The weights that were merged into are gone there. merge_and_detach() "
                "keeps the model as it is now, and detach() gives back the weights that are left."
            )
        self._check_not_edited("unmerge")
        self._give_back()

    def merge_and_detach(
        self, *names: str, safe: bool = False, untie: bool = False, heads: str | None = None
    ) -> nn.Module:
        """The plain model with these adapters (or, without names, those that act now) in it for good.

        Their heads become the model's own modules, and their label set its config's. All other adapters go.

        Returns:
            The model, without a trace of adapters.
        """
        wanted = names or self.active
        if not wanted and not self.merged:
            raise ConfigError(f"merge_and_detach() has nothing to merge: no adapter is active. There is {self.names}.")
        self._check_present("merge_and_detach", *(n for n in wanted if n not in self.merged))
        for name in self.merged:
            self._warn_if_changed(name, "What is there now stays as it is.")
        before, trained, merged = self._active.state, self._trained(), self.merged
        with uninterrupted():
            try:
                if names:
                    kept = [n for n in self.active if n in names]
                    settled = heads or next(reversed(self._active.heads), None)
                    self.activate(*kept, trainable=False, heads=settled if settled in kept else None)
                if wanted:
                    self.merge(*wanted, safe=safe, keep_base=False, untie=untie, heads=heads)
            except BaseException:
                if self.merged == merged:
                    self._return_to(before, trained)
                raise
            acting = [self._records[name] for name in self._active.heads]
            model, host = self.model, self._live
            parting = Parting.of(model, (), {p: n for record in acting for p, n in record.head_paths().items()})
            host.keep_labels()
            self._merged = Merged()
            take_heads(acting, model)
            parting.tell()
            return self.detach()

    def detach(self) -> nn.Module:
        """See `Lifecycle.detach`; what is merged is unmerged first.

        Raises:
            StateError: something was merged with `keep_base=False`; `merge_and_detach` keeps it instead.
        """
        if self.merged:
            self._check_base_kept()
            for name in self.merged:
                self._warn_if_changed(name, "What is there now stays as it is.")
            edited = self._merged.edited
            if edited:
                warnings.warn(
                    f"{edited[0]!r} was written to while it was merged; that is gone now, the base is given back.",
                    AdapterWarning,
                    stacklevel=2,
                )
            for kept in self._merged.kept.values():
                kept.leave_resized()
            self._give_back()
        return super().detach()

    def _check_base_kept(self) -> None:
        self._check_not_per_sample("unmerge")
        names = self.merged
        if not names:
            raise StateError("Nothing is merged.")
        if not self._merged.keeps_base:
            raise StateError(
                f"{', '.join(map(repr, names))} cannot be unmerged: with keep_base=False the base is gone. "
                "Load the base model again."
            )

    def _check_not_edited(self, call: str) -> None:
        edited = self._merged.edited
        if edited:
            raise StateError(
                f"{call} is refused: {edited[0]!r} was written to while {', '.join(map(repr, self.merged))} was merged "
                "(by an optimizer, or load_state_dict?), and unmerge() would throw that away. merge_and_detach() keeps "
                "the model as it is now; detach() gives back the base all the same."
            )

    def _give_back(self) -> None:
        state = self._merged
        with uninterrupted():
            try:
                give_back(state)
            except Exception as error:
                raise StateError(
                    f"Not every weight could be given back ({type(error).__name__}: {error}). Call unmerge() again: "
                    "all that is kept is kept still."
                ) from error
            self._live.tie()
            self._merged = Merged()
            self._set_unmerged([self._records[name] for name in state.names])

    def _to_merge(self, names: tuple[str, ...]) -> list[AdapterRecord]:
        records = [self._record(name) for name in names]
        if not names or len(set(names)) < len(names):
            raise ConfigError(f"merge{names!r} must name adapters, each once. There is {self.names}.")
        for name in names:
            self._check_not_merged(name)
        return records
