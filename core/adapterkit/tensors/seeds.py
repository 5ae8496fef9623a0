"""Random numbers that depend on a seed and a name, whatever else is drawn before, beside or in another process."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from hashlib import blake2b

import torch


def new_seed() -> int:
    """A seed from torch's global CPU generator: one draw, also where the default device is another."""
    number = torch.randint(2**63 - 1, (), dtype=torch.int64, device="cpu")
    return int(number) if type(number) is torch.Tensor else 0  # under FakeTensorMode nothing has a value


@contextmanager
def seeded(seed: int | None, devices: Iterable[torch.device]) -> Iterator[Callable[[str], None]]:
    """In the block, `begin(name)` has the global generators of these devices draw what the seed and the name give.

    Code that knows no generator, such as `torch.randn` in a method's `setup`, draws from them. After the block they are
    as before. Without a seed nothing is set or restored.
    """
    generators = [] if seed is None else list(filter(None, map(_generator, {torch.device("cpu"), *devices})))
    states = [generator.get_state() for generator in generators]

    def begin(name: str) -> None:
        number = int.from_bytes(blake2b(f"{seed}:{name}".encode(), digest_size=8).digest(), "little")
        for generator in generators:
            generator.manual_seed(number)

    try:
        yield begin
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


def _generator(device: torch.device) -> torch.Generator | None:
    """The global generator of a device; `None` if the device offers none."""
    if device.type in ("cpu", "meta"):
        return torch.default_generator if device.type == "cpu" else None
    module = torch.get_device_module(device)
    found = getattr(module, "default_generators", ())
    index = module.current_device() if device.index is None else device.index
    return found[index] if index < len(found) else None
