"""Adapters: all adapters of one model, and everything one does with them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from adapterkit import persistence
from adapterkit.adapted import Active
from adapterkit.build import Builder
from adapterkit.config import AdapterConfig
from adapterkit.errors import AdapterWarning, ConfigError, StateError, unknown
from adapterkit.files import read_folder
from adapterkit.heads import resize_output
from adapterkit.host import Host
from adapterkit.hub import adapter_folder
from adapterkit.labels import LabelSet
from adapterkit.loading import fit, put, refuse, to_file
from adapterkit.record import AdapterRecord, acting_heads
from adapterkit.registry import default_registry
from adapterkit.reports import AddReport, LoadReport, Status
from adapterkit.selection import select

_ATTRIBUTE = "_adapterkit"
# Wrappers that only forward to the model inside: the adapters are the inner model's.
_WRAPPERS = {"OptimizedModule": "_orig_mod", "DistributedDataParallel": "module", "DataParallel": "module"}


def attach(model: nn.Module) -> Adapters:
    """The adapters of this model: made at the first call, the same object at every later one.

    Changes nothing by itself. A model wrapped by `torch.compile` or `DistributedDataParallel` has the
    adapters of the model inside.

    Raises:
        ConfigError: not a module.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"attach needs a torch.nn.Module, not a {type(model).__name__}.")
    inner = _WRAPPERS.get(type(model).__name__)
    if inner is not None and isinstance(model._modules.get(inner), nn.Module):
        return attach(getattr(model, inner))
    found = model.__dict__.get(_ATTRIBUTE)
    if found is None:
        found = model.__dict__[_ATTRIBUTE] = Adapters(model)
    assert isinstance(found, Adapters)
    return found


class Adapters:
    """The adapters of one model. Made by `attach`.

    A call that raises has changed nothing.
    """

    def __init__(self, model: nn.Module) -> None:
        self._records: dict[str, AdapterRecord] = {}
        self._active = Active()
        self._trainable: tuple[str, ...] = ()
        self._host: Host | None = Host(model)

    # What there is

    @property
    def model(self) -> nn.Module:
        """The adapted model."""
        return self._live.model

    @property
    def names(self) -> tuple[str, ...]:
        """Every adapter, in the order they were added."""
        return tuple(self._records)

    @property
    def active(self) -> tuple[str, ...]:
        """The adapters that act now; the first is the innermost."""
        return self._active.names

    def __contains__(self, name: object) -> bool:
        return name in self._records

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __repr__(self) -> str:
        return f"<Adapters of {type(self.model).__name__}: {', '.join(map(repr, self.names)) or 'none'}>"

    def config(self, name: str) -> AdapterConfig:
        """The config of an adapter."""
        return self._record(name).config

    def parameters(self, name: str) -> Iterator[nn.Parameter]:
        """The parameters an adapter trains: its layers', its heads' and its biases'."""
        return (parameter for _, parameter in self.named_parameters(name))

    def named_parameters(self, name: str) -> Iterator[tuple[str, nn.Parameter]]:
        """The same with their names, `<module path>.<parameter>`."""
        return self._record(name).named_parameters()

    def status(self) -> Status:
        """A table of the adapters; prints as one."""
        return Status(tuple(record.status(name in self.active) for name, record in self._records.items()))

    # Adding and removing

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
        selection = select(self.model, config)
        record, notes = Builder(self.model, method, config, selection).build(name, self._active)
        notes += self._live.notes(record)
        record.labels = self._own_labels(record, labels)
        self._warn_unmatched(selection.unmatched)
        self._install(record)
        if activate:
            self.activate(name)
        parameters = sum(p.numel() for _, p in record.named_parameters())
        heads = tuple(record.heads)
        return AddReport(name, selection.paths, heads, parameters, self._live.size, selection.unmatched, tuple(notes))

    def remove(self, name: str) -> None:
        """Remove an adapter and all that was its own. If it was active it no longer is."""
        record = self._record(name)
        self._set_active(*(tuple(n for n in names if n != name) for names in (self._active.names, self._active.heads)))
        self._trainable = tuple(n for n in self._trainable if n != name)
        record.uninstall()
        self._live.forget(record)
        del self._records[name]

    def rename(self, old: str, new: str) -> None:
        """Give an adapter another name."""
        record = self._record(old)
        self._check_new_name(new)
        self._live.forget(record)
        record.uninstall()
        record.name = new
        record.install(self._active)
        self._live.remember(record)
        self._records = {record.name: record for record in self._records.values()}
        swap = {old: new}
        self._active.names = tuple(swap.get(n, n) for n in self._active.names)
        self._active.heads = tuple(swap.get(n, n) for n in self._active.heads)
        self._trainable = tuple(swap.get(n, n) for n in self._trainable)
        self._live.labels_of = swap.get(self._live.labels_of or "", self._live.labels_of)

    def copy(self, source: str, target: str) -> None:
        """Add a copy of an adapter under another name, independent of it, and not active."""
        record = self._record(source)
        self._check_new_name(target)
        # The modules they are on are the model's and stay; the rest is the adapter's own.
        memo = {id(module): module for module in record.hosts.values()}
        duplicate = copy.deepcopy(record, memo)
        duplicate.name = target
        duplicate.set_trainable(False)
        self._install(duplicate)

    def detach(self) -> nn.Module:
        """Remove every adapter and every trace of them: classes, parameters, hooks, `requires_grad`, labels.

        Returns:
            The model, as it was before `attach`. This object is of no use afterwards.
        """
        model = self.model
        for name in self.names:
            self.remove(name)
        self._live.restore()
        del model.__dict__[_ATTRIBUTE]
        self._host = None
        return model

    # Which adapters act

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
        """
        records = [self._record(name) for name in names]
        if len(set(names)) < len(names):
            raise ConfigError(f"activate{names!r} names an adapter twice.")
        acting = acting_heads(records, heads)
        self._set_trainable(names if trainable else ())
        self._set_active(names, acting)

    @contextmanager
    def activated(self, *names: str, trainable: bool = True, heads: str | None = None) -> Iterator[None]:
        """`activate` for the length of a `with` block; afterwards all is as it was before."""
        before, before_heads, trained = self._active.names, self._active.heads, self._trainable
        self.activate(*names, trainable=trainable, heads=heads)
        try:
            yield
        finally:
            self._set_trainable(trained)
            self._set_active(before, before_heads)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The bare model, heads and label set included, for the length of a `with` block."""
        before, before_heads = self._active.names, self._active.heads
        self._set_active((), ())
        try:
            yield
        finally:
            self._set_active(before, before_heads)

    # Tensors and files

    def state_dict(self, name: str, source: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """An adapter's tensors under the keys they have in a file.

        Args:
            source: a full state dict of the adapted model to take them from, such as FSDP or a `Trainer`
                hands over; the model's own tensors if `None`.

        Raises:
            CheckpointError: `source` lacks some of them.
        """
        record = self._record(name)
        return to_file(record, default_registry.method_of(record.config), source)

    def load_state_dict(self, name: str, tensors: Mapping[str, Tensor], *, strict: bool = True) -> LoadReport:
        """Copy tensors into an existing adapter.

        Args:
            tensors: keys as in a file, or a full state dict of an adapted model.
            strict: raise if anything is missing, unexpected or mismatched; else warn, and load what fits.

        Raises:
            CheckpointError: with `strict`, if something does not fit; nothing has changed then.
        """
        record = self._record(name)
        found = fit(record, default_registry.method_of(record.config), self.model, tensors)
        if not found.report.ok:
            if strict:
                refuse(found.report, name, "The state dict")
            warnings.warn(str(found.report), AdapterWarning, stacklevel=2)
        put(found.values, assign=False)
        return found.report

    def save(self, name: str, folder: str | Path, *, source: Mapping[str, Tensor] | None = None) -> Path:
        """Write an adapter to a folder, in PEFT's format, all or nothing.

        Args:
            source: a full state dict of the adapted model to take the tensors from, as for `state_dict`.

        Returns:
            The folder.

        Raises:
            SaveError: it cannot be written there; what was there is untouched.
        """
        path = Path(folder).expanduser()
        persistence.save_record(self._record(name), self.model, path, source)
        return path

    def load(  # noqa: PLR0913 - the last four are the hub's
        self,
        source: str | Path,
        name: str,
        *,
        activate: bool = True,
        trainable: bool = False,
        strict: bool = True,
        dtype: torch.dtype | str | None = None,
        revision: str | None = None,
        subfolder: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
    ) -> LoadReport:
        """Add the adapter that a folder, or a repository of the hub, holds.

        Args:
            source: a folder with `adapter_config.json` and the weights, or a hub id such as `"user/name"`.
            name: what it is called here.
            activate: make it the one active adapter.
            trainable: whether it is to be trained further.
            strict: raise if anything is missing, unexpected or mismatched; else warn, and load what fits.
            dtype: of its layers; `None` follows the model, but float32 for a half-precision one; `"file"`
                keeps the file's.
            revision, subfolder, cache_dir, token: where to look on the hub.

        Raises:
            CheckpointError: damaged or foreign files, or tensors that do not fit.
            UnknownNameError: no plugin provides its method.
        """
        self._check_new_name(name)
        if isinstance(dtype, str) and dtype != "file":
            raise ConfigError(f"dtype = {dtype!r} must be a torch.dtype, 'file' or None.")
        folder = adapter_folder(source, revision=revision, subfolder=subfolder, cache_dir=cache_dir, token=token)
        record, report = persistence.load_record(
            self.model, name, read_folder(folder), self._active, strict=strict, dtype=dtype
        )
        self._install(record)
        if activate:
            self.activate(name, trainable=trainable)
        return report

    # How it is done

    @property
    def _live(self) -> Host:
        if self._host is None:
            raise StateError("These adapters were detached; call ak.attach(model) for new ones.")
        return self._host

    def _check_live(self) -> None:
        _ = self._live

    def _record(self, name: str) -> AdapterRecord:
        self._check_live()
        if not isinstance(name, str) or name not in self._records:
            raise unknown("adapter", name, self._records)
        return self._records[name]

    def _check_new_name(self, name: object) -> None:
        if not isinstance(name, str) or not name or "." in name:
            raise ConfigError(f"{name!r} cannot be an adapter's name: it must be text, not empty, without a dot.")
        self._check_live()
        if name in self._records:
            raise ConfigError(f"There is an adapter {name!r} already. Remove it first, or choose another name.")

    def _install(self, record: AdapterRecord) -> None:
        if not self._records:
            self._live.freeze()
        record.trainable = True  # as modules are made
        record.set_trainable(False)
        record.install(self._active)
        self._records[record.name] = record
        self._live.remember(record)

    def _own_labels(self, record: AdapterRecord, chosen: LabelSet | None) -> LabelSet | None:
        """The new adapter's label set; its head's output layer is resized to it."""
        base = self._live.labels
        if chosen is None:
            return base if record.heads else None
        if not record.heads or base is None:
            why = "it has no head (modules_to_save)" if base is not None else "the model's config has no labels"
            raise ConfigError(f"num_labels and id2label set the size of an adapter's head, but {why}.")
        old, new = len(base.id2label), len(chosen.id2label)
        if old != new:
            resize_output(list(record.heads.values())[-1], old, new, self.model)
        return chosen

    def _set_active(self, names: tuple[str, ...], heads: tuple[str, ...]) -> None:
        self._active.names = tuple(n for n in names if n in self._records)
        self._active.heads = tuple(n for n in heads if n in self._records)
        self._live.follow_labels(self._records, self._active.heads)

    def _set_trainable(self, names: tuple[str, ...]) -> None:
        names = tuple(n for n in names if n in self._records)
        for name in {*self._trainable, *names}:
            self._records[name].set_trainable(name in names)
        self._trainable = names

    @staticmethod
    def _warn_unmatched(unmatched: tuple[str, ...]) -> None:
        if unmatched:
            warnings.warn(
                f"These entries of the config matched nothing: {', '.join(unmatched)}.",
                AdapterWarning,
                stacklevel=4,
            )
