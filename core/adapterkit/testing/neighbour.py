"""A second method for checks that need one: it adds a learned vector to a layer's output."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

from adapterkit.contract import AdapterConfig, AdapterLayer, KeyRule, Target, default_registry, hookimpl

NAME = "adapterkit_testing_neighbour"


@dataclass(frozen=True, kw_only=True)
class NeighbourConfig(AdapterConfig):
    """The config of the second method."""

    method = NAME


class NeighbourLayer(AdapterLayer):
    """`delta(x) = v`, shape `(out,)`."""

    def __init__(self, target: Target) -> None:
        super().__init__(target.kind)
        self.neighbour_v = target.empty(target.out_features)
        if not target.load:
            nn.init.zeros_(self.neighbour_v)

    def delta(self, x: Tensor) -> Tensor:
        """See `AdapterLayer.delta`."""
        return self.kind.spread(self.neighbour_v)


class Neighbour:
    """The plugin."""

    @hookimpl
    def config_type(self) -> type[AdapterConfig]:
        """See the spec."""
        return NeighbourConfig

    @hookimpl
    def key_rule(self) -> KeyRule:
        """See the spec."""
        return KeyRule(prefix="neighbour_")

    @hookimpl
    def inject(self, target: Target) -> AdapterLayer:
        """See the spec."""
        return NeighbourLayer(target)


@contextmanager
def neighbour() -> Iterator[None]:
    """The second method is registered for the length of a `with` block."""
    default_registry.register(Neighbour())
    try:
        yield
    finally:
        default_registry.unregister(NAME)


__all__ = ["NeighbourConfig", "neighbour"]
