"""A second method for checks that need one: it adds a learned vector to a layer's output."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from adapterkit.contract import AdapterConfig, AdapterLayer, KeyRule, Target, default_registry, hookimpl
from adapterkit.forward import Base

NAME = "adapterkit_testing_neighbour"


@dataclass(frozen=True, kw_only=True)
class NeighbourConfig(AdapterConfig):
    """The config of the second method."""

    method = NAME


class NeighbourLayer(AdapterLayer):
    """`base(x) + v`, v of shape `(out,)`."""

    def setup(self, target: Target, config: NeighbourConfig) -> None:
        """See `AdapterLayer.setup`."""
        self.neighbour_v = target.new(target.out_features)

    def forward(self, base: Base, x: Tensor) -> Tensor:
        """See `AdapterLayer.forward`."""
        out: Tensor = base(x) + self.kind.spread(self.neighbour_v)
        return out


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
    def inject(self, target: Target, config: NeighbourConfig) -> AdapterLayer:
        """See the spec."""
        return NeighbourLayer(target, config)


@contextmanager
def neighbour() -> Iterator[None]:
    """The second method is registered for the length of a `with` block."""
    default_registry.register(Neighbour())
    try:
        yield
    finally:
        default_registry.unregister(NAME)


__all__ = ["NeighbourConfig", "neighbour"]
