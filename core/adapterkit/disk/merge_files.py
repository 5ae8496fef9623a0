"""The files of a merged model: laid out as the base's, written in order, and in place only when all are whole.

They grow in a folder beside the output, `.<name>.partial`. A file has its name there only when it is whole and on the
disk, so a run that was broken off is resumed at the first one that is missing.
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
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adapterkit.disk.checkpoint import Checkpoint
from adapterkit.disk.model import CONFIG
from adapterkit.errors import SaveError, StateError
from adapterkit.files import CONFIG_FILE, Entry, Shard, as_bytes, dtype_name, write_header
from adapterkit.merging import FLAG, Change, merge_module
from adapterkit.model import LabelSet

MANIFEST = "adapterkit_merge.json"
JOURNAL, LOCK = ".journal.json", ".lock"
_WEIGHTS = (
    *(".safetensors", ".index.json", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx"),
    *(".onnx_data", ".ot", ".tflite", ".pkl", ".npz", ".mlmodel", ".mlpackage"),
)
# So much is copied at a time.
_PIECE_BYTES = 1 << 22
# So much is written before it is given to the disk: the fsync at the end of a file is short then.
_SYNCED_BYTES = 1 << 26


@dataclass(frozen=True, eq=False)
class Merge:
    """One module that is merged.

    Attributes:
        inputs: the base's tensors that it needs, by parameter name.
        names: the tensors of the output that come of it, by parameter name.
    """

    change: Change
    inputs: Mapping[str, Entry]
    names: Mapping[str, str]

    def run(self, *, safe: bool) -> dict[str, Tensor]:
        """Read the base's values and merge; the results by their names in the output."""
        module = copy.copy(self.change.module)
        values: dict[str, nn.Parameter] = {}
        for local, entry in self.inputs.items():
            raw = torch.empty(
                entry.nbytes, dtype=torch.uint8
            )  # never through a map: a file that shrinks ends a process
            _read(entry, 0, as_bytes(raw))
            values[local] = nn.Parameter(raw.view(entry.torch_dtype).view(entry.shape), requires_grad=False)
        module.__dict__["_parameters"] = {**module._parameters, **values}
        merge_module(replace(self.change, module=module), safe=safe)
        return {self.names[local]: module._parameters[local].detach() for local in values}  # type: ignore[union-attr]


# Where a tensor of the output comes from: copied from the base, made by a merge, or held by an adapter.
Origin = Entry | Merge | Tensor


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
    names = [*(entry.name for entry in shard.entries), *added]
    own = {entry.name: entry for entry in shard.entries}
    forms = {name: _form(name, origins[name] if name in origins else own[name]) for name in names}
    if not added and all(forms[name] == (e.dtype, e.shape, e.nbytes) for name, e in own.items()):
        return shard
    order = sorted(names, key=lambda name: own[name].start if name in own else shard.size)
    order.sort(key=lambda name: -_width(*forms[name][1:]))
    place, entries = 0, {}
    for name in order:
        dtype, shape, nbytes = forms[name]
        entries[name] = Entry(name, dtype, shape, shard.file, place, place + nbytes)
        place += nbytes
    header = write_header([entries[name] for name in names], shard.metadata)
    moved = (replace(e, start=e.start + len(header), end=e.end + len(header)) for e in (entries[n] for n in names))
    return Shard(shard.file, header, tuple(moved), shard.metadata, len(header) + place)


def _form(name: str, origin: Origin) -> tuple[str, tuple[int, ...], int]:
    """The dtype, shape and bytes of a tensor of the output."""
    if isinstance(origin, Tensor):
        return dtype_name(origin.dtype), tuple(origin.shape), origin.nbytes
    if isinstance(origin, Merge):
        origin = next(origin.inputs[local] for local, made in origin.names.items() if made == name)
    return origin.dtype, origin.shape, origin.nbytes


def _width(shape: Sequence[int], nbytes: int) -> int:
    """Bytes of one element."""
    count = torch.Size(shape).numel()
    return nbytes // count if count else 8


# Writing


def write_shard(
    place: Path, shard: Shard, origins: Mapping[str, Origin], *, safe: bool, wrote: Callable[[int], object]
) -> None:
    """Write a file, tensor by tensor, and give it its name when it is on the disk.

    Args:
        origins: of all tensors.
        wrote: called with the bytes that were written.
    """
    fresh = place.with_name(f"{place.name}.new")
    starts = {entry.name: entry.start for entry in shard.entries}
    merged: set[str] = set()
    buffer = memoryview(bytearray(_PIECE_BYTES))
    with _synced(fresh, wrote) as put:
        put(0, memoryview(shard.header))
        for entry in sorted(shard.entries, key=lambda e: (e.start, e.end)):
            origin = origins[entry.name]
            if isinstance(origin, Tensor):
                put(entry.start, as_bytes(origin))
            elif isinstance(origin, Entry):
                for offset in range(0, entry.nbytes, _PIECE_BYTES):
                    piece = buffer[: entry.nbytes - offset]
                    _read(origin, offset, piece)
                    put(entry.start + offset, piece)
            elif entry.name not in merged:  # all that comes of a module is written at once
                made = origin.run(safe=safe)
                for name in starts.keys() & made.keys():
                    put(starts[name], as_bytes(made.pop(name)))
                    merged.add(name)
    fresh.replace(place)


@contextlib.contextmanager
def _synced(path: Path, wrote: Callable[[int], object]) -> Iterator[Callable[[int, memoryview], None]]:
    """A file to put bytes into; it is on the disk when the block ends. A thread syncs it while it grows."""
    with path.open("wb", buffering=0) as file, ThreadPoolExecutor(1) as helper:
        unsynced, syncing = 0, helper.submit(lambda: None)

        def put(start: int, content: memoryview) -> None:
            nonlocal unsynced, syncing
            while content.nbytes:
                count = os.pwrite(file.fileno(), content, start)
                content, start, unsynced = content[count:], start + count, unsynced + count
                wrote(count)
            if unsynced >= _SYNCED_BYTES and syncing.done():
                syncing.result()
                syncing, unsynced = helper.submit(os.fsync, file.fileno()), 0

        yield put
        syncing.result()
        os.fsync(file.fileno())


def _read(entry: Entry, offset: int, target: memoryview) -> None:
    """Fill `target` with bytes of a tensor of the base."""
    with entry.file.open("rb", buffering=0) as file:
        file.seek(entry.start + offset)
        while target.nbytes:
            count = file.readinto(target)
            if not count:
                raise OSError(f"{entry.file}: a file of the base has become shorter")
            target = target[count:]


def write_durably(path: Path, content: bytes) -> None:
    """Write a file so that it holds the old content or the new one, whatever happens."""
    fresh = path.with_name(f"{path.name}.new")
    with fresh.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)


# The folder in which the output grows


def partial_folder(out: Path) -> Path:
    """Where an output grows."""
    return out.with_name(f".{out.name}.partial")


@contextlib.contextmanager
def held(out: Path) -> Iterator[Path]:
    """The folder in which an output grows, made if need be, for this process alone.

    Raises:
        StateError: another process merges into the same output.
        SaveError: something else is there.
    """
    folder = partial_folder(out)
    ours = folder.is_dir() and ((folder / LOCK).is_file() or not any(folder.iterdir()))
    if folder.is_symlink() or (folder.exists() and not ours):
        raise SaveError(f"{folder} is in the way: it is no unfinished merge. Move it.")
    descriptor = None
    while descriptor is None:
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # another run has just become the output
            descriptor = _lock(folder / LOCK, out)
    try:
        yield folder
    finally:
        os.close(descriptor)


def _lock(path: Path, out: Path) -> int | None:
    """The lock's file, opened and locked (not on Windows); `None` if it was moved away with its folder meanwhile."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if sys.platform != "win32":
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise StateError(f"Another process is merging into {out}. Wait for it.") from error
    with contextlib.suppress(OSError):
        if os.path.samestat(os.fstat(descriptor), path.stat()):
            return descriptor
    os.close(descriptor)
    return None


def begin(folder: Path, request: Mapping[str, Any], shards: Mapping[str, Shard], *, resume: bool) -> tuple[str, ...]:
    """Empty the folder, or with `resume` keep the files that are finished, up to the first that is not; their names.

    Args:
        request: all that the bytes of the output follow from.

    Raises:
        StateError: the folder was begun with another request.
    """
    request = json.loads(json.dumps(request))
    journal, done = folder / JOURNAL, []
    if resume and journal.is_file():
        _check_same(journal, request)
        for name, shard in shards.items():
            file = folder / name
            if file.is_symlink() or not file.is_file() or file.stat().st_size != shard.size:
                break
            done.append(name)
    for path in folder.iterdir():
        if path.name not in (LOCK, JOURNAL, *done):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    if not done:
        write_durably(journal, json.dumps({"request": request}, indent=1).encode())
    return tuple(done)


def _check_same(journal: Path, request: Mapping[str, Any]) -> None:
    try:
        begun = json.loads(journal.read_text(encoding="utf-8"))["request"]
        differing = sorted(key for key in {*begun, *request} if begun.get(key) != request.get(key))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise StateError(
            f"{journal} is damaged, so it is not known what is finished. Merge with resume=False to begin anew."
        ) from error
    if differing:
        raise StateError(
            f"{journal.parent} was begun with other inputs or arguments ({', '.join(differing)} differ). Repeat the "
            "call that began it, or merge with resume=False to begin anew."
        )


def publish(folder: Path, out: Path, *, overwrite: bool) -> None:
    """Give the folder the output's name, in one step.

    Raises:
        SaveError: there is something of that name now.
    """
    (folder / JOURNAL).unlink()
    _sync_folder(folder)
    if out.exists() and overwrite:
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
    _sync_folder(out.parent)


def exchange(a: Path, b: Path) -> bool:
    """Swap two folders in one step (Linux's `renameat2`); `False` if the system cannot."""
    import ctypes

    exchange_flag, at_cwd = 2, -100
    with contextlib.suppress(OSError, AttributeError):
        rename = ctypes.CDLL(None, use_errno=True).renameat2
        return bool(rename(at_cwd, os.fsencode(a), at_cwd, os.fsencode(b), exchange_flag) == 0)
    return False


def _sync_folder(folder: Path) -> None:
    """Have a folder's list of names on the disk."""
    with contextlib.suppress(OSError):  # not every system can open folders
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


# The files beside the weights


def others(base: Path, checkpoint: Checkpoint) -> tuple[list[str], list[str]]:
    """The files of the base beside its weights that are copied, and those that are not, by their paths in it.

    Not copied are weights, of this and of other formats, adapters, hidden files, and folders behind links.
    """
    own = {*checkpoint.shards, *([checkpoint.index_file.name] if checkpoint.index_file else []), MANIFEST}
    copied: list[str] = []
    left: list[str] = []
    for path in sorted(_files(base)):
        name = path.relative_to(base).as_posix()
        hidden = name.startswith(".") or "/." in name
        if name not in own:
            not_wanted = path.is_dir() or hidden or path.name.endswith(_WEIGHTS) or path.name == CONFIG_FILE
            (left if not_wanted else copied).append(name)
    return copied, left


def _files(folder: Path) -> Iterator[Path]:
    """Every file below the folder, and each folder that is not looked into."""
    for path in folder.iterdir():
        closed = path.is_symlink() or path.name.startswith(".") or (path / CONFIG_FILE).exists()
        if path.is_dir() and not closed:
            yield from _files(path)
        else:
            yield path


def copy_others(base: Path, names: Sequence[str], folder: Path) -> None:
    """Copy the files; the content behind a link, not the link."""
    for name in names:
        place = folder / name
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(base / name, place)
        with place.open("rb") as file:
            os.fsync(file.fileno())


def write_config(
    folder: Path, *, architecture: str | None, labels: LabelSet | None, untied: Sequence[tuple[str, ...]]
) -> None:
    """Change the copied `config.json` where it would be untrue."""
    path = folder / CONFIG
    if not path.exists():
        return
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    before = json.dumps(config)
    if architecture is not None and config.get("architectures") != [architecture]:
        config["architectures"] = [architecture]
    for names in untied:
        place = config
        for name in names:
            place = place.setdefault(name, {})
        place[FLAG] = False
    if labels is not None:
        named = {str(i): name for i, name in labels.id2label.items()}
        reverse = {name: i for i, name in labels.id2label.items()}
        config["id2label"], config["label2id"] = named, dict(labels.label2id or reverse)
        config.pop("num_labels", None)  # follows from id2label
        if labels.problem_type is not None or "problem_type" in config:
            config["problem_type"] = labels.problem_type
    if json.dumps(config) != before:
        write_durably(path, (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode())


def write_index(checkpoint: Checkpoint, shards: Mapping[str, Shard], folder: Path) -> None:
    """The index: the base's, byte for byte, unless tensors were added or have other sizes."""
    if checkpoint.index_file is None or checkpoint.index is None:
        return
    places = {e.name: (name, e) for name, shard in shards.items() for e in shard.entries}
    before = checkpoint.entries
    changed = [n for n, (_, e) in places.items() if n not in before or before[n].shape != e.shape]
    content = checkpoint.index_file.read_bytes()
    if changed:
        index = dict(checkpoint.index)
        index["weight_map"] = {**index["weight_map"], **{name: places[name][0] for name in changed}}
        if isinstance(index.get("metadata"), Mapping):
            index["metadata"] = dict(index["metadata"])
            for key, measure in (("total_size", "nbytes"), ("total_parameters", "numel")):
                if isinstance(index["metadata"].get(key), int):
                    grown = sum(getattr(places[name][1], measure) for name in changed)
                    index["metadata"][key] += grown - sum(getattr(before[n], measure) for n in changed if n in before)
        content = (json.dumps(index, indent=2) + "\n").encode()
    write_durably(folder / checkpoint.index_file.name, content)
