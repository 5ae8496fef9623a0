"""Acting: which adapters of a model act, in which thread."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from adapterkit.errors import StateError
from adapterkit.forward import threads
from adapterkit.forward.plan import Plan, parts_of

if TYPE_CHECKING:
    from adapterkit.model import Adapter
    from adapterkit.rows import Rows


class State:
    """Which adapters act, while they do: replaced by another, never changed, but for the names of adapters.

    Attributes:
        names: active adapters; the first is the innermost.
        heads: those of them whose heads act.
        trains: those of them that were asked to train.
        still: no gradient goes to any of them, whatever `requires_grad` says: it is everyone's, and a graph, another
            thread or what comes after the block may need it.
        asleep: adapters that were active when they were merged, to be active again.
        idle: nothing acts.
        lost: why the state cannot act any more, for graphs that were made in it.
        rows: which of them acts on which row of the batch; `None`: all on all.
        plans: what acts at each module, by the module's `id`; each plan holds its module, so no `id` comes again.
        first: called once, before the first plan: what is checked where a switch must cost nothing.
    """

    rows: Rows | None = None
    first: Callable[[], None] | None = None

    def __init__(
        self,
        names: tuple[str, ...] = (),
        heads: tuple[str, ...] = (),
        trains: tuple[str, ...] = (),
        *,
        still: bool = False,
        asleep: tuple[str, ...] = (),
    ) -> None:
        self.names, self.heads, self.trains, self.still, self.asleep = names, heads, trains, still, asleep
        self.idle = not (names or heads)
        self.lost = ""
        self.plans: dict[int, Plan] = {}

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles make their plans themselves, and nobody waits for what they train.
        return {**self.__dict__, "plans": {}, "still": False, "first": None}

    def rename(self, old: str, new: str) -> None:
        """Adapter `old` has another name now."""
        for group in ("names", "heads", "trains", "asleep"):
            setattr(self, group, tuple(new if name == old else name for name in getattr(self, group)))
        self.plans.clear()

    def without(self, gone: Collection[str]) -> State:
        """The same without these adapters."""
        names, heads, trains, asleep = (
            tuple(name for name in group if name not in gone)
            for group in (self.names, self.heads, self.trains, self.asleep)
        )
        return State(names, heads, trains, still=self.still, asleep=asleep)

    def merged(self, names: Collection[str], heads: tuple[str, ...]) -> State:
        """The same once these adapters are in the weights; `heads`: of all that are, those whose heads act."""
        left = self.without(names)
        own = heads + tuple(name for name in left.heads if name not in heads)
        asleep = self.asleep + tuple(name for name in names if name in self.names)
        return State(left.names, own, left.trains, still=self.still, asleep=asleep)

    def unmerged(self, trained: Collection[str]) -> State:
        """The same once nothing is merged: what was active then is so again, before what is active now.

        Args:
            trained: adapters that trained when they were merged.
        """
        names = self.asleep + self.names
        trains = tuple(name for name in self.asleep if name in trained) + self.trains
        return State(names, tuple(name for name in self.heads if name in names), trains, still=self.still)

    def plan(self, module: nn.Module) -> Plan:
        """What acts at `module`.

        Compiled, it is decided at each compilation: what is kept for later calls would be guarded, and so compiled
        anew in each state. The replicas of `DataParallel` live for one forward and are not kept either.
        """
        if torch.compiler.is_compiling():
            return self.make_plan(module)
        found = None if self.still and torch.is_grad_enabled() else self.plans.get(id(module))
        if found is None:
            if self.first is not None:
                self.first()
                self.first = None
            found = self.make_plan(module)
            if "_is_replica" not in module.__dict__ and not (self.still and torch.is_grad_enabled()):
                self.plans[id(module)] = found
        return found

    def make_plan(self, module: nn.Module) -> Plan:
        """Decide what acts at `module`."""
        return Plan(module, self)

    def parts(self, module: nn.Module, container: str, names: tuple[str, ...]) -> list[tuple[Any, str]]:
        """What these adapters have in one container of `module`, each with its adapter's name."""
        found = list(parts_of(module._modules.get(container), names))
        if torch.is_grad_enabled() and (torch.compiler.is_compiling() or self.still):
            # Compiled, `still` is asked where it counts alone: the graph is guarded by all that is asked.
            return [(constant(part) if _trains(part) and self.still else part, name) for part, name in found]
        return found


class Refused(State):
    """It is not known, or not there any more, what is to act: a forward of an adapted module raises `StateError`."""

    def __init__(self, reason: str) -> None:
        super().__init__()
        self.reason, self.idle = reason, False

    def plan(self, module: nn.Module) -> Plan:
        """Raise `StateError`."""
        raise StateError(self.reason)


_ENDED = (
    "This thread was started in a block (activated, disabled or per_sample) that has ended since, and it works on for "
    "others, so it is not known which adapters are to act. Open a block in the task itself."
)


def _trains(module: nn.Module) -> bool:
    return any(map(_learns, module.parameters()))


def _learns(parameter: Tensor) -> bool:
    # A tensor that `torch.func.functional_call` puts in a parameter's place is to get what gradients it may.
    return isinstance(parameter, nn.Parameter) and parameter.requires_grad


def constant(module: nn.Module | None) -> Any:
    """`module` with its parameters as constants, for one forward; their memory and buffers are the same."""
    if module is None or not _trains(module):
        return module
    same = object.__new__(type(module))
    same.__dict__.update(module.__dict__)
    same.__dict__["_parameters"] = {
        name: p.detach() if p is not None and _learns(p) else p for name, p in module._parameters.items()
    }
    same.__dict__["_modules"] = {name: constant(child) for name, child in module._modules.items()}
    return same


class Active:
    """Which adapters of a model act now. One per model, read by every adapted module in each forward.

    A copy or pickle begins with what acts in the thread that makes it.

    Attributes:
        adapters: the model's adapters, by name.
        default: what acts where no block is open.
        merged: the adapters in the weights.
        slots: each thread's (see `threads`).
        here: this thread's, as `here.slot`.
        alive: all states that anything may still act in, graphs included.
    """

    def __init__(self, adapters: Mapping[str, Adapter] | None = None) -> None:
        self._begin({} if adapters is None else adapters, State(), ())

    def _begin(self, adapters: Mapping[str, Adapter], default: State, merged: tuple[str, ...]) -> None:
        self.adapters, self.default, self.merged = adapters, default, merged
        self.slots: weakref.WeakSet[threads.Slot] = weakref.WeakSet()
        self.alive: weakref.WeakSet[State] = weakref.WeakSet([default])
        self.here = threads.Here(self)
        threads.know(self)

    def __getstate__(self) -> tuple[Any, ...]:
        return self.adapters, self.state, self.merged

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self._begin(*state)

    @property
    def state(self) -> State:
        """What acts in this thread."""
        found: State = self.here.slot.state
        return found

    @property
    def in_block(self) -> bool:
        """Whether this thread is in a block."""
        return bool(self.here.slot.blocks)

    @property
    def names(self) -> tuple[str, ...]:
        """See `State`."""
        return self.state.names

    @property
    def heads(self) -> tuple[str, ...]:
        """See `State`."""
        return self.state.heads

    def become(self, state: State) -> None:
        """Let this act from now on: until the end of the block that this thread is in, or else everywhere.

        Costs the same for any number of modules: each makes its plan when it is called.
        """
        with threads.lock:
            self.alive.add(state)
            own = self.here.slot
            if own.blocks:
                own.blocks[-1].state = own.state = state
                return
            self.default, own.ended = state, False
            for slot in list(self.slots):
                if not slot.blocks:  # others may be in the middle of something
                    self.refresh(slot)

    def enter(self, state: State) -> threads.Block:
        """Begin a block of this thread.

        Raises:
            StateError: another asyncio task of this thread is in a block.
        """
        threads.wrap()
        with threads.lock:
            block = threads.Block(self.here.slot, state)
            if any(
                None not in (block.task, other.task) and other.task is not block.task for other in block.slot.blocks
            ):
                raise StateError(
                    "Another asyncio task of this thread is in a block (activated, disabled or per_sample), and tasks "
                    "of one thread share what acts. Do not await inside a block, or run the forward with its block in "
                    "asyncio.to_thread."
                )
            self.alive.add(state)
            block.slot.blocks.append(block)
            block.slot.state = state
        return block

    def leave(self, block: threads.Block) -> None:
        """End a block. Blocks may end in any order and in any thread: a generator's ends where it is freed."""
        with threads.lock:
            block.open = False
            for begun in (block, *block.workers):
                begun.slot.blocks.remove(begun)
                begun.slot.ended |= begun is not block
                self.refresh(begun.slot)

    @contextmanager
    def acting(self, state: State) -> Iterator[None]:
        """A block."""
        block = self.enter(state)
        try:
            yield
        finally:
            self.leave(block)

    def refresh(self, slot: threads.Slot) -> None:
        """Blocks of a thread have begun or ended, or there is another default."""
        slot.state = slot.blocks[-1].state if slot.blocks else Refused(_ENDED) if slot.ended else self.default

    def states(self) -> list[State]:
        """The default and those of all open blocks."""
        return [self.default, *(block.state for slot in list(self.slots) for block in slot.blocks)]

    def each(self, change: Callable[[State], State]) -> None:
        """Put another state in place of each of `states()`."""
        with threads.lock:
            self.default = change(self.default)
            for block in [block for slot in list(self.slots) for block in slot.blocks]:
                block.state = change(block.state)
            self.alive.update(self.states())
            for slot in list(self.slots):
                self.refresh(slot)

    def rename(self, old: str, new: str) -> None:
        """Adapter `old` has another name now; in states that only graphs know, too."""
        with threads.lock:
            for state in list(self.alive):
                state.rename(old, new)

    def remove(self, name: str) -> None:
        """The adapter is gone: it acts nowhere any more."""
        with threads.lock:
            for state in list(self.alive):
                if name in state.names or name in state.heads:
                    state.lost = f"adapter {name!r} was removed"
            self.each(lambda state: state.without((name,)))

    def replan(self, module: nn.Module) -> None:
        """The parts at `module` are others now."""
        for state in list(self.alive):
            state.plans.pop(id(module), None)
