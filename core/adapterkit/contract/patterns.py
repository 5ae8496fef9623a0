"""Patterns over module paths: suffixes at a dot, and regular expressions that cannot hang."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Mapping
from typing import Any

from adapterkit.errors import ConfigError

# A pattern may come from a downloaded file. All its matches together get this long, and those of all patterns of one
# table ten times as long. States (repeats count as often as they say) take memory, and groups take the stack.
TIME_LIMIT_SECONDS = 2.0
_OF_A_TABLE = 10
_MOST_CHARACTERS, _MOST_STATES, _DEEPEST = 1 << 16, 1 << 16, 64
_TOKEN = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\{\d*(?:,\d*)?\}|.", re.DOTALL)


class Budget:
    """The seconds that matches may take together; each of them may take `least`, also when the others took all."""

    def __init__(self, seconds: float, least: float = 1e-3) -> None:
        self.seconds = self.left = seconds
        self.least = least


class Pattern:
    """A regular expression that must match a full path, with a limit on the time all its matches take.

    Args:
        expression: the pattern, in the syntax of `re`.
        field: the config field it is from, for messages.
        budget: of several patterns; `None`: it has one of its own.

    Raises:
        ConfigError: not a regular expression, too large a one, or (when matching) too slow.
    """

    def __init__(self, expression: str, field: str, budget: Budget | None = None) -> None:
        import regex

        self.expression, self.field, self._budget = expression, field, budget or Budget(TIME_LIMIT_SECONDS)
        if len(expression) > _MOST_CHARACTERS or _states(expression) > _MOST_STATES:
            raise ConfigError(
                f"{field} = {expression!r} is too large an expression: its repeats or groups would take too much "
                "memory. Write a simpler one, or list the modules."
            )
        start = time.perf_counter()
        try:
            self._compiled = regex.compile(expression)
        except (regex.error, RecursionError, OverflowError, MemoryError) as error:
            raise ConfigError(
                f"{field} = {expression!r} is not a valid regular expression: {error}. "
                "A list of names, such as ['query', 'value'], is taken literally."
            ) from error
        if budget is not None:  # thousands of expressions of a table take long to compile
            budget.left -= time.perf_counter() - start
            if budget.left <= 0:
                raise self._late()

    def matches(self, path: str) -> bool:
        """Whether the whole of `path` matches."""
        start = time.perf_counter()
        try:
            left = max(self._budget.left, self._budget.least)
            if not left:
                raise self._late()
            return self._compiled.fullmatch(path, timeout=left) is not None
        except TimeoutError as error:
            raise self._late() from error
        finally:
            self._budget.left -= time.perf_counter() - start

    def _late(self) -> ConfigError:
        return ConfigError(
            f"{self.field} = {self.expression!r} took over {self._budget.seconds:g} s to match the module names, with "
            "those before it: it backtracks without end, or there are too many. Write simpler expressions, or list the "
            "modules."
        )


def _states(expression: str) -> int:
    """About how many states a compiled expression has; more than any limit if its groups are too deep."""
    sums, last = [0], 0  # of each open group, and of the last element, which a repeat multiplies
    for token in _TOKEN.findall(expression):
        if token == "(":
            sums.append(0)
            last = 0
        elif token == ")" and len(sums) > 1:
            last = sums.pop() + 1
            sums[-1] += last
        elif len(token) > 1 and token[0] == "{":
            counts = [int(count[:9]) for count in re.findall(r"\d+", token)]
            sums[-1] += last * (max(counts, default=1) - 1)
        else:
            last = 1
            sums[-1] += 1
        if len(sums) > _DEEPEST or sums[-1] > _MOST_STATES:
            return _MOST_STATES + 1
    return sum(sums)


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


# A key of names and dots alone, or of several in a group, as `AdapterConfig.with_values` writes them.
_NAME = r"(?:[\w/-]|\\-|\\?\.)+"
_PLAIN = re.compile(rf"(\^|\.\*)?(?:\(\?:({_NAME}(?:\|{_NAME})*)\)|({_NAME}))\$?")


class PatternTable:
    """PEFT's `rank_pattern` and `alpha_pattern`: the first key, in order, that is or ends a path.

    A key is a regular expression for the end of the path at a dot; `^` ties it to the beginning. A file may have one
    for each of its layers, so keys of names and dots alone are found in a dictionary.
    """

    def __init__(self, table: Mapping[str, Any], field: str) -> None:
        self.field = field
        self.used: set[str] = set()
        self._rows = list(table.items())
        self._patterns: list[tuple[int, Pattern]] = []
        budget = Budget(_OF_A_TABLE * TIME_LIMIT_SECONDS, least=0.0)
        # By what begins the key, and by the lengths of a name's pieces: the names, in pieces, and their rows. A dot
        # that is not escaped stands for any character and separates two pieces.
        self._names: dict[tuple[str | None, tuple[int, ...]], dict[tuple[str, ...], int]] = {}
        for row, key in enumerate(table):
            plain = _PLAIN.fullmatch(key)
            if plain is None:
                self._patterns.append((row, Pattern(rf"(?:.*\.)?(?:{key})$", field, budget)))
                continue
            for name in (plain[2] or plain[3]).split("|"):
                pieces = tuple(piece.replace("\\", "") for piece in re.split(r"(?<!\\)\.", name))
                group = self._names.setdefault((plain[1], tuple(map(len, pieces))), {})
                group.setdefault(pieces, row)

    def get(self, path: str, default: Any) -> Any:
        """The value for `path`, or `default`."""
        first = self._row_of_name(path)
        first = next((row for row, pattern in self._patterns if row < first and pattern.matches(path)), first)
        if first == len(self._rows):
            return default
        key, value = self._rows[first]
        self.used.add(key)
        return value

    def _row_of_name(self, path: str) -> int:
        """The first row with a name that is or ends the path; the number of rows if there is none."""
        first = len(self._rows)
        for (beginning, lengths), rows in self._names.items():
            start = len(path) - sum(lengths) - len(lengths) + 1
            if start == 0 or (start > 0 and (beginning == ".*" or (beginning is None and path[start - 1] == "."))):
                pieces = []
                for length in lengths:
                    pieces.append(path[start : start + length])
                    start += length + 1
                first = min(first, rows.get(tuple(pieces), first))
        return first

    @property
    def unused(self) -> list[str]:
        """Keys that have matched nothing so far."""
        return [f"{self.field} {key!r}" for key, _ in self._rows if key not in self.used]
