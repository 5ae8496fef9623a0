"""Torch's modes are for the caller's forwards. What is stored does not depend on them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def default_modes() -> Iterator[None]:
    """A block, or a decorated function, without inference mode and autocast: new tensors can be trained later."""
    with torch.inference_mode(False), without_autocast():
        yield


@contextmanager
def without_autocast() -> Iterator[None]:
    """A block, or a decorated function, in which autocast rounds no product of matrices to half precision."""
    accelerator = torch.accelerator.current_accelerator()
    with ExitStack() as stack:
        for kind in {"cpu"} if accelerator is None else {"cpu", accelerator.type}:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield
