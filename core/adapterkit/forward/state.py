"""Which adapters of a model act, and in which thread.

`activate` says what acts everywhere. A block (`activated`, `disabled`, `per_sample`) says what acts in its own thread,
and in whatever that thread starts: a new thread begins in the blocks that its starter is in and stays in them as long
as it lives, and a task given to a `ThreadPoolExecutor` runs in the blocks in which it was given. Python has no hook for
this. So from the first block on `Thread.start` and `ThreadPoolExecutor.submit` are wrapped; while no block is open the
wrappers change nothing.
"""

from __future__ import annotations

import functools
import sys
import threading
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from adapterkit.errors import StateError
from adapterkit.forward.plan import Plan, parts_of

if TYPE_CHECKING:
    from adapterkit.model import Adapter
    from adapterkit.rows import Rows

# Held while what acts, or what trains, changes.
lock = threading.RLock()
_models: weakref.WeakSet[Active] = weakref.WeakSet()


class State:
    """What acts. A state is replaced and never changed, except that adapters may be renamed in it.

    Attributes:
        names: the active adapters; the first is the innermost.
        heads: those of them that provide the acting heads.
        trains: those of them that were asked to train.
        constant: no gradient goes to any of them, even if their parameters require one: `requires_grad` is the same
            for everyone, and a graph, another thread or the code after the block may need it.
        active_when_merged: adapters that were active when they were merged; `unmerge` activates them again.
        idle: nothing acts.
        lost: why graphs that were made in this state cannot be computed again; empty while they can.
        rows: which adapter acts on which row of the batch; `None`: all on all rows.
        plans: what acts at each module, by the module's `id`. A plan holds its module, so no `id` is used twice.
        before_first: called once, before the first forward, for checks that would make a switch slow.
    """

    rows: Rows | None = None
    before_first: Callable[[], None] | None = None

    def __init__(
        self,
        names: tuple[str, ...] = (),
        heads: tuple[str, ...] = (),
        trains: tuple[str, ...] = (),
        *,
        constant: bool = False,
        active_when_merged: tuple[str, ...] = (),
    ) -> None:
        self.names, self.heads, self.trains, self.constant = names, heads, trains, constant
        self.active_when_merged = active_when_merged
        self.idle = not (names or heads)
        self.lost = ""
        self.plans: dict[int, Plan] = {}

    def __getstate__(self) -> dict[str, Any]:
        # A copy makes its own plans, and no graph or thread needs its gradients.
        return {**self.__dict__, "plans": {}, "constant": False, "before_first": None}

    def rename(self, old: str, new: str) -> None:
        """Adapter `old` has a new name."""
        for group in ("names", "heads", "trains", "active_when_merged"):
            setattr(self, group, tuple(new if name == old else name for name in getattr(self, group)))
        self.plans.clear()

    def without(self, gone: Collection[str]) -> State:
        """The same state without these adapters."""
        names, heads, trains, active_when_merged = (
            tuple(name for name in group if name not in gone)
            for group in (self.names, self.heads, self.trains, self.active_when_merged)
        )
        return State(names, heads, trains, constant=self.constant, active_when_merged=active_when_merged)

    def merged(self, names: Collection[str], heads: tuple[str, ...]) -> State:
        """The state after a merge of `names`; `heads` are the acting heads of all merged adapters."""
        left = self.without(names)
        heads += tuple(name for name in left.heads if name not in heads)
        before = self.active_when_merged + tuple(name for name in names if name in self.names)
        return State(left.names, heads, left.trains, constant=self.constant, active_when_merged=before)

    def unmerged(self, trained: Collection[str]) -> State:
        """The state after `unmerge`; `trained` are the adapters that trained when they were merged."""
        names = self.active_when_merged + self.names
        trains = tuple(name for name in self.active_when_merged if name in trained) + self.trains
        return State(names, tuple(name for name in self.heads if name in names), trains, constant=self.constant)

    def plan(self, module: nn.Module) -> Plan:
        """What acts at `module`.

        Under `torch.compile` no plan is kept: the compiler would guard it, and compile again in each state. Replicas
        of `DataParallel` live for one forward, so their plans are not kept either.
        """
        if torch.compiler.is_compiling():
            return self.make_plan(module)
        once = self.constant and torch.is_grad_enabled()  # such a plan holds constants, which are of this moment
        found = None if once else self.plans.get(id(module))
        if found is None:
            if self.before_first is not None:
                self.before_first()
                self.before_first = None
            found = self.make_plan(module)
            if "_is_replica" not in module.__dict__ and not once:
                self.plans[id(module)] = found
        return found

    def make_plan(self, module: nn.Module) -> Plan:
        """Decide what acts at `module`."""
        return Plan(module, self)

    def parts(self, module: nn.Module, container: str, names: tuple[str, ...]) -> list[tuple[Any, str]]:
        """What these adapters have in one container of `module`, each with its adapter's name."""
        found = list(parts_of(module._modules.get(container), names))
        if torch.is_grad_enabled() and (torch.compiler.is_compiling() or self.constant):
            # The compiler guards everything that is read, so it must read `constant` only where that matters.
            return [(as_constant(part) if _trains(part) and self.constant else part, name) for part, name in found]
        return found


class Refused(State):
    """A state in which every forward of an adapted module raises `StateError`."""

    def __init__(self, reason: str) -> None:
        super().__init__()
        self.reason, self.idle = reason, False

    def plan(self, module: nn.Module) -> Plan:
        """Raise `StateError`."""
        raise StateError(self.reason)


_ENDED = (
    "This thread was started in a block (activated, disabled or per_sample) that has ended. The thread works on for "
    "others, so it is unknown which adapters should act. Open a block in the task itself."
)


def _trains(module: nn.Module) -> bool:
    return any(map(_requires_grad, module.parameters()))


def _requires_grad(parameter: Tensor) -> bool:
    # `torch.func.functional_call` puts tensors in the place of parameters: these get the gradients they ask for.
    return isinstance(parameter, nn.Parameter) and parameter.requires_grad


def as_constant(module: nn.Module | None) -> Any:
    """A twin of `module` for one forward, with the same memory and buffers and with parameters as constants."""
    if module is None or not _trains(module):
        return module
    twin = object.__new__(type(module))
    twin.__dict__.update(module.__dict__)
    twin.__dict__["_parameters"] = {
        name: p.detach() if p is not None and _requires_grad(p) else p for name, p in module._parameters.items()
    }
    twin.__dict__["_modules"] = {name: as_constant(child) for name, child in module._modules.items()}
    return twin


class Active:
    """What acts on one model now. Every adapted module reads it in each forward.

    A copy or pickle starts with what acts in the thread that makes it.

    Attributes:
        adapters: the model's adapters, by name.
        default: the state where no block is open.
        merged: names of the adapters in the weights.
        threads: the threads that have asked.
        here: `here.thread` is this thread's entry among them.
        alive: every state that may still act somewhere, also in graphs.
    """

    def __init__(self, adapters: Mapping[str, Adapter] | None = None) -> None:
        self._begin({} if adapters is None else adapters, State(), ())

    def _begin(self, adapters: Mapping[str, Adapter], default: State, merged: tuple[str, ...]) -> None:
        self.adapters, self.default, self.merged = adapters, default, merged
        self.threads: weakref.WeakSet[Thread] = weakref.WeakSet()
        self.alive: weakref.WeakSet[State] = weakref.WeakSet([default])
        self.here = _Here(self)
        with lock:
            _models.add(self)

    def __getstate__(self) -> tuple[Any, ...]:
        return self.adapters, self.state, self.merged

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self._begin(*state)

    @property
    def state(self) -> State:
        """What acts in this thread."""
        found: State = self.here.thread.state
        return found

    @property
    def in_block(self) -> bool:
        """Whether this thread is in a block."""
        return bool(self.here.thread.blocks)

    @property
    def names(self) -> tuple[str, ...]:
        """`State.names` of this thread."""
        return self.state.names

    @property
    def heads(self) -> tuple[str, ...]:
        """`State.heads` of this thread."""
        return self.state.heads

    def become(self, state: State) -> None:
        """Let `state` act until the end of this thread's block, or everywhere if the thread is in no block.

        The cost does not depend on the number of modules: each makes its plan when it is called.
        """
        with lock:
            self.alive.add(state)
            own = self.here.thread
            if own.blocks:
                own.blocks[-1].state = own.state = state
                return
            # Python handles signals at calls and jumps, so Ctrl-C cannot come between these two.
            self.default = own.state = state
            own.ended = False
            for thread in list(self.threads):
                if not thread.blocks:
                    self.refresh(thread)

    def enter(self, state: State) -> Block:
        """Begin a block of this thread.

        Raises:
            StateError: another asyncio task of this thread is in a block.
        """
        _wrap_threads()
        with lock:
            block = Block(self.here.thread, state)
            tasks = [other.task for other in block.thread.blocks if other.task is not None]
            if block.task is not None and any(task is not block.task for task in tasks):
                raise StateError(
                    "Another asyncio task of this thread is in a block (activated, disabled or per_sample), and the "
                    "tasks of one thread share what acts. Do not await inside a block, or run the block with its "
                    "forward in asyncio.to_thread."
                )
            self.alive.add(state)
            block.thread.blocks.append(block)
            block.thread.state = state
        return block

    def leave(self, block: Block) -> None:
        """End a block. Blocks may end in any order and thread: a generator's block ends where it is freed."""
        with lock:
            block.open = False
            for each in (block, *block.in_workers):
                each.thread.blocks.remove(each)
                each.thread.ended |= each is not block
                self.refresh(each.thread)

    @contextmanager
    def acting(self, state: State) -> Iterator[None]:
        """A block as a context manager."""
        block = self.enter(state)
        try:
            yield
        finally:
            self.leave(block)

    def refresh(self, thread: Thread) -> None:
        """Set a thread's state after its blocks or the default have changed."""
        if thread.blocks:
            thread.state = thread.blocks[-1].state
        else:
            thread.state = Refused(_ENDED) if thread.ended else self.default

    def states(self) -> list[State]:
        """The default and the states of all open blocks."""
        return [self.default, *(block.state for thread in list(self.threads) for block in thread.blocks)]

    def each(self, change: Callable[[State], State]) -> None:
        """Replace each of `states()` by `change(state)`."""
        with lock:
            self.default = change(self.default)
            for block in [block for thread in list(self.threads) for block in thread.blocks]:
                block.state = change(block.state)
            self.alive.update(self.states())
            for thread in list(self.threads):
                self.refresh(thread)

    def rename(self, old: str, new: str) -> None:
        """Adapter `old` has a new name, also in states that only graphs know."""
        with lock:
            for state in list(self.alive):
                state.rename(old, new)

    def remove(self, name: str) -> None:
        """The adapter is gone and acts nowhere."""
        with lock:
            for state in list(self.alive):
                if name in state.names or name in state.heads:
                    state.lost = f"adapter {name!r} was removed"
            self.each(lambda state: state.without((name,)))

    def replan(self, module: nn.Module) -> None:
        """The parts at `module` have changed."""
        for state in list(self.alive):
            state.plans.pop(id(module), None)


# Threads

# Attribute of a new thread: the innermost block of each model in its starter. It also marks the wrapped `start`.
_STARTED_IN = "_adapterkit_blocks"
# Modules whose threads run tasks of others.
_POOLS = ("multiprocessing.pool",)


class Thread:
    """What acts on one model in one thread: the state of the innermost block, or the model's default.

    Attributes:
        ended: the thread was started in a block that has ended, and runs tasks of others.
    """

    def __init__(self, state: State) -> None:
        self.state = state
        self.blocks: list[Block] = []
        self.ended = False


class Block:
    """A block that is open in one thread.

    Attributes:
        task: the asyncio task that opened it, or `None`.
        in_workers: blocks of pool threads that were started in this one, and end with it.
    """

    def __init__(self, thread: Thread, state: State) -> None:
        self.thread, self.state, self.task = thread, state, _asyncio_task()
        self.open = True
        self.in_workers: list[Block] = []


class _Here(threading.local):
    """`thread`: this thread's entry of one model.

    `__init__` sets it and runs once in each thread, because torch.compile guards instance attributes of a
    `threading.local` and not class attributes. A forward reads nothing else, so the same adapters always give the same
    graph. A `ContextVar` would break the graph.
    """

    def __init__(self, active: Active) -> None:
        with lock:
            self.thread = Thread(active.default)
            active.threads.add(self.thread)
            thread = threading.current_thread()
            for model, block in thread.__dict__.get(_STARTED_IN, ()):
                if model is active:
                    _start_in(self.thread, block, ends=_runs_one_task(thread))
            active.refresh(self.thread)


def _start_in(thread: Thread, block: Block, *, ends: bool) -> None:
    """Begin a thread in a block of its starter. A pool's thread outlives its task, so it leaves with the block."""
    inherited = Block(thread, block.state)
    if ends or block.open:
        thread.blocks.append(inherited)
    if not ends:
        thread.ended = not block.open
        block.in_workers += [inherited] if block.open else []


def _asyncio_task() -> object:
    """The asyncio task that runs in this thread, or `None`."""
    asyncio = sys.modules.get("asyncio")
    try:
        return None if asyncio is None else asyncio.current_task()
    except RuntimeError:  # no loop runs in this thread
        return None


def _runs_one_task(thread: threading.Thread) -> bool:
    """Whether the thread ends with the task for which it was started. Pools and subclasses may run others too."""
    return type(thread).run is threading.Thread.run and _module_of_target(thread) not in _POOLS


def _module_of_target(thread: threading.Thread) -> str | None:
    return getattr(getattr(thread, "_target", None), "__module__", None)


def models() -> list[Active]:
    """What acts on each adapted model that exists."""
    with lock:
        return list(_models)


def _in_blocks() -> list[Active]:
    """The models on which this thread is in a block."""
    return [active for active in models() if active.here.thread.blocks]


def _wrap_threads() -> None:
    """Let new threads and tasks begin in the blocks of their starter. Wraps once."""
    with lock:
        if not hasattr(threading.Thread.start, _STARTED_IN):
            threading.Thread.start = _wrapped_start(threading.Thread.start)  # type: ignore[method-assign]
            ThreadPoolExecutor.submit = _wrapped_submit(ThreadPoolExecutor.submit)  # type: ignore[method-assign]


def _wrapped_start(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def start(self: threading.Thread, *args: Any, **kwargs: Any) -> None:
        if _module_of_target(self) != ThreadPoolExecutor.__module__:  # `submit` takes care of an executor's tasks
            self.__dict__[_STARTED_IN] = [(active, active.here.thread.blocks[-1]) for active in _in_blocks()]
        original(self, *args, **kwargs)

    start.__dict__[_STARTED_IN] = True
    return start


def _wrapped_submit(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def submit(self: ThreadPoolExecutor, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        states = [(active, active.here.thread.state) for active in _in_blocks()]

        def in_states(*args: Any, **kwargs: Any) -> Any:
            with ExitStack() as stack:
                for active, state in states:
                    stack.enter_context(active.acting(state))
                return fn(*args, **kwargs)

        return original(self, in_states if states else fn, *args, **kwargs)

    return submit
