"""Options that several commands share, and the Python values that their text stands for."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer

WEIGHTED = "PATH[:WEIGHT]"

Out = Annotated[Path, typer.Option("--out", "-o", help="The folder to write; it appears when it is complete.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the adapter in the folder.")]
Rank = Annotated[int | None, typer.Option(help="Truncate to this rank (best approximation).", min=1)]
MaxRank = Annotated[int | None, typer.Option(help="The server's own `--max-lora-rank`.", min=1)]
Energy = Annotated[
    float | None,
    typer.Option(
        help="Truncate to the rank that keeps this share of the squared singular values, such as 0.99.", min=0, max=1
    ),
]
Server = Literal["vllm", "sglang"]
To = Annotated[str, typer.Option(help="The method of the result.")]
Base = Annotated[
    str | None,
    typer.Option(help="The base model's folder. Required if the adapters' files do not tell the sizes of the layers."),
]
Dtype = Annotated[
    Literal["float32", "bfloat16", "float16", "float64"] | None,
    typer.Option(help="The dtype of the result.", show_default="float32"),
]
Component = Annotated[str | None, typer.Option(help="The part to use, such as `unet`, of a file for a whole pipeline.")]
TargetModules = Annotated[
    list[str] | None,
    typer.Option(
        help="Names of layers: full paths, or their ends after a dot. Separate several with commas, or repeat the "
        "option. `all-linear` selects every linear layer except the output head.",
        metavar="NAMES",
    ),
]
TargetRegex = Annotated[
    str | None,
    typer.Option(help="A regular expression for the full path, in place of names.", metavar="EXPRESSION"),
]
ExcludeModules = Annotated[list[str] | None, typer.Option(help="Names of layers to leave out.", metavar="NAMES")]


def weighted(texts: Iterable[str]) -> dict[str, float]:
    """The weight of each adapter, from texts `PATH` or `PATH:WEIGHT`. A path that exists as it is written is a path.

    Raises:
        typer.BadParameter: a weight is not a number, or an adapter is given twice.
    """
    found: dict[str, float] = {}
    for text in texts:
        path, weight = _weighted(text)
        if path in found:
            raise typer.BadParameter(f"{path!r} is given twice. Give it once, with the sum of its weights.")
        found[path] = weight
    return found


def _weighted(text: str) -> tuple[str, float]:
    path, _, tail = text.rpartition(":")
    if not path or Path(text).exists():
        return text, 1.0
    try:
        return path, float(tail)
    except ValueError:
        if Path(path).exists():
            raise typer.BadParameter(f"{text!r}: {tail!r} is not a number. Write, for example, {path}:0.5.") from None
        return text, 1.0  # the path itself has a colon


def names(texts: Sequence[str] | None) -> list[str] | None:
    """Names from repeated options or separated by commas; `None` if there are none."""
    found = [name.strip() for text in texts or () for name in text.split(",")]
    return [name for name in found if name] or None


def modules(listed: Sequence[str] | None, expression: str | None) -> str | list[str] | None:
    """The value of `target_modules`: a list, a regular expression, or `"all-linear"`.

    Raises:
        typer.BadParameter: both a list and an expression are given, or the expression is malformed.
    """
    found = names(listed)
    if expression is not None and found is not None:
        raise typer.BadParameter("give --target-modules or --target-regex, not both.")
    try:
        re.compile(expression or "")
    except re.error as error:
        raise typer.BadParameter(f"--target-regex {expression}: {error}.") from None
    if found == ["all-linear"]:
        return "all-linear"
    return expression if expression is not None else found


def fields(texts: Iterable[str]) -> dict[str, object]:
    """The fields of a config, from texts `FIELD=VALUE`. A value is JSON if it can be read as JSON, else text.

    Raises:
        typer.BadParameter: a text has no `=`, or a field is given twice.
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
