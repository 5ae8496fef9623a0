"""What each tensor of a merged checkpoint comes from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from adapterkit.disk.checkpoint import Checkpoint
from adapterkit.disk.merge.sources import can_be_merged
from adapterkit.disk.names import Names, match_names
from adapterkit.errors import CheckpointError, UnsupportedError
from adapterkit.files import Entry, dtype_name
from adapterkit.merging import Change, Parting, nested, number_of
from adapterkit.model import Adapter, base_parameters


@dataclass(frozen=True, eq=False)
class ModuleMerge:
    """One module that is merged, with the tensors of the base that it needs for that, by parameter name."""

    change: Change
    inputs: Mapping[str, Entry]

    @property
    def nbytes(self) -> int:
        """How much it holds at a time."""
        return sum(entry.nbytes for entry in self.inputs.values())


@dataclass(frozen=True)
class Merged:
    """A tensor that is a parameter of a merged module."""

    module: ModuleMerge
    parameter: str


# Copied from the base, made by a merge, or held by an adapter.
Origin = Entry | Merged | Tensor


@dataclass
class Contents:
    """The tensors of the output that are not simply the base's.

    Attributes:
        origins: where they come from, by their names in the file.
        heads: modules that were taken over.
        untied: where in the config flags say that weights are tied which are apart now: the names that lead there.
    """

    origins: dict[str, Origin] = field(default_factory=dict)
    heads: tuple[str, ...] = ()
    untied: tuple[tuple[str, ...], ...] = ()


class ContentsBuilder:
    """Finds the tensors in the files that changes and heads are about."""

    def __init__(self, model: nn.Module, checkpoint: Checkpoint, names: Names) -> None:
        self.model, self.checkpoint, self.names = model, checkpoint, names
        self.parameters = dict(base_parameters(model))
        self.keys: dict[nn.Parameter, list[str]] = {}
        for key, parameter in self.parameters.items():
            self.keys.setdefault(parameter, []).append(key)
        self.contents = Contents()
        self._parted: set[str] = set()

    def file_name(self, key: str) -> str:
        """The tensor in the file that is the model's `key`, or that is tied to it.

        Raises:
            UnsupportedError: it is made at loading from other tensors.
            CheckpointError: there is none, or it is no plain floating tensor of the model's shape.
        """
        parameter = self.parameters[key]
        name = next((self.names.in_file[k] for k in (key, *self.keys[parameter]) if k in self.names.in_file), None)
        where = self.checkpoint.folder
        if name is None:
            parts = self.names.fused.get(key)
            if parts is not None:
                raise UnsupportedError(
                    f"{key!r} is no tensor of {where}: transformers makes it from {len(parts)} others when it loads, "
                    f"such as {parts[0]!r}, so nothing can be merged into it there. Load the model and merge in memory."
                )
            raise CheckpointError(f"{where} has no tensor for {key!r}, which an adapter changes. Is it another model?")
        entry = self.checkpoint.entries[name]
        if not can_be_merged(entry) or entry.shape != tuple(parameter.shape):
            raise CheckpointError(
                f"{where}: {name!r} is {entry.dtype} of shape {entry.shape}, and {tuple(parameter.shape)} in plain "
                "floating numbers is needed: it is quantised, or does not go with the config."
            )
        return name

    def add_change(self, change: Change) -> None:
        """The tensors that a change writes to."""
        touched = {local: f"{change.path}.{local}" for local in change.touched}
        files = {local: self.file_name(key) for local, key in touched.items()}
        module = ModuleMerge(change, {local: self.checkpoint.entries[name] for local, name in files.items()})
        for local, key in touched.items():
            if local in change.tied:
                self._untie(key, files[local])
            self.contents.origins[self._own_name(key, change, local)] = Merged(module, local)

    def _own_name(self, key: str, change: Change, local: str) -> str:
        return key if local in change.tied and key not in self.names.in_file else self.file_name(key)

    def _untie(self, key: str, name: str) -> None:
        """Every other name of a tied weight keeps the base's values, under its own name in the file."""
        self._parted.add(key)
        for other in self.keys[self.parameters[key]]:
            if other != key and other not in self.names.in_file:
                self.contents.origins.setdefault(other, self.checkpoint.entries[name])

    def add_heads(self, adapters: Sequence[Adapter]) -> None:
        """The tensors of the heads that act, in place of the model's; the last one's at each module."""
        heads = {path: (adapter, head) for adapter in adapters for path, head in adapter.heads.items()}
        numbers = {path: number for adapter in adapters for path, number in adapter.head_paths().items()}
        for path, (adapter, head) in heads.items():
            for place in (path, *adapter.aliases.get(path, ())):
                for local, tensor in head.state_dict().items():
                    key = f"{place}.{local}"
                    tied = [k for k in self.keys.get(self.parameters.get(key), []) if k != key]  # type: ignore[arg-type]
                    own = self.names.in_file.get(key)
                    if any(number_of(k, numbers) != numbers[place] for k in tied):
                        self._parted.add(key)
                        base = next((self.names.in_file[k] for k in (key, *tied) if k in self.names.in_file), None)
                        if base is not None:
                            self._untie(key, base)
                    elif own is None and any(k in self.names.in_file for k in tied):
                        continue  # it is still tied to that one
                    self.contents.origins[own or key] = tensor
        self.contents.heads = tuple(heads)

    def finish(self) -> Contents:
        """All that was added, and what follows from ties that hold no longer: see `Parting`.

        Raises:
            UnsupportedError: the model has no config that could say that, or names that would not be found.
        """
        if self._parted:
            self._part()
        origins, held = self.contents.origins, self.checkpoint.entries
        added = [name for name in origins if name not in held]
        found = match_names(self.model, [*held, *added]).of_model if added else {}
        wrong = [name for name in added if found.get(name) != name]
        if wrong:
            raise UnsupportedError(
                f"{self.checkpoint.folder} lacks {wrong[0]!r}, and beside the names that it has, such a tensor would "
                "not be found. Load the model and merge in memory."
            )
        return self.contents

    def _part(self) -> None:
        parting = Parting.of(self.model, self._parted)
        said = {name for tie in parting.parted if tie.outer is self.model for name in (tie.target, tie.source)}
        if not self._parted <= said:
            raise UnsupportedError(
                f"A {type(self.model).__name__} ties weights in its code, so its files cannot say that they are apart."
            )
        config = self.model.config
        self.contents.untied = tuple(path for path, c in nested(config) if any(c is other for other in parting.configs))
        for tie in parting.freed:
            pair = (tie.target, tie.source)
            held = next((self.names.in_file[key] for key in pair if key in self.names.in_file), None)
            for key in pair:
                if held is not None and key not in self.names.in_file:
                    self.contents.origins.setdefault(key, self.checkpoint.entries[held])

    def absent(self) -> tuple[str, ...]:
        """Parameters of the model that neither the base nor the output has, under any of their names."""
        given = {self.names.of_model.get(name, name) for name in self.contents.origins} | set(self.names.in_file)
        given |= set(self.names.fused)
        return tuple(keys[0] for keys in self.keys.values() if not given.intersection(keys))


def described(name: str, origin: Origin, file: Entry | None) -> tuple[str, tuple[int, ...], int]:
    """The dtype, shape and bytes of a tensor of the output."""
    if isinstance(origin, Tensor):
        return dtype_name(origin.dtype), tuple(origin.shape), origin.nbytes
    entry = origin.module.inputs[origin.parameter] if isinstance(origin, Merged) else origin
    return entry.dtype, entry.shape, entry.nbytes
