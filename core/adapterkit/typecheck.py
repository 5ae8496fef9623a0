"""Whether a value read from JSON, or given by a user, has the type a config field declares."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

# Adapters compute in this precision at least; what it does not hold would be infinite there.
_LARGEST_FLOAT32 = 3.4028234663852886e38


def conforms(value: object, hint: Any) -> bool:
    """Whether `value` has type `hint`: unions, literals, sequences and mappings looked into.

    A bool is no number, an int is a float, and a float must be finite in float32.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(conforms(value, a) for a in args)
    if origin is typing.Literal:
        return any(value == a and type(value) is type(a) for a in args)
    if origin is not None and issubclass(origin, Mapping):
        return isinstance(value, Mapping) and all(
            conforms(k, args[0]) and conforms(v, args[1]) for k, v in value.items()
        )
    if origin is not None and issubclass(origin, Sequence):
        return isinstance(value, tuple | list) and all(conforms(v, args[0]) for v in value)
    return _is_plain(value, hint)


def _is_plain(value: object, hint: Any) -> bool:
    if hint in (int, float) and isinstance(value, bool):
        return False
    if hint is float:
        return isinstance(value, int | float) and abs(value) <= _LARGEST_FLOAT32
    if hint is None:
        return value is None
    return not isinstance(hint, type) or isinstance(value, hint)  # what is no class is its author's to check


def readable(hint: Any) -> str:
    """A type as a user would say it: `an int`, `a list of str or None`."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(readable(a) for a in args))
    if origin is typing.Literal:
        return " or ".join(map(repr, args))
    if origin is not None and issubclass(origin, Mapping):
        return f"a mapping from {readable(args[0])} to {readable(args[1])}"
    if origin is not None and issubclass(origin, Sequence):
        return f"a list of {readable(args[0])}"
    if hint is type(None) or hint is None:
        return "None"
    return "a finite float32" if hint is float else str(getattr(hint, "__name__", hint))
