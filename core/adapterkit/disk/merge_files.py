"""The files of a merged model: laid out as the base's, written in order, and in place only when all are whole.

They grow in a folder beside the output, `.<name>.partial`. A file has its name there only when it is whole and on the
disk, so an interrupted run is resumed at the first one that is missing.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from adapterkit.disk.checkpoint import Checkpoint, read_object
from adapterkit.door import own_file
from adapterkit.errors import CheckpointError, PluginError, SaveError, StateError, UnsupportedError
from adapterkit.files import Entry, Shard, appearing, as_bytes, dtype_name, read_entry, write_header
from adapterkit.formats import CONFIG_FILE
from adapterkit.merging import Change, merge_module

MANIFEST = "adapterkit_merge.json"
LOCK = ".lock"
_WEIGHTS = (
    *(".safetensors", ".index.json", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx"),
    *(".onnx_data", ".ot", ".tflite", ".pkl", ".npz", ".mlmodel", ".mlpackage"),
)
# Beside these, what `save_pretrained` of models, tokenizers and processors writes.
_OF_MODELS = (
    *("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "*r_config.json"),
    *("tokenizer.*", "vocab.*", "merges.txt", "spiece.model", "*.bpe.model", "chat_template.*"),
    *("special_tokens_map.json", "added_tokens.json"),
)
# Bytes that are copied at a time.
_PIECE_BYTES = 1 << 22
# Bytes between two fsyncs of a growing file, so that the last one is short.
_SYNCED_BYTES = 1 << 26


@dataclass(frozen=True, eq=False)
class Merge:
    """One tensor of a module that is merged.

    Attributes:
        inputs: the base's tensors that the merge needs, by parameter name.
        local: the name of the parameter.
    """

    change: Change
    inputs: Mapping[str, Entry]
    local: str


Progress = Callable[[int, int], object]
# Where a tensor of the output comes from: copied from the base, made by a merge, or held by an adapter.
Origin = Entry | Merge | Tensor


def read_and_merge(merge: Merge, *, safe: bool) -> Mapping[str, Any]:
    """Read the base's values and merge the whole module; its parameters by name."""
    module, values = copy.copy(merge.change.module), {}
    for local, entry in merge.inputs.items():
        with entry.file.open("rb", buffering=0) as file:  # no map: if a mapped file shrinks, the process ends
            values[local] = nn.Parameter(read_entry(entry, file), requires_grad=False)
    module.__dict__["_parameters"] = {**module._parameters, **values}
    merge_module(replace(merge.change, module=module), safe=safe)
    return module._parameters


# Layout


def lay_out(checkpoint: Checkpoint, origins: Mapping[str, Origin]) -> dict[str, Shard]:
    """The files of the output: the base's names, order and metadata; what is added goes into the last one.

    Args:
        origins: of the tensors that are not simply the base's.
    """
    last = list(checkpoint.shards)[-1]
    added = [name for name in origins if name not in checkpoint.entries]
    return {name: _laid_out(shard, origins, added if name == last else []) for name, shard in checkpoint.shards.items()}


def _laid_out(shard: Shard, origins: Mapping[str, Origin], added: Sequence[str]) -> Shard:
    """The file itself, with the base's header, where no size differs; else one with the same order and metadata.

    In a new header wide elements go first, as safetensors puts them, so that each tensor can be mapped.
    """
    own = {entry.name: entry for entry in shard.entries}
    forms = {name: _form(name, origins[name] if name in origins else own[name], shard.file) for name in (*own, *added)}
    if not added and all((e.dtype, e.shape) == (forms[name].dtype, forms[name].shape) for name, e in own.items()):
        return shard
    order = sorted(forms, key=lambda name: own[name].start if name in own else shard.size)
    order.sort(key=lambda name: forms[name].nbytes // (forms[name].numel or 1), reverse=True)
    place = 0
    for name in order:
        forms[name] = replace(forms[name], start=place, end=place + forms[name].nbytes)
        place = forms[name].end
    header = write_header([*forms.values()], shard.metadata)
    moved = [replace(e, start=e.start + len(header), end=e.end + len(header)) for e in forms.values()]
    return Shard(shard.file, header, tuple(moved), shard.metadata, len(header) + place)


def _form(name: str, origin: Origin, file: Path) -> Entry:
    """The dtype, shape and size of a tensor of the output."""
    if isinstance(origin, Tensor):
        return Entry(name, dtype_name(origin.dtype), tuple(origin.shape), file, 0, origin.nbytes)
    entry = origin.inputs[origin.local] if isinstance(origin, Merge) else origin
    return replace(entry, name=name, file=file)


def new_index(checkpoint: Checkpoint, shards: Mapping[str, Shard]) -> bytes:
    """The content of the output's index: the base's, byte for byte, unless tensors were added or have other sizes."""
    assert checkpoint.index_file is not None
    assert checkpoint.index is not None
    if all(shards[name] is shard for name, shard in checkpoint.shards.items()):
        return checkpoint.index_file.read_bytes()
    entries = {entry.name: (name, entry) for name, shard in shards.items() for entry in shard.entries}
    index = {**checkpoint.index, "weight_map": {name: file for name, (file, _) in entries.items()}}
    if isinstance(index.get("metadata"), Mapping):
        sizes = {"total_size": "nbytes", "total_parameters": "numel"}
        counted = {key: sum(getattr(e, size) for _, e in entries.values()) for key, size in sizes.items()}
        index["metadata"] = {**index["metadata"], **{k: n for k, n in counted.items() if k in index["metadata"]}}
    return (json.dumps(index, indent=2) + "\n").encode()


# Writing


@dataclass(frozen=True)
class Output:
    """A merged model that is about to be written.

    Attributes:
        out: its folder.
        base: the base's folder, or its single file.
        origins: where every tensor comes from.
        shards: the files of weights.
        small: the content of other files by name.
        inputs: all that the bytes of the output follow from.
    """

    out: Path
    base: Path
    origins: Mapping[str, Origin]
    shards: Mapping[str, Shard]
    small: Mapping[str, bytes]
    inputs: Mapping[str, Any]

    def write(
        self, *, safe: bool, resume: bool, overwrite: bool, progress: Progress | None
    ) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Write it; the files that an earlier run had finished, and files of the base that are not copied."""
        kept = ""
        try:
            with partial_folder(self.out) as partial:
                resumed = begin(partial, self, resume=resume)
                kept = f" What is finished is in {partial}: resume=True goes on from there, or delete it."
                try:
                    left = self._write_to(partial, resumed, safe=safe, progress=progress)
                except (PluginError, StateError, UnsupportedError):  # a second try would fail too
                    shutil.rmtree(partial)
                    raise
                publish(partial, self.out, overwrite=overwrite)
        except (OSError, MemoryError) as error:
            if isinstance(error, SaveError):
                raise
            raise SaveError(
                f"The merged model cannot be written to {self.out}: {error}. The base, and what was at {self.out}, are "
                f"as they were.{kept}"
            ) from error
        return resumed, left

    def _write_to(
        self, folder: Path, resumed: Sequence[str], *, safe: bool, progress: Progress | None
    ) -> tuple[str, ...]:
        total = sum(shard.size for shard in self.shards.values())
        done = sum(self.shards[name].size for name in resumed)
        needed = total - done
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise SaveError(f"The output needs {needed:,} more bytes, and {folder.parent} has {free:,} free.")

        def wrote(count: int) -> None:
            nonlocal done
            done += count
            if progress is not None:
                progress(done, total)

        wrote(0)
        for name, shard in self.shards.items():
            if name not in resumed:
                write_shard(folder / name, shard, self.origins, safe=safe, wrote=wrote)
        left = _copy_others(self.base, folder, {MANIFEST, *self.shards, *self.small})
        for name, content in self.small.items():
            with appearing(folder / name) as fresh:
                fresh.write_bytes(content)
        files = (path for path in folder.rglob("*") if path.is_file() and path.name != LOCK)
        holds = sorted(path.relative_to(folder).as_posix() for path in files)
        _write_manifest(folder, {**read_object(folder / MANIFEST), "holds": holds})
        return left


def write_shard(
    place: Path, shard: Shard, origins: Mapping[str, Origin], *, safe: bool, wrote: Callable[[int], object]
) -> None:
    """Write a file, tensor by tensor, and give it its name when it is on the disk. A thread syncs it while it grows.

    Args:
        origins: of all tensors.
        wrote: called with the bytes that were written.
    """
    with appearing(place) as fresh, fresh.open("wb", buffering=0) as file, ThreadPoolExecutor(1) as helper:
        unsynced, syncing = 0, helper.submit(lambda: None)
        for content in _contents(shard, origins, safe=safe):
            while content.nbytes:
                count = os.write(file.fileno(), content)
                content, unsynced = content[count:], unsynced + count  # noqa: PLW2901 - what is left
                wrote(count)
            del content  # or a merged module stays in memory while the next one is merged
            if unsynced >= _SYNCED_BYTES and syncing.done():
                syncing.result()
                syncing, unsynced = helper.submit(os.fsync, file.fileno()), 0
        syncing.result()


def _contents(shard: Shard, origins: Mapping[str, Origin], *, safe: bool) -> Iterator[memoryview]:
    """The bytes of a file from its beginning to its end; each piece is valid until the next one is asked for."""
    yield memoryview(shard.header)
    buffer = memoryview(bytearray(_PIECE_BYTES))
    change: Change | None = None
    made: Mapping[str, Any] = {}
    for entry in sorted(shard.entries, key=lambda e: (e.start, e.end)):
        origin = origins[entry.name]
        if isinstance(origin, Tensor):
            yield as_bytes(origin)
        elif isinstance(origin, Merge):
            if origin.change is not change:  # the weight and the bias of a module follow each other
                made = {}  # so that one module is in memory at a time
                change, made = origin.change, read_and_merge(origin, safe=safe)
            yield as_bytes(made[origin.local])
        else:
            with origin.file.open("rb", buffering=0) as file:
                file.seek(origin.start)
                left = origin.nbytes
                while left:
                    count = file.readinto(buffer[:left])
                    if not count:
                        raise OSError(f"{origin.file}: a file of the base has become shorter")
                    yield buffer[:count]
                    left -= count


def _copy_others(base: Path, folder: Path, made: set[str]) -> tuple[str, ...]:
    """Copy the files of the base beside its weights; the files that are left out.

    Those are weights, of this and of other formats, adapters, hidden files, and what is not the base's own: folders
    behind links, links to files elsewhere, devices and pipes. Nothing is beside a base that is a single file.
    """
    left, folders = [], [base] if base.is_dir() else []
    for inside in folders:
        for path in sorted(inside.iterdir()):
            name = path.relative_to(base).as_posix()
            closed = path.is_dir() and (path.is_symlink() or (path / CONFIG_FILE).exists())
            if name in made:
                continue
            if closed or path.name.startswith(".") or path.name.endswith(_WEIGHTS) or path.name == CONFIG_FILE:
                left.append(name)
            elif path.is_dir():
                folders.append(path)
            elif not own_file(path, base):
                left.append(name)
            else:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, folder / name)
                with (folder / name).open("rb") as file:
                    os.fsync(file.fileno())
    return tuple(sorted(left))


def _write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    with appearing(folder / MANIFEST) as fresh:
        fresh.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def of_others(folder: Path) -> list[str]:
    """Files in a folder that neither a merge wrote, as its manifest says, nor a model's `save_pretrained`."""
    try:
        own = set(read_object(folder / MANIFEST)["holds"])
    except (CheckpointError, LookupError, TypeError):
        own = set()
    names = []
    for place, folders, files in os.walk(folder):
        links = (name for name in folders if Path(place, name).is_symlink())
        names += [Path(place, name).relative_to(folder).as_posix() for name in (*files, *links)]
    known = (*_OF_MODELS, MANIFEST, LOCK)
    own |= {name for name in names if "/" not in name and any(fnmatchcase(name, pattern) for pattern in known)}
    return sorted(set(names) - own)


# The folder in which the output grows


@contextlib.contextmanager
def partial_folder(out: Path) -> Iterator[Path]:
    """The folder in which an output grows, made if need be, for this process alone (not on Windows)."""
    folder = out.with_name(f".{out.name}.partial")
    ours = folder.is_dir() and ((folder / LOCK).is_file() or not any(folder.iterdir()))
    if folder.is_symlink() or (folder.exists() and not ours):
        raise SaveError(f"{folder} is in the way: it is not an unfinished merge. Move it.")
    folder.mkdir(parents=True, exist_ok=True)
    # Not behind a link: others may write where the output goes.
    with os.fdopen(os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)), "r+b") as lock:
        if sys.platform != "win32":
            import fcntl

            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise StateError(f"Another process is merging into {out}. Wait for it.") from error
        yield folder


def begin(folder: Path, output: Output, *, resume: bool) -> tuple[str, ...]:
    """Empty the folder, or with `resume` keep the files that are finished, up to the first that is not; their names.

    The manifest is written first: it says what the files are made of.
    """
    path, done, inputs = folder / MANIFEST, [], json.loads(json.dumps(output.inputs))
    if resume and path.is_file():
        try:
            begun = read_object(path)["inputs"]
            differing = sorted(key for key in {*begun, *inputs} if begun.get(key) != inputs.get(key))
        except (CheckpointError, KeyError, TypeError, AttributeError) as error:
            raise StateError(
                f"{path} is damaged, so it is not known what is finished. Merge with resume=False to begin anew."
            ) from error
        if differing:
            raise StateError(
                f"{folder} was begun with other inputs or arguments ({', '.join(differing)} differ). Repeat the call "
                "that began it, or merge with resume=False to begin anew."
            )
        for name, shard in output.shards.items():
            file = folder / name
            if file.is_symlink() or not file.is_file() or file.stat().st_size != shard.size:
                break
            done.append(name)
    for old in folder.iterdir():
        if old.name not in (LOCK, *done, MANIFEST if done else LOCK):
            shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink()
    sizes = {name: {"size": shard.size} for name, shard in output.shards.items()}
    manifest = {"base": output.base.resolve().name, "inputs": inputs, "files": sizes}
    _write_manifest(folder, manifest)
    return tuple(done)


def publish(folder: Path, out: Path, *, overwrite: bool) -> None:
    """Give the folder the output's name, in one step; and the mode and the owner of a folder that it replaces."""
    if out.exists() and overwrite:
        replaced = out.stat()
        with contextlib.suppress(OSError, AttributeError):  # as in a save
            os.chown(folder, replaced.st_uid, replaced.st_gid)
        folder.chmod(replaced.st_mode & 0o7777)
        if not exchange(folder, out):  # where folders cannot change places there is a moment with neither
            old = out.with_name(f".{out.name}.old")
            out.rename(old)
            folder.rename(out)
            old.rename(folder)
    else:
        try:
            folder.rename(out)  # an empty folder may be replaced
        except OSError as error:
            if not out.exists():
                raise
            raise SaveError(f"{out} has been made meanwhile. The merged model is in {folder}.") from error
    (out / LOCK).unlink()  # not before: another run would find the folder free
    shutil.rmtree(folder, ignore_errors=True)  # where it changed places: the old output


def exchange(a: Path, b: Path) -> bool:
    """Swap two folders in one step (Linux's `renameat2`); `False` if the system cannot."""
    import ctypes

    exchange_flag, at_cwd = 2, -100
    with contextlib.suppress(OSError, AttributeError):
        rename = ctypes.CDLL(None, use_errno=True).renameat2
        return bool(rename(at_cwd, os.fsencode(a), at_cwd, os.fsencode(b), exchange_flag) == 0)
    return False
