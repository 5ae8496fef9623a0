"""Names of the original code of image and video models: read as the layers of diffusers, and written."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from adapterkit.contract import GENERATORS, Format, LayerNames, component, default_registry
from adapterkit.errors import CheckpointError, UnsupportedError
from adapterkit.formats.families import FAMILIES, Family
from adapterkit.formats.layouts import AdapterFiles, layers_in_file, methods, shapes_of
from adapterkit.kinds import LayerKind

# A number that is a name of its own, or the place for one.
_NUMBER = re.compile(r"\{\}|(?<![A-Za-z0-9])\d+(?![A-Za-z0-9])")


@dataclass(frozen=True)
class Place:
    """A module of a file that has a name of the original code.

    Attributes:
        module: what its keys begin with; `part`: the part of a pipeline at the beginning of that, or `""`.
        layers: the layers of diffusers that its rows belong to, in order, with their shares of the rows.
        swapped: diffusers has the two halves of its rows in the other order, if there are two rows for each input.
    """

    module: str
    part: str
    layers: Mapping[str, int]
    swapped: bool

    @property
    def same(self) -> bool:
        """Whether diffusers has the original name, perhaps with dots for `_`."""
        names = [path.replace(".", "_") for path in (*self.layers, self.module)]
        return names[-1].endswith(names[0]) and len(names) == 2

    def fits(self, sizes: Mapping[str, LayerKind]) -> bool:
        """Whether the module has such shares, if its size is known: the first of several layers, q, is square."""
        first, *others = self.layers.values()
        if self.module not in sizes or (first == 1 and not others):
            return True
        kind = sizes[self.module]
        return kind.out_features * (first if others else 1) == kind.in_features * (first + sum(others))

    def rows(self, sizes: Mapping[str, LayerKind]) -> list[int]:
        """How many rows, or what share of them, each part has into which the module is split; one if it stays whole.

        Args:
            sizes: the layers of the model by their paths, or those of the file by the names of their modules.

        Raises:
            CheckpointError: there is no model, and the module's tensors do not tell its size.
        """
        kinds = [sizes[path] for path in self.layers if path in sizes]
        if not kinds and self.module not in sizes:
            raise CheckpointError(
                f"{self.module!r} has the rows of {', '.join(self.layers)}, and the file does not tell how many each "
                "has. Give base=, the model that it is for."
            )
        outputs = [kind.out_features for kind in kinds or [sizes[self.module]]]
        inputs = (kinds or [sizes[self.module]])[0].in_features
        if self.swapped:
            return [inputs, inputs] if outputs == [2 * inputs] else outputs
        return outputs if kinds else list(self.layers.values())


# Families, their original names, and the numbers of a name, by the text of that name with `#` for each number.
Table = Mapping[str, list[tuple[Family, str, list[str]]]]


@cache
def _table(families: tuple[Family, ...], separator: str = "") -> Table:
    """The original names, with `_` or `.` between their parts; or, without a separator, by the layers of diffusers."""
    table: dict[str, list[tuple[Family, str, list[str]]]] = {}
    for family in families:
        for original in family.names:
            for name in [original.replace(".", separator)] if separator else family.layers(original):
                table.setdefault(_NUMBER.sub("#", name), []).append((family, original, _NUMBER.findall(name)))
    return table


def _named(table: Table, name: str, module: str = "", part: str = "") -> dict[Family, Place]:
    """The module of the original code that a table has for a name, in each family; the first of several names counts.

    Args:
        module: what the file calls it; else it gets the original name.
    """
    numbers, found = _NUMBER.findall(name), dict[Family, Place]()
    for family, original, expected in table.get(_NUMBER.sub("#", name), ()):
        pairs = list(zip(expected, numbers, strict=True))
        if all(e in ("{}", number) for e, number in pairs):
            own = [number for e, number in pairs if e == "{}"]
            layers = {path.format(*own): share for path, share in family.layers(original).items()}
            found.setdefault(family, Place(module or original.format(*own), part, layers, original in family.swapped))
    return found


def _module_of(key: str, families: tuple[Family, ...]) -> dict[Family, Place]:
    """The module that a key of a file is for, in each family whose models have one of that name."""
    part, found = component(key), dict[Family, Place]()
    if part not in ("", "lycoris", *GENERATORS):  # text encoders have the names of transformers everywhere
        return found
    start = len(part) + 1 if part else 0
    separator, pieces = key[start - 1] if part else ".", key[start:].split(".")
    for end in (1,) if separator == "_" else range(len(pieces) - 1, 0, -1):
        name = ".".join(pieces[:end])
        for family, place in _named(_table(families, separator), name, key[:start] + name, part).items():
            found.setdefault(family, place)
    return found


def in_diffusers_names(
    files: AdapterFiles, layers: Mapping[str, LayerKind] | None, families: tuple[Family, ...] = FAMILIES
) -> AdapterFiles:
    """Give layers diffusers' names where files have those of the original code: `double_blocks.0.img_attn.qkv`.

    A key keeps the part of a pipeline that it begins with, and what follows the module's name. Names that the model has
    itself stay, and so do those of layers that it lacks. Without a model only keys that begin with a part of a pipeline
    are looked at. Files without such names are given back as they are.

    Args:
        families: the models whose names are known. The one with most names in the file is meant.

    Raises:
        CheckpointError: several families have these names and mean different layers, or two keys are for one place.
        UnsupportedError: the method cannot split a module.
    """
    if files.config is not None and layers is None:
        return files
    found = _places(files.tensors, layers, families)
    if files.config is not None and any(found.values()):
        files = _without_config(files, files.config)
        found = _places(files.tensors, layers, families)
    most = max(map(len, found.values()))
    best = {family: places for family, places in found.items() if 0 < len(places) == most}
    if not best:
        return files
    sizes = layers or layers_in_file(files.tensors)
    if layers is None:
        best = {f: places for f, places in best.items() if all(p.fits(sizes) for p in places.values())} or best
        if len({tuple(tuple(place.layers) for place in places.values()) for places in best.values()}) > 1:
            raise CheckpointError(
                f"{files.folder} may be for {' or '.join(family.model for family in best)}, which have the same "
                "names for different layers. Give base=, the model that it is for."
            )
    family, places = next(iter(best.items()))
    tensors = _moved(files.tensors, places, sizes)
    if all(place.same for place in places.values()):  # several models may have these names
        return dataclasses.replace(files, tensors=tensors)
    parts = {place.part for place in places.values()}
    other = next((key for key in files.tensors if key not in places and component(key) in parts), None)
    if layers is None and other is not None:
        raise CheckpointError(
            f"{files.folder}: {other!r} is not a name of {family.model}, as the others are. Give base=, the model "
            "that it is for."
        )
    return files.read_as(f"{family.model} in its original names", tensors)


def _places(
    keys: Iterable[str], layers: Mapping[str, LayerKind] | None, families: tuple[Family, ...]
) -> dict[Family, dict[str, Place]]:
    """For each family the keys that have an original name of it, as far as the model has the layers."""
    found: dict[Family, dict[str, Place]] = {family: {} for family in families}
    names = LayerNames(layers or ())
    for key in keys:
        for family, place in _module_of(key, families).items():
            wanted = bool(place.part) and not family.rare
            if layers is not None:
                wanted = layers.keys() >= place.layers.keys() and names.find(place.module) is None
            if wanted:
                found[family][key] = place
    return found


def _without_config(files: AdapterFiles, fields: Mapping[str, Any]) -> AdapterFiles:
    """A folder of PEFT's as a file without a config, whose layers have their alphas beside them.

    Raises:
        UnsupportedError: the scale of its layers is not in the config, or part of them is in the base's weights.
    """
    method, config = default_registry.read_config(fields, files.folder)
    layers: Any = {path: config.at(path) for path in method.layers_in_file(shapes_of(files.tensors), config)}
    # An alpha of 0 would mean the rank.
    if method.key_rule(config).exempt or not all(getattr(own, "scaling", 0) for own in layers.values()):
        raise UnsupportedError(
            f"{files.folder}: its layers have names of the model's original code, and an adapter of the method "
            f"{method.name!r} with this config cannot be brought to diffusers' layers. Convert it to plain LoRA there."
        )
    tensors = dict(files.tensors)
    for path, own in layers.items():
        tensors.setdefault(f"{path}.alpha", torch.tensor(float(own.scaling * own.r)))
    return dataclasses.replace(files, config=None, tensors=tensors)


def advice_on_names(layers: Iterable[str]) -> str:
    """What to do if most of a model's layers have names of the original code and an adapter has others; else `""`."""
    paths = list(layers)
    places = ((path, _module_of(f"{path}.weight", FAMILIES)) for path in paths)
    found = Counter(family.model for path, known in places for family in known if path not in known[family].layers)
    family, count = next(iter(found.most_common(1)), ("", 0))
    if 2 * count <= len(paths):
        return ""
    return (
        f"The model has the original names of {family}: for an adapter in diffusers' names, give its diffusers folder."
    )


def _moved(
    tensors: Mapping[str, Tensor], places: Mapping[str, Place], sizes: Mapping[str, LayerKind]
) -> dict[str, Tensor]:
    """The tensors by their new keys, the rows of fused modules split."""
    moved = {key: tensor for key, tensor in tensors.items() if key not in places}
    forms, modules = _formats(), dict[str, dict[str, Tensor]]()
    for key, place in places.items():
        modules.setdefault(place.module, {})[key] = tensors[key]
    for module, held in modules.items():
        place = places[next(iter(held))]
        for path, part in zip(place.layers, _parts(place, held, sizes, forms), strict=True):
            for key, tensor in part.items():
                name = (f"{place.part}.{path}" if place.part else path) + key.removeprefix(module)
                if name in moved:
                    raise CheckpointError(f"{key!r} is for {path!r}, and so are other keys of the file. One must go.")
                moved[name] = tensor
    return moved


def _parts(
    place: Place, held: Mapping[str, Tensor], sizes: Mapping[str, LayerKind], forms: Iterable[Format]
) -> list[dict[str, Tensor]]:
    """The tensors of a module, by their keys in the file, for each of its layers."""
    rows = place.rows(sizes) if place.swapped or len(place.layers) > 1 else []
    parts, rest = [dict[str, Tensor]() for _ in place.layers], dict(held)
    for form, own in _readings(place.module, held, forms) if len(rows) > 1 else ():
        if not rest.keys() >= {*own.values()}:  # another method has read them
            continue
        values = {local: rest.pop(key) for local, key in own.items()}
        try:
            found = [_swapped(values, form, rows)] if place.swapped else form.split(values, rows)
        except UnsupportedError as error:
            raise UnsupportedError(f"{place.module!r} has the rows of {', '.join(place.layers)}. {error}") from error
        for part, tensors in zip(parts, found, strict=True):
            part |= {own.get(local, f"{place.module}.{local}"): tensor for local, tensor in tensors.items()}
    return [part | rest for part in parts]  # no method knows the rest, and a message names its keys


class _Differences(Format):
    """Differences of whole weights and biases, which ComfyUI and LyCORIS have beside adapters."""

    factors = frozenset({"diff", "diff_b"})
    rows = dict.fromkeys(factors, 0)


def _formats() -> list[Format]:
    """The formats of all methods, and that of whole differences."""
    return [*(form for method in methods() for form in method.formats()), _Differences()]


def _readings(module: str, keys: Iterable[str], forms: Iterable[Format]) -> Iterator[tuple[Format, dict[str, str]]]:
    """The formats that know factors among a module's keys, and these keys by the formats' own local names."""
    for form in forms:
        own = {local: key for key in keys for read, local in form.readings(key) if read == module}
        if not form.factors.isdisjoint(own):
            yield form, own


def original_names(
    tensors: Mapping[str, Mapping[str, Tensor]],
    kinds: Mapping[str, LayerKind],
    base: Mapping[str, LayerKind] | None,
    separator: str,
) -> dict[str, Mapping[str, Tensor]]:
    """An adapter's tensors by the names of the model's original code, fused layers joined; as they are if it has none.

    Args:
        tensors: for each layer's path its tensors by another program's names, alphas too.
        kinds: of these layers; `base`: of all layers of the model, if it is known.
        separator: what the names will have between their parts.

    Raises:
        CheckpointError: the layers may be those of several models, which have other original names.
        UnsupportedError: layers that are one in the original code have changes that the method cannot join.
    """
    family = _family_of(tensors, base, separator)
    if family is None:
        return dict(tensors)
    forms, written = _formats(), dict[str, Mapping[str, Tensor]]()
    for path in tensors:
        place = _named(_table(FAMILIES), path)[family]
        if place.module not in written:
            written[place.module] = _joined(place, tensors, kinds if base is None else base, forms)
    return written


def _family_of(paths: Iterable[str], base: Iterable[str] | None, separator: str) -> Family | None:
    """The family whose original names the layers have; `None` if diffusers' names are the only ones.

    With a model it is the family that names most of the model's layers, and most of them at least.
    """
    table = _table(FAMILIES)
    known, own = list(paths if base is None else base), [_named(table, path) for path in paths]
    told = {family for family in FAMILIES if any(re.search(family.told_by, path) for path in known)}
    best = [family for family in FAMILIES if family in told and all(family in places for places in own)]
    best = [family for family in best if base is not None or not family.rare]
    if base is not None:
        named = Counter(family for path in known for family in _named(table, path))
        best = sorted((family for family in best if 2 * named[family] > len(known)), key=lambda f: -named[f])[:1]
    if len({tuple(places[family].module.replace(".", separator) for places in own) for family in best}) > 1:
        raise CheckpointError(
            f"The adapter may be for {' or '.join(family.model for family in best)}, whose original code has other "
            "names for the same layers. Give base=, the model that it is for."
        )
    return next(iter(best), None)


def _joined(
    place: Place,
    tensors: Mapping[str, Mapping[str, Tensor]],
    kinds: Mapping[str, LayerKind],
    forms: Iterable[Format],
) -> Mapping[str, Tensor]:
    """The tensors of a module of the original code. Its layers that the adapter does not change get zeros."""
    first = next(path for path in place.layers if path in tensors)
    outputs, inputs = kinds[first].out_features, kinds[first].in_features
    if len(place.layers) == 1 and not (place.swapped and outputs == 2 * inputs):
        return tensors[first]
    form, keys = next(_readings("x", [f"x.{local}" for local in tensors[first]], forms))
    names = {key.removeprefix("x."): local for local, key in keys.items()}
    held = {path: {names[local]: t for local, t in tensors[path].items()} for path in place.layers if path in tensors}
    if place.swapped:
        joined = _swapped(held[first], form, [inputs, inputs])
    else:
        parts = []
        for path, share in place.layers.items():
            rows = kinds[path].out_features if path in kinds else outputs * share // place.layers[first]
            parts.append(held[path] if path in held else _zeros(held[first], form, rows))
        joined = form.join(parts)
    return {keys[local].removeprefix("x."): tensor for local, tensor in joined.items()}


def _swapped(tensors: Mapping[str, Tensor], form: Format, halves: Sequence[int]) -> dict[str, Tensor]:
    """The tensors of a layer with the halves of its rows in the other order; everything else stays."""
    return Format.join(form, Format.split(form, tensors, halves)[::-1])


def _zeros(tensors: Mapping[str, Tensor], form: Format, rows: int) -> dict[str, Tensor]:
    """The tensors of a layer with this many outputs and no change, which has the rest in common with another layer."""
    zeros = {}
    for local, dim in form.rows.items():
        if local in tensors:
            zeros[local] = tensors[local].new_zeros(*tensors[local].shape[:dim], rows, *tensors[local].shape[dim + 1 :])
    return {**tensors, **zeros}
