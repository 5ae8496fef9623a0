"""An adapter method in one file: dW = u v^T, an outer product of two learned vectors."""

from dataclasses import dataclass

from torch import nn

import adapterkit as ak


@dataclass(frozen=True, kw_only=True)
class OuterConfig(ak.AdapterConfig):
    """`scale`: how much of the change is added."""

    method = "outer"

    scale: float = 1.0


class OuterLayer(ak.LowRankLayer):
    """u is `(out,)` and starts at zero, v is `(in,)`."""

    def setup(self, target: ak.Target, config: OuterConfig) -> None:
        self.outer_u = target.new(target.out_features)
        self.outer_v = target.new(target.in_features, init=nn.init.normal_)

    def factors(self) -> ak.Factors:
        return ak.Factors(up=self.outer_u[:, None], down=self.outer_v[None, :], scale=self.config.scale)


plugin = ak.plugin(OuterConfig, OuterLayer, prefix="outer_")
