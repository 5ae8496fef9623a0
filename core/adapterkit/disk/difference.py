"""What two adapters' files differ in: `ak.diff_adapters`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adapterkit.combining import measures
from adapterkit.contract import strip_file_prefix
from adapterkit.disk.adapter_file import AdapterFile
from adapterkit.disk.inspection import LayerInspection, inspect_layer
from adapterkit.disk.model import Base
from adapterkit.errors import UsageError, usage
from adapterkit.files import adapter_folder
from adapterkit.kinds import Factors
from adapterkit.results import Printed, brief, in_lines
from adapterkit.tensors import default_modes

# Fields that name modules: PEFT writes its sets in any order.
_SETS = ("target_modules", "exclude_modules", "modules_to_save")


@dataclass(frozen=True)
class LayerDifference:
    """The changes of two adapters at one layer.

    Attributes:
        a, b: what each has there; `None`: nothing.
        same_tensors: whether the files hold the same bits.
        same: whether both do the same here; `None`: that cannot be told.
        distance: `|dW_a - dW_b|` by the larger norm; `cosine`: of the two as vectors.
    """

    path: str
    a: LayerInspection | None
    b: LayerInspection | None
    same_tensors: bool
    same: bool | None
    distance: float | None
    cosine: float | None

    def __str__(self) -> str:
        one, other = self.a, self.b
        if one is None or other is None:
            return f"only in the {'second' if one is None else 'first'}"
        if self.distance is not None:
            return (
                f"distance {self.distance:.2%}, cosine {self.cosine:.3f}, norm {one.norm:.4g} | {other.norm:.4g}, rank "
                f"{one.rank} | {other.rank}"
            )
        if one.shape is None or other.shape is None or one.shape == other.shape:
            return "other tensors; how far apart cannot be told"
        return " | ".join(f"{shape[0]} x {shape[1]}" for shape in (one.shape, other.shape))


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


# Of more layers that differ, the text shows the most different ones.
_LISTED = 20
# Of fields and other tensors, it shows the first.
_MOST_LINES = 100


@dataclass(frozen=True)
class AdapterDiff(Printed):
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
        others = [t for t in self.tensors if "." in t.key]  # shared tensors act through the layers' changes alone
        told = [layer.same for layer in self.layers]
        told += [t.distance is not None and t.distance <= self.tolerance for t in others]
        return False if False in told else None if None in told else True

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, with `equal` and `same_function`."""
        return {"equal": self.equal, "same_function": self.same_function, **dataclasses.asdict(self)}

    def __str__(self) -> str:
        return in_lines(_lines(self))


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
        lines = (f"  {title} {name}: {brief(one)} | {brief(other)}" for name, (one, other) in fields.items())
        yield from _first(lines, len(fields), f"fields of the {title}")
    differing = [layer for layer in diff.layers if not layer.same]
    yield f"  {len(diff.layers) - len(differing)} of {len(diff.layers)} layers have the same change"
    shown = differing
    if len(differing) > _LISTED:
        shown = sorted(differing, key=lambda layer: -math.inf if layer.distance is None else -layer.distance)[:_LISTED]
    yield from (f"  layer {layer.path}: {layer}" for layer in shown)
    if len(differing) > _LISTED:
        yield f"  {len(differing) - _LISTED:,} more layers differ, by no more than these; `layers`, and JSON, have all"
    yield from _first(map(_of_tensor, diff.tensors), len(diff.tensors), "tensors")
    yield from (f"  note: {note}" for note in diff.notes)


def _of_tensor(tensor: TensorDifference) -> str:
    one, other = ("-" if t is None else f"{t[0]} {t[1]}" for t in (tensor.a, tensor.b))
    apart = "" if tensor.distance is None else f", distance {tensor.distance:.2%}"
    return f"  tensor {tensor.key}: {one} | {other}{apart}"


def _first(lines: Iterable[str], count: int, what: str) -> Iterator[str]:
    """The first lines of many: a file of a stranger may name any number of things."""
    yield from islice(lines, _MOST_LINES)
    if count > _MOST_LINES:
        yield f"  {count - _MOST_LINES:,} more {what} differ; JSON has all"


@usage()
@default_modes()
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

    Changes are compared by their effect, whatever the methods, the ranks and the factors. The base is never loaded.

    Args:
        a, b: adapter folders, hub ids, or files of other programs.
        base: as for `inspect_adapter`.
        component: of a file for a whole pipeline, the part to look at.
        tolerance: two changes are the same up to this distance, relative to the larger one's Frobenius norm; a result
            in float32 is off by about 1e-7 times the root of its rank.

    Raises:
        CheckpointError: one is not an adapter, or it is damaged.
        UnknownNameError: no plugin provides a method.
        ConfigError: the tolerance is not a share.
    """
    if not 0.0 <= tolerance < 1.0:
        raise UsageError(f"tolerance = {tolerance!r} must be a share, at least 0 and below 1.")
    places = [adapter_folder(source) for source in (a, b)]
    given, bare = Base.of(base), all(place.is_file() for place in places)
    one, other = (AdapterFile.open(place, given, component=component, keep_names=bare) for place in places)
    return AdapterDiff(
        a=str(a),
        b=str(b),
        methods=(one.method.name, other.method.name),
        config=_fields(one.files.config or {}, other.files.config or {}, _SETS),
        metadata=_fields(one.files.metadata, other.files.metadata),
        layers=tuple(_layer(path, one, other, tolerance) for path in dict.fromkeys((*one.layers, *other.layers))),
        tensors=tuple(_tensors(one, other)),
        tolerance=tolerance,
        notes=tuple(f"{side.files.folder}: {note}" for side in (one, other) for note in side.notes),
    )


def _layer(path: str, a: AdapterFile, b: AdapterFile, tolerance: float) -> LayerDifference:
    ours, theirs = a.layers.get(path, {}), b.layers.get(path, {})
    same_tensors = ours.keys() == theirs.keys() and all(_same(t, theirs[name]) for name, t in ours.items())
    one = inspect_layer(a, path) if ours else None
    other = inspect_layer(b, path) if theirs else None
    sides = [side for side in (one, other) if side is not None]
    norms = [side.norm for side in sides if side.norm is not None]
    apart = cosine = None
    if len(norms) == 2 and len({side.shape for side in sides}) == 1:
        f, g = (side.method.factors(side.built[path]) for side in (a, b))
        assert f is not None
        assert g is not None
        apart, cosine = _distance(f, g, max(norms)), measures.cosine(f, g)
    same: bool | None = None
    if same_tensors and a.config == b.config:
        same = True
    elif apart is not None:
        same = apart <= tolerance
    elif len(norms) == len(sides):
        same = len(norms) < 2 and not any(norms)  # a change of zero is as none
    a.mapped.release()
    b.mapped.release()
    return LayerDifference(path, one, other, same_tensors, same, apart, cosine)


def _distance(f: Factors, g: Factors, larger: float) -> float:
    """`|dW_f - dW_g|` by the larger of their Frobenius norms, or the same of the biases if that is more."""
    dtype = torch.promote_types(f.up.dtype, g.up.dtype)
    up, down = torch.cat([f.up.to(dtype), -g.up.to(dtype)], dim=1), torch.cat([f.down.to(dtype), g.down.to(dtype)])
    apart = measures.norm(Factors(up, down)) / larger if larger else 0.0
    zero = torch.zeros(f.up.shape[0], device="cpu")
    return max(apart, _relative(zero if f.bias is None else f.bias, zero if g.bias is None else g.bias))


def _relative(one: Tensor, other: Tensor) -> float:
    """`|a - b| / max(|a|, |b|)`."""
    one, other = one.double(), other.double()
    larger = max(float(one.norm()), float(other.norm()))
    return float((one - other).norm()) / larger if larger else 0.0


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same dtype, shape and bits."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(*(tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)))


def _tensors(a: AdapterFile, b: AdapterFile) -> Iterator[TensorDifference]:
    """The tensors of no layer that differ."""
    sides = []
    for side in (a, b):
        inside = {f"{path}.{local}" for path, held in side.layers.items() for local in held}
        tensors = strip_file_prefix(side.files.tensors)
        sides.append({key: tensor for key, tensor in tensors.items() if key not in inside})
    for key in dict.fromkeys((*sides[0], *sides[1])):
        one, other = (side.get(key) for side in sides)
        if one is not None and other is not None and _same(one, other):
            continue
        apart = _relative(one, other) if one is not None and other is not None and one.shape == other.shape else None
        forms = [t if t is None else (str(t.dtype).removeprefix("torch."), tuple(t.shape)) for t in (one, other)]
        yield TensorDifference(key, forms[0], forms[1], apart)


def _fields(
    ours: Mapping[str, Any], theirs: Mapping[str, Any], unordered: Sequence[str] = ()
) -> dict[str, tuple[Any, Any]]:
    """The fields that differ, with both values."""
    found = {}
    for name in sorted({*ours, *theirs}):
        pair = one, other = ours.get(name), theirs.get(name)
        if name in unordered and isinstance(one, list) and isinstance(other, list):
            one, other = sorted(one), sorted(other)
        if one != other:
            found[name] = pair
    return found
