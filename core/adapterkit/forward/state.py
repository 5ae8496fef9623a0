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
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from adapterkit.contract import HEADS, SHARED, twin
from adapterkit.errors import StateError
from adapterkit.forward.plan import CallPlan, Plan, parts_of
from adapterkit.forward.readers import ACTIVE

if TYPE_CHECKING:
    from adapterkit.model import Adapter
    from adapterkit.rows import Rows

# What the change of an adapter is multiplied by: everywhere, or at each module by its path; `None`: it is off there.
Strength = float | Mapping[str, float | None]

# Held while what acts, or what trains, changes.
lock = threading.RLock()
_models: weakref.WeakSet[Active] = weakref.WeakSet()


class State:
    """What acts in a block, or everywhere.

    Attributes:
        asked: a pair: the names that were activated and the names that provide heads, both with merged adapters.
        names: the active adapters, which are not merged; the first is the innermost.
        heads: the adapters that provide the acting heads, merged ones included.
        trains: the adapters that were activated to train.
        constants: the adapters that take no gradients in this state; `requires_grad` stays on where a graph, another
            thread or the code after the block needs it.
        idle: nothing acts.
        removed: the adapters of this state that were removed: its graphs cannot be computed again.
        refuses: why every forward of an adapted module raises `StateError`; empty: it does not.
        strengths: the `Strength` of each adapter that has another than 1, by name.
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
        constants: tuple[str, ...] = (),
        merged: tuple[str, ...] = (),
        strengths: Mapping[str, Strength] | None = None,
        refuses: str = "",
    ) -> None:
        self.strengths = dict(strengths or {})
        self.asked, self.trains, self.constants, self.refuses = (names, heads), trains, constants, refuses
        self.names, self.heads = tuple(name for name in names if name not in merged) if merged else names, heads
        self.idle = not (self.names or heads or refuses)
        self.removed: tuple[str, ...] = ()
        self.plans: dict[int, Plan] = {}

    def __getstate__(self) -> dict[str, Any]:
        # A copy makes its own plans, and no graph or thread needs its gradients.
        return {**self.__dict__, "plans": {}, "constants": (), "before_first": None}

    def replace(self, old: str, *new: str) -> None:
        """Adapter `old` has the name `new` now; without `new` it is gone."""

        def edited(group: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(other for name in group for other in (new if name == old else (name,)))

        if not new and old in (*self.names, *self.heads):
            self.removed += (old,)
        self.asked = edited(self.asked[0]), edited(self.asked[1])
        self.names, self.heads = edited(self.names), edited(self.heads)
        self.trains, self.constants = edited(self.trains), edited(self.constants)
        if old in self.strengths:
            self.strengths |= dict.fromkeys(new, self.strengths.pop(old))
        self.idle = not (self.names or self.heads or self.refuses)
        self.plans.clear()

    def see_merged(self, merged: tuple[str, ...], heads: tuple[str, ...]) -> None:
        """The adapters `merged` are in the weights now. They act nowhere else, but their `heads` do, everywhere."""
        names, own = self.asked
        self.names = tuple(name for name in names if name not in merged)
        self.heads = heads + tuple(name for name in own if name in self.names)
        self.idle = not (self.names or self.heads or self.refuses)
        self.plans.clear()

    def strength(self, name: str, path: str) -> float | None:
        """What the change of an active adapter at this path is multiplied by; `None`: it is off there."""
        return strength_at(self.strengths.get(name, 1.0), path)

    def plan(self, module: nn.Module) -> Plan:
        """What acts at `module`."""
        adapters: Mapping[str, Adapter] = module.__dict__[ACTIVE].adapters
        if torch.compiler.is_compiling():  # the compiler would guard a plan that is kept, and compile in each state
            for name in (*self.names, *self.heads):
                if adapters[name].unset:
                    raise StateError(adapters[name].no_values)
            return self.make_plan(module)
        # Detached parameters belong to this forward, and replicas of `DataParallel` live for one forward.
        for_one_forward = (self.constants and torch.is_grad_enabled()) or "_is_replica" in module.__dict__
        found = None if for_one_forward else self.plans.get(id(module))
        if found is None:
            if self.before_first is not None:
                self.before_first()
                self.before_first = None
            ready = all(adapters[name].has_values() for name in (*self.names, *self.heads))
            found = self.make_plan(module)
            if ready and not for_one_forward:
                self.plans[id(module)] = found
        return found

    def make_plan(self, module: nn.Module) -> Plan:
        """Decide what acts at `module`."""
        if self.refuses:
            raise StateError(self.refuses)
        return CallPlan(module, self) if SHARED in module._modules else Plan(module, self)

    def parts(self, module: nn.Module, container: str, names: tuple[str, ...]) -> list[tuple[Any, float, str]]:
        """What acts of these adapters in one container of `module`: the part, its strength, its adapter's name."""
        slots: Any = module._modules.get(container)
        graph = torch.is_grad_enabled() and (torch.compiler.is_compiling() or bool(self.constants))
        found = []
        for part, name in parts_of(slots, names):
            strength = 1.0 if container == HEADS or not self.strengths else self.strength(name, slots.path)
            if strength is None:
                continue
            # The compiler guards everything that is read, so it must read `constants` only where that matters.
            if graph and any(map(_requires_grad, part.parameters())) and name in self.constants:
                part = twin(part, lambda t: t.detach() if _requires_grad(t) else t)  # noqa: PLW2901
            found.append((part, strength, name))
        return found


def strength_at(strength: Strength, path: str) -> float | None:
    """The strength at the module of this path. `None`: the adapter is off there."""
    return strength.get(path, 1.0) if isinstance(strength, Mapping) else strength


def _requires_grad(tensor: Tensor) -> bool:
    # `torch.func.functional_call` puts tensors in the place of parameters: these get the gradients they ask for.
    return isinstance(tensor, nn.Parameter) and tensor.requires_grad


class Active:
    """What acts on one model now. Every adapted module reads it in each forward.

    A copy or pickle starts with what acts in the thread that makes it.

    Attributes:
        adapters: the model's adapters, by name.
        default: the state where no block is open.
        merged: names of the adapters in the weights.
        warned: whether the user was warned that these do not train.
        extra: gives further classes of which an adapted module is an instance. Its adapted class derives from the first
            of them, from the module's own class and from the others, in this order; abstract ones register it.
        threads: the threads that have read it.
        here: `here.thread` is this thread's entry among them.
        alive: every state that may still act somewhere, also in graphs.
        caller: the thread that runs a model whose call a `Shared.forward` replaces.
    """

    def __init__(self, adapters: Mapping[str, Adapter] | None = None) -> None:
        self.__setstate__(({} if adapters is None else adapters, State(), (), None))

    def __getstate__(self) -> tuple[Any, ...]:
        return self.adapters, self.state, self.merged, self.extra

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.adapters: Mapping[str, Adapter]
        self.default: State
        self.merged: tuple[str, ...]
        self.extra: Callable[[nn.Module], tuple[type, ...]] | None
        self.adapters, self.default, self.merged, self.extra = state
        self.warned = False
        self.caller: int | None = None
        self.threads: weakref.WeakSet[Thread] = weakref.WeakSet()
        self.alive: weakref.WeakSet[State] = weakref.WeakSet([self.default])
        self.here = _Here(self)
        with lock:
            _models.add(self)

    @property
    def state(self) -> State:
        """What acts in this thread."""
        found: State = self.here.thread.state
        return found

    @property
    def in_block(self) -> bool:
        """Whether this thread is in a block."""
        return bool(self.here.thread.blocks)

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
                self.refresh(thread)

    def enter(self, block: Block) -> Block:
        """Begin a block of this thread.

        Raises:
            StateError: another asyncio task of this thread is in a block.
        """
        _wrap_threads()
        with lock:
            thread = self.here.thread
            if block.task is not None and any(other.task not in (None, block.task) for other in thread.blocks):
                raise StateError(
                    "Another asyncio task of this thread is in a block (activated, disabled or per_sample), and the "
                    "tasks of one thread share what acts. Do not await inside a block, or run the block with its "
                    "forward in asyncio.to_thread."
                )
            self.alive.add(block.state)
            thread.blocks.append(block)
            thread.state = block.state
        return block

    def leave(self, block: Block) -> None:
        """End a block. Blocks may end in any order and thread: a generator's block ends where it is freed."""
        with lock:
            block.open = False
            for thread in list(self.threads):
                left = [each for each in thread.blocks if each is not block and each.starter is not block]
                if len(left) < len(thread.blocks):
                    thread.ended |= block not in thread.blocks  # a pool started the thread in it
                    thread.blocks = left
                self.refresh(thread)

    def refresh(self, thread: Thread) -> None:
        """Set a thread's state after its blocks or the default have changed."""
        if thread.blocks:
            thread.state = thread.blocks[-1].state
        else:
            thread.state = State(refuses=_ENDED) if thread.ended else self.default

    def states(self) -> list[State]:
        """The default and the states of all open blocks."""
        return [self.default, *(block.state for thread in list(self.threads) for block in thread.blocks)]

    def replace(self, old: str, *new: str) -> None:
        """Adapter `old` has the name `new` now, also in states that only graphs know; without `new` it is gone."""
        with lock:
            for state in list(self.alive):
                state.replace(old, *new)

    def set_merged(self, merged: tuple[str, ...], heads: tuple[str, ...]) -> None:
        """These adapters are in the weights now, and these heads of theirs act."""
        with lock:
            self.merged, self.warned = merged, False
            for state in list(self.alive):
                state.see_merged(merged, heads)

    def replan(self, module: nn.Module) -> None:
        """The parts at `module` have changed."""
        for state in list(self.alive):
            state.plans.pop(id(module), None)


# Threads

# Attribute of a new thread: the innermost block of each model in its starter. It also marks the wrapped `start`.
_STARTED_IN = "_adapterkit_blocks"
_ENDED = (
    "This thread was started in a block (activated, disabled or per_sample) that has ended. The thread works on for "
    "others, so it is unknown which adapters should act. Open a block in the task itself."
)


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
        starter: the block in which a pool started this thread; this block ends with it.
        task: the asyncio task that opened it, or `None`.
    """

    def __init__(self, state: State, starter: Block | None = None) -> None:
        self.state, self.starter, self.open = state, starter, True
        asyncio = sys.modules.get("asyncio")
        try:
            self.task = None if asyncio is None else asyncio.current_task()
        except RuntimeError:  # no loop runs in this thread
            self.task = None


class _Here(threading.local):
    """`thread`: this thread's entry of one model.

    `__init__` sets it and runs once in each thread, because torch.compile guards instance attributes of a
    `threading.local` and not class attributes. A forward reads nothing else, so the same adapters always give the same
    graph. A `ContextVar` would break the graph.
    """

    def __init__(self, active: Active) -> None:
        started = threading.current_thread()
        # Pools and subclasses may run the tasks of others after the one that they were started for.
        target = started.function if isinstance(started, threading.Timer) else getattr(started, "_target", None)
        pooled = target is None or target.__module__ == "multiprocessing.pool"
        with lock:
            self.thread = Thread(active.default)
            active.threads.add(self.thread)
            for block in [b for model, b in started.__dict__.get(_STARTED_IN, ()) if model is active]:
                if block.open or not pooled:
                    self.thread.blocks.append(Block(block.state, block if pooled else None))
                self.thread.ended = not self.thread.blocks
            active.refresh(self.thread)


def models() -> list[Active]:
    """What acts on each adapted model that exists."""
    with lock:
        return list(_models)


def _wrap_threads() -> None:
    """Let new threads and tasks begin in the blocks of their starter. Wraps once."""
    if hasattr(threading.Thread.start, _STARTED_IN):
        return
    original_start, original_submit = threading.Thread.start, cast(Any, ThreadPoolExecutor.submit)

    @functools.wraps(original_start)
    def start(self: threading.Thread, *args: Any, **kwargs: Any) -> None:
        target = getattr(self, "_target", None)
        if getattr(target, "__module__", "") != ThreadPoolExecutor.__module__:  # `submit` cares for its tasks
            self.__dict__[_STARTED_IN] = [(m, m.here.thread.blocks[-1]) for m in models() if m.in_block]
        original_start(self, *args, **kwargs)

    @functools.wraps(original_submit)
    def submit(self: ThreadPoolExecutor, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        states = [(active, active.state) for active in models() if active.in_block]

        def in_states(*args: Any, **kwargs: Any) -> Any:
            with ExitStack() as stack:
                for active, state in states:
                    stack.callback(active.leave, active.enter(Block(state)))
                return fn(*args, **kwargs)

        return original_submit(self, in_states if states else fn, *args, **kwargs)

    with lock:
        if not hasattr(threading.Thread.start, _STARTED_IN):
            start.__dict__[_STARTED_IN] = True
            threading.Thread.start = start  # type: ignore[method-assign]
            ThreadPoolExecutor.submit = submit  # type: ignore[method-assign, assignment]
