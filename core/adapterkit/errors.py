"""All errors that adapterkit raises: one small tree under `AdapterError`.

Each class also derives from the builtin error that a caller would expect, so `except KeyError` around a lookup works
without knowledge of this library.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class AdapterError(Exception):
    """The base of all errors that adapterkit raises."""


class ConfigError(AdapterError, ValueError):
    """A config, a name or an argument is invalid."""


class UnsupportedError(AdapterError, NotImplementedError):
    """The library knows an option or a layer but does not implement it. It never ignores one instead."""


class UnknownNameError(AdapterError, KeyError):
    """A name (of an adapter, method or field) does not exist. The message lists the existing names."""

    # KeyError would print the message in quotes.
    __str__ = Exception.__str__


class SelectionError(AdapterError, ValueError):
    """A config selects nothing on this model, or something that cannot be adapted."""


class StateError(AdapterError, RuntimeError):
    """A call is impossible in the current state of the model or of the adapters."""


class CheckpointError(AdapterError, ValueError):
    """A file is damaged, has another format, or does not fit the model."""


class SaveError(AdapterError, OSError):
    """Files cannot be written. Existing files are unchanged."""


class PluginError(AdapterError, RuntimeError):
    """A plugin cannot be imported, breaks the hook contract, or has the name of another plugin."""


class AdapterWarning(UserWarning):
    """Something is allowed, but probably not intended."""


def nearest(name: str, known: Iterable[str], limit: int = 3) -> list[str]:
    """The known names that are most similar to `name`, best first; the last parts of dotted paths also count."""
    names = sorted(set(known))
    by_tail: dict[str, list[str]] = {}
    for candidate in names:
        by_tail.setdefault(candidate.rpartition(".")[2], []).append(candidate)
    close = difflib.get_close_matches(name, names, n=limit, cutoff=0.6)
    for tail in difflib.get_close_matches(name.rpartition(".")[2], list(by_tail), n=limit, cutoff=0.6):
        close += [tail if tail in names or len(by_tail[tail]) > 1 else by_tail[tail][0]]
    return list(dict.fromkeys(close))[:limit]


def unknown(what: str, name: object, known: Iterable[str], advice: str = "") -> UnknownNameError:
    """The error for a name that does not exist, with the existing names and the most similar one."""
    names = sorted(known)
    exists = f"Available: {', '.join(map(repr, names))}." if names else "There are none yet."
    close = nearest(name, names, 1) if isinstance(name, str) else []
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return UnknownNameError(f"Unknown {what} {name!r}. {exists}{hint}{' ' + advice if advice else ''}")
