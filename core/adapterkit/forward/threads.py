"""Threads: what acts in each thread of the program.

`activate` says what acts everywhere. A block (`activated`, `disabled`, `per_sample`) acts in its own thread alone, and
in what that thread starts: a new thread begins in the blocks that its starter is in and stays in them as long as it
lives, and a task given to a `ThreadPoolExecutor` runs in the blocks that it was given in. Python tells nobody who
starts a thread. So, from the first block on, `Thread.start` and `ThreadPoolExecutor.submit` are wrapped; where no block
is open they do what they always did.
"""

from __future__ import annotations

import functools
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adapterkit.forward.state import Active, State

lock = threading.RLock()
# What a new thread begins in: the innermost block of each model.
_BEGINS = "_adapterkit_blocks"
# Modules whose threads work for whoever gives them something to do.
_WORKERS = ("multiprocessing.pool",)
_models: weakref.WeakSet[Active] = weakref.WeakSet()


class Slot:
    """What acts in one thread on one model: the state of its innermost block, or the model's default.

    Attributes:
        ended: the block that the thread began in has ended, and the thread goes on.
    """

    def __init__(self, state: State) -> None:
        self.state = state
        self.blocks: list[Block] = []
        self.ended = False

    def begin(self, block: Block, *, worker: bool) -> None:
        """The thread was started in this block; what works for others stays in it no longer than it is open."""
        begun = Block(self, block.state)
        if worker and not block.open:
            self.ended = True
        else:
            self.blocks.append(begun)
        if worker and block.open:
            block.workers.append(begun)


class Block:
    """A block that is open in one thread.

    Attributes:
        task: the asyncio task that opened it, if one did.
        workers: blocks that threads began in because of this one, and that end with it.
    """

    def __init__(self, slot: Slot, state: State) -> None:
        self.slot, self.state, self.task = slot, state, _task()
        self.open = True
        self.workers: list[Block] = []


class Here(threading.local):
    """`slot`: this thread's, of one model.

    It is set in `__init__`, which runs once in each thread, for torch.compile guards that and not an attribute of the
    class; and it is all that a forward reads, so that the same adapters are the same graph, by whichever way they came
    to act. A `ContextVar` would break the graph.
    """

    def __init__(self, active: Active) -> None:
        with lock:
            self.slot = Slot(active.default)
            active.slots.add(self.slot)
            thread = threading.current_thread()
            for model, block in thread.__dict__.get(_BEGINS, ()):
                if model is active:
                    self.slot.begin(block, worker=not _has_one_task(thread))
            active.refresh(self.slot)


def _task() -> object:
    """The asyncio task that runs in this thread now, if there is one."""
    asyncio = sys.modules.get("asyncio")
    try:
        return None if asyncio is None else asyncio.current_task()
    except RuntimeError:  # no loop runs in this thread
        return None


def know(active: Active) -> None:
    """New threads begin in the blocks of this model, too."""
    with lock:
        _models.add(active)


def wrap() -> None:
    """Let threads and tasks begin in the blocks that they are started in. Done once."""
    with lock:
        if not hasattr(threading.Thread.start, _BEGINS):
            threading.Thread.start = _start(threading.Thread.start)  # type: ignore[method-assign]
            ThreadPoolExecutor.submit = _submit(ThreadPoolExecutor.submit)  # type: ignore[method-assign]


def _start(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def start(self: threading.Thread, *args: Any, **kwargs: Any) -> None:
        if not _is_executors(self):  # its tasks begin in blocks by themselves
            self.__dict__[_BEGINS] = [(active, active.here.slot.blocks[-1]) for active in _in_blocks()]
        original(self, *args, **kwargs)

    start.__dict__[_BEGINS] = True
    return start


def _submit(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def submit(self: ThreadPoolExecutor, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        begun = [(active, active.here.slot.state) for active in _in_blocks()]
        return original(self, functools.partial(run_in, begun, fn) if begun else fn, *args, **kwargs)

    return submit


def models() -> list[Active]:
    """What acts on each model that there is."""
    with lock:
        return list(_models)


def _in_blocks() -> list[Active]:
    """The models on which this thread is in a block."""
    return [active for active in models() if active.here.slot.blocks]


def run_in(states: Sequence[tuple[Active, State]], function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """`function(*args, **kwargs)` in these states."""
    with ExitStack() as stack:
        for active, state in states:
            stack.enter_context(active.acting(state))
        return function(*args, **kwargs)


def _is_executors(thread: threading.Thread) -> bool:
    return _module_of_target(thread) == ThreadPoolExecutor.__module__


def _has_one_task(thread: threading.Thread) -> bool:
    """Whether the thread ends with what it was started for; pools' threads and subclasses may do other things, too."""
    return type(thread).run is threading.Thread.run and _module_of_target(thread) not in _WORKERS


def _module_of_target(thread: threading.Thread) -> str | None:
    return getattr(getattr(thread, "_target", None), "__module__", None)
