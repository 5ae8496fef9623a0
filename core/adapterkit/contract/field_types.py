"""The types of a config's fields: whether a value has one, how a message names it, and whether JSON can hold it."""

from __future__ import annotations

import types
import typing
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Annotated, Any

# Adapters may compute in float32, where a larger number would be infinite.
_LARGEST_FLOAT32 = 3.4028234663852886e38


@dataclass(frozen=True)
class Limit:
    """What a number must be, in the annotation of a config's field: `r: Annotated[int, Limit(...)] = 8`.

    Attributes:
        holds: whether a value is allowed.
        text: what follows `"<field> = <value>"` in the message of the `ConfigError`.
    """

    holds: Callable[[Any], bool]
    text: str


POSITIVE = Limit(lambda value: value >= 1, ": a rank must be at least 1")
Rank = Annotated[int, POSITIVE]
Dropout = Annotated[float, Limit(lambda p: 0 <= p < 1, " must be a probability, at least 0 and below 1")]
Probability = Annotated[float, Limit(lambda p: 0 <= p <= 1, " must be a probability, from 0 to 1")]


def bare(hint: Any) -> Any:
    """A type without its limits."""
    return typing.get_args(hint)[0] if typing.get_origin(hint) is Annotated else hint


def _apart(hint: Any) -> tuple[str, tuple[Any, ...]]:
    """A type taken apart: `"union"`, `"literal"`, `"mapping"`, `"list"`, `"tuple"` or `"plain"`, and its arguments."""
    hint = bare(hint)
    origin, args = typing.get_origin(hint) or hint, typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return "union", args
    if origin is typing.Literal:
        return "literal", args
    if origin is typing.ClassVar:
        return _apart(args[0])
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return "mapping", args or (Any, Any)
    if isinstance(origin, type) and issubclass(origin, Sequence | Set) and not issubclass(origin, str | bytes):
        return ("tuple", args) if origin is tuple and args and args[-1] is not ... else ("list", args[:1] or (Any,))
    return "plain", (hint,)


def misfit(value: object, hint: Any) -> str | None:
    """`None` if `value` has type `hint`; else the text of the limit that it breaks; `""` if its type is wrong.

    A sequence or a set is a list or a tuple. A bool does not count as a number, an int counts as a float, and a float
    must be finite in float32.
    """
    if hint is str and isinstance(value, str):  # soon done: a list may hold very many
        return None
    form, parts = _apart(hint)
    faults: list[str | None]
    match form:
        case "union":
            faults = [misfit(value, part) for part in parts]
            faults = [] if None in faults else faults
        case "literal":
            faults = [None if any(value == part and type(value) is type(part) for part in parts) else ""]
        case "mapping" if isinstance(value, Mapping):
            faults = [misfit(one, part) for item in value.items() for one, part in zip(item, parts, strict=True)]
        case "list" if isinstance(value, tuple | list | Set):
            faults = [misfit(one, parts[0]) for one in value]
        case "tuple" if isinstance(value, tuple | list) and len(value) == len(parts):
            faults = [misfit(one, part) for one, part in zip(value, parts, strict=True)]
        case "plain":
            faults = [None if _is(value, parts[0]) else ""]
        case _:
            faults = [""]
    found = [fault for fault in faults if fault is not None]
    if found:
        return max(found, key=bool)
    limits = hint.__metadata__ if typing.get_origin(hint) is Annotated else ()
    return next((limit.text for limit in limits if isinstance(limit, Limit) and not limit.holds(value)), None)


def _is(value: Any, hint: Any) -> bool:
    if hint in (int, float):
        is_number = isinstance(value, int if hint is int else int | float) and not isinstance(value, bool)
        return is_number and (hint is int or abs(value) <= _LARGEST_FLOAT32)
    if hint is None:
        return value is None
    return hint is Any or not isinstance(hint, type) or isinstance(value, hint)


def readable(hint: Any) -> str:
    """A type as a user would say it: `int or None`, `a list of str`."""
    form, parts = _apart(hint)
    match form:
        case "union":
            return " or ".join(dict.fromkeys(map(readable, parts)))
        case "literal":
            return " or ".join(map(repr, parts))
        case "mapping":
            return f"a mapping from {readable(parts[0])} to {readable(parts[1])}"
        case "list":
            return f"a list of {readable(parts[0])}"
        case "tuple":
            return f"a list ({', '.join(map(readable, parts))})"
    names: dict[Any, str] = {None: "None", types.NoneType: "None", float: "a number, finite in float32"}
    return names.get(parts[0]) or str(getattr(parts[0], "__name__", parts[0]))


def not_json(hint: Any) -> Any:
    """The first part of a type that `adapter_config.json` cannot hold; `None` if there is none."""
    form, parts = _apart(hint)
    known = (bool, int, float, str, types.NoneType, None, Any, object)
    if form in ("plain", "literal"):
        kinds = parts if form == "plain" else map(type, parts)
        return next((kind for kind in kinds if kind not in known), None)
    return next((found for found in map(not_json, parts) if found is not None), None)
