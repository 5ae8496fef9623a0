"""Gradient checkpointing: the backward recomputes what the forward computed, with the same adapters.

torch.utils.checkpoint runs a function again in the backward, maybe in another thread, when other adapters may be
active. So every function that it is given runs again in the state of its first run, and inside the same readers
(`readers`). Torch's own module is wrapped, once for all models, because models reach it in many ways: the switches of
transformers and diffusers, timm's sequences, the user's own code.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch.utils.checkpoint as torch_checkpoint
from torch import Tensor, is_grad_enabled

from adapterkit.forward.readers import running
from adapterkit.forward.state import Block, State, lock, models

_WRAPPED = "_adapterkit_keeps_states"
_GENERATOR = "_checkpoint_without_reentrant_generator"


def wrap() -> None:
    """Let checkpointing keep states. Wraps once."""
    with lock:
        if hasattr(torch_checkpoint, _WRAPPED):
            return
        setattr(torch_checkpoint, _WRAPPED, True)
        function: Any = torch_checkpoint.CheckpointFunction
        reentrant, generator = function.apply, getattr(torch_checkpoint, _GENERATOR)

        def apply(function: Callable[..., Any], preserve: bool, *args: Any) -> Any:
            kept = InSameState(function)
            if kept.trained and is_grad_enabled() and not any(isinstance(x, Tensor) and x.requires_grad for x in args):
                # With a frozen base no input requires a gradient, and then this form gives parameters none either.
                return torch_checkpoint.checkpoint(function, *args, use_reentrant=False, preserve_rng_state=preserve)
            return reentrant(kept, preserve, *args)

        function.apply = staticmethod(apply)
        setattr(torch_checkpoint, _GENERATOR, lambda fn, *args, **kwargs: generator(InSameState(fn), *args, **kwargs))


class InSameState:
    """Calls a function always in the states of this moment and thread.

    Attributes:
        trained: the adapters that act and train now; they train in each later call too.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.readers = function, tuple(running.stack)
        self.states = [(active, active.state, active.merged, active.state.removed) for active in models()]
        # What `Shared.forward` left for the layers that run again.
        shared = [active.adapters[n].shared for active, s, *_ in self.states for n in s.names if n in active.adapters]
        self.left = [(part, part.plain_attributes()) for part in shared if part is not None and part.replaces_call]
        self.trained = [
            active.adapters[name]
            for active, state, *_ in self.states
            for name in dict.fromkeys((*state.names, *state.heads))
            if name not in state.constants and name in active.adapters and active.adapters[name].trains()
        ]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function. A forward raises `StateError` if its adapters were removed or merged since."""
        with ExitStack() as stack:
            for active, state, merged, removed in self.states:
                why = f"adapter {state.removed[-1]!r} was removed" if state.removed != removed else ""
                if merged != active.merged:
                    why = "adapters were merged or unmerged"
                if why:  # raised by the forward, because this may be another model, which does not run here
                    reason = f"This backward recomputes a forward (gradient checkpointing), and since then {why}. "
                    state = State(refuses=reason + "Call backward() before that.")  # noqa: PLW2901
                if state is not active.state:
                    stack.callback(active.leave, active.enter(Block(state)))
            stack.callback(setattr, running, "stack", running.stack)
            running.stack = list(self.readers)
            for shared, left in self.left:
                stack.callback(vars(shared).update, shared.plain_attributes())
                vars(shared).update(left)
            for adapter in self.trained:
                adapter.train_again()  # the reentrant form made no graph that would have kept `requires_grad` on
            return self.function(*args, **kwargs)
