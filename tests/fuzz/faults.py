"""Faults put into a running call: Ctrl-C at a line, an error in a method's code, an error in an operation of torch."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

import adapterkit
import adapterkit_loha
import adapterkit_lora
import adapterkit_vera

METHODS = tuple(str(Path(str(m.__file__)).parent) for m in (adapterkit_lora, adapterkit_loha, adapterkit_vera))
LIBRARY = (str(Path(str(adapterkit.__file__)).parent), *METHODS)


class Injected(RuntimeError):
    """An error that was put in."""


class Points:
    """Counts the places where a fault may come; at the one with the number `at` it comes."""

    def __init__(self, at: int = -1, fault: Callable[[], None] = lambda: None) -> None:
        self.seen, self.at, self.fault = 0, at, fault

    def __call__(self) -> None:
        self.seen += 1
        if self.seen == self.at:
            self.fault()


def _raise() -> None:
    raise Injected("injected")


def interrupt() -> None:
    """What Ctrl-C does."""
    signal.raise_signal(signal.SIGINT)


@contextmanager
def _lines(points: Points, places: tuple[str, ...]) -> Iterator[None]:
    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        if not frame.f_code.co_filename.startswith(places):
            return None
        if event == "line":
            points()
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


class _Operations(TorchDispatchMode):
    def __init__(self, points: Points) -> None:
        super().__init__()
        self.points = points

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not function.is_view:  # which takes no memory and cannot fail
            self.points()
        return function(*args, **(kwargs or {}))


# How each sort of fault finds its places, and what it does there.
SORTS: dict[str, tuple[Callable[[Points], Any], Callable[[], None]]] = {
    "interrupt": (lambda points: _lines(points, LIBRARY), interrupt),
    "method": (lambda points: _lines(points, METHODS), _raise),
    "torch": (_Operations, _raise),
}
