"""The model as its adapters change it: what acts, what trains, its label set, and what `detach` restores."""

from __future__ import annotations

import copy
import reprlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext

from torch import nn

from adapterkit.contract import SHARED, AdapterConfig, default_registry, part_name
from adapterkit.errors import ConfigError, StateError, UsageError
from adapterkit.forward import (
    Active,
    Block,
    State,
    Strength,
    checkpointing,
    install,
    lock,
    tensor_parallel,
)
from adapterkit.model.adapter import Adapter, acting_heads, checked_strengths, training_among
from adapterkit.model.heads import LabelSet
from adapterkit.model.modules import BaseModules, base_parameters, inside
from adapterkit.model.optimizing import watch
from adapterkit.model.selection import ALL_LINEAR
from adapterkit.model.vocabulary import resized_tables
from adapterkit.results import counted
from adapterkit.rows import Entries
from adapterkit.tensors import check_averaged, gradients, is_hooked, reshard, size_of, uninterrupted


class AdaptedModel:
    """A model with its adapters.

    Attributes:
        adapters: by name, in the order they were added.
        active: which of them act.
        attached: `detach` was not called yet.
        size: how many numbers the base has.
        labels_of: the adapter that the label set in the model's config belongs to; `None`: it is the model's own.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.adapters: dict[str, Adapter] = {}
        self.active = Active(self.adapters)
        self.attached = True
        self.size = 0
        self.labels_of: str | None = None
        self._labels = LabelSet.of(model)
        self._trained: list[str] | None = None
        self._entries: Entries | None = None

    # Adapters come and go

    def install(self, adapter: Adapter) -> None:
        """Put an adapter on the model. The first one freezes the base."""
        tensor_parallel.follow(self.model, adapter.layers, adapter.heads, adapter.hosts, adapter.modules())
        parameters = list(base_parameters(self.model)) if self._trained is None else []
        lazy = next((name for name, p in parameters if nn.parameter.is_lazy(p)), None)
        if lazy is not None:
            raise StateError(f"{lazy!r} has no size yet. Run the model once, then add the adapter.")
        self._share(adapter)  # may fail, unlike what follows
        if self._trained is None:
            self._trained = [name for name, p in parameters if p.requires_grad]
            self.size = size_of({p for _, p in parameters})
            for _, parameter in parameters:
                parameter.requires_grad_(False)
            checkpointing.wrap()
        for parameter in adapter.parameters():
            parameter.requires_grad_(False)
        own = (m for m in adapter.modules() if not is_hooked(m))
        tensors = (t for m in own for held in (m._parameters, m._buffers) for t in held.values())
        adapter.unset = any(t is not None and t.is_meta for t in tensors)
        adapter.install(self.active)
        self.adapters[adapter.name] = adapter
        watch(adapter, self.model)

    def remove(self, adapter: Adapter) -> None:
        """Remove an adapter. It acts nowhere afterwards."""
        self.active.replace(adapter.name)
        self.follow_labels()
        adapter.uninstall(self.model)
        del self.adapters[adapter.name]

    def rename(self, adapter: Adapter, name: str) -> None:
        """Give an adapter another name; it keeps its place in the order."""
        old = adapter.name
        adapter.uninstall(self.model)
        adapter.name = name
        self._share(adapter)
        adapter.install(self.active)
        adapters = [*self.adapters.values()]
        self.adapters.clear()
        self.adapters.update((adapter.name, adapter) for adapter in adapters)
        self.active.replace(old, name)
        if self.labels_of == old:
            self.labels_of = name

    def restore(self) -> None:
        """Give the model back what the first adapter changed."""
        parameters = dict(base_parameters(self.model))
        for name in self._trained or ():
            if name in parameters:
                parameters[name].requires_grad_(True)
        if self._entries is not None:
            self._entries.remove()
        self.attached = False

    def entries(self) -> Entries:
        """What sees the model's batches, from the first call on."""
        if self._entries is None:
            self._entries = Entries(self.active, self.model)
        return self._entries

    # Shared tensors

    @contextmanager
    def writing(self, adapter: Adapter) -> Iterator[None]:
        """While an adapter's tensors are written to, it shares no tensors with other adapters."""
        if adapter.shared is None:
            yield
            return
        if any(other.shared is adapter.shared for other in self.adapters.values() if other is not adapter):
            adapter.share(copy.deepcopy(adapter.shared))
        try:
            yield
        finally:
            self._share(adapter)

    def _share(self, adapter: Adapter) -> None:
        """Register the adapter's shared tensors at the model; if another adapter has equal ones, both use these."""
        own = adapter.shared
        if own is None:
            return
        if not own.replaces_call:
            others = (other.shared for other in self.adapters.values() if other is not adapter)
            own = next((other for other in others if other is not None and other.equals(own)), own)
            adapter.share(own)
        install(self.model, "", SHARED, adapter.name, own, self.active)

    def check_new_name(self, name: object) -> None:
        """Raise `ConfigError` if no adapter can have this name, or one has it."""
        if isinstance(name, AdapterConfig):
            raise UsageError("The name comes before the config: adapters.add('mood', ak.LoraConfig(r=8)).")
        if not isinstance(name, str) or not name.strip("."):
            raise ConfigError(f"{reprlib.repr(name)} cannot be an adapter's name: it must be text, and not dots alone.")
        other = next((own for own in self.adapters if part_name(own) == part_name(name)), None)
        if other is not None:
            raise ConfigError(f"There is an adapter {other!r} already. Remove it first, or choose another name.")

    # What acts and what trains

    def state(
        self,
        call: str,
        adapters: Sequence[Adapter],
        heads: str | None,
        strengths: Mapping[str, Strength] | None,
        trainable: bool | Collection[str],
        *,
        block: bool,
    ) -> State:
        """The state in which these adapters act. In a block, those that do not train are constants.

        Raises:
            ConfigError: an adapter twice, two heads for one module and no choice, or a malformed argument.
            UnsupportedError: a strength of an adapter that is not additive.
            StateError: an adapter is merged; or one that should train does not act any more at some module. If none
                should train, the first forward raises this.
        """
        names = tuple(adapter.name for adapter in adapters)
        trains = training_among(names, trainable)
        if len(set(names)) < len(names):
            raise ConfigError(f"{call}{names!r} names an adapter twice.")
        self.check_not_merged(names)
        acting = acting_heads([*map(self.adapters.__getitem__, self.active.merged), *adapters], heads)
        scales = checked_strengths(call, adapters, strengths)
        self.check_unchanged(call, trains)
        before, merged = self.active.state, self.active.merged
        merged_before: tuple[str, ...] = ()
        constants = tuple(name for name in names if name not in trains) if block else ()
        if merged:  # these are active again after `unmerge`
            merged_before = tuple(name for name in before.asked[0] if name in merged)
            trains = tuple(name for name in merged_before if name in before.trains) + trains
            scales |= {name: before.strengths[name] for name in merged_before if name in before.strengths}
        state = State(merged_before + names, acting, trains, constants=constants, merged=merged, strengths=scales)
        state.before_first = lambda: self.check_unchanged(call, state.names)
        return state

    def activate(self, state: State) -> None:
        """Let `state` act, in this thread's block or everywhere. Parameters that train nowhere are frozen."""
        active, adapters = self.active, self.adapters.values()
        block, before, trained = active.in_block, active.state, self._trained_in(state)
        changes_flags = bool(trained) or before.trains or any(a.trains_for_now or a.may_train() for a in adapters)
        several_writes = changes_flags or len(active.threads) > 1 or self._labels_owner(state.heads) != self.labels_of
        # Masking Ctrl-C takes as long as all the rest, and one assignment cannot be interrupted halfway.
        with uninterrupted() if several_writes else nullcontext(), lock:
            for adapter in trained:
                adapter.train(for_now=block)
            active.become(state)
            if changes_flags:
                self._freeze_what_need_not_train(None if block else before.trains)
                others = [name for name in state.names if name not in state.trains]
                state.constants += tuple(name for name in others if self.adapters[name].trains_for_now)
            self.follow_labels()

    @contextmanager
    def block(self, state: State) -> Iterator[None]:
        """Let `state` act in this thread inside the block; its adapters that train require gradients there."""
        trained, block = self._trained_in(state), Block(state)
        try:
            with uninterrupted() if trained else nullcontext(), lock:
                for adapter in trained:
                    adapter.train(for_now=True)
                self.active.enter(block)
            self.follow_labels()
            yield
        finally:
            try:
                with uninterrupted() if trained else nullcontext():
                    self._leave(block)
            except KeyboardInterrupt:  # masking it where nothing trains would take as long as all the rest
                self._leave(block)
                raise

    def _leave(self, block: Block) -> None:
        """End a block. What required gradients for the block alone is frozen, unless a graph still holds it."""
        with lock:
            self.active.leave(block)
            if self.attached:
                self._freeze_what_need_not_train(None)
        if self.attached:
            self.follow_labels()

    def check_not_merged(self, names: Iterable[str]) -> None:
        """Raise `StateError` if one of these adapters is merged."""
        for name in names:
            if name in self.active.merged:
                raise StateError(f"Adapter {name!r} is merged into the weights. Call unmerge() first.")

    def check_not_per_sample(self, call: str) -> None:
        """Raise `StateError` in a `per_sample` block."""
        if self.active.state.rows is not None:
            raise StateError(
                f"{call} would change which adapters act, but per_sample chooses them for each row. Leave its block "
                "first."
            )

    def _trained_in(self, state: State) -> list[Adapter]:
        """The adapters that act and train in this state, after the check that they would train in all processes."""
        trained = [self.adapters[name] for name in state.trains if name in state.names]
        for adapter in trained:
            check_averaged(self.model, adapter)
        if trained:
            reshard(self.model)  # FSDP2 goes by `requires_grad` of its shards
        return trained

    def _freeze_what_need_not_train(self, trained: Collection[str] | None) -> None:
        """Freeze parameters that trained for a block or a graph that is over.

        Args:
            trained: adapters that trained until now. All of theirs is frozen, and all that a user unfroze. `None`: a
                block has ended, which freezes nothing else.
        """
        reshard(self.model)
        needed = {name for state in self.active.states() for name in state.trains}
        for name, adapter in self.adapters.items():
            if name in needed:
                continue
            if trained is not None and (name in trained or adapter.trains_for_now or adapter.may_train()):
                adapter.freeze(adapter.parameters())
            elif adapter.trains_for_now:
                adapter.freeze(adapter.trains_for_now)

    def return_point(self) -> Callable[[], None]:
        """A function that restores what acts and trains now."""
        before, merged = self.active.state, self.active.merged
        heads = before.heads
        trained = [p for adapter in self.adapters.values() for p in adapter.parameters() if p.requires_grad]

        def restore() -> None:
            with lock:
                gradients.enable(trained)
                self.active.set_merged(merged, tuple(name for name in heads if name in merged))
                before.heads = heads
                self.active.become(before)
            self.follow_labels()

        return restore

    def set_merged(self, adapters: Sequence[Adapter], merged: tuple[str, ...], heads: tuple[str, ...]) -> None:
        """These adapters are in the weights now. They act nowhere else, but the heads of all merged ones do.

        Args:
            merged: all merged adapters.
            heads: the adapters that provide the acting heads.
        """
        reshard(self.model)
        with lock:
            self.active.set_merged(merged, tuple(name for name in heads if name in merged))
            own = self.active.state
            if own.rows is None:
                own.heads = heads
            for adapter in adapters:
                adapter.trained_before = []
                adapter.freeze(adapter.parameters())
        self.follow_labels()

    def set_unmerged(self, adapters: Sequence[Adapter]) -> None:
        """These adapters, all that were merged, are not in the weights any more."""
        with lock:
            self.active.set_merged((), ())
            for adapter in adapters:
                adapter.train_again()
                if adapter.name in self.active.default.trains:
                    adapter.trains_for_now = []
        self.follow_labels()

    # The label set

    @property
    def labels(self) -> LabelSet | None:
        """The model's own label set, which its user may change while the config has no adapter's."""
        if self.labels_of is None:
            self._labels = LabelSet.of(self.model)
        return self._labels

    def follow_labels(self) -> None:
        """Give the model's config the label set of the head that acts."""
        owner = self._labels_owner(self.active.state.heads)
        base = self.labels if owner != self.labels_of else None
        if base is None:
            return
        with uninterrupted():
            self.keep_labels()
            wanted = base if owner is None else self.adapters[owner].labels
            assert wanted is not None
            wanted.apply(self.model)
            self.labels_of = owner

    def keep_labels(self) -> None:
        """Note what users, and transformers at the first loss, changed in the label set that is in the config now."""
        owner = None if self.labels_of is None else self.adapters.get(self.labels_of)
        now = LabelSet.of(self.model)
        if owner is not None and owner.labels is not None and now is not None:
            owner.labels = now if len(now.id2label) == len(owner.labels.id2label) else owner.labels

    def _labels_owner(self, heads: tuple[str, ...]) -> str | None:
        return next((name for name in reversed(heads) if self.adapters[name].labels is not None), None)

    # Notes

    def what_changed(self, names: Collection[str]) -> tuple[str, str]:
        """The first of these adapters that does not act any more at some module, and a sentence about it.

        Both are empty if all of them act everywhere.
        """
        paths_now = BaseModules(self.model).paths_of if names else {}
        for name in names:
            changed = self.adapters[name].changed(paths_now)
            if changed:
                (path, what), *more = changed.items()
                others = f" (and {len(more)} more: {', '.join(repr(p) for p, _ in more[:3])})" if more else ""
                text = f"{path!r}{others} {what} since adapter {name!r} was added, so the adapter does not act there."
                return name, text
        return "", ""

    def check_unchanged(self, call: str, names: Collection[str]) -> None:
        """Raise `StateError` if one of these adapters does not act any more at some module."""
        name, changed = self.what_changed(names)
        if changed:
            raise StateError(
                f"{call} is refused: {changed} Add it again: adapters.remove({name!r}), then add or load it on the "
                f"model as it is now. adapters.save({name!r}, folder) keeps what was trained."
            )

    def never_ran(self, adapter: Adapter) -> list[str]:
        """A note if nothing called or read some of the adapter's layers since it was activated, while others ran."""
        state = self.active.state
        if state.rows is not None or not state.plans or adapter.name not in {*state.names, *state.heads}:
            return []
        idle = [path for path, host in adapter.hosts.items() if id(host) not in state.plans]
        if not idle:
            return []
        return [
            f"{len(idle)} of its {len(adapter.hosts)} layers never ran since it was activated, such as {idle[0]!r}. If "
            "the model reads their weights instead of calling them, declare the module that does: ak.declare_reader"
        ]

    def notes_for_file(self, adapter: Adapter) -> list[str]:
        """What someone who saves this adapter should know about what its file will not show."""
        state, notes = self.active.state, self.never_ran(adapter)
        strength = state.strengths.get(adapter.name, 1.0) if adapter.name in state.names else 1.0
        if strength != 1.0 and adapter.trains():
            by_layer = isinstance(strength, Mapping)
            acts, value = (
                ("strengths by layer", "{...}") if by_layer else (f"a strength of {strength:g}", f"{strength:g}")
            )
            notes.append(
                f"it trains with {acts}, which its file does not hold, so it acts with 1 when it is loaded. Then call "
                f"activate({adapter.name!r}, strengths={{{adapter.name!r}: {value}}})"
            )
        return notes

    def notes(self, adapter: Adapter, modules: BaseModules) -> list[str]:
        """What a user who adds this adapter should know about the model."""
        notes = [
            f"the vocabulary was resized, so the adapter's file will hold {path!r} too (save(embeddings=False) leaves "
            "it out)"
            for path in resized_tables(modules, adapter.heads)
        ]
        norms = [
            paths[0]
            for module, paths in modules.paths_of.items()
            if isinstance(module, nn.modules.batchnorm._BatchNorm)
            and module.track_running_stats
            and inside(paths[0], adapter.heads) is None
        ]
        if norms:
            notes.append(
                f"{len(norms)} batch norms, such as {norms[0]!r}, update their running statistics in training mode. "
                "These are the base's and are not saved with the adapter: keep the batch norms in eval mode, or name "
                "them in modules_to_save."
            )
        stacks = _stacked_matrices(modules) if adapter.config.target_modules == ALL_LINEAR else {}
        share = size_of(p for module in stacks.values() for p in module._parameters.values() if p is not None)
        base = size_of({p for _, p in base_parameters(self.model)}) if stacks else 0
        if share > 0.05 * base:
            path, first = next(iter(stacks.items()))
            notes.append(
                f"{ALL_LINEAR!r} leaves out {counted(len(stacks), 'module')} with stacked matrices, such as the "
                f"experts of a mixture, {share / base:.0%} of the base: no layer kind adapts them. The first is "
                f"{path!r}, a {type(first).__name__}"
            )
        return notes


def _stacked_matrices(modules: BaseModules) -> dict[str, nn.Module]:
    """The modules by path whose parameters hold several matrices each, and that no layer kind knows."""
    return {
        paths[0]: module
        for module, paths in modules.paths_of.items()
        if any(p is not None and p.dim() == 3 and p.shape[0] > 1 for p in module._parameters.values())
        and default_registry.kind_of(module) is None
    }
