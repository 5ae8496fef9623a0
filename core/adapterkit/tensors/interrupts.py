"""Ctrl-C must not leave a change of the model half done."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def uninterrupted() -> Iterator[list[tuple[Any, ...]]]:
    """Delay Ctrl-C until the end of the block. The block gets a list that is not empty once Ctrl-C was pressed.

    Python raises `KeyboardInterrupt` only in the main thread, and only if a handler in Python is installed.
    """
    waiting: list[tuple[Any, ...]] = []
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield waiting
        return
    # Without the frame, which would keep everything alive that the interrupted line holds, such as a graph.
    signal.signal(signal.SIGINT, lambda number, frame: waiting.append((number, None)))
    try:
        yield waiting
    finally:
        signal.signal(signal.SIGINT, before)
        if waiting:
            before(*waiting[0])
