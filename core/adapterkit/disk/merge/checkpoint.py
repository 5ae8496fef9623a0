"""`merge_checkpoint`: adapters worked into a checkpoint on disk, without loading the model."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from adapterkit.disk.checkpoint import Checkpoint
from adapterkit.disk.merge import beside, writing
from adapterkit.disk.merge.architecture import fitting
from adapterkit.disk.merge.contents import Contents, ContentsBuilder
from adapterkit.disk.merge.layout import FileLayout, lay_out
from adapterkit.disk.merge.report import MergeReport
from adapterkit.disk.merge.sources import Source, Sources, checked_sources, give_dtypes, load, untie_unequal
from adapterkit.disk.merge.staging import Staging, write_durably
from adapterkit.disk.names import match_names
from adapterkit.errors import ConfigError, PluginError, SaveError, StateError, UnsupportedError
from adapterkit.files import local_path, model_folder
from adapterkit.forward import give_dtypes_back
from adapterkit.merging import merge_module, plan
from adapterkit.model import Adapter, BaseModules, LabelSet, acting_heads

Progress = Callable[[int, int], object]


@dataclass
class _Job:
    """All that is known before anything is written."""

    base: Path
    checkpoint: Checkpoint
    sources: list[Source]
    contents: Contents
    layouts: list[FileLayout]
    copied: list[str]
    not_copied: list[str]
    absent: tuple[str, ...]
    architecture: str | None
    labels: LabelSet | None


def merge_checkpoint(  # noqa: PLR0913 - what is merged, how, and where it goes
    base: str | Path,
    adapters: Sources,
    out: str | Path,
    *,
    untie: bool = False,
    heads: str | None = None,
    safe: bool = False,
    architecture: str | None = None,
    model: nn.Module | None = None,
    component: str | None = None,
    workers: int = 1,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> MergeReport:
    """Merge adapters into a safetensors checkpoint, tensor by tensor: what `adapters.merge` does, without the model.

    The tensors are, bit for bit, those that `Adapters.merge` gives in memory. The files keep the base's names, tensor
    names, order, dtypes, metadata and index; files and parts of files without a target are copied by the kernel. Config
    and tokenizer files are copied too, and the adapters' heads and label set taken over. Memory: the largest module's
    weights, for each worker, and a constant. A manifest (`adapterkit_merge.json`) has the hash of every weight file.

    The output appears under its name when it is whole, on the disk. Until then it grows in a folder beside it,
    `.<name>.partial`, from which a run that was broken off can be resumed.

    Args:
        base: the model's folder, its `.safetensors` or index file, or a hub id.
        adapters: folders, hub ids or other programs' files; a mapping gives each a weight, by which its change is
            multiplied (but not its head).
        out: a folder that is not there yet.
        untie: give a target whose weight is tied to another module a weight of its own; the config says so then.
        heads: whose head is taken over, where two have their own copy of one module: a key of `adapters`.
        safe: raise if a merged value is not finite.
        architecture: the class of the model, where the adapter's head is not in the one that the config names. `None`:
            the config's, or the one that the adapter's `task_type` stands for if only that has the adapter's modules.
        model: the model on the meta device, if it is not one of transformers'.
        component: see `Adapters.load`.
        workers: how many threads work, each with a buffer.
        resume: keep what a run with the same inputs and arguments had finished.
        overwrite: let the new model and the one at `out` change places, in one step, and delete the old one.
        progress: called with the bytes that are done and all bytes.

    Raises:
        CheckpointError: damaged files, or adapters that do not fit.
        UnsupportedError: a target whose weight is no single tensor of the files, or a method that cannot be merged.
        StateError: tied weights, values that are not finite, another run on `out`, or another job to be resumed.
        SaveError: it cannot be written there. The base, and what was at `out`, are as they were.
        ConfigError: arguments that make no sense together.
    """
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
        raise ConfigError(f"workers = {workers!r} must be a number of threads, at least 1.")
    sources = checked_sources(adapters)
    place = model_folder(base)
    folder = place if place.is_dir() else place.parent
    target = _checked_out(local_path(out), [folder, *(s.place for s in sources)], overwrite)
    beside.check_config(folder)
    checkpoint = Checkpoint.open(place)
    built, named = (model, None) if model is not None else fitting(folder, sources, architecture)
    job = _plan(folder, checkpoint, built, sources, untie=untie, heads=heads, component=component, safe=safe)
    job.architecture = named
    arguments = {"untie": untie, "heads": heads, "safe": safe, "architecture": architecture, "component": component}
    staging = Staging(target, _request(job, arguments))
    try:
        with staging.locked():
            staging.begin(resume=resume)
            resumed = tuple(staging.done)
            try:
                _write(job, staging, safe=safe, workers=workers, progress=progress)
            except (PluginError, StateError, UnsupportedError):  # they come again: nothing to go on from
                staging.discard()
                raise
            staging.publish(overwrite=overwrite)
    except (OSError, MemoryError) as error:
        if isinstance(error, SaveError):
            raise
        kept = f" What is finished is in {staging.folder}: resume=True goes on from there, or delete it."
        raise SaveError(
            f"The merged model cannot be written to {target}: {error}. The base, and what was at {target}, are as they "
            f"were.{kept if staging.begun else ''}"
        ) from error
    return _report(job, target, resumed)


def _checked_out(out: Path, inputs: Sequence[Path], overwrite: bool) -> Path:
    if out.is_symlink():
        raise SaveError(f"{out} is a symbolic link. Give the folder itself: a link cannot be replaced in one step.")
    place = out.resolve()
    for path in (p.resolve() for p in inputs):
        if place == path or place.is_relative_to(path) or path.is_relative_to(place):
            raise SaveError(f"{out} and the input {path} lie in each other; give the output a folder of its own.")
    if not place.name:
        raise SaveError(f"{out} is no folder that could be written.")
    if place.exists():
        if not place.is_dir():
            raise SaveError(f"{out} is a file; the output is a folder.")
        held = sorted(p.name for p in place.iterdir())
        if held and not overwrite:
            raise SaveError(f"{out} exists already. Say overwrite=True to replace it, or choose another place.")
        if held and not {"config.json", beside.MANIFEST} & set(held):
            raise SaveError(
                f"{out} holds {', '.join(held[:4])} and no model, so it is not replaced. Choose another place."
            )
        if Path.cwd().is_relative_to(place):
            raise SaveError(f"{out} is the working directory, or around it; it cannot be replaced from inside.")
    return place


def _plan(
    base: Path,
    checkpoint: Checkpoint,
    model: nn.Module,
    sources: list[Source],
    *,
    untie: bool,
    heads: str | None,
    component: str | None,
    safe: bool,
) -> _Job:
    names = match_names(model, checkpoint.entries)
    give_dtypes(model, checkpoint, names)
    untie_unequal(model, checkpoint, names)
    adapters = [load(source, model, component, checkpoint, names) for source in sources]
    changes = plan(adapters, BaseModules(model), untie=untie, scales={s.name: s.weight for s in sources})
    _check_weights(sources, adapters)
    acting = [next(r for r in adapters if r.name == name) for name in acting_heads(adapters, _named(heads, sources))]
    builder = ContentsBuilder(model, checkpoint, names)
    for change in changes:
        if change.head is None:
            builder.add_change(change)
        else:  # its own copy of the module is in memory, and is written as the head that it is
            merge_module(change, safe=safe)
    for adapter in acting:
        for path, head in adapter.heads.items():
            give_dtypes_back(head, adapter.hosts[path])
    builder.add_heads(acting)
    contents = builder.finish()
    labels = next((r.labels for r in reversed(acting) if r.labels is not None), None)
    own = LabelSet.of(model)
    if labels is not None and own is not None and labels.id2label == own.id2label:
        labels = None  # what the config says already
    copied, left = beside.others(base, checkpoint)
    layouts = lay_out(checkpoint, contents)
    return _Job(base, checkpoint, sources, contents, layouts, copied, left, builder.absent(), None, labels)


def _named(heads: str | None, sources: list[Source]) -> str | None:
    """The adapter whose head was chosen, by what it was given as."""
    return next((s.name for s in sources if heads in (s.given, s.name)), heads)


def _check_weights(sources: list[Source], adapters: list[Adapter]) -> None:
    for source, adapter in zip(sources, adapters, strict=True):
        additive = all(layer.additive for layer in adapter.layers.values())
        if source.weight != 1.0 and not additive:
            raise UnsupportedError(
                f"{source.given!r} cannot be merged with the weight {source.weight:g}: the method "
                f"{adapter.config.method!r} is not additive, so its change has no multiple. Leave the weight out."
            )


def _request(job: _Job, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """All that the bytes of the output follow from."""
    files = {
        name: {
            "size": shard.size,
            "modified": shard.file.stat().st_mtime_ns,
            "header_sha256": hashlib.sha256(shard.header).hexdigest(),
        }
        for name, shard in job.checkpoint.shards.items()
    }
    return {
        "base": files,
        "adapters": [source.identity() for source in job.sources],
        "arguments": dict(arguments),
        "versions": _versions(),
    }


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("adapterkit", "torch", "transformers")}


def _write(job: _Job, staging: Staging, *, safe: bool, workers: int, progress: Progress | None) -> None:
    total = sum(layout.size for layout in job.layouts)
    rest = [layout for layout in job.layouts if layout.name not in staging.done]
    _check_space(job, rest, staging.folder)
    done = total - sum(layout.size for layout in rest)

    def wrote(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total)

    wrote(0)
    with writing.Inputs() as inputs:
        worker = writing.Worker(inputs, safe=safe, largest=writing.buffer_size(rest))
        writing.write_files(rest, staging.folder, worker, workers=workers, finished=staging.finished, progress=wrote)
    beside.copy_others(job.base, job.copied, staging.folder)
    beside.write_config(staging.folder, architecture=job.architecture, labels=job.labels, untied=job.contents.untied)
    beside.write_index(job.checkpoint, job.layouts, staging.folder)
    manifest = {
        "base": str(job.base),
        "inputs": staging.request,
        "files": {layout.name: staging.done[layout.name] for layout in job.layouts},
    }
    write_durably(staging.folder / beside.MANIFEST, (json.dumps(manifest, indent=2) + "\n").encode())


def _check_space(job: _Job, rest: list[FileLayout], folder: Path) -> None:
    needed = sum(layout.size for layout in rest) + sum((job.base / name).stat().st_size for name in job.copied)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise SaveError(f"The output needs {needed:,} more bytes, and {folder.parent} has {free:,} free.")


def _report(job: _Job, out: Path, resumed: tuple[str, ...]) -> MergeReport:
    added = tuple(n for n in job.contents.origins if n not in job.checkpoint.entries)
    return MergeReport(
        out,
        {s.name: s.weight for s in job.sources},
        {layout.name: layout.merged for layout in job.layouts},
        job.contents.heads,
        added,
        job.absent,
        tuple(job.not_copied),
        sum(layout.size for layout in job.layouts),
        resumed,
    )
