"""Storage: the tensors of a model's adapters, and their files."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from adapterkit import persistence
from adapterkit.errors import AdapterWarning, CheckpointError, ConfigError, StateError
from adapterkit.files import local_path, read
from adapterkit.hub import adapter_folder
from adapterkit.interrupts import uninterrupted
from adapterkit.lifecycle import Lifecycle
from adapterkit.loading import fit, put, refuse, to_file
from adapterkit.presence import KEPT
from adapterkit.registry import default_registry
from adapterkit.reports import LoadReport, SwapReport
from adapterkit.swapping import swapped_config, values_to_swap
from adapterkit.vocabulary import resized_tables, tables
from adapterkit.walk import Walk
from adapterkit.wrapped import check_can_replace, refuse_fsdp1


class Storage(Lifecycle):
    """The part of `Adapters` that saves and loads."""

    def state_dict(self, name: str, source: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """An adapter's tensors under the keys they have in a file.

        Args:
            source: a full state dict of the adapted model to take them from, such as FSDP or a `Trainer`
                hands over; the model's own tensors if `None`.

        Raises:
            CheckpointError: `source` lacks some of them.
        """
        record = self._record(name)
        self._check_heads_not_merged(name)
        self._warn_if_changed(name, KEPT)
        with self._as_wholes([record] if source is None else []):
            return to_file(record, default_registry.method_of(record.config), source)

    @torch.inference_mode(False)
    def load_state_dict(self, name: str, tensors: Mapping[str, Tensor], *, strict: bool = True) -> LoadReport:
        """Copy tensors into an existing adapter.

        Args:
            tensors: keys as in a file, or a full state dict of an adapted model.
            strict: raise if anything is missing, unexpected or mismatched; else warn, and load what fits.

        Raises:
            CheckpointError: with `strict`, if something does not fit; nothing has changed then.
        """
        record = self._record(name)
        self._check_not_merged(name)
        self._check_present("load_state_dict", name)
        with self._live.writing(record), self._as_wholes([record], writing=True):
            found = fit(record, default_registry.method_of(record.config), self.model, tensors)
            if not found.report.ok:
                if strict:
                    refuse(found.report, name, "The state dict")
                warnings.warn(str(found.report), AdapterWarning, stacklevel=3)
            for slot, tensor in found.values:
                if slot.tensor.shape != tensor.shape:
                    check_can_replace(self.model, slot.key)
            put(found.values, assign=False)
        return found.report

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
        record = self._record(name)
        self._check_heads_not_merged(name)
        self._warn_if_changed(name, KEPT)
        if self._merged.kept and embeddings is not False:
            walk = Walk(self.model)
            for place, table in (tables if embeddings else resized_tables)(walk, record.heads).items():
                if table in self._merged.kept:
                    raise StateError(
                        f"The file must hold {place!r}, because the vocabulary was resized, and an adapter is merged "
                        "into it. Call unmerge() first."
                    )
        persistence.save_record(record, self.model, path, source, embeddings=embeddings)
        for note in self._never_ran(record):
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
        record, report = persistence.load_record(
            self.model, name, read(folder), self._active, strict=strict, dtype=dtype, component=component
        )
        self._begin(record, activate=activate, trainable=trainable)
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
        record = self._record(name)
        self._check_not_merged(name)
        self._check_present("swap", name)
        refuse_fsdp1(self.model)
        folder = adapter_folder(source, revision=revision, subfolder=subfolder, cache_dir=cache_dir, token=token)
        other, report = persistence.load_record(
            self.model, name, read(folder), self._active, strict=True, dtype=None, component=component
        )
        with uninterrupted():
            with self._as_wholes([record], writing=True):
                try:
                    with torch.no_grad():
                        values = values_to_swap(record, other)
                except CheckpointError as error:
                    raise CheckpointError(
                        f"{folder} cannot be swapped into adapter {name!r}: {error}. Nothing was changed. Load it "
                        "under another name instead (adapters.load)."
                    ) from error
                put(values, assign=False)
            record.config = swapped_config(record.config, other.config)
            record.labels = other.labels if record.heads else record.labels
            self._live.renew_labels(record)
        cleared = tuple(path for path in record.layers if path not in other.layers)
        return SwapReport(name, tuple(other.layers), cleared, tuple(record.heads), report.ignored)
