"""What must hold whatever is put in: errors of the library's own, no hang, a model that a refused call left alone."""

from __future__ import annotations

import signal
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

import adapterkit as ak

# Seconds of the processor's time, so that other processes do not count.
LONGEST = 2.0
MOST_CHARACTERS = 5000  # in a line of an error


class Hang(BaseException):
    """An input took too long."""


class Finding(Exception):
    """An input that shows a fault of the library."""


@contextmanager
def in_time() -> Iterator[None]:
    """Raise `Hang` in the block after `LONGEST` seconds of this process's work."""

    def late(number: int, frame: FrameType | None) -> None:
        raise Hang

    before = signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, LONGEST)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def refused(call: Callable[[], object]) -> bool:
    """Whether `call` was refused by an error of the library, in lines that are safe to print.

    Raises:
        Finding: it raised another error, or took too long.
    """
    try:
        with in_time(), warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.simplefilter("ignore", ak.AdapterWarning)
            call()
    except ak.AdapterError as error:
        if any(not line.isprintable() or len(line) > MOST_CHARACTERS for line in str(error).split("\n")):
            raise Finding(f"its message is not plain: {error}") from error
        return True
    except Hang:
        raise Finding(f"it takes longer than {LONGEST:g} s") from None
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        raise Finding(f"{type(error).__name__}: {error} (at {where.filename}:{where.lineno})") from error
    return False


@dataclass(frozen=True)
class State:
    """What a refused call must leave as it was; cheap enough to be taken for every input."""

    modules: tuple[tuple[str, int, type], ...]
    tensors: tuple[tuple[str, int, int, bool], ...]
    hooks: tuple[int, ...]
    names: tuple[str, ...]
    active: tuple[str, ...]

    @classmethod
    def of(cls, model: nn.Module) -> State:
        """The identity of each module and tensor, how often each tensor was written to, and what acts."""
        adapters = ak.attach(model)
        tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        return cls(
            tuple((name, id(m), type(m)) for name, m in model.named_modules(remove_duplicate=False)),
            tuple((name, id(t), t._version, t.requires_grad) for name, t in tensors),
            tuple(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()),
            adapters.names,
            adapters.active,
        )


def same_tensors(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    """Whether two adapters hold the same bits; NaN equals NaN."""
    return ours.keys() == theirs.keys() and all(
        ours[k].dtype == theirs[k].dtype and ours[k].shape == theirs[k].shape and _bits(ours[k]) == _bits(theirs[k])
        for k in ours
    )


def _bits(tensor: Tensor) -> Any:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).tolist()
