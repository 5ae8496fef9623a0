"""Adapters: all adapters of one model, and everything one does with them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from adapterkit.combining import (
    Choices,
    Space,
    Workspace,
    check_asked,
    check_same_base,
    check_sources,
    extracted,
    mix,
    module_of,
    same_layer,
    wanted_layers,
)
from adapterkit.contract import ATTRIBUTE, AdapterConfig, MajoritySign, default_registry
from adapterkit.errors import AdapterWarning, CheckpointError, ConfigError, StateError, unknown
from adapterkit.files import (
    adapter_folder,
    load_adapter,
    local_path,
    match_adapter,
    read,
    refuse,
    save_adapter,
    swapped_config,
    to_file,
    values_to_swap,
)
from adapterkit.forward import Active, State, lock
from adapterkit.integrations import Loader, install, uninstall
from adapterkit.merging import (
    Done,
    Merged,
    Parting,
    carry_out,
    check_in_memory,
    give_back,
    parted_names,
    plan,
    take_back,
    take_heads,
)
from adapterkit.model import (
    KEPT,
    Adapter,
    BaseModules,
    Host,
    LabelSet,
    LayerBuilder,
    acting_heads,
    build_adapter,
    copy_head,
    inner_model,
    resize_output,
    resized_tables,
    select_on,
    tables,
)
from adapterkit.results import AddReport, CombineReport, LoadReport, Status, SwapReport
from adapterkit.rows import Batch, Rows, RowState, check_paths
from adapterkit.tensors import (
    check_averaged,
    check_can_grow,
    check_can_replace,
    gathered,
    gradients,
    has_fsdp1,
    put,
    refuse_fsdp1,
    reshard,
    size_of,
    uninterrupted,
    watch_wrappers,
)

if TYPE_CHECKING:
    from adapterkit.report import Report


def attach(model: nn.Module) -> Adapters:
    """The adapters of this model: made at the first call, the same object at every later one.

    Changes nothing by itself. A model wrapped by `torch.compile`, `DistributedDataParallel` or DeepSpeed's engine has
    the adapters of the model inside; torch's `AveragedModel` those of its copy.

    Attach to the whole model, not to a model inside it: the outer model's `save_pretrained` and `from_pretrained` would
    not know of the adapters. A transformers model warns when it is saved so.

    Raises:
        ConfigError: not a module.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"attach needs a torch.nn.Module, not a {type(model).__name__}.")
    watch_wrappers()
    model = inner_model(model)
    found = model.__dict__.get(ATTRIBUTE)
    if found is None:
        found = model.__dict__[ATTRIBUTE] = Adapters(model)
    assert isinstance(found, Adapters)
    return found


class Adapters:
    """The adapters of one model. Made by `attach`.

    A call that raises has changed nothing.
    """

    # What there is

    def __init__(self, model: nn.Module) -> None:
        self._adapters: dict[str, Adapter] = {}
        self._active = Active(self._adapters)
        self._merged = Merged()
        self._host: Host | None = Host(model)
        self._loader: Loader | None = None

    @property
    def model(self) -> nn.Module:
        """The adapted model."""
        return self._live.model

    @property
    def names(self) -> tuple[str, ...]:
        """Every adapter, in the order they were added."""
        return tuple(self._adapters)

    @property
    def active(self) -> tuple[str, ...]:
        """The adapters that act now; the first is the innermost."""
        return self._active.names

    def __contains__(self, name: object) -> bool:
        return name in self._adapters

    def __len__(self) -> int:
        return len(self._adapters)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __repr__(self) -> str:
        if self._host is None:
            return "<Adapters, detached>"
        return f"<Adapters of {type(self.model).__name__}: {', '.join(map(repr, self.names)) or 'none'}>"

    def config(self, name: str) -> AdapterConfig:
        """The config of an adapter."""
        return self._adapter(name).config

    def parameters(self, name: str) -> Iterator[nn.Parameter]:
        """The parameters an adapter trains: its layers', its heads', its biases' and those that its layers share."""
        return (parameter for _, parameter in self.named_parameters(name))

    def named_parameters(self, name: str) -> Iterator[tuple[str, nn.Parameter]]:
        """The same with their names: `<module path>.<parameter>`, or `<parameter>` of those that layers share."""
        adapter = self._adapter(name)
        reshard(self.model)  # FSDP2 leaves copies in place after a forward, which an optimizer must not get
        return adapter.named_parameters()

    def status(self) -> Status:
        """A table of the adapters; prints as one.

        `active` is what acts in this thread. `trainable` is what the parameters' own `requires_grad` say: where only
        some of an adapter's require gradients, it prints how many. Notes say where an adapter does not act any more,
        because the module there was replaced since, and where nothing called or read an adapted layer since its
        adapter was activated (compiled forwards are not seen).
        """
        reshard(self.model)
        part = ("FullyShardedDataParallel: the parameters are those of this process",) if has_fsdp1(self.model) else ()
        return Status(
            tuple(
                adapter.status(
                    active=name in self.active,
                    merged=name in self._merged.names,
                    notes=(
                        *part,
                        *(f"{path!r} {what} since" for path, what in self._live.changes(adapter).items()),
                        *self._never_ran(adapter),
                    ),
                )
                for name, adapter in self._adapters.items()
            )
        )

    def _never_ran(self, adapter: Adapter) -> list[str]:
        """A note if nothing called or read some of the adapter's layers since it was activated, while others ran."""
        state = self._active.state
        if state.rows is not None or not state.plans or adapter.name not in {*state.names, *state.heads}:
            return []
        idle = [path for path, host in adapter.hosts.items() if id(host) not in state.plans]
        if not idle:
            return []
        return [
            f"{len(idle)} of its {len(adapter.hosts)} layers never ran since it was activated, such as {idle[0]!r}. If "
            "the model reads their weights instead of calling them, declare the module that does: ak.declare_reader"
        ]

    @property
    def _live(self) -> Host:
        if self._host is None:
            raise StateError("These adapters were detached; call ak.attach(model) for new ones.")
        return self._host

    def _check_live(self) -> None:
        _ = self._live

    def _adapter(self, name: str) -> Adapter:
        self._check_live()
        if not isinstance(name, str) or name not in self._adapters:
            raise unknown("adapter", name, self._adapters)
        return self._adapters[name]

    def _check_new_name(self, name: object, *, grows: bool = True) -> None:
        if not isinstance(name, str) or not name or "." in name:
            raise ConfigError(f"{name!r} cannot be an adapter's name: it must be text, not empty, without a dot.")
        self._check_live()
        if name in self._adapters:
            raise ConfigError(f"There is an adapter {name!r} already. Remove it first, or choose another name.")
        if grows:
            check_can_grow(self.model, name)

    def _gathered(self, adapters: Iterable[Adapter], *, writing: bool = False) -> AbstractContextManager[None]:
        """See `gathered`, for everything that is these adapters'."""
        return gathered(self.model, (m for adapter in adapters for m in adapter.modules()), writing=writing)

    def _check_heads_not_merged(self, name: str) -> None:
        if name in self._merged.heads:
            raise StateError(
                f"Adapter {name!r} is merged, part of it into its own copy of a module, which its file must hold "
                "without that. Call unmerge() first."
            )

    def _check_not_merged(self, name: str) -> None:
        if name in self._merged.names:
            raise StateError(f"Adapter {name!r} is merged into the weights. Call unmerge() first.")

    def _check_present(self, call: str, *names: str) -> None:
        """Refuse a call for adapters whose modules are not the model's any more."""
        for name in names:
            changed = self._changed(name)
            if changed:
                raise StateError(
                    f"{call} is refused: {changed} Add it again: adapters.remove({name!r}), then add or load it on the "
                    f"model as it is now. adapters.save({name!r}, folder) keeps what was trained."
                )

    def _warn_if_changed(self, name: str, advice: str) -> None:
        changed = self._changed(name)
        if changed:
            warnings.warn(f"{changed} {advice}", AdapterWarning, stacklevel=3)

    def _changed(self, name: str) -> str:
        """What became of the modules of an adapter, as a sentence; empty if they are what they were."""
        changes = self._live.changes(self._adapter(name))
        if not changes:
            return ""
        (path, what), *more = changes.items()
        others = f" (and {len(more)} more: {', '.join(repr(p) for p, _ in more[:3])})" if more else ""
        return f"{path!r}{others} {what} since adapter {name!r} was added, so the adapter does not act there."

    def _check_not_per_sample(self, call: str) -> None:
        if self._active.state.rows is not None:
            raise StateError(
                f"{call} would change which adapters act, and per_sample has said that for each row. Leave its block "
                "first."
            )

    # Which adapters act

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
        adapters, acting = self._chosen("activate", names, heads, trainable)
        with uninterrupted(), lock:
            block, before = self._active.in_block, self._active.state
            for adapter in adapters if trainable else ():
                adapter.train(for_now=block)
            trains = names if trainable else ()
            state = State(
                names, acting, trains, constant=block and not trainable, active_when_merged=before.active_when_merged
            )
            state.before_first = lambda: self._check_present("activate", *state.names)
            self._active.become(state)
            self._settle(None if block else before.trains)
            if not trainable and any(adapter.trains_for_now for adapter in adapters):
                state.constant = True
            self._live.follow_labels(self._adapters, acting)

    @contextmanager
    def activated(self, *names: str, trainable: bool = True, heads: str | None = None) -> Iterator[None]:
        """`activate` for the length of a `with` block, in this thread; afterwards all is as it was before.

        Other threads do not notice, but those that are started in the block: they act as it does as long as they live.
        So do tasks given to a `ThreadPoolExecutor` in it. Tasks of one asyncio loop share a thread, and so its blocks.
        A `backward` may come after the block. No `requires_grad` is taken away in a block: with `trainable=False` the
        adapters act as constants.
        """
        adapters, acting = self._chosen("activated", names, heads, trainable)
        before = self._active.state.active_when_merged
        state = State(names, acting, names if trainable else (), constant=not trainable, active_when_merged=before)
        state.before_first = lambda: self._check_present("activated", *state.names)
        with self._block(state, adapters if trainable else ()):
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
    def _block(self, state: State, trained: Collection[Adapter]) -> Iterator[None]:
        """What `state` says acts in this thread, and these adapters train, until the end."""
        self._check_trainable(trained)
        with lock:
            for adapter in trained:
                adapter.train(for_now=True)
            block = self._active.enter(state)
        try:
            self._live.follow_labels(self._adapters, state.heads)
            yield
        finally:
            with lock:
                self._active.leave(block)
                self._settle()
            if self._host is not None:  # else detached meanwhile
                self._live.follow_labels(self._adapters, self._active.heads)

    def _chosen(
        self, call: str, names: tuple[str, ...], heads: str | None, trainable: bool
    ) -> tuple[list[Adapter], tuple[str, ...]]:
        """These adapters, and whose heads act with them."""
        adapters = [self._adapter(name) for name in names]
        if len(set(names)) < len(names):
            raise ConfigError(f"{call}{names!r} names an adapter twice.")
        for name in names:
            self._check_not_merged(name)
        acting = acting_heads([*map(self._adapter, self._merged.names), *adapters], heads)
        if trainable:
            self._check_present(call, *names)
            self._check_trainable(adapters)
        return adapters, acting

    def _check_trainable(self, adapters: Collection[Adapter]) -> None:
        for adapter in adapters:
            check_averaged(self.model, adapter)
        reshard(self.model)  # the flags of its shards are those that FSDP2 goes by

    def _trained(self) -> list[tuple[Adapter, list[nn.Parameter]]]:
        """What requires gradients now."""
        return [(adapter, [p for p in adapter.parameters() if p.requires_grad]) for adapter in self._adapters.values()]

    def _return_to(self, before: State, trained: list[tuple[Adapter, list[nn.Parameter]]]) -> None:
        """Undo `activate`."""
        with lock:
            for _, parameters in trained:
                gradients.enable(parameters)
            self._active.become(before)
        self._live.follow_labels(self._adapters, before.heads)

    def _set_merged(self, adapters: Sequence[Adapter], acting: tuple[str, ...]) -> None:
        """These are in the weights now: they act nowhere else, and the heads of all that are act everywhere."""
        merged, names = self._merged.names, tuple(adapter.name for adapter in adapters)
        heads = tuple(name for name in acting if name in merged)
        reshard(self.model)
        with lock:
            own = self._active.state
            self._active.each(lambda state: state.merged(names, heads))
            if own.rows is None:
                self._active.state.heads = acting
            self._active.merged = merged
            for adapter in adapters:
                adapter.trained_before = []
                adapter.freeze(adapter.parameters())
        self._live.follow_labels(self._adapters, self._active.heads)

    def _set_unmerged(self, adapters: Sequence[Adapter]) -> None:
        """Nothing is merged any more."""
        with lock:
            self._active.each(lambda state: state.unmerged([r.name for r in adapters if r.trained_before]))
            self._active.merged = ()
            for adapter in adapters:
                adapter.train_again()
                if adapter.name in self._active.default.trains:
                    adapter.trains_for_now = []
        self._live.follow_labels(self._adapters, self._active.heads)

    def _settle(self, trained: Collection[str] | None = None) -> None:
        """Take `requires_grad` from parameters to which it was lent and that need it no more.

        Args:
            trained: adapters that trained up to now; everything of theirs, and of others that may train: `None`: not.
        """
        if self._host is None:  # detached meanwhile
            return
        reshard(self.model)
        wanted = {name for state in self._active.states() for name in state.trains}
        for name, adapter in self._adapters.items():
            if name in wanted:
                continue
            if trained is not None and (name in trained or adapter.trains_for_now or adapter.may_train()):
                adapter.freeze(adapter.parameters())
            elif adapter.trains_for_now:
                adapter.freeze(adapter.trains_for_now)

    @contextmanager
    def per_sample(
        self, names: Sequence[str | None], *, trainable: bool = False, batch_first: bool = False
    ) -> Iterator[None]:
        """A different adapter, or none, for each row of a batch, for the length of a `with` block.

        Equal to running each row by itself with its adapter; heads and trained biases go with their rows, and rows of
        `None` are the bare model's. Additive adapters whose method has `AdapterLayer.stacked` cost the same however
        many there are; with other methods the adapted layers run on the rows of one adapter after another. A batch
        may have each row several times, one after another, as `generate` makes it for beams. Adapters that are merged
        act on all rows. The block is its thread's, and a `backward` may come after it (see `activated`).

        Args:
            names: an adapter or `None` for each row.
            trainable: whether their parameters require gradients; else they act as constants.
            batch_first: vouch that the first dimension of every adapted layer's input is the batch, each row's
                entries together; else this is proven for each layer (see `adapterkit.rows.batch.Batch`), or refused.

        Raises:
            UnknownNameError: no such adapter.
            ConfigError: no rows; in a forward: a batch of another size, or heads whose outputs differ in shape.
            StateError: an adapter that is merged; in the block or in a forward: rows that cannot be told apart.
        """
        rows = self._rows(names, trusted=batch_first)
        self._check_present("per_sample", *rows.adapters)
        adapters = [self._adapters[name] for name in rows.adapters]
        merged = tuple(n for n in self._active.heads if n in self._merged.names)
        heads = merged + tuple(adapter.name for adapter in adapters if adapter.heads)
        batch = Batch(self._live.watch(self._active))
        state = RowState(rows, batch, heads, merged, trainable=trainable, constant=not trainable)
        with self._block(state, adapters if trainable else ()):
            yield

    def _rows(self, names: Sequence[str | None], *, trusted: bool) -> Rows:
        if isinstance(names, str) or not isinstance(names, Sequence) or not names:
            raise ConfigError(f"per_sample needs an adapter's name or None for each row of the batch, not {names!r}.")
        rows = Rows([None if name is None else self._adapter(name).name for name in names], trusted=trusted)
        for name in rows.adapters:
            self._check_not_merged(name)
        if not (trusted or rows.uniform):
            self._live.watch(self._active).check_order()
            for name in rows.adapters:
                check_paths(name, self._adapter(name).layers)
        return rows

    # Adding and removing

    @torch.inference_mode(False)
    def add(
        self,
        name: str,
        config: AdapterConfig,
        *,
        num_labels: int | None = None,
        id2label: Mapping[int, str] | None = None,
        activate: bool = True,
    ) -> AddReport:
        """Add a new adapter. The first one freezes the base; `detach` gives that back.

        While an adapter is on a parametrized layer, torch's `remove_parametrizations` cannot give the layer its class
        back, and raises `AttributeError`: save, `detach`, remove the parametrization and load again.

        Args:
            name: any text without a dot.
            config: says the method, the layers and the sizes.
            num_labels, id2label: the label set of the adapter's own head, whose output layer is then made
                with that many rows. `None`: the model's own.
            activate: make it the one active adapter, trainable.

        Raises:
            ConfigError: a name that is taken or not allowed, or a malformed config.
            SelectionError: the config selects nothing here, or something that cannot be adapted.
            PluginError: the method's plugin failed.
        """
        self._check_new_name(name)
        method = default_registry.method_of(config)
        labels = LabelSet.chosen(num_labels, id2label)
        modules = BaseModules(self.model)
        selection = select_on(modules, config)
        adapter, notes = build_adapter(modules, name, LayerBuilder(method, config), selection, self._active)
        notes += self._live.notes(adapter, modules)
        adapter.labels = self._own_labels(adapter, labels)
        self._warn_unmatched(selection.unmatched)
        self._begin(adapter, activate=activate, trainable=activate)
        parameters = size_of(adapter.parameters())
        heads = tuple(adapter.heads)
        return AddReport(name, selection.paths, heads, parameters, self._live.size, selection.unmatched, tuple(notes))

    @uninterrupted()
    def remove(self, name: str) -> None:
        """Remove an adapter and all that was its own. If it was active it no longer is."""
        adapter = self._adapter(name)
        self._check_not_merged(name)
        self._check_not_per_sample("remove")
        self._active.remove(name)
        self._live.follow_labels(self._adapters, self._active.heads)
        adapter.uninstall()
        self._live.forget(adapter)
        del self._adapters[name]

    @uninterrupted()
    def rename(self, old: str, new: str) -> None:
        """Give an adapter another name."""
        adapter = self._adapter(old)
        self._check_not_merged(old)
        self._check_not_per_sample("rename")
        self._check_new_name(new, grows=False)
        self._check_present("rename", old)
        self._live.forget(adapter)
        adapter.uninstall()
        adapter.name = new
        adapter.install(self._active)
        self._live.remember(adapter)
        adapters = [*self._adapters.values()]
        self._adapters.clear()
        self._adapters.update((adapter.name, adapter) for adapter in adapters)
        self._active.rename(old, new)
        if self._live.labels_of == old:
            self._live.labels_of = new

    @torch.inference_mode(False)
    def copy(self, source: str, target: str) -> None:
        """Add a copy of an adapter under another name, independent of it, and not active."""
        adapter = self._adapter(source)
        self._check_new_name(target)
        self._check_present("copy", source)
        # The modules they are on are the model's and stay; the rest is the adapter's own.
        memo = {id(module): module for module in (*adapter.hosts.values(), *adapter.readers)}
        with self._gathered([adapter]):
            duplicate = copy.deepcopy(adapter, memo)
        duplicate.name = target
        duplicate.trains_for_now, duplicate.trained_before = [], []
        self._install(duplicate)

    def _begin(self, adapter: Adapter, *, activate: bool, trainable: bool) -> None:
        """Install an adapter and let it act, or neither."""
        with uninterrupted():
            self._install(adapter, train=activate and trainable)
            try:
                if activate:
                    self.activate(adapter.name, trainable=trainable)
                elif trainable:
                    adapter.train(for_now=False)
            except BaseException:
                self.remove(adapter.name)
                raise

    @uninterrupted()
    def _install(self, adapter: Adapter, *, train: bool = False) -> None:
        if train:
            check_averaged(self.model, adapter)
        if adapter.biases and self._merged.names:
            raise StateError(
                f"Adapter {adapter.name!r} trains biases, which start from the base's; others' are merged into those "
                "now. Call unmerge() first."
            )
        self._live.join(adapter)  # which may fail, as what comes after may not
        if not self._adapters:
            self._live.freeze()
        if self._loader is None:
            self._loader = install(self.model)
        for parameter in adapter.parameters():
            parameter.requires_grad_(False)
        adapter.install(self._active)
        self._adapters[adapter.name] = adapter
        self._live.remember(adapter)

    def _own_labels(self, adapter: Adapter, chosen: LabelSet | None) -> LabelSet | None:
        """The new adapter's label set; its head's output layer is resized to it."""
        base = self._live.labels
        if chosen is None:
            return base if adapter.heads else None
        if not adapter.heads or base is None:
            why = "it has no head (modules_to_save)" if base is not None else "the model's config has no labels"
            raise ConfigError(f"num_labels and id2label set the size of an adapter's head, but {why}.")
        old, new = len(base.id2label), len(chosen.id2label)
        if old != new:
            resize_output(list(adapter.heads.values()), old, new, self.model)
        return chosen

    @staticmethod
    def _warn_unmatched(unmatched: tuple[str, ...]) -> None:
        if unmatched:
            warnings.warn(
                f"These entries of the config matched nothing: {', '.join(unmatched)}.",
                AdapterWarning,
                stacklevel=4,
            )

    # Tensors and files

    def state_dict(self, name: str, source: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """An adapter's tensors under the keys they have in a file.

        Args:
            source: a full state dict of the adapted model to take them from, such as FSDP or a `Trainer`
                hands over; the model's own tensors if `None`.

        Raises:
            CheckpointError: `source` lacks some of them.
        """
        adapter = self._adapter(name)
        self._check_heads_not_merged(name)
        self._warn_if_changed(name, KEPT)
        with self._gathered([adapter] if source is None else []):
            return to_file(adapter, default_registry.method_of(adapter.config), source)

    @torch.inference_mode(False)
    def load_state_dict(self, name: str, tensors: Mapping[str, Tensor], *, strict: bool = True) -> LoadReport:
        """Copy tensors into an existing adapter.

        Args:
            tensors: keys as in a file, or a full state dict of an adapted model.
            strict: raise if anything is missing, unexpected or mismatched; else warn, and load what fits.

        Raises:
            CheckpointError: with `strict`, if something does not fit; nothing has changed then.
        """
        adapter = self._adapter(name)
        self._check_not_merged(name)
        self._check_present("load_state_dict", name)
        with self._live.writing(adapter), self._gathered([adapter], writing=True):
            values, report = match_adapter(adapter, default_registry.method_of(adapter.config), self.model, tensors)
            if not report.ok:
                if strict:
                    refuse(report, name, "The state dict")
                warnings.warn(str(report), AdapterWarning, stacklevel=3)
            for slot, tensor in values:
                if slot.tensor.shape != tensor.shape:
                    check_can_replace(self.model, slot.key)
            put(values)
        return report

    def save(
        self,
        name: str,
        folder: str | Path,
        *,
        source: Mapping[str, Tensor] | None = None,
        embeddings: bool | None = None,
    ) -> Path:
        """Write an adapter to a folder, in PEFT's format, all or nothing.

        A warning says if some of its layers never ran since it was activated, so that nothing trained there.

        Args:
            source: a full state dict of the adapted model to take the tensors from, as for `state_dict`.
            embeddings: whether the model's embeddings, input and output, go into the file, for `load` and for PEFT.
                `None`: if the vocabulary was resized (`resize_token_embeddings`), by the config of the base where
                that is on this machine, and else by what the resizing left on the model.

        Returns:
            The folder.

        Raises:
            SaveError: it cannot be written there; what was there is untouched.
            StateError: a part of what the file must hold is merged now.
        """
        path = local_path(folder)
        adapter = self._adapter(name)
        self._check_heads_not_merged(name)
        self._warn_if_changed(name, KEPT)
        if self._merged.kept and embeddings is not False:
            modules = BaseModules(self.model)
            for place, table in (tables if embeddings else resized_tables)(modules, adapter.heads).items():
                if table in self._merged.kept:
                    raise StateError(
                        f"The file must hold {place!r}, because the vocabulary was resized, and an adapter is merged "
                        "into it. Call unmerge() first."
                    )
        save_adapter(adapter, self.model, path, source, embeddings=embeddings)
        for note in self._never_ran(adapter):
            warnings.warn(f"Adapter {name!r}: {note}.", AdapterWarning, stacklevel=2)
        return path

    @torch.inference_mode(False)
    def load(  # noqa: PLR0913 - the last four are the hub's
        self,
        source: str | Path,
        name: str,
        *,
        activate: bool = True,
        trainable: bool = False,
        strict: bool = True,
        dtype: torch.dtype | str | None = None,
        component: str | None = None,
        revision: str | None = None,
        subfolder: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
    ) -> LoadReport:
        """Add the adapter that a folder, a repository of the hub, or a file of another program holds.

        Args:
            source: a folder with `adapter_config.json` and the weights, or a hub id such as `"user/name"`; or a file
                that kohya-ss's programs, LyCORIS or diffusers wrote, of any method that knows its keys.
            name: what it is called here.
            activate: make it the one active adapter.
            trainable: whether it is to be trained further: its parameters require gradients. With `activate=False` they
                do so, too, until others are activated, and where `activated` or `per_sample` let it act it trains.
            strict: raise if anything is missing, unexpected or mismatched; else warn, and load what fits.
            dtype: of its layers; `None` follows the model, but float32 for a half-precision one; `"file"`
                keeps the file's.
            component: of a file for a whole pipeline, the part that this model is, as its keys begin: `"unet"`,
                `"lora_te1"`. Needed only where several fit.
            revision, subfolder, cache_dir, token: where to look on the hub.

        Raises:
            CheckpointError: damaged or foreign files, or tensors that do not fit.
            UnknownNameError: no plugin provides its method.
        """
        self._check_new_name(name)
        if dtype not in (None, "file") and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ConfigError(f"dtype = {dtype!r} must be a floating torch.dtype, 'file' or None.")
        folder = adapter_folder(source, revision=revision, subfolder=subfolder, cache_dir=cache_dir, token=token)
        adapter, report = load_adapter(
            self.model, name, read(folder), self._active, strict=strict, dtype=dtype, component=component
        )
        self._begin(adapter, activate=activate, trainable=trainable)
        return report

    @torch.inference_mode(False)
    def swap(
        self,
        name: str,
        source: str | Path,
        *,
        component: str | None = None,
        revision: str | None = None,
        subfolder: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
    ) -> SwapReport:
        """Write what a folder, a repository of the hub or a file holds into an adapter that is there.

        Its parameters stay where they are in memory, and keep their shapes, so a model that is compiled is not
        compiled again. A smaller rank is filled up with zeros; another scaling is worked into the up factor, exactly
        if their ratio is a power of two. Layers that the file does not have change nothing afterwards. Heads, trained
        biases and the label set are the file's.

        The adapter's config keeps its own sizes, and says what its file holds: saved and loaded it gives the outputs
        of the adapter that was swapped in. Ranks that were filled up get no gradient.

        Args:
            source, component, revision, subfolder, cache_dir, token: as for `load`.

        Raises:
            CheckpointError: a file that is damaged, or that does not fit into this adapter: of another method, of a
                larger rank, with layers or heads that it has not, or with other shared tensors. Nothing has changed.
            StateError: the adapter is merged or offloaded.
        """
        adapter = self._adapter(name)
        self._check_not_merged(name)
        self._check_present("swap", name)
        refuse_fsdp1(self.model)
        folder = adapter_folder(source, revision=revision, subfolder=subfolder, cache_dir=cache_dir, token=token)
        other, report = load_adapter(
            self.model, name, read(folder), self._active, strict=True, dtype=None, component=component
        )
        with uninterrupted():
            with self._gathered([adapter], writing=True):
                try:
                    with torch.no_grad():
                        values = values_to_swap(adapter, other)
                except CheckpointError as error:
                    raise CheckpointError(
                        f"{folder} cannot be swapped into adapter {name!r}: {error}. Nothing was changed. Load it "
                        "under another name instead (adapters.load)."
                    ) from error
                put(values)
            adapter.config = swapped_config(adapter.config, other.config)
            adapter.labels = other.labels if adapter.heads else adapter.labels
            self._live.renew_labels(adapter)
        cleared = tuple(path for path in adapter.layers if path not in other.layers)
        return SwapReport(name, tuple(other.layers), cleared, tuple(adapter.heads), report.ignored)

    # Merging

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
        adapters = self._to_merge(names)
        self._check_not_per_sample("merge")
        self._check_present("merge", *names)
        if keep_base:
            self._check_not_edited("merge")
        rest = [self._adapter(n) for n in self.active if n not in names]
        if heads is None and set(names) <= set(self.active) and self._active.heads:
            heads = self._active.heads[-1]  # which one acts was settled when they were activated
        acting = acting_heads([*map(self._adapter, self.merged), *adapters, *rest], heads)
        refuse_fsdp1(self.model)
        reshard(self.model)  # copies that FSDP2 leaves in place would take the merge with them
        modules = BaseModules(self.model)
        changes = plan(adapters, modules, untie=untie)
        check_in_memory(changes)
        parting = Parting.of(self.model, parted_names(changes, modules))
        before, acted, trained = self._merged, self._active.state, self._trained()
        done, edited = Done(), before.edited
        with uninterrupted() as stop:
            try:
                carry_out(changes, done, safe=safe, keep_base=keep_base, stop=stop)
                self._live.part(parting)
                self._merged = before.joined(names, done, keep_base=keep_base)
                self._set_merged(adapters, acting)
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
            acting = [self._adapters[name] for name in self._active.heads]
            model, host = self.model, self._live
            parting = Parting.of(model, (), {p: n for adapter in acting for p, n in adapter.head_paths().items()})
            host.keep_labels()
            self._merged = Merged()
            take_heads(acting, model)
            parting.tell()
            return self.detach()

    def detach(self) -> nn.Module:
        """Remove every adapter and every trace of them: classes, parameters, hooks, `requires_grad`, labels.

        What is merged is unmerged first.

        Returns:
            The model, as it was before `attach`. This object is of no use afterwards.

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
        with uninterrupted():
            model = self.model
            for name in self.names:
                self.remove(name)
            self._live.restore()
            if self._loader is not None:
                uninstall(model, self._loader)
            del model.__dict__[ATTRIBUTE]
            self._host = None
            return model

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
            self._set_unmerged([self._adapters[name] for name in state.names])

    def _to_merge(self, names: tuple[str, ...]) -> list[Adapter]:
        adapters = [self._adapter(name) for name in names]
        if not names or len(set(names)) < len(names):
            raise ConfigError(f"merge{names!r} must name adapters, each once. There is {self.names}.")
        for name in names:
            self._check_not_merged(name)
        return adapters

    # Combining

    @torch.inference_mode(False)
    def combine(  # noqa: PLR0913 - three independent choices and what they need
        self,
        name: str,
        sources: Mapping[str, float],
        *,
        method: str = "linear",
        space: Space = "delta",
        rank: int | None = None,
        energy: float | None = None,
        to: str = "lora",
        heads: str | None = None,
        density: float | None = None,
        majority_sign_method: MajoritySign = "total",
        seed: int | None = None,
        isotropize: bool = False,
        same_base: bool = False,
    ) -> CombineReport:
        """Add an adapter that is a combination of others. It is not activated.

        With `method="linear"` in delta space the result is exactly `sum of w_i dW_i`, whatever the ranks and the
        (additive) methods of the sources. A target that only some sources have is combined from those.

        Args:
            name: of the new adapter.
            sources: the adapters and their weights; negative ones subtract.
            method: `"linear"`, `"ties"`, `"dare_linear"`, `"dare_ties"`, `"magnitude_prune"`, `"tsv"`, or what an
                extension adds.
            space: `"delta"` works on dW itself; `"core"` on its coordinates in the sources' common subspace (small
                matrices, no dense one); `"factors"` on A and B apart, which is what PEFT does.
            rank, energy: truncate the result optimally, to a rank or to a share of the squared singular
                values. A layer too small for the rank gets the largest that it can have; the report lists these.
                Neither: exact, ranks add up.
            to: the method of the result; one with the hook `from_factors`.
            heads: what becomes of the heads: an adapter's name, `"average"`, `"concat"` or `"drop"`.
            density, majority_sign_method, seed: for the methods that prune, elect signs and draw.
            isotropize: give the result's singular values their mean.
            same_base: combine even if the adapters' configs name different base models.

        Raises:
            ConfigError: arguments that make no sense; heads and no choice; adapters of different bases.
            UnknownNameError: no such adapter, method or space.
            UnsupportedError: an adapter whose change has no low-rank form.
            StateError: an adapter, or a result, with values that are not finite.
        """
        self._check_new_name(name)
        check_sources(sources)
        adapters = [self._adapter(source) for source in sources]
        self._check_present("combine", *sources)
        if not same_base:
            check_same_base(adapters)
        choices = Choices(
            method=method,
            space=space,
            rank=rank,
            energy=energy,
            to=to,
            heads=heads,
            density=density,
            majority_sign_method=majority_sign_method,
            seed=seed,
            isotropize=isotropize,
        )
        weights = [float(weight) for weight in sources.values()]
        with self._gathered(adapters):
            adapter, report = mix(name, adapters, weights, choices, Workspace(self.model, self._active))
        self._install(adapter)
        return report

    def convert(
        self, source: str, *, to: str, name: str, rank: int | None = None, energy: float | None = None
    ) -> CombineReport:
        """Add the same adapter in another method's form: exact, unless `rank` or `energy` truncates it.

        LoHa becomes LoRA of rank `r * r`, VeRA LoRA of its own rank, so that what knows only LoRA can serve them.

        Raises:
            UnsupportedError: the source has no low-rank form, or `to` cannot be made from one.
        """
        heads = source if self._adapter(source).heads else None
        return self.combine(name, {source: 1.0}, to=to, rank=rank, energy=energy, heads=heads)

    # Looking

    def report(self, *names: str, out: str | Path | None = None, title: str | None = None) -> Report:
        """A page to look at: which layers these adapters change most, which rank is enough, what can be merged.

        A notebook shows it; `print` gives its verdicts; `save(path)`, or `out=`, writes one self-contained HTML file.
        Nothing is changed, and no dense matrix is made. Sizes are relative to the base's weights where these are in
        memory.

        Args:
            names: the adapters; none: all of them.
            title: the page's.

        Raises:
            UnknownNameError: no such adapter.
            ConfigError: there is none, or one is named twice.
            StateError: values that are not finite, or on the meta device.
            UnsupportedError: matplotlib is not installed (the extra `report`).
            SaveError: the file cannot be written.
        """
        from adapterkit.report import Report, live_sources

        adapters = [self._adapter(name) for name in names or self.names]
        for name in names or self.names:
            self._warn_if_changed(name, "The report shows what was trained there, beside the base as it was.")
        with self._gathered(adapters):
            report = Report.of(live_sources(adapters, self._merged), title)
        if out is not None:
            report.save(out)
        return report


@torch.inference_mode(False)
@torch.no_grad()
def extract(  # noqa: PLR0913 - two models, a size, and the selection fields
    base: nn.Module,
    tuned: nn.Module,
    *,
    name: str = "extracted",
    rank: int | None = None,
    energy: float | None = None,
    target_modules: str | Sequence[str] = "all-linear",
    exclude_modules: str | Sequence[str] | None = None,
    modules_to_save: str | Sequence[str] | None = "auto",
    to: str = "lora",
) -> CombineReport:
    """Add to `base` the adapter of low rank that comes closest to `tuned`, a full fine-tune of it.

    At each target the best approximation of `W_tuned - W_base` in the Frobenius norm. Where both sides of the
    weight are longer than 1,024 and a rank is given, it is found by randomised subspace iteration (Halko et al.
    2011, arXiv 0909.4061). The report states each target's error, measured on the full difference. Biases that were
    trained too go into the adapter where its method has them. Save it with `ak.attach(base).save(name, folder)`.

    Args:
        base, tuned: two models of one architecture; both in memory.
        rank, energy: the size, one of them; see `Adapters.combine`.
        target_modules, exclude_modules: which layers.
        modules_to_save: modules taken over from `tuned` in full, such as its task head.
        to: the method of the result.

    Raises:
        SelectionError: nothing selected, or models that do not match.
        ConfigError: neither or both sizes, or a name that is taken.
        StateError: weights that are not in memory or not finite, or a base with something merged into it.
        UnsupportedError: a layer that computes something else than the plain product with its weight.
    """
    check_asked(rank, energy)
    adapters = attach(base)
    adapters._check_new_name(name)
    if adapters.merged:
        listed = ", ".join(map(repr, adapters.merged))
        raise StateError(f"The base's weights have {listed} merged into them. Call unmerge() first.")
    selection = wanted_layers(base, to, target_modules, exclude_modules, modules_to_save)
    heads = {path: copy_head(module_of(tuned, path), path) for path in selection.heads}
    labels = LabelSet.of(tuned) if heads else None
    space = Workspace(base, adapters._active)
    adapter, report = extracted(
        name, selection, lambda match: (match.module, same_layer(tuned, match)), rank, energy, to, heads, labels, space
    )
    adapters._install(adapter)
    return report
