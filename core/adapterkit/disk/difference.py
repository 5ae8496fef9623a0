"""What two adapters' files differ in: `ak.diff_adapters`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adapterkit.combining import measures
from adapterkit.contract import strip_file_prefix
from adapterkit.disk.adapter_file import AdapterFile
from adapterkit.disk.base import Base
from adapterkit.disk.diffreport import AdapterDiff, LayerDifference, TensorDifference
from adapterkit.errors import ConfigError
from adapterkit.files import adapter_folder
from adapterkit.kinds import Factors

# Fields that name modules: PEFT writes its sets in any order.
_SETS = ("target_modules", "exclude_modules", "modules_to_save")


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
