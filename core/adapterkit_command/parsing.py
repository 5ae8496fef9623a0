"""What the command line says in text, as Python values."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    import torch


def weighted(texts: Iterable[str]) -> dict[str, float]:
    """Weights by adapter, of `PATH` or `PATH:WEIGHT` each; a path that exists as it is written is a path.

    Raises:
        typer.BadParameter: a weight that is no finite number, or an adapter that is given twice.
    """
    found: dict[str, float] = {}
    for text in texts:
        path, weight = _weighted(text)
        if path in found:
            raise typer.BadParameter(f"{path!r} is given twice; give it once, with the sum of its weights.")
        found[path] = weight
    return found


def _weighted(text: str) -> tuple[str, float]:
    path, colon, tail = text.rpartition(":")
    if not colon or Path(text).exists():
        return text, 1.0
    try:
        weight = float(tail)
    except ValueError:
        if path and Path(path).exists():
            raise typer.BadParameter(f"{text!r}: {tail!r} is no number; write {path}:0.5, say.") from None
        return text, 1.0  # a colon of the path's own
    if not path or not math.isfinite(weight):
        raise typer.BadParameter(f"{text!r}: give PATH:WEIGHT, with a finite number.")
    return path, weight


def names(texts: Sequence[str] | None) -> list[str] | None:
    """Names given one by one or with commas between them; `None` if there are none."""
    found = [name.strip() for text in texts or () for name in text.split(",")]
    return [name for name in found if name] or None


def modules(listed: Sequence[str] | None, expression: str | None, option: str) -> str | list[str] | None:
    """What a config takes to name modules: a list, or a regular expression, or `"all-linear"`.

    Raises:
        typer.BadParameter: both a list and an expression.
    """
    found = names(listed)
    if expression is not None and found is not None:
        raise typer.BadParameter(f"give names ({option}) or an expression, not both.")
    if found == ["all-linear"]:
        return "all-linear"
    return expression if expression is not None else found


def fields(texts: Iterable[str]) -> dict[str, object]:
    """Fields of a config, of `FIELD=VALUE` each. Values are JSON where they can be read so, else text.

    Raises:
        typer.BadParameter: no `=`, or a field that is given twice.
    """
    found: dict[str, object] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise typer.BadParameter(f"{text!r}: give FIELD=VALUE, such as r=16 or rank_pattern='{{\"query\": 4}}'.")
        if name in found:
            raise typer.BadParameter(f"the field {name!r} is given twice.")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


def dtype(text: str | None) -> torch.dtype | None:
    """A floating dtype by its name.

    Raises:
        typer.BadParameter: there is none of that name.
    """
    if text is None:
        return None
    import torch

    found = getattr(torch, text.removeprefix("torch."), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise typer.BadParameter(f"{text!r} is no floating dtype; there are float32, bfloat16, float16 and float64.")
    return found
