"""What `ak.diff_adapters` reports."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from adapterkit.results import brief

T = TypeVar("T")
Both = tuple[T | None, T | None]


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
        yield f"  tensor {tensor.key}: {_described(tensor.a)} | {_described(tensor.b)}{apart}"
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


def _described(tensor: tuple[str, tuple[int, ...]] | None) -> str:
    return "-" if tensor is None else f"{tensor[0]} {tensor[1]}"
