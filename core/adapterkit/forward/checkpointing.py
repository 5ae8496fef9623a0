"""Gradient checkpointing: what is computed again in the backward is what was computed, and its adapters get gradients.

torch.utils.checkpoint runs a function again in the backward, perhaps in another thread, and by then other adapters may
be active. So each function that it is given runs again in the state that it first ran in, and inside the same readers
(`readers`). That is done in torch's own
module, once and for all models, because models call it in many ways: transformers' and diffusers' switches, timm's
sequences, and code of one's own.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch.utils.checkpoint as torch_checkpoint
from torch import Tensor, is_grad_enabled

from adapterkit.forward import readers, threads
from adapterkit.forward.state import Active, Refused

_WRAPPED = "_adapterkit_keeps_states"
_GENERATOR = "_checkpoint_without_reentrant_generator"


def wrap() -> None:
    """Let checkpointing keep states. Done once."""
    with threads.lock:
        if not hasattr(torch_checkpoint, _WRAPPED):
            setattr(torch_checkpoint, _WRAPPED, True)
            function: Any = torch_checkpoint.CheckpointFunction
            function.apply = staticmethod(_reentrant(function.apply))
            setattr(torch_checkpoint, _GENERATOR, _without_reentrant(getattr(torch_checkpoint, _GENERATOR)))


def _without_reentrant(original: Callable[..., Any]) -> Callable[..., Any]:
    def generator(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return original(KeepsStates(function), *args, **kwargs)

    return generator


def _reentrant(original: Callable[..., Any]) -> Callable[..., Any]:
    def apply(function: Callable[..., Any], preserve: bool, *args: Any) -> Any:
        kept = KeepsStates(function)
        if kept.trains and is_grad_enabled() and not any(isinstance(x, Tensor) and x.requires_grad for x in args):
            # The base is frozen, and this form gives gradients to nothing inside unless an input requires one.
            return torch_checkpoint.checkpoint(function, *args, use_reentrant=False, preserve_rng_state=preserve)
        return original(kept, preserve, *args)

    return apply


class KeepsStates:
    """A function that always runs in the states of this moment and thread; what trains now trains in it."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.readers = function, tuple(readers.running.stack)
        self.states = [(active, active.state, active.merged) for active in threads.models()]
        self.trained = [adapter for active, state, _ in self.states for adapter in _training(active)]

    @property
    def trains(self) -> bool:
        """Whether any adapter that acts now trains."""
        return bool(self.trained)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The function; a forward of a model whose adapters are not there any more as they were raises `StateError`."""
        with ExitStack() as stack:
            for active, state, merged in self.states:
                if state is active.state:
                    continue
                lost = state.lost or ("adapters were merged or unmerged" if merged != active.merged else "")
                reason = f"This backward computes a forward again (gradient checkpointing), and since then {lost}. "
                acts = Refused(reason + "Call backward() before that.") if lost else state
                stack.enter_context(active.acting(acts))  # it may be another model's, which does not run here
            stack.enter_context(readers.inside(self.readers))
            for adapter in self.trained:
                adapter.light_again()  # the reentrant form makes no graph before that would have held them
            return self.function(*args, **kwargs)


def _training(active: Active) -> list[Any]:
    state = active.state
    found = [active.adapters[name] for name in dict.fromkeys((*state.names, *state.heads)) if name in active.adapters]
    return [] if state.still else [adapter for adapter in found if adapter.trains()]
