"""Layout: where in the files of the output each tensor stands, and what has to be done to put it there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from adapterkit.disk.checkpoint import Checkpoint
from adapterkit.disk.merge.contents import Contents, Merged, ModuleMerge, Origin, described
from adapterkit.files import Entry, Shard, write_header

# The kernel copies so much at a time: small enough that progress is seen and that workers share large files.
COPIED_BYTES = 1 << 26


@dataclass(frozen=True)
class Copy:
    """Bytes of the base that stay as they are."""

    file: Path
    source: int
    start: int
    nbytes: int

    @property
    def end(self) -> int:
        """Behind the last byte in the output."""
        return self.start + self.nbytes


@dataclass(frozen=True, eq=False)
class Given:
    """Bytes that are at hand: a header, or a tensor of a head."""

    content: bytes | Tensor
    start: int
    nbytes: int


@dataclass(frozen=True, eq=False)
class Merge:
    """A module that is merged, and where those of its parameters that are in this file begin."""

    module: ModuleMerge
    starts: Mapping[str, int]

    @property
    def extents(self) -> list[tuple[int, int]]:
        """What it writes in the output."""
        return [(start, start + self.module.inputs[local].nbytes) for local, start in self.starts.items()]

    @property
    def nbytes(self) -> int:
        """How much it writes."""
        return sum(end - start for start, end in self.extents)


Step = Copy | Given | Merge


@dataclass
class FileLayout:
    """One file of the output: its entries, in the order of its header, and the steps that write it, from its start on.

    Attributes:
        copied: whether it is the base's file, byte for byte.
    """

    name: str
    size: int
    entries: tuple[Entry, ...]
    steps: list[Step] = field(default_factory=list)
    copied: bool = False

    @property
    def merged(self) -> int:
        """How many of its tensors are merged."""
        return sum(len(step.starts) for step in self.steps if isinstance(step, Merge))


def lay_out(checkpoint: Checkpoint, contents: Contents) -> list[FileLayout]:
    """The files of the output: the base's names, order and metadata; what is added goes into the last one."""
    last = list(checkpoint.shards)[-1]
    added = [name for name in contents.origins if name not in checkpoint.entries]
    return [
        _file(name, shard, contents.origins, added if name == last else ()) for name, shard in checkpoint.shards.items()
    ]


def _file(name: str, shard: Shard, origins: Mapping[str, Origin], added: Sequence[str]) -> FileLayout:
    own = {e.name: origins.get(e.name, e) for e in shard.entries}
    if not added and all(origin is e for e, origin in zip(shard.entries, own.values(), strict=True)):
        steps: list[Step] = list(_pieces(Copy(shard.file, 0, 0, shard.size)))
        return FileLayout(name, shard.size, shard.entries, steps, copied=True)
    own |= {n: origins[n] for n in added}
    before = {e.name: e for e in shard.entries}
    sizes = {n: described(n, origin, before.get(n)) for n, origin in own.items()}
    if not added and all((e.dtype, e.shape, e.nbytes) == sizes[e.name] for e in shard.entries):
        header, entries = shard.header, shard.entries
    else:
        header, entries = _new_header(shard, sizes)
    size = max((e.end for e in entries), default=len(header))
    return FileLayout(name, size, entries, _steps(header, entries, own))


def _new_header(shard: Shard, sizes: Mapping[str, tuple[str, tuple[int, ...], int]]) -> tuple[bytes, tuple[Entry, ...]]:
    """The header where sizes differ from the base's, and its entries, whose offsets are the file's.

    Wide elements go first, as safetensors puts them, so that each tensor can be mapped; else the order stays.
    """
    start = {e.name: e.start for e in shard.entries}
    order = sorted(sizes, key=lambda n: start.get(n, shard.size))
    order.sort(key=lambda n: -_width(*sizes[n][1:]))
    place, places = 0, {}
    for name in order:
        places[name] = place
        place += sizes[name][2]
    entries = [
        Entry(name, dtype, shape, shard.file, places[name], places[name] + nbytes)
        for name, (dtype, shape, nbytes) in sizes.items()
    ]
    header = write_header(entries, shard.metadata)
    moved = (replace(e, start=e.start + len(header), end=e.end + len(header)) for e in entries)
    return header, tuple(moved)


def _width(shape: Sequence[int], nbytes: int) -> int:
    """Bytes of one element."""
    count = 1
    for size in shape:
        count *= size
    return nbytes // count if count else 8


def _steps(header: bytes, entries: Sequence[Entry], origins: Mapping[str, Origin]) -> list[Step]:
    """In the order of the file; each module once, at the first of its parameters; neighbours are copied in one go."""
    steps: list[Step] = [Given(header, 0, len(header))]
    merges: dict[ModuleMerge, dict[str, int]] = {}
    run: Copy | None = None
    for entry in sorted(entries, key=lambda e: (e.start, e.end)):
        origin = origins[entry.name]
        if isinstance(origin, Entry):
            if run is not None and origin.file == run.file and origin.start - run.source == entry.start - run.start:
                run = replace(run, nbytes=entry.end - run.start)
                continue
            steps += _pieces(run)
            run = Copy(origin.file, origin.start, entry.start, origin.nbytes)
            continue
        steps += _pieces(run)
        run = None
        if isinstance(origin, Merged):
            if origin.module not in merges:
                merges[origin.module] = {}
                steps.append(Merge(origin.module, merges[origin.module]))
            merges[origin.module][origin.parameter] = entry.start
        else:
            steps.append(Given(origin, entry.start, entry.nbytes))
    return [*steps, *_pieces(run)]


def _pieces(run: Copy | None) -> Iterator[Copy]:
    for offset in range(0, run.nbytes if run is not None else 0, COPIED_BYTES):
        assert run is not None
        nbytes = min(COPIED_BYTES, run.nbytes - offset)
        yield Copy(run.file, run.source + offset, run.start + offset, nbytes)
