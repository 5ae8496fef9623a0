"""Lifecycle: adapters come and go."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping

import torch
from torch import nn

from adapterkit.build import Builder
from adapterkit.config import AdapterConfig
from adapterkit.errors import AdapterWarning, ConfigError, StateError
from adapterkit.heads import resize_output
from adapterkit.interrupts import uninterrupted
from adapterkit.keys import ATTRIBUTE
from adapterkit.labels import LabelSet
from adapterkit.per_sample import PerSample
from adapterkit.record import AdapterRecord
from adapterkit.registry import default_registry
from adapterkit.reports import AddReport
from adapterkit.selection import select_on
from adapterkit.sharded import size_of
from adapterkit.walk import Walk
from adapterkit.wrapped import check_averaged


class Lifecycle(PerSample):
    """The part of `Adapters` that adds and removes."""

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
        walk = Walk(self.model)
        selection = select_on(walk, config)
        record, notes = Builder(walk, method, config, selection).build(name, self._active)
        notes += self._live.notes(record, walk)
        record.labels = self._own_labels(record, labels)
        self._warn_unmatched(selection.unmatched)
        self._begin(record, activate=activate, trainable=activate)
        parameters = size_of(record.parameters())
        heads = tuple(record.heads)
        return AddReport(name, selection.paths, heads, parameters, self._live.size, selection.unmatched, tuple(notes))

    @uninterrupted()
    def remove(self, name: str) -> None:
        """Remove an adapter and all that was its own. If it was active it no longer is."""
        record = self._record(name)
        self._check_not_merged(name)
        self._check_not_per_sample("remove")
        self._active.remove(name)
        self._live.follow_labels(self._records, self._active.heads)
        record.uninstall()
        self._live.forget(record)
        del self._records[name]

    @uninterrupted()
    def rename(self, old: str, new: str) -> None:
        """Give an adapter another name."""
        record = self._record(old)
        self._check_not_merged(old)
        self._check_not_per_sample("rename")
        self._check_new_name(new, grows=False)
        self._check_present("rename", old)
        self._live.forget(record)
        record.uninstall()
        record.name = new
        record.install(self._active)
        self._live.remember(record)
        records = [*self._records.values()]
        self._records.clear()
        self._records.update((record.name, record) for record in records)
        self._active.rename(old, new)
        if self._live.labels_of == old:
            self._live.labels_of = new

    @torch.inference_mode(False)
    def copy(self, source: str, target: str) -> None:
        """Add a copy of an adapter under another name, independent of it, and not active."""
        record = self._record(source)
        self._check_new_name(target)
        self._check_present("copy", source)
        # The modules they are on are the model's and stay; the rest is the adapter's own.
        memo = {id(module): module for module in (*record.hosts.values(), *record.readers)}
        with self._as_wholes([record]):
            duplicate = copy.deepcopy(record, memo)
        duplicate.name = target
        duplicate.lent, duplicate.dimmed = [], []
        self._install(duplicate)

    @uninterrupted()
    def detach(self) -> nn.Module:
        """Remove every adapter and every trace of them: classes, parameters, hooks, `requires_grad`, labels.

        Returns:
            The model, as it was before `attach`. This object is of no use afterwards.
        """
        model = self.model
        for name in self.names:
            self.remove(name)
        self._live.restore()
        del model.__dict__[ATTRIBUTE]
        self._host = None
        return model

    def _begin(self, record: AdapterRecord, *, activate: bool, trainable: bool) -> None:
        """Install an adapter and let it act, or neither."""
        with uninterrupted():
            self._install(record, train=activate and trainable)
            try:
                if activate:
                    self.activate(record.name, trainable=trainable)
                elif trainable:
                    record.light(lent=False)
            except BaseException:
                self.remove(record.name)
                raise

    @uninterrupted()
    def _install(self, record: AdapterRecord, *, train: bool = False) -> None:
        if train:
            check_averaged(self.model, record)
        if record.biases and self._merged.names:
            raise StateError(
                f"Adapter {record.name!r} trains biases, which start from the base's; others' are merged into those "
                "now. Call unmerge() first."
            )
        self._live.join(record)  # which may fail, as what comes after may not
        if not self._records:
            self._live.freeze()
        for parameter in record.parameters():
            parameter.requires_grad_(False)
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
            resize_output(list(record.heads.values()), old, new, self.model)
        return chosen

    @staticmethod
    def _warn_unmatched(unmatched: tuple[str, ...]) -> None:
        if unmatched:
            warnings.warn(
                f"These entries of the config matched nothing: {', '.join(unmatched)}.",
                AdapterWarning,
                stacklevel=4,
            )
