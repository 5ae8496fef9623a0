"""`merge_checkpoint`: adapters worked into a checkpoint on disk, without loading the model."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from adapterkit.contract import FILE_PREFIX
from adapterkit.disk import merge_files
from adapterkit.disk.checkpoint import Checkpoint, match_names
from adapterkit.disk.merge_files import MANIFEST, Merge, Origin
from adapterkit.disk.model import CONFIG, MappedModel, skeleton_for
from adapterkit.errors import CheckpointError, ConfigError, PluginError, SaveError, StateError, UnsupportedError
from adapterkit.files import AdapterFiles, Shard, adapter_folder, load_adapter, local_path, model_folder, read
from adapterkit.forward import Active, give_dtypes_back
from adapterkit.merging import Change, Parting, merge_module, nested, plan, tie_number
from adapterkit.model import Adapter, BaseModules, LabelSet, acting_heads

Sources = Mapping[str | Path, float] | Sequence[str | Path] | str | Path
Progress = Callable[[int, int], object]
_BASE_LAYER = "base_layer."


@dataclass(frozen=True)
class MergeReport:
    """What `merge_checkpoint` wrote.

    Attributes:
        out: the folder.
        adapters: the name of each adapter with its weight.
        merged: the tensors that were changed, by the file they are in; a file with none was copied as it is.
        heads: modules that were taken over from an adapter.
        added: tensors that the base had not: of heads, and of weights that were tied.
        absent: tensors of the model that no file holds, and that `from_pretrained` will initialise.
        not_copied: files of the base that are not in the output.
        nbytes: size of the weights.
        resumed: files that an earlier run had finished.
    """

    out: Path
    adapters: Mapping[str, float]
    merged: Mapping[str, int]
    heads: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    not_copied: tuple[str, ...] = ()
    nbytes: int = 0
    resumed: tuple[str, ...] = ()

    def __str__(self) -> str:
        names = ", ".join(name if weight == 1 else f"{name}:{weight:g}" for name, weight in self.adapters.items())
        files = f"{len(self.merged)} file" + "s" * (len(self.merged) != 1)
        lines = [f"{self.out}: {sum(self.merged.values())} tensors merged ({names}), {self.nbytes:,} bytes in {files}"]
        lines += [f"  taken over in full: {path}" for path in self.heads]
        for what, found in (
            ("added", self.added),
            ("in no file", self.absent),
            ("not copied", self.not_copied),
            ("finished by an earlier run", self.resumed),
        ):
            lines += [f"  {what}: {', '.join(found)}"] if found else []
        return "\n".join(lines)


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
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> MergeReport:
    """Merge adapters into a safetensors checkpoint, tensor by tensor: what `adapters.merge` does, without the model.

    The tensors are, bit for bit, those that `Adapters.merge` gives in memory. The files keep the base's names, tensor
    names, order, dtypes, metadata and index. Config and tokenizer files are copied too, and the adapters' heads and
    label set taken over. Memory: the largest module's weights and a constant. A manifest (`adapterkit_merge.json`) says
    what was merged, and the size of every weight file.

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
        resume: keep the files that a run with the same inputs and arguments had finished.
        overwrite: let the new model and the one at `out` change places, in one step, and delete the old one.
        progress: called with the bytes that are done and all bytes.

    Raises:
        CheckpointError: damaged files, or adapters that do not fit.
        UnsupportedError: a target whose weight is no single tensor of the files, or a method that cannot be merged.
        StateError: tied weights, values that are not finite, another run on `out`, or another job to be resumed.
        SaveError: it cannot be written there. The base, and what was at `out`, are as they were.
        ConfigError: arguments that make no sense together.
    """
    sources = _checked_sources(adapters)
    place = model_folder(base)
    folder = place if place.is_dir() else place.parent
    target = _checked_out(local_path(out), [folder, *(s.place for s in sources)], overwrite)
    _check_config(folder / CONFIG)
    checkpoint, named = Checkpoint.open(place), None
    if model is None:
        built, named = skeleton_for(folder, [s.place for s in sources], architecture)
    else:
        built = copy.deepcopy(model)
    output = _Output(MappedModel(built, checkpoint), folder, named)
    _work_in(output, sources, untie=untie, heads=heads, component=component, safe=safe)
    arguments = {"untie": untie, "heads": heads, "safe": safe, "architecture": architecture, "component": component}
    request = _request(checkpoint, sources, arguments)
    kept = ""
    try:
        with merge_files.held(target) as partial:
            resumed = merge_files.begin(partial, request, output.shards, resume=resume)
            kept = f" What is finished is in {partial}: resume=True goes on from there, or delete it."
            try:
                output.write(partial, resumed, request, safe=safe, progress=progress)
            except (PluginError, StateError, UnsupportedError):  # they come again: nothing to go on from
                shutil.rmtree(partial)
                raise
            merge_files.publish(partial, target, overwrite=overwrite)
    except (OSError, MemoryError) as error:
        if isinstance(error, SaveError):
            raise
        raise SaveError(
            f"The merged model cannot be written to {target}: {error}. The base, and what was at {target}, are as they "
            f"were.{kept}"
        ) from error
    return output.report(target, sources, resumed)


# Checks before anything is written


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
        if held and not {CONFIG, MANIFEST} & set(held):
            raise SaveError(
                f"{out} holds {', '.join(held[:4])} and no model, so it is not replaced. Choose another place."
            )
        if Path.cwd().is_relative_to(place):
            raise SaveError(f"{out} is the working directory, or around it; it cannot be replaced from inside.")
    return place


def _check_config(path: Path) -> None:
    if not path.exists():
        return
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is no valid JSON: {error}.") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not a {type(found).__name__}.")


def _request(checkpoint: Checkpoint, sources: Sequence[_Source], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """All that the bytes of the output follow from."""
    from importlib.metadata import version

    def of_base(shard: Shard) -> dict[str, Any]:
        header = hashlib.sha256(shard.header).hexdigest()
        return {"size": shard.size, "modified": shard.file.stat().st_mtime_ns, "header_sha256": header}

    return {
        "base": {name: of_base(shard) for name, shard in checkpoint.shards.items()},
        "adapters": [source.identity() for source in sources],
        "arguments": dict(arguments),
        "versions": {name: version(name) for name in ("adapterkit", "torch", "transformers")},
    }


# The adapters


@dataclass(frozen=True)
class _Source:
    """One adapter to be merged.

    Attributes:
        given: how the caller named it.
        name: what it is called in messages and in the report.
    """

    given: str
    name: str
    weight: float
    place: Path

    def identity(self) -> dict[str, Any]:
        """What tells its files from others, for the journal and for the manifest."""
        files = [self.place] if self.place.is_file() else sorted(self.place.glob("adapter_*"))
        found = {f.name: {"size": f.stat().st_size, "sha256": _sha256(f)} for f in files if f.is_file()}
        return {"source": self.given, "weight": self.weight, "files": found}


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _checked_sources(adapters: Sources) -> list[_Source]:
    """The adapters that a caller named, found, and each with a name of its own.

    Raises:
        ConfigError: none, or a weight that is no number.
        CheckpointError: one that is not there.
    """
    if isinstance(adapters, str | Path):
        adapters = [adapters]
    weights = dict(adapters) if isinstance(adapters, Mapping) else dict.fromkeys(adapters, 1.0)
    if not weights or len(weights) < len(adapters):
        raise ConfigError(f"merge_checkpoint needs adapters, each once, not {adapters!r}.")
    found: list[_Source] = []
    for given, weight in weights.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not abs(weight) < float("inf"):
            raise ConfigError(f"The weight of {str(given)!r} must be a finite number, not {weight!r}.")
        place = adapter_folder(given)
        twice = next((s for s in found if s.place.resolve() == place.resolve()), None)
        if twice is not None:
            raise ConfigError(
                f"{twice.given!r} and {str(given)!r} are one adapter; give it once, with the sum of its weights."
            )
        name = _free_name(place.stem if place.is_file() else place.resolve().name, [s.name for s in found])
        found.append(_Source(str(given), name, float(weight), place))
    return found


def _free_name(wanted: str, taken: Sequence[str]) -> str:
    name = base = re.sub(r"[^\w-]", "_", wanted) or "adapter"
    number = 1
    while name in taken:
        number += 1
        name = f"{base}_{number}"
    return name


def _work_in(
    output: _Output, sources: Sequence[_Source], *, untie: bool, heads: str | None, component: str | None, safe: bool
) -> None:
    """Find out what the adapters change, as a merge in memory does.

    Raises:
        CheckpointError, UnsupportedError, StateError, ConfigError: see `merge_checkpoint`.
    """
    base = output.base
    adapters = []
    for source in sources:
        files = _without_base(read(source.place), base)
        given: dict[str, Any] = {"strict": True, "dtype": None, "component": component, "device": torch.device("cpu")}
        adapters.append(load_adapter(base.model, source.name, files, Active(), **given)[0])
    changes = plan(adapters, BaseModules(base.model), untie=untie, scales={s.name: s.weight for s in sources})
    for source, adapter in zip(sources, adapters, strict=True):
        if source.weight != 1.0 and not all(layer.additive for layer in adapter.layers.values()):
            raise UnsupportedError(
                f"{source.given!r} cannot be merged with the weight {source.weight:g}: the method "
                f"{adapter.config.method!r} is not additive, so its change has no multiple. Leave the weight out."
            )
    chosen = next((s.name for s in sources if heads in (s.given, s.name)), heads)
    acting = [next(a for a in adapters if a.name == name) for name in acting_heads(adapters, chosen)]
    for change in changes:
        if change.head is None:
            output.add_change(change)
        else:  # its own copy of the module is in memory, and is written as the head that it is
            merge_module(change, safe=safe)
    for adapter in acting:
        for path, head in adapter.heads.items():
            give_dtypes_back(head, adapter.hosts[path])
    output.add_heads(acting)
    output.finish()
    base.release()


def _without_base(files: AdapterFiles, base: MappedModel) -> AdapterFiles:
    """The files without weights of adapted layers that are the base's: PEFT writes embeddings with every adapter."""
    same = set()
    for key, tensor in files.tensors.items():
        own = base.parameters.get(key.removeprefix(FILE_PREFIX).replace(_BASE_LAYER, ""))
        if key.endswith(f"{_BASE_LAYER}weight") and own is not None and not own.is_meta and own.shape == tensor.shape:
            same |= {key} if torch.equal(own.to(tensor.dtype), tensor) else set()
    return dataclasses.replace(files, tensors={k: v for k, v in files.tensors.items() if k not in same})


# The tensors of the output


class _Output:
    """What the output is made of.

    Attributes:
        folder: the base's.
        architecture: the class of the model, if it is not the one that the base's config names.
        origins: where the tensors come from that are not simply the base's, by their names in the file.
        heads: modules that were taken over.
        labels: their label set, if it is not the base's.
        untied: where in the config flags say that weights are tied which are apart now: the names that lead there.
        shards: the files of weights.
        copied, left: the base's other files that are in the output, and that are not.
    """

    def __init__(self, base: MappedModel, folder: Path, architecture: str | None) -> None:
        self.base, self.folder, self.architecture = base, folder, architecture
        self.origins: dict[str, Origin] = {}
        self.heads: tuple[str, ...] = ()
        self.labels: LabelSet | None = None
        self.untied: tuple[tuple[str, ...], ...] = ()
        self.shards: dict[str, Shard] = {}
        self.copied, self.left = merge_files.others(folder, base.checkpoint)
        self._parted: set[str] = set()

    def add_change(self, change: Change) -> None:
        """The tensors that a change writes to."""
        base, keys = self.base, {local: f"{change.path}.{local}" for local in change.touched}
        held = {local: base.held_as(key) for local, key in keys.items()}
        apart = [local for local, key in keys.items() if local in change.tied and key not in base.names.in_file]
        names = {**held, **{local: keys[local] for local in apart}}
        merge = Merge(change, {local: base.checkpoint.entries[name] for local, name in held.items()}, names)
        for local, key in keys.items():
            if local in change.tied:
                self._part(key, held[local])
            self.origins[names[local]] = merge

    def _part(self, key: str, name: str) -> None:
        """Every other name of a tied weight keeps the base's values, under its own name in the file."""
        self._parted.add(key)
        for other in self.base.keys[self.base.parameters[key]]:
            if other != key and other not in self.base.names.in_file:
                self.origins.setdefault(other, self.base.checkpoint.entries[name])

    def add_heads(self, adapters: Sequence[Adapter]) -> None:
        """The tensors of the heads that act, in place of the model's; the last one's at each module."""
        base, in_file = self.base, self.base.names.in_file
        heads = {path: (adapter, head) for adapter in adapters for path, head in adapter.heads.items()}
        numbers = {path: number for adapter in adapters for path, number in adapter.tie_numbers().items()}
        for path, (adapter, head) in heads.items():
            places = (path, *adapter.aliases.get(path, ()))
            for place, local, tensor in ((p, *item) for p in places for item in head.state_dict().items()):
                key = f"{place}.{local}"
                parameter = base.parameters.get(key)
                tied = [] if parameter is None else [k for k in base.keys[parameter] if k != key]
                own = in_file.get(key)
                if any(tie_number(k, numbers) != numbers[place] for k in tied):
                    self._parted.add(key)
                    held = next((in_file[k] for k in (key, *tied) if k in in_file), None)
                    if held is not None:
                        self._part(key, held)
                elif own is None and any(k in in_file for k in tied):
                    continue  # it is still tied to that one
                self.origins[own or key] = tensor
        self.heads = tuple(heads)
        labels = next((a.labels for a in reversed(adapters) if a.labels is not None), None)
        own_labels = LabelSet.of(base.model)
        if labels is not None and (own_labels is None or labels.id2label != own_labels.id2label):
            self.labels = labels

    def finish(self) -> None:
        """Follow up ties that hold no longer, check that what is added will be found, and lay out the files.

        Raises:
            UnsupportedError: the model has no config that could say that, or names that would not be found.
        """
        if self._parted:
            self._tell_parted()
        base, held = self.base, self.base.checkpoint.entries
        added = [name for name in self.origins if name not in held]
        found = match_names(base.model, [*held, *added]).of_model if added else {}
        wrong = [name for name in added if found.get(name) != name]
        if wrong:
            raise UnsupportedError(
                f"{base.checkpoint.folder} lacks {wrong[0]!r}, and beside the names that it has, such a tensor would "
                "not be found. Load the model and merge in memory."
            )
        self.shards = merge_files.lay_out(base.checkpoint, self.origins)

    def _tell_parted(self) -> None:
        model: Any = self.base.model
        parting = Parting.of(model, self._parted)
        said = {name for tie in parting.parted if tie.outer is model for name in (tie.target, tie.source)}
        if not self._parted <= said:
            raise UnsupportedError(
                f"A {type(model).__name__} ties weights in its code, so its files cannot say that they are apart."
            )
        silent = parting.configs
        self.untied = tuple(path for path, c in nested(model.config) if any(c is other for other in silent))
        in_file = self.base.names.in_file
        for tie in parting.freed:
            pair = (tie.target, tie.source)
            held = next((in_file[key] for key in pair if key in in_file), None)
            for key in pair:
                if held is not None and key not in in_file:
                    self.origins.setdefault(key, self.base.checkpoint.entries[held])

    def write(
        self,
        partial: Path,
        done: Sequence[str],
        request: Mapping[str, Any],
        *,
        safe: bool,
        progress: Progress | None,
    ) -> None:
        """Write all but the files of weights that are done.

        Raises:
            OSError: it cannot be written, or there is no room for it.
            StateError: with `safe`, a merged value is not finite.
        """
        checkpoint, rest = self.base.checkpoint, {n: s for n, s in self.shards.items() if n not in done}
        total = sum(shard.size for shard in self.shards.values())
        left = sum(shard.size for shard in rest.values())
        needed = left + sum((self.folder / name).stat().st_size for name in self.copied)
        free = shutil.disk_usage(partial).free
        if needed > free:
            raise SaveError(f"The output needs {needed:,} more bytes, and {partial.parent} has {free:,} free.")

        def wrote(count: int) -> None:
            nonlocal left
            left -= count
            if progress is not None:
                progress(total - left, total)

        wrote(0)
        origins = {**checkpoint.entries, **self.origins}
        for name, shard in rest.items():
            merge_files.write_shard(partial / name, shard, origins, safe=safe, wrote=wrote)
        merge_files.copy_others(self.folder, self.copied, partial)
        merge_files.write_config(partial, architecture=self.architecture, labels=self.labels, untied=self.untied)
        merge_files.write_index(checkpoint, self.shards, partial)
        sizes = {name: {"size": shard.size} for name, shard in self.shards.items()}
        manifest = {"base": str(self.folder), "inputs": request, "files": sizes}
        merge_files.write_durably(partial / MANIFEST, (json.dumps(manifest, indent=2) + "\n").encode())

    def report(self, out: Path, sources: Sequence[_Source], resumed: tuple[str, ...]) -> MergeReport:
        """What is at `out` now."""
        base, names = self.base, self.base.names
        given = {names.of_model.get(name, name) for name in self.origins} | set(names.in_file) | set(names.fused)
        merged = {name for name, origin in self.origins.items() if isinstance(origin, Merge)}
        return MergeReport(
            out,
            {s.name: s.weight for s in sources},
            {name: sum(e.name in merged for e in shard.entries) for name, shard in self.shards.items()},
            self.heads,
            tuple(name for name in self.origins if name not in base.checkpoint.entries),
            tuple(keys[0] for keys in base.keys.values() if not given.intersection(keys)),
            tuple(self.left),
            sum(shard.size for shard in self.shards.values()),
            resumed,
        )
