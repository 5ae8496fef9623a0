"""Check that all ways give the same result. Nothing is timed before that."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

RELATIVE, ABSOLUTE = 1e-4, 1e-5


class Unequal(AssertionError):
    """Two ways do not do the same work, so their times cannot be compared."""


def same(results: Mapping[str, Any], relative: float = RELATIVE, absolute: float = ABSOLUTE) -> None:
    """All results are equal: tensors and numbers within rounding, in mappings and sequences of one structure.

    Raises:
        Unequal: naming the two ways and the place.
    """
    first, *others = results
    if all(value is None for value in results.values()):
        raise Unequal(f"The ways {', '.join(results)} say nothing of what they did, so they cannot be compared.")
    for other in others:
        _compare(results[first], results[other], f"{first!r} and {other!r}", relative, absolute)


def within(relative: float, absolute: float) -> Callable[[Mapping[str, Any]], None]:
    """`same` with other tolerances."""

    def check(results: Mapping[str, Any]) -> None:
        same(results, relative, absolute)

    return check


def unchecked(reason: str) -> Callable[[Mapping[str, Any]], None]:
    """No check, where there is nothing to compare; the reason is for the reader of the benchmark."""
    assert reason

    def nothing(results: Mapping[str, Any]) -> None:
        return None

    return nothing


def _compare(one: Any, other: Any, where: str, relative: float, absolute: float) -> None:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        _compare_tensors(one, other, where, relative, absolute)
    elif isinstance(one, Mapping) and isinstance(other, Mapping):
        if one.keys() != other.keys():
            raise Unequal(f"{where} differ in {sorted(map(str, one.keys() ^ other.keys()))[:4]}.")
        for key in one:
            _compare(one[key], other[key], f"{where} at {key!r}", relative, absolute)
    elif isinstance(one, list | tuple) and isinstance(other, list | tuple):
        if len(one) != len(other):
            raise Unequal(f"{where}: {len(one)} and {len(other)} values.")
        for i, pair in enumerate(zip(one, other, strict=True)):
            _compare(*pair, f"{where} at {i}", relative, absolute)
    elif type(one) is not type(other) or one != other:
        raise Unequal(f"{where}: {one!r} and {other!r}.")


def _compare_tensors(one: Tensor, other: Tensor, where: str, relative: float, absolute: float) -> None:
    if one.shape != other.shape:
        raise Unequal(f"{where}: shapes {tuple(one.shape)} and {tuple(other.shape)}.")
    if one.is_meta and other.is_meta:
        return
    if not torch.allclose(one, other.to(one), relative, absolute):
        gap = (one - other.to(one)).abs().max().item()
        raise Unequal(f"{where} differ by up to {gap:.3g}.")
