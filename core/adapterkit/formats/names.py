"""Names that other programs have for a model's layers: a table for each family of models, and the one way to use it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from torch import Tensor

from adapterkit.contract import FLAT, Format, LayerNames, component, default_registry
from adapterkit.errors import PluginError
from adapterkit.formats.layouts import AdapterFiles, Layout
from adapterkit.kinds import LayerKind

# The layer that a name stands for; or, of a fused layer, the layers whose outputs it stacks, in this order, with their
# shares of the outputs, which are equal in a tuple.
Layers = str | tuple[str, ...] | Mapping[str, int]


class _Found(NamedTuple):
    """A key's module: the key up to the tensor's own name, the part of the pipeline, the layers and their shares."""

    module: str
    part: str
    layers: Mapping[str, int]


@dataclass(frozen=True)
class NameTable(Layout):
    """One family of models under the names of one program.

    Attributes:
        program: the program and the family, such as `"ComfyUI, Flux in its original names"`.
        parts: the parts of a pipeline under which such names stand: `"lora_unet"`, `"diffusion_model"`, `""` for none.
        names: by the name of a layer there, with dots, the layers of the model. `{}` in both stands for a number:
            `{"double_blocks.{}.img_attn.qkv": ("transformer_blocks.{}.attn.to_q", ...)}`.
        marks: names of which a file has at least one, where other families share some names; all of them by default.
    """

    program: str
    parts: tuple[str, ...]
    names: Mapping[str, Layers]
    marks: tuple[str, ...] = ()

    def read(self, files: AdapterFiles, layers: Mapping[str, LayerKind] | None) -> AdapterFiles | None:
        """Keys with the paths of the model's layers: `<part>.<path>.<name of the tensor there>`.

        A name that the model has itself stays, and so does one whose layers it lacks.
        """
        if files.config is not None and layers is None:  # PEFT's own names
            return None
        known, groups = None if layers is None else LayerNames(layers), dict[str, tuple[_Found, dict[str, str]]]()
        marked = False
        for key in files.tensors:
            found = self._find(key)
            if found is None:
                continue
            marked = marked or self._is_mark(found)
            there = known is None or known.find(found.module) is None
            if there and (layers is None or not found.layers.keys().isdisjoint(layers)):
                groups.setdefault(found.module, (found, {}))[1][key] = key.removeprefix(f"{found.module}.")
        if not groups or not marked:
            return None
        tensors = dict(files.tensors)
        for found, keys in groups.values():
            given = {local: tensors.pop(key) for key, local in keys.items()}
            for path, own in zip(found.layers, _split(given, found.layers, layers), strict=True):
                place = f"{found.part}.{path}" if found.part else path
                tensors |= {f"{place}.{local}": tensor for local, tensor in own.items()}
        return dataclasses.replace(files, tensors=tensors)

    def _find(self, key: str) -> _Found | None:
        """The layers that a key is for, if it has a name of this table."""
        part = component(key)
        if part not in self.parts:
            return None
        start = len(part) + 1 if part else 0
        flat = part in FLAT and key[start - 1] == "_"
        match = self._patterns[flat].match(key, start)
        if match is None or match.lastindex is None:
            return None
        name = [*self.names][self._entries[match.lastindex]]
        numbers = match.groups()[match.lastindex : match.lastindex + name.count("{}")]
        return _Found(key[: match.end() - 1], part, {p.format(*numbers): n for p, n in _shares(self.names[name])})

    def _is_mark(self, found: _Found) -> bool:
        marks = (path for mark in self.marks for path, _ in _shares(self.names[mark]))
        return not self.marks or any(re.fullmatch(_pattern(m), path) for m in marks for path in found.layers)

    @cached_property
    def _order(self) -> list[int]:
        """The longest name first: one may be the beginning of another."""
        return sorted(range(len(self.names)), key=lambda i: -len([*self.names][i]))

    @cached_property
    def _entries(self) -> dict[int, int]:
        """By the number of its group in the patterns, which name matched."""
        names, found, group = [*self.names], {}, 1
        for i in self._order:
            found[group] = i
            group += 1 + names[i].count("{}")
        return found

    @cached_property
    def _patterns(self) -> tuple[re.Pattern[str], re.Pattern[str]]:
        """All names in one expression, with dots and with `_` for each of them; behind a name there is a dot."""
        names = [[*self.names][i] for i in self._order]
        dotted, flat = (
            "|".join(f"({_pattern(name if dots else name.replace('.', '_'))})" for name in names)
            for dots in (True, False)
        )
        return re.compile(rf"(?:{dotted})\."), re.compile(rf"(?:{flat})\.")


def _pattern(name: str) -> str:
    return re.escape(name).replace(r"\{\}", r"(\d+)")


def _shares(layers: Layers) -> Iterable[tuple[str, int]]:
    if isinstance(layers, Mapping):
        return layers.items()
    return [(layers, 1)] if isinstance(layers, str) else [(path, 1) for path in layers]


def _split(
    given: Mapping[str, Tensor], shares: Mapping[str, int], layers: Mapping[str, LayerKind] | None
) -> list[Mapping[str, Tensor]]:
    """The tensors of a fused layer, by their names in the file, for each of its layers.

    The method cuts those that it knows (`Format.split`). A layer of a method that is not installed is copied, so that
    the message about it names its keys.
    """
    if len(shares) == 1:
        return [given]
    sizes = [*shares.values()]
    if layers is not None and shares.keys() <= layers.keys():
        sizes = [layers[path].out_features for path in shares]
    for form in _formats():
        own = {local: next(iter(form.readings(f"x.{local}")), ("", ""))[1] for local in given}
        if not form.factors.isdisjoint(own.values()):
            cut = form.split({own[local] or local: tensor for local, tensor in given.items()}, sizes)
            return [{local: part[own[local] or local] for local in given} for part in cut]
    return [given] * len(sizes)


def _formats() -> Iterator[Format]:
    """The formats of all methods; plugins that cannot be asked are told of where the file's method is looked for."""
    for name in default_registry.methods():
        try:
            yield from default_registry.method(name).formats()
        except PluginError:
            continue
