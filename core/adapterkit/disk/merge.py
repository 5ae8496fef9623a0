"""`merge_checkpoint`: adapters worked into a checkpoint on disk, without loading the model."""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from adapterkit.disk.checkpoint import Checkpoint, match_names, read_object
from adapterkit.disk.merge_files import MANIFEST, Merge, Origin, Output, Progress, lay_out, new_index, of_others
from adapterkit.disk.model import CONFIG, MappedModel, Vocabulary, skeleton_for, tokenizer_in
from adapterkit.door import real_path
from adapterkit.errors import SaveError, UnsupportedError, UsageError, usage
from adapterkit.files import adapter_folder, load_adapter, local_path, model_folder, read, standing
from adapterkit.formats import AdapterFiles
from adapterkit.forward import Active, give_dtypes_back
from adapterkit.merging import FLAG, Change, Parting, give_own_memory, merge_module, nested, plan
from adapterkit.model import Adapter, BaseModules, LabelSet, acting_heads, checked_strengths, finite_number
from adapterkit.results import Printed, counted, in_lines
from adapterkit.tensors import default_modes

Sources = Mapping[str | Path, float] | Sequence[str | Path] | str | Path


@dataclass(frozen=True)
class MergeReport(Printed):
    """What `merge_checkpoint` wrote.

    Attributes:
        out: the folder.
        adapters: the name of each adapter with its weight.
        merged: the tensors that were changed, by the file they are in; a file with none was copied as it is.
        heads: modules that were taken over from an adapter.
        added: tensors that the base did not have: of heads, and of weights that were tied.
        vocabulary: the rows of the adapters' embeddings, if they are not the base's.
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
    vocabulary: int | None = None

    def __str__(self) -> str:
        names = ", ".join(name if weight == 1 else f"{name}:{weight:g}" for name, weight in self.adapters.items())
        tensors, files = counted(sum(self.merged.values()), "tensor"), counted(len(self.merged), "file")
        lines = [f"{self.out}: {tensors} merged ({names}), {self.nbytes:,} bytes in {files}"]
        lines += [f"  taken over in full: {path}" for path in self.heads]
        lines += [f"  vocabulary: {self.vocabulary:,} rows"] if self.vocabulary is not None else []
        for what, found in (
            ("added", self.added),
            ("in no file", self.absent),
            ("not copied", self.not_copied),
            ("finished by an earlier run", self.resumed),
        ):
            lines += [f"  {what}: {', '.join(found)}"] if found else []
        return in_lines(lines)


@usage()
@default_modes()
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
    label set taken over. If the adapters were trained with a resized vocabulary, the output has their embeddings, its
    config their size, and the tokenizer is the one beside the adapter, if there is one. A manifest
    (`adapterkit_merge.json`) says what was merged, and the size of every weight file. Memory: the largest module's
    weights and a constant.

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
        overwrite: let the new model and the one at `out` change places, in one step, and delete the old one, if it
            holds only what a merge or `save_pretrained` wrote.
        progress: called with the bytes that are done and all bytes.

    Raises:
        CheckpointError: damaged files, or adapters that do not fit.
        UnsupportedError: a target's weight is not one tensor of the files, or a method cannot be merged.
        StateError: tied weights, values that are not finite, another run on `out`, or another job to be resumed.
        SaveError: it cannot be written there. The base, and what was at `out`, are as they were.
        ConfigError: arguments that make no sense together.
    """
    sources = _sources(adapters)
    place = model_folder(base)
    folder = place if place.is_dir() else place.parent
    whole = folder if (folder / CONFIG).is_file() else place  # nothing beside a single file belongs to it
    target = _checked_out(real_path(local_path(out)), [whole, *(s.place for s in sources)], overwrite)
    checkpoint, named = Checkpoint.open(place), None
    files = {source.name: read(source.place) for source in sources}
    if model is None:
        built, named = skeleton_for(place, [*files.values()], architecture)
    else:
        built = copy.deepcopy(model)
    vocabulary = Vocabulary.resize(built, files)
    mapped = MappedModel(built, checkpoint)
    changes, acting = _changes(mapped, sources, files, untie=untie, heads=heads, component=component, safe=safe)
    values, parted = _new_values(mapped, changes, acting)
    values |= {} if vocabulary is None else vocabulary.rest(mapped, values)
    parting = _parting(built, parted)
    origins, absent = _origins(mapped, values, () if parting is None else (*parting.parted, *parting.freed))
    shards = lay_out(checkpoint, origins)
    small = _new_config(folder / CONFIG, built, named, acting, parting, vocabulary)
    if vocabulary is not None:
        small |= tokenizer_in(files[vocabulary.owner].folder)
    if checkpoint.index_file is not None:
        small[checkpoint.index_file.name] = new_index(checkpoint, shards)
    arguments = {"untie": untie, "heads": heads, "safe": safe, "architecture": architecture, "component": component}
    mapped.release()
    output = Output(
        target, whole, {**checkpoint.entries, **origins}, shards, small, _inputs(checkpoint, sources, arguments)
    )
    resumed, not_copied = output.write(safe=safe, resume=resume, overwrite=overwrite, progress=progress)
    merged = {name for name, origin in origins.items() if isinstance(origin, Merge)}
    return MergeReport(
        target,
        {source.name: source.weight for source in sources},
        {name: sum(e.name in merged for e in shard.entries) for name, shard in shards.items()},
        tuple(dict.fromkeys(path for adapter in acting for path in adapter.heads)),
        tuple(name for name in origins if name not in checkpoint.entries),
        absent,
        not_copied,
        sum(shard.size for shard in shards.values()),
        resumed,
        None if vocabulary is None else vocabulary.rows,
    )


def _checked_out(place: Path, inputs: Sequence[Path], overwrite: bool) -> Path:
    """The output's folder, if it may be written."""
    for path in map(real_path, inputs):
        if place == path or place.is_relative_to(path) or path.is_relative_to(place):
            raise UsageError(f"{place} and the input {path} lie in each other; give the output a folder of its own.")
    if place.exists():
        if not place.is_dir():
            raise SaveError(f"{place} is a file; the output is a folder.")
        held = sorted(p.name for p in place.iterdir())
        if held and not overwrite:
            raise SaveError(f"{place} exists already. Say overwrite=True to replace it, or choose another place.")
        if held and not {CONFIG, MANIFEST} & set(held):
            raise SaveError(
                f"{place} holds {', '.join(held[:4])} and no model, so it is not replaced. Choose another place."
            )
        others = of_others(place)
        if others:
            more = f" and {len(others) - 4:,} more" if len(others) > 4 else ""
            raise SaveError(
                f"{place} holds more than a model: overwrite=True would delete {', '.join(others[:4])}{more}. Move "
                "that, or choose another place."
            )
    return place


def _inputs(checkpoint: Checkpoint, sources: Sequence[_Source], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that determines the output; `resume` compares it. It has no folders of this machine."""
    from importlib.metadata import version

    base, adapters = {}, []
    for name, shard in checkpoint.shards.items():
        header = hashlib.sha256(shard.header).hexdigest()
        base[name] = {"size": shard.size, "modified": shard.file.stat().st_mtime_ns, "header_sha256": header}
    for source in sources:
        files, place = {}, source.place
        for path in [place] if place.is_file() else filter(None, standing(place)):
            with path.open("rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            files[path.name] = {"size": path.stat().st_size, "sha256": sha256}
        adapters.append({"source": Path(source.given).name, "weight": source.weight, "files": files})
    versions = {name: version(name) for name in ("adapterkit", "torch", "transformers")}
    return {"base": base, "adapters": adapters, "arguments": dict(arguments), "versions": versions}


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


def _sources(adapters: Sources) -> list[_Source]:
    """The adapters that a caller named, found, and each with a name of its own."""
    if isinstance(adapters, str | Path):
        adapters = [adapters]
    weights = dict(adapters) if isinstance(adapters, Mapping) else dict.fromkeys(adapters, 1.0)
    if not weights or len(weights) < len(adapters):
        raise UsageError(f"merge_checkpoint needs adapters, each once, not {adapters!r}.")
    found: dict[str, _Source] = {}
    for given, weight in weights.items():
        number = finite_number(weight, f"The weight of {str(given)!r}")
        place = adapter_folder(given)
        twice = next((s for s in found.values() if real_path(s.place) == real_path(place)), None)
        if twice is not None:
            raise UsageError(
                f"{twice.given!r} and {str(given)!r} are one adapter; give it once, with the sum of its weights."
            )
        wanted = name = re.sub(r"[^\w-]", "_", place.stem if place.is_file() else real_path(place).name) or "adapter"
        while name in found:
            name = f"{wanted}_{len(found) + 1}"
        found[name] = _Source(str(given), name, number, place)
    return list(found.values())


def _changes(
    base: MappedModel,
    sources: Sequence[_Source],
    files: Mapping[str, AdapterFiles],
    *,
    untie: bool,
    heads: str | None,
    component: str | None,
    safe: bool,
) -> tuple[list[Change], list[Adapter]]:
    """Plan the changes of the base's modules, as a merge in memory does, and find the adapters whose heads act."""
    adapters = []
    for source in sources:
        given: dict[str, Any] = {"strict": True, "dtype": None, "component": component, "device": torch.device("cpu")}
        adapter, _ = load_adapter(base.model, source.name, files[source.name], Active(), **given)
        adapters.append(adapter)
    scales = checked_strengths("merge_checkpoint", adapters, {source.name: source.weight for source in sources})
    changes = plan(adapters, BaseModules(base.model), untie=untie, scales=scales)
    for change in changes:
        if change.head is not None:  # merged now: the copy of the module in the head is written as a part of the head
            give_own_memory(change)
            merge_module(change, safe=safe)
    chosen = next((s.name for s in sources if heads in (s.given, s.name)), heads)
    acting = [next(a for a in adapters if a.name == name) for name in acting_heads(adapters, chosen)]
    for adapter in acting:
        for path, head in adapter.heads.items():
            give_dtypes_back(head, adapter.hosts[path])
    return [change for change in changes if change.head is None], acting


# The tensors of the output


def _new_values(
    base: MappedModel, changes: Sequence[Change], acting: Sequence[Adapter]
) -> tuple[dict[str, Merge | torch.Tensor], set[str]]:
    """The new value of each key of the model that changes, and the keys that are no longer tied to an unchanged one."""
    values: dict[str, Merge | torch.Tensor] = {}
    modules = BaseModules(base.model)
    for change in changes:
        names = {local: base.held_as(f"{change.path}.{local}") for local in change.touched}
        inputs = {local: base.checkpoint.entries[name] for local, name in names.items()}
        for local in inputs:
            keys = base.keys[base.parameters[f"{change.path}.{local}"]]
            if local in change.tied:
                keys = [f"{path}.{local}" for path in modules.paths_of[change.module]]
            values |= dict.fromkeys(keys, Merge(change, inputs, local))
    for adapter in acting:
        for path, head in adapter.heads.items():
            for place in (path, *adapter.aliases.get(path, ())):
                values |= {f"{place}.{local}": t for local, t in head.state_dict(keep_vars=True).items()}
    parted = set()
    for keys in base.keys.values():
        if len({id(values.get(key)) for key in keys}) > 1:
            parted |= values.keys() & keys
    return values, parted


def _parting(model: Any, parted: set[str]) -> Parting | None:
    """What the config must say because these keys are no longer tied; `None` if there are no keys."""
    if not parted:
        return None
    parting = Parting.of(model, parted)
    said = {name for tie in parting.parted if tie.outer is model for name in (tie.target, tie.source)}
    if not parted <= said:
        raise UnsupportedError(
            f"A {type(model).__name__} ties weights in its code, so its files cannot say that they are apart."
        )
    return parting


def _origins(
    base: MappedModel, values: Mapping[str, Merge | torch.Tensor], ended: Sequence[Any]
) -> tuple[dict[str, Origin], tuple[str, ...]]:
    """Where tensors of the output come from that are not simply the base's, and what of the model is in no file.

    Of tied tensors the files need to hold one, except where the config no longer says that they are tied (`ended`).
    """
    entries, in_file = base.checkpoint.entries, base.in_file
    apart = {key for tie in ended for key in (tie.target, tie.source)}
    buffers = {key: value for key, value in values.items() if key not in base.parameters}
    origins: dict[str, Origin] = {in_file.get(key, key): value for key, value in buffers.items()}
    absent = []
    for keys in base.keys.values():
        held = next((entries[in_file[key]] for key in keys if key in in_file), None)
        written: list[object] = []
        for key in sorted(keys, key=lambda key: key not in in_file):
            value = values.get(key, held)
            if key in in_file or not any(value is other for other in written) or key in apart:
                if value is not None and (key in values or key not in in_file):
                    origins[in_file.get(key, key)] = value
                written.append(value)
        if written == [None] and base.fused.keys().isdisjoint(keys):
            absent.append(keys[0])
    added = [name for name in origins if name not in entries]
    found, _ = match_names(base.model, [*entries, *added]) if added else ({}, {})
    wrong = next((name for name in added if found.get(name) != name), None)
    if wrong is not None:
        raise UnsupportedError(
            f"{base.checkpoint.folder} lacks {wrong!r}, and transformers would not find a tensor of this name "
            "among the others. Load the model and merge in memory."
        )
    return origins, tuple(absent)


def _new_config(
    path: Path,
    model: Any,
    architecture: str | None,
    acting: Sequence[Adapter],
    parting: Parting | None,
    vocabulary: Vocabulary | None,
) -> dict[str, bytes]:
    """The content of the output's config by its name, if it is not the base's."""
    if not path.exists():
        return {}
    config = read_object(path)
    before = copy.deepcopy(config)
    if architecture is not None:
        config["architectures"] = [architecture]
    for names, inner in nested(model.config) if parting is not None else ():
        if any(inner is cleared for cleared in parting.configs):  # type: ignore[union-attr]
            _inner(config, names)[FLAG] = False
    if vocabulary is not None:
        text = model.config.get_text_config()
        names = next(names for names, part in nested(model.config) if part is text)
        _inner(config, names)[text.attribute_map.get("vocab_size", "vocab_size")] = vocabulary.rows
    labels = next((a.labels for a in reversed(acting) if a.labels is not None), None)
    own = LabelSet.of(model)
    if labels is not None and (own is None or labels.id2label != own.id2label):
        reverse = {name: i for i, name in labels.id2label.items()}
        config["id2label"] = {str(i): name for i, name in labels.id2label.items()}
        config["label2id"] = dict(labels.label2id or reverse)
        config.pop("num_labels", None)  # follows from id2label
        if labels.problem_type is not None or "problem_type" in config:
            config["problem_type"] = labels.problem_type
    return {} if config == before else {path.name: (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()}


def _inner(config: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The part of a config's file for the config of these names; configs of older models hold its fields themselves."""
    for name in names:
        if not isinstance(config.get(name), dict):
            break
        config = config[name]
    return config
