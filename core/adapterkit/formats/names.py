"""Names of the original code of image and video models in a file, and the layers of diffusers that they stand for."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache

from torch import Tensor

from adapterkit.contract import Format, LayerNames, component
from adapterkit.errors import CheckpointError, UnsupportedError
from adapterkit.formats.families import FAMILIES, Family
from adapterkit.formats.layouts import AdapterFiles, Layout, layers_in_file, methods
from adapterkit.kinds import LayerKind

# The parts of a pipeline that generate images. Text encoders have the names of transformers everywhere.
_GENERATORS = (
    *("", "lora_unet", "lora_transformer", "lora_prior_unet", "lycoris"),
    *("unet", "transformer", "transformer_2", "prior", "diffusion_model", "model.diffusion_model"),
)
# A number that is a name of its own, or the place for one.
_NUMBER = re.compile(r"\{\}|(?<![A-Za-z0-9])\d+(?![A-Za-z0-9])")


@dataclass(frozen=True)
class Place:
    """A module of a file that has a name of the original code.

    Attributes:
        module: what its keys begin with; `part`: the part of a pipeline at the beginning of that, or `""`.
        paths: the layers of diffusers that its rows belong to, in order.
        shares: how they share the rows; `()`: the one layer has them all.
        swapped: diffusers has the two halves of its rows in the other order, if there are two rows for each input.
    """

    module: str
    part: str
    paths: tuple[str, ...]
    shares: tuple[int, ...]
    swapped: bool

    @classmethod
    def of(cls, key: str, family: Family) -> Place | None:
        """The module that a key is for, if the models of the family have one of that name."""
        part = component(key)
        if part not in _GENERATORS:
            return None
        start = len(part) + 1 if part else 0
        separator, pieces = key[start - 1] if part else ".", key[start:].split(".")
        for end in (1,) if separator == "_" else range(len(pieces) - 1, 0, -1):
            name = ".".join(pieces[:end])
            found = _find(_table(family, separator), name)
            if found is not None:
                original, numbers = found
                layers = family.names[original]
                paths = (layers,) if isinstance(layers, str) else tuple(layers)
                shares = () if isinstance(layers, str) else tuple(layers.values())
                paths = tuple(path.format(*numbers) for path in paths)
                return cls(key[:start] + name, part, paths, shares, original in family.swapped)
        return None

    def fits(self, outputs: int, inputs: int) -> bool:
        """Whether a module of this size has such shares: the first of several layers, q, has as many rows as inputs."""
        first = self.shares[0] if len(self.shares) > 1 else 1
        return not self.shares or outputs * first == inputs * sum(self.shares)

    def rows(self, sizes: Mapping[str, LayerKind]) -> list[int]:
        """How many rows each part has into which the module is split; one number if it stays whole.

        Args:
            sizes: the layers of the model by their paths, or those of the file by the names of their modules.

        Raises:
            CheckpointError: there is no model, and the module's tensors do not tell its size.
        """
        kinds = [sizes[path] for path in self.paths if path in sizes]
        if not kinds and self.module not in sizes:
            raise CheckpointError(
                f"{self.module!r} has the rows of {', '.join(self.paths)}, and the file does not tell how many each "
                "has. Give base=, the model that it is for."
            )
        outputs = [kind.out_features for kind in kinds or [sizes[self.module]]]
        inputs = (kinds or [sizes[self.module]])[0].in_features
        if self.swapped:
            return [inputs, inputs] if outputs == [2 * inputs] else outputs
        return outputs if kinds else [outputs[0] * share // sum(self.shares) for share in self.shares]


Names = Mapping[str, list[tuple[str, list[str]]]]


@cache
def _table(family: Family, separator: str) -> Names:
    """The original names by their text with `#` for each number, and those numbers."""
    table: dict[str, list[tuple[str, list[str]]]] = {}
    for original in family.names:
        name = original.replace(".", separator)
        table.setdefault(_NUMBER.sub("#", name), []).append((original, _NUMBER.findall(name)))
    return table


def _find(table: Names, name: str) -> tuple[str, list[str]] | None:
    """The entry of a table for a name, and the numbers that stand in its places."""
    numbers = _NUMBER.findall(name)
    for original, expected in table.get(_NUMBER.sub("#", name), ()):
        pairs = list(zip(expected, numbers, strict=True))
        if all(e in ("{}", number) for e, number in pairs):
            return original, [number for e, number in pairs if e == "{}"]
    return None


@dataclass(frozen=True)
class OriginalNames(Layout):
    """Files that call the layers of a model as its original code does: `diffusion_model.double_blocks.0.img_attn.qkv`.

    A key keeps the part of a pipeline that it begins with, and what follows the module's name. Names that the model has
    itself stay, and so do those of layers that it lacks.

    Attributes:
        families: the models whose names are known. The one with most names in the file is meant.
    """

    families: tuple[Family, ...] = FAMILIES

    def read(self, files: AdapterFiles, layers: Mapping[str, LayerKind] | None) -> AdapterFiles | None:
        """See `Layout.read`. Without a model only keys that begin with a part of a pipeline are looked at.

        Raises:
            CheckpointError: several families have these names and mean different layers, or two keys are for one place.
            UnsupportedError: the method cannot split a module.
        """
        if files.config is not None:
            return None
        found = {family: _places(files.tensors, family, layers) for family in self.families}
        most = max(map(len, found.values()))
        best = {family: places for family, places in found.items() if 0 < len(places) == most}
        if not best:
            return None
        sizes = layers or layers_in_file(files.tensors)
        if layers is None:
            best = {family: places for family, places in best.items() if _fit(places.values(), sizes)} or best
            if len({tuple(place.paths for place in places.values()) for places in best.values()}) > 1:
                raise CheckpointError(
                    f"{files.folder} may be for {' or '.join(family.model for family in best)}, which have the same "
                    "names for different layers. Give base=, the model that it is for."
                )
        family, places = next(iter(best.items()))
        tensors = _moved(files.tensors, places, sizes)
        return files.read_as(f"the original code of {family.model}", tensors)


def _places(tensors: Iterable[str], family: Family, layers: Mapping[str, LayerKind] | None) -> dict[str, Place]:
    """For each key with an original name of the family its place, as far as the model has the layers."""
    found = {key: place for key in tensors if (place := Place.of(key, family)) is not None}
    if layers is None:
        return {key: place for key, place in found.items() if place.part}
    names = LayerNames(layers)
    own = {place.module for place in found.values() if names.find(place.module) is not None}
    return {k: place for k, place in found.items() if place.module not in own and layers.keys() >= {*place.paths}}


def _fit(places: Iterable[Place], sizes: Mapping[str, LayerKind]) -> bool:
    """Whether the modules whose sizes the file tells have the shares that the family has."""
    known = [(place, sizes[place.module]) for place in places if place.module in sizes]
    return all(place.fits(kind.out_features, kind.in_features) for place, kind in known)


def _moved(
    tensors: Mapping[str, Tensor], places: Mapping[str, Place], sizes: Mapping[str, LayerKind]
) -> dict[str, Tensor]:
    """The tensors by their new keys, the rows of fused modules split."""
    moved = {key: tensor for key, tensor in tensors.items() if key not in places}
    modules: dict[str, dict[str, Tensor]] = {}
    for key, place in places.items():
        modules.setdefault(place.module, {})[key] = tensors[key]
    for module, held in modules.items():
        place = places[next(iter(held))]
        for path, part in zip(place.paths, _parts(place, held, sizes), strict=True):
            for key, tensor in part.items():
                name = (f"{place.part}.{path}" if place.part else path) + key.removeprefix(module)
                if name in moved:
                    raise CheckpointError(f"{key!r} is for {path!r}, and so are other keys of the file. One must go.")
                moved[name] = tensor
    return moved


def _parts(place: Place, held: Mapping[str, Tensor], sizes: Mapping[str, LayerKind]) -> list[dict[str, Tensor]]:
    """The tensors of a module, by their keys in the file, for each of its layers."""
    rows = place.rows(sizes) if place.swapped or len(place.paths) > 1 else []
    for form, own in _readings(place.module, held) if len(rows) > 1 else ():
        try:
            found = form.split({local: held[key] for local, key in own.items()}, rows)
            found = [form.join(found[::-1])] if place.swapped else found
        except UnsupportedError as error:
            raise UnsupportedError(f"{place.module!r} has the rows of {', '.join(place.paths)}. {error}") from error
        rest = {key: tensor for key, tensor in held.items() if key not in own.values()}
        return [{own[local]: tensor for local, tensor in part.items()} | rest for part in found]
    return [dict(held) for _ in place.paths]  # if no method knows them, a message names their keys


def _readings(module: str, keys: Iterable[str]) -> Iterator[tuple[Format, dict[str, str]]]:
    """The formats that know factors among a module's keys, and these keys by the formats' own local names."""
    for method in methods():
        for form in method.formats():
            own = {local: key for key in keys for read, local in form.readings(key) if read == module}
            if not form.factors.isdisjoint(own):
                yield form, own
