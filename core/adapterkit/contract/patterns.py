"""Patterns over module paths: suffixes at a dot, and regular expressions that cannot hang."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any

from adapterkit.errors import ConfigError

# A pattern may come from a downloaded file. All its matches together get this long.
TIME_LIMIT_SECONDS = 2.0


class Pattern:
    """A regular expression that must match a full path, with a limit on the time all its matches take.

    Args:
        expression: the pattern, in the syntax of `re`.
        field: the config field it is from, for messages.

    Raises:
        ConfigError: not a regular expression, or (when matching) too slow.
    """

    def __init__(self, expression: str, field: str) -> None:
        import regex

        self.expression, self.field = expression, field
        self._left = TIME_LIMIT_SECONDS
        try:
            self._compiled = regex.compile(expression)
        except (regex.error, RecursionError, OverflowError) as error:
            raise ConfigError(
                f"{field} = {expression!r} is not a valid regular expression: {error}. "
                "A list of names, such as ['query', 'value'], is taken literally."
            ) from error

    def matches(self, path: str) -> bool:
        """Whether the whole of `path` matches."""
        start = time.perf_counter()
        try:
            return self._compiled.fullmatch(path, timeout=max(self._left, 1e-3)) is not None
        except TimeoutError as error:
            raise ConfigError(
                f"{self.field} = {self.expression!r} took over {TIME_LIMIT_SECONDS:g} s to match the module "
                "names: it backtracks without end. Write a simpler expression, or list the modules."
            ) from error
        finally:
            self._left -= time.perf_counter() - start


class Names:
    """A list of exact paths or suffixes at a dot, each remembered if it matched."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = tuple(names)
        self.used: set[str] = set()
        self._known = frozenset(self.names)

    def match(self, path: str) -> str | None:
        """The longest entry that is `path` or ends it at a dot."""
        parts = path.split(".")
        found = [tail for i in range(len(parts)) if (tail := ".".join(parts[i:])) in self._known]
        self.used.update(found)
        return found[0] if found else None


class Rule:
    """`target_modules` or `exclude_modules`: a list of names or a regular expression."""

    def __init__(self, field: str, value: str | Iterable[str]) -> None:
        self.field = field
        self.names = Names(()) if isinstance(value, str) else Names(value)
        self.pattern = Pattern(value, field) if isinstance(value, str) else None

    def match(self, path: str) -> str | None:
        """The rule that takes `path`, as a reader would name it, or `None`."""
        if self.pattern is not None:
            return f"{self.field} {self.pattern.expression!r}" if self.pattern.matches(path) else None
        name = self.names.match(path)
        return None if name is None else f"{self.field} {name!r}"

    @property
    def unused(self) -> list[str]:
        """Entries of the list that have matched nothing so far."""
        return [f"{self.field} {n!r}" for n in self.names.names if n not in self.names.used]


class PatternTable:
    """PEFT's `rank_pattern` and `alpha_pattern`: the first key, in order, that is or ends a path.

    A key is a regular expression for the end of the path at a dot; `^` ties it to the beginning.
    """

    def __init__(self, table: Mapping[str, Any], field: str) -> None:
        self._rows = [(key, Pattern(rf"(?:.*\.)?(?:{key})$", field), value) for key, value in table.items()]
        self.field = field
        self.used: set[str] = set()

    def get(self, path: str, default: Any) -> Any:
        """The value for `path`, or `default`."""
        for key, pattern, value in self._rows:
            if pattern.matches(path):
                self.used.add(key)
                return value
        return default

    @property
    def unused(self) -> list[str]:
        """Keys that have matched nothing so far."""
        return [f"{self.field} {key!r}" for key, *_ in self._rows if key not in self.used]
