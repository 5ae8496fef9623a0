"""What two adapters' files differ in: `ak.diff_adapters`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from adapterkit.combining import measures
from adapterkit.contract import strip_file_prefix
from adapterkit.disk.adapter_file import AdapterFile
from adapterkit.disk.model import Base
from adapterkit.errors import ConfigError
from adapterkit.files import adapter_folder
from adapterkit.kinds import Factors
from adapterkit.results import brief

T = TypeVar("T")
Both = tuple[T | None, T | None]

# Fields that name modules: PEFT writes its sets in any order.
_SETS = ("target_modules", "exclude_modules", "modules_to_save")


@dataclass(frozen=True)
class LayerDifference:
    """The changes of two adapters at one layer; pairs are of the first and the second.

    Attributes:
        held: whether each has tensors for it.
        shapes, ranks, norms: of the changes `(out, in)`; `None` where there is none, or none that files tell.
        same_tensors: whether the files hold the same bits; `same_config`: whether their configs say the same.
        distance: `|dW_a - dW_b|` by the larger norm; `cosine`: of the two as vectors.
    """

    path: str
    held: tuple[bool, bool]
    shapes: Both[tuple[int, int]]
    ranks: Both[int]
    norms: Both[float]
    same_tensors: bool
    same_config: bool
    distance: float | None = None
    cosine: float | None = None

    def same(self, tolerance: float) -> bool | None:
        """Whether both do the same here; `None`: that cannot be told."""
        if self.same_tensors and self.same_config:
            return True
        if self.distance is not None:
            return self.distance <= tolerance
        absent = [norm if held else 0.0 for norm, held in zip(self.norms, self.held, strict=True)]
        if not all(self.held) and None not in absent:
            return absent == [0.0, 0.0]  # a change of zero is none
        return False if None not in self.shapes else None


@dataclass(frozen=True)
class TensorDifference:
    """A tensor of no layer (a head's, a bias, a shared one) that is in one file only, or differs.

    Attributes:
        a, b: dtype and shape in each.
        distance: `|a - b|` by the larger norm, where both have one shape.
    """

    key: str
    a: tuple[str, tuple[int, ...]] | None
    b: tuple[str, tuple[int, ...]] | None
    distance: float | None = None


@dataclass(frozen=True)
class AdapterDiff:
    """What two adapters differ in. Prints as text; `to_dict` is for JSON.

    Attributes:
        a, b: where they are; `methods` what they are.
        config: fields that differ, with both values; `None` for one that is not there. `metadata`: the same of the
            headers, where the label set is.
        layers: every layer that one of them changes.
        tensors: other tensors that differ.
        tolerance: the relative distance up to which two changes are the same.
        notes: what could not be told, and why.
    """

    a: str
    b: str
    methods: tuple[str, str]
    config: Mapping[str, tuple[Any, Any]]
    metadata: Mapping[str, tuple[Any, Any]]
    layers: tuple[LayerDifference, ...]
    tensors: tuple[TensorDifference, ...]
    tolerance: float
    notes: tuple[str, ...] = ()

    @property
    def equal(self) -> bool:
        """Whether configs, tensors and metadata are the same, to the bit."""
        same = all(layer.same_tensors for layer in self.layers)
        return same and not (self.config or self.metadata or self.tensors)

    @property
    def same_function(self) -> bool | None:
        """Whether a model computes the same with both, up to the tolerance; `None`: that cannot be told.

        All changes are the same, by whatever factors, and so is every other tensor.
        """
        shared = [t for t in self.tensors if "." not in t.key]  # they act through the layers' changes alone
        told = [layer.same(self.tolerance) for layer in self.layers]
        others = [t.distance is not None and t.distance <= self.tolerance for t in self.tensors if t not in shared]
        if False in told or False in others:
            return False
        return None if None in told else True

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, with `equal` and `same_function`."""
        return {"equal": self.equal, "same_function": self.same_function, **dataclasses.asdict(self)}

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def _lines(diff: AdapterDiff) -> Iterator[str]:
    if diff.equal:
        yield f"{diff.a} and {diff.b} are equal: the same config, tensors and metadata."
        return
    yield {
        True: f"{diff.a} and {diff.b} do the same, but their files differ.",
        False: f"{diff.a} and {diff.b} differ.",
        None: f"{diff.a} and {diff.b} differ; whether they do the same cannot be told.",
    }[diff.same_function]
    if diff.methods[0] != diff.methods[1]:
        yield f"  method: {diff.methods[0]} | {diff.methods[1]}"
    for title, fields in (("config", diff.config), ("header", diff.metadata)):
        yield from (f"  {title} {name}: {brief(one)} | {brief(other)}" for name, (one, other) in fields.items())
    yield from _layer_lines(diff)
    for tensor in diff.tensors:
        apart = "" if tensor.distance is None else f", distance {tensor.distance:.2%}"
        yield f"  tensor {tensor.key}: {_text(tensor.a)} | {_text(tensor.b)}{apart}"
    yield from (f"  note: {note}" for note in diff.notes)


def _layer_lines(diff: AdapterDiff) -> Iterator[str]:
    same = [layer for layer in diff.layers if layer.same(diff.tolerance)]
    yield f"  {len(same)} of {len(diff.layers)} layers have the same change"
    for layer in diff.layers:
        if layer.same(diff.tolerance):
            continue
        if not all(layer.held):
            yield f"  layer {layer.path}: only in {diff.a if layer.held[0] else diff.b}"
        elif layer.distance is None:
            yield f"  layer {layer.path}: {_sizes(layer.shapes)}"
        else:
            ranks, norms = layer.ranks, " | ".join(f"{n:.4g}" for n in layer.norms if n is not None)
            yield (
                f"  layer {layer.path}: distance {layer.distance:.2%}, cosine {layer.cosine:.3f}, norm {norms}, "
                f"rank {ranks[0]} | {ranks[1]}"
            )


def _sizes(shapes: Both[tuple[int, int]]) -> str:
    if None in shapes:
        return "other tensors; how far apart cannot be told"
    return " | ".join(f"{shape[0]} x {shape[1]}" for shape in shapes if shape is not None)


def _text(tensor: tuple[str, tuple[int, ...]] | None) -> str:
    return "-" if tensor is None else f"{tensor[0]} {tensor[1]}"


@torch.no_grad()
def diff_adapters(
    a: str | Path,
    b: str | Path,
    *,
    base: str | Path | nn.Module | None = None,
    component: str | None = None,
    tolerance: float = 1e-5,
) -> AdapterDiff:
    """What two adapters' files differ in: configs, changes of layers, heads, biases and labels.

    Changes are compared from their factors, whatever the methods and the ranks, so that two adapters which do the same
    by other factors are said to do the same. The base is never loaded.

    Args:
        a, b: adapter folders, hub ids, or files of other programs.
        base: as for `inspect_adapter`.
        component: of a file for a whole pipeline, the part to look at.
        tolerance: two changes are the same up to this distance, relative to the larger one's Frobenius norm; a result
            in float32 is off by about 1e-7 times the root of its rank.

    Raises:
        CheckpointError: one is no adapter, or damaged.
        UnknownNameError: no plugin provides a method.
        ConfigError: a tolerance that is none.
    """
    if not 0.0 <= tolerance < 1.0:
        raise ConfigError(f"tolerance = {tolerance!r} must be a share, at least 0 and below 1.")
    places = [adapter_folder(source) for source in (a, b)]
    given, bare = Base.of(base), all(place.is_file() for place in places)
    sides = [_Side(AdapterFile.open(place, given, component=component, keep_names=bare)) for place in places]
    layers = tuple(_layers(*sides))
    tensors = tuple(_tensors(sides[0].rest, sides[1].rest))
    return AdapterDiff(
        a=str(a),
        b=str(b),
        methods=(sides[0].opened.method.name, sides[1].opened.method.name),
        config=_fields(*(side.opened.files.config or {} for side in sides), ordered=False),
        metadata=_fields(*(side.opened.files.metadata for side in sides), ordered=True),
        layers=layers,
        tensors=tensors,
        tolerance=tolerance,
        notes=tuple(note for side in sides for note in side.notes),
    )


class _Side:
    """One of the two adapters."""

    def __init__(self, opened: AdapterFile) -> None:
        self.opened, self.inside, self.broken = opened, opened.layers, opened.broken
        tensors = strip_file_prefix(opened.files.tensors)
        keys = {f"{path}.{local}" for path, held in opened.layers.items() for local in held}
        self.rest = {key: tensor for key, tensor in tensors.items() if key not in keys}
        name = opened.files.folder
        self.notes = [f"{name}: {why}" for why in dict.fromkeys(opened.refused.values())]
        if not opened.kinds:
            self.notes.append(
                f"{name}: the tensors of {opened.method.name!r} do not tell the sizes of its layers; give base="
            )

    def factors(self, path: str) -> Factors | None:
        """The change at a layer; `None` if it has none, or none that the files tell."""
        found = None if path in self.broken or path not in self.opened.built else self.opened.factors(path)
        finite = found is not None and all(bool(torch.isfinite(t).all()) for t in found[:3] if t is not None)
        return found if finite else None


def _layers(a: _Side, b: _Side) -> Iterator[LayerDifference]:
    for path in dict.fromkeys((*a.inside, *b.inside)):
        f, g = a.factors(path), b.factors(path)
        ours, theirs = a.inside.get(path, {}), b.inside.get(path, {})
        same_config = a.opened.config == b.opened.config
        yield LayerDifference(
            path=path,
            shapes=(_shape(f), _shape(g)),
            ranks=(None if f is None else f.rank, None if g is None else g.rank),
            norms=(None if f is None else measures.norm(f), None if g is None else measures.norm(g)),
            held=(bool(ours), bool(theirs)),
            same_tensors=ours.keys() == theirs.keys() and all(_same(t, theirs[name]) for name, t in ours.items()),
            same_config=same_config,
            distance=None if f is None or g is None or _shape(f) != _shape(g) else distance(f, g),
            cosine=None if f is None or g is None or _shape(f) != _shape(g) else measures.cosine(f, g),
        )
        for side in (a, b):
            side.opened.mapped.release()


def distance(f: Factors, g: Factors) -> float:
    """`|dW_f - dW_g| / max(|dW_f|, |dW_g|)` in the Frobenius norm, or the same of the biases if that is more."""
    dtype = torch.promote_types(f.up.dtype, g.up.dtype)
    between = Factors(
        torch.cat([f.up.to(dtype), -g.up.to(dtype)], dim=1), torch.cat([f.down.to(dtype), g.down.to(dtype)])
    )
    apart = _relative(measures.norm(between), measures.norm(f), measures.norm(g))
    if f.bias is None and g.bias is None:
        return apart
    zero = torch.zeros(f.up.shape[0], dtype=dtype)
    ours, theirs = ((zero if t is None else t.to(dtype)) for t in (f.bias, g.bias))
    return max(apart, _relative(*(float(t.norm()) for t in (ours - theirs, ours, theirs))))


def _relative(apart: float, one: float, other: float) -> float:
    return apart / max(one, other) if max(one, other) else 0.0


def _shape(factors: Factors | None) -> tuple[int, int] | None:
    return None if factors is None else (factors.up.shape[0], factors.down.shape[1])


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same dtype, shape and bits."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(one.contiguous().reshape(-1).view(torch.uint8), other.contiguous().reshape(-1).view(torch.uint8))


def _tensors(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> Iterator[TensorDifference]:
    for key in dict.fromkeys((*ours, *theirs)):
        one, other = ours.get(key), theirs.get(key)
        if one is not None and other is not None and _same(one, other):
            continue
        apart = None
        if one is not None and other is not None and one.shape == other.shape:
            apart = _relative(*(float(t.norm()) for t in (one.double() - other.double(), one.double(), other.double())))
        yield TensorDifference(key, _described(one), _described(other), apart)


def _described(tensor: Tensor | None) -> tuple[str, tuple[int, ...]] | None:
    return None if tensor is None else (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))


def _fields(ours: Mapping[str, Any], theirs: Mapping[str, Any], *, ordered: bool) -> dict[str, tuple[Any, Any]]:
    """The fields that differ, with both values."""

    def plain(name: str, value: Any) -> Any:
        return sorted(value) if not ordered and name in _SETS and isinstance(value, list) else value

    names = sorted({*ours, *theirs})
    found = {name: (ours.get(name), theirs.get(name)) for name in names}
    return {name: pair for name, pair in found.items() if plain(name, pair[0]) != plain(name, pair[1])}
