"""Interrupts: what Ctrl-C must not leave half done."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def uninterrupted() -> Iterator[list[tuple[Any, ...]]]:
    """Ctrl-C waits until the block is over; meanwhile what waits is in the list that the block gets.

    Python raises it in the main thread only, and only if its own handler, or another function, is in place.
    """
    waiting: list[tuple[Any, ...]] = []
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield waiting
        return
    # Without the frame: it would keep alive what the interrupted line holds, such as a graph.
    signal.signal(signal.SIGINT, lambda number, frame: waiting.append((number, None)))
    try:
        yield waiting
    finally:
        signal.signal(signal.SIGINT, before)
        if waiting:
            before(*waiting[0])
