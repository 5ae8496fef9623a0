"""Every error adapterkit raises: one small tree under `AdapterError`.

Each class also derives from the builtin that a caller would expect, so `except KeyError` around a
lookup works without knowing this library.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class AdapterError(Exception):
    """Base of every error that adapterkit raises on purpose."""


class ConfigError(AdapterError, ValueError):
    """A config, a name or an argument that cannot be used as it is."""


class UnsupportedError(AdapterError, NotImplementedError):
    """A known option or layer that this library does not implement; it is never ignored instead."""


class UnknownNameError(AdapterError, KeyError):
    """A name (adapter, method, field) that does not exist; the message lists those that do."""

    # KeyError would print the message in quotes.
    __str__ = Exception.__str__


class SelectionError(AdapterError, ValueError):
    """A config that selects nothing on this model, or something that cannot be adapted."""


class StateError(AdapterError, RuntimeError):
    """A call that is impossible in the model's or the adapters' present state."""


class CheckpointError(AdapterError, ValueError):
    """A file that is damaged, of another format, or does not fit the model."""


class SaveError(AdapterError, OSError):
    """Files could not be written; what stood there before is untouched."""


class PluginError(AdapterError, RuntimeError):
    """A plugin that cannot be imported, breaks the hook contract, or shares a name with another."""


class AdapterWarning(UserWarning):
    """Something that is allowed but that its author probably did not mean."""


def nearest(name: str, known: Iterable[str], limit: int = 3) -> list[str]:
    """The known names most like `name`, best first; the last parts of dotted paths count as well."""
    names = sorted(set(known))
    by_tail: dict[str, list[str]] = {}
    for candidate in names:
        by_tail.setdefault(candidate.rpartition(".")[2], []).append(candidate)
    close = difflib.get_close_matches(name, names, n=limit, cutoff=0.6)
    for tail in difflib.get_close_matches(name.rpartition(".")[2], list(by_tail), n=limit, cutoff=0.6):
        close += [tail if tail in names or len(by_tail[tail]) > 1 else by_tail[tail][0]]
    return list(dict.fromkeys(close))[:limit]


def unknown(what: str, name: object, known: Iterable[str], advice: str = "") -> UnknownNameError:
    """The error for a name that is not there: what was asked, what exists, and the nearest match."""
    names = sorted(known)
    exists = f"There is: {', '.join(map(repr, names))}." if names else f"There is no {what} yet."
    close = nearest(name, names, 1) if isinstance(name, str) else []
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return UnknownNameError(f"No {what} {name!r}. {exists}{hint}{' ' + advice if advice else ''}")
