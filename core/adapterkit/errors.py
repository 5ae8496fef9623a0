"""All errors that adapterkit raises: one small tree under `AdapterError`.

Each class also derives from the builtin error that a caller would expect, so `except KeyError` around a lookup works
without knowledge of this library. Messages quote names and values of files, so all text for people is made `plain`.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import re
import reprlib
import sys
import traceback
import types
import typing
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

# Longer words and lines are cut in the middle.
_LONGEST_WORD, _LONGEST_LINE = 300, 4000
# What a terminal obeys or does not show: controls, bidi marks, separators of lines, surrogates
_UNSEEN = ("Cc", "Cf", "Cs", "Zl", "Zp")
# Two of them join letters, in Persian and Hindi for example, and the parts of emoji.
_JOINERS = ("\u200c", "\u200d")
# How the names of modules begin whose lines no warning is about.
_NOT_THE_CALLERS = ("adapterkit", "torch.", "contextlib", "transformers.modeling_utils")


def plain(text: str) -> str:
    r"""One line of text that is safe to print, whatever a file put into it.

    Characters that move the cursor, end the line, change the direction of writing or are invisible become escapes such
    as `\x1b`. Words of over 300 characters and lines of over 4,000 lose their middle.
    """
    if len(text) > _LONGEST_WORD:
        text = re.sub(rf"\S{{{_LONGEST_WORD + 1},}}", lambda word: _cut(word[0], _LONGEST_WORD), text)
        text = _cut(text, _LONGEST_LINE)
    if text.isprintable():
        return text
    unseen = (unicodedata.category(c) in _UNSEEN and c not in _JOINERS for c in text)
    return "".join(ascii(c)[1:-1] if hidden else c for c, hidden in zip(text, unseen, strict=True))


def _cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else f"{text[: longest * 2 // 3]}[...]{text[-longest // 4 :]}"


class AdapterError(Exception):
    """The base of all errors that adapterkit raises.

    Args:
        message: it becomes one `plain` line.
        details: text below the message, such as a report, whose lines are kept.
    """

    def __str__(self) -> str:
        message, *details = map(str, self.args or ("",))
        lines = [" ".join(message.split("\n")), *(line for detail in details for line in detail.split("\n"))]
        return "\n".join(map(plain, lines))


class ConfigError(AdapterError, ValueError):
    """A config, a name or an argument is invalid."""


class UsageError(ConfigError, TypeError):
    """A call is wrong, whatever the model and the files hold: an argument is missing, unknown or impossible."""


class UnsupportedError(AdapterError, NotImplementedError):
    """The library knows an option or a layer but does not implement it. It never ignores one instead."""


class UnknownNameError(AdapterError, KeyError):
    """A name (of an adapter, method or field) does not exist. The message lists the existing names."""


class SelectionError(AdapterError, ValueError):
    """A config selects nothing on this model, or something that cannot be adapted."""


class StateError(AdapterError, RuntimeError):
    """A call is impossible in the current state of the model or of the adapters."""


class CheckpointError(AdapterError, ValueError):
    """A file is damaged, has another format, or does not fit the model."""


class MissingMethodError(CheckpointError, UnknownNameError):
    """A file needs a method that no installed plugin provides."""


class SaveError(AdapterError, OSError):
    """Files cannot be written. Existing files are unchanged."""


class PluginError(AdapterError, RuntimeError):
    """A plugin cannot be imported, breaks the hook contract, or has the name of another plugin."""


class AdapterWarning(UserWarning):
    """Something is allowed, but probably not intended. Its text is made as that of an error."""

    __str__ = AdapterError.__str__


def warn(message: str | AdapterWarning) -> None:
    """Warn at the line of the caller: the nearest one outside this library, its plugins and torch."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(_NOT_THE_CALLERS):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, AdapterWarning, stacklevel=level)


def usage(example: str = "", *, of: str = "ak") -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Let a call with missing, unknown or unsuitable arguments raise a `UsageError` that shows how it is called.

    Arguments are looked at only after a `TypeError` or `AttributeError`, so a call that works costs nothing more. An
    error that comes out of others' code, such as a model, a dataset or a plugin, stays what it is.

    Args:
        example: the call that the message shows. Empty: the signature of the function.
        of: the object or module on which that signature is called.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def checked(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                return function(*args, **kwargs)
            except AdapterError:
                raise
            except (TypeError, AttributeError) as error:
                signature = inspect.signature(function)
                unbound = _unbound(signature, args, kwargs)
                fault = unbound or (_is_of_the_call(error) and _unsuitable(function, signature, args, kwargs))
                if not fault:
                    raise
                shown = [p.replace(annotation=p.empty) for p in signature.parameters.values() if p.name != "self"]
                called = example or f"{of}.{function.__name__}{inspect.Signature(shown)}"
                raise UsageError(f"{function.__name__}: {fault} It is called so: {called}") from (
                    None if unbound else error
                )

        return checked

    return decorate


def usage_of_methods(of: str) -> Callable[[type[T]], type[T]]:
    """`usage` for every public method of a class; a method with an example of its own keeps that."""

    def decorate(cls: type[T]) -> type[T]:
        for name, method in [*vars(cls).items()]:
            if inspect.isfunction(method) and not name.startswith("_"):
                setattr(cls, name, usage(of=of)(method))
        return cls

    return decorate


def _is_of_the_call(error: BaseException) -> bool:
    """Whether no code of others was running when it was raised: no model, dataset or plugin."""
    names = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    known = {"adapterkit", "torch", "tqdm", *sys.stdlib_module_names}
    return "torch.nn.modules.module" not in names and known.issuperset(name.partition(".")[0] for name in names)


def _unbound(signature: inspect.Signature, args: Sequence[object], kwargs: Mapping[str, object]) -> str:
    """A sentence about an argument that is missing or unknown; empty if there is none."""
    try:
        signature.bind(*args, **kwargs)
    except TypeError as fault:
        known = signature.parameters
        ends = [name for key in kwargs for name in known if key.endswith(f"_{name}")]
        close = ends + [name for key in kwargs for name in nearest(key, known, 1) if name != key]
        listed = f" Its arguments: {', '.join(name for name in known if name != 'self')}." * any(
            kwargs.keys() - {*known}
        )
        return f"{fault}." + (f" Did you mean {close[0]!r}?" if close else listed)
    return ""


def _unsuitable(
    function: Callable[..., object], signature: inspect.Signature, args: Sequence[object], kwargs: Mapping[str, object]
) -> str:
    """A sentence about an argument with a value that its annotation does not allow; empty if there is none."""
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    try:
        hints = typing.get_type_hints(inspect.unwrap(function))
        for name, value in signature.bind(*args, **kwargs).arguments.items():
            parameter = signature.parameters[name]
            if parameter.kind not in several and name in hints and not _allows(hints[name], value):
                choices = typing.get_args(hints[name]) if typing.get_origin(hints[name]) is typing.Literal else ()
                must = " or ".join(map(repr, choices)) or _shown_hint(hints[name], parameter.annotation)
                return f"{name} = {reprlib.repr(value)} has the type {type(value).__name__}; it must be {must}."
    except (NameError, TypeError):  # names for type checkers alone, and types that nothing can be an instance of
        pass
    return ""


def _shown_hint(hint: Any, annotation: str) -> str:
    """An annotation as it is written, but a name for several types, such as `Batches`, as these."""
    named = annotation.isidentifier() and not isinstance(hint, type)
    return re.sub(r"\b(\w+\.)+", "", str(hint)) if named else annotation


def _allows(hint: Any, value: object) -> bool:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return any(_allows(member, value) for member in typing.get_args(hint))
    kind = typing.get_origin(hint) or hint
    if kind is Iterable and hasattr(value, "__getitem__"):  # as torch's datasets
        return True
    if kind is typing.Literal:
        kind = tuple(map(type, typing.get_args(hint)))
    return isinstance(value, (int, float) if kind is float else kind) if isinstance(kind, type | tuple) else True


def nearest(name: str, known: Iterable[str], limit: int = 3) -> list[str]:
    """The known names that are most similar to `name`, best first; the last parts of dotted paths also count."""
    names = sorted(set(known))
    by_tail: dict[str, list[str]] = {}
    for candidate in names:
        by_tail.setdefault(candidate.rpartition(".")[2], []).append(candidate)
    close = [known for known in names if known.lower() == name.lower()]
    close += difflib.get_close_matches(name, names, n=limit, cutoff=0.6)
    for tail in difflib.get_close_matches(name.rpartition(".")[2], list(by_tail), n=limit, cutoff=0.6):
        close += [tail if tail in names or len(by_tail[tail]) > 1 else by_tail[tail][0]]
    return list(dict.fromkeys(close))[:limit]


def unknown(what: str, name: object, known: Iterable[str], advice: str = "", *, guess: bool = True) -> UnknownNameError:
    """The error for a name that does not exist, with the existing names and, as a guess, the most similar one."""
    names = sorted(known)
    exists = f"Available: {', '.join(map(repr, names))}." if names else "There are none yet."
    close = nearest(name, names, 1) if guess and isinstance(name, str) else []
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return UnknownNameError(f"Unknown {what} {name!r}. {exists}{hint}{' ' + advice if advice else ''}")
