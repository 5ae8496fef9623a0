"""The VeRA layer: its parameters and its factors, and the random projections that all layers share."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from adapterkit import Factors, LowRankLayer, Shared, Target
from adapterkit_vera.config import VeraConfig


def projections(r: int, in_features: int, out_features: int, key: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The random A `(r, in)` and B `(out, r)` of a key, float32: uniform within `sqrt(6 / columns)`.

    Bit for bit PEFT's: one stream of torch's CPU generator, A before B. On the meta device they have no values.
    """
    place = "meta" if device.type == "meta" else "cpu"
    down = torch.empty(r, in_features, dtype=torch.float32, device=place)
    up = torch.empty(out_features, r, dtype=torch.float32, device=place)
    if device.type == "meta":
        return down, up
    generator = torch.Generator("cpu").manual_seed(key)
    for matrix in (down, up):
        # In this order of operations: a bound that is rounded otherwise gives other bits.
        bound = math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(matrix.shape[1]))
        matrix.uniform_(-bound, bound, generator=generator)
    return down.to(device), up.to(device)


class VeraShared(Shared):
    """A and B of the sizes that the largest layers need; in files if `save_projection` says so."""

    vera_A: Tensor
    vera_B: Tensor

    def setup(self, targets: Sequence[Target], config: VeraConfig, root: Target) -> None:
        """See `Shared.setup`."""
        sizes = max(t.in_features for t in targets), max(t.out_features for t in targets)
        in_file = config.save_projection and {"vera_A", "vera_B"} <= (root.file or {}).keys()
        device = torch.device("meta") if in_file else root.device  # what a file brings is not made first
        made = projections(config.r, *sizes, config.projection_prng_key, device)
        for name, matrix in zip(("vera_A", "vera_B"), made, strict=True):
            self.register_buffer(name, matrix.to(root.dtype), persistent=config.save_projection)


class VeraLayer(LowRankLayer):
    """`dW = diag(b) B diag(d) A` with this layer's d `(r,)` and b `(out,)` and the shared A and B."""

    shared: VeraShared
    vera_lambda_d: nn.Parameter
    vera_lambda_b: nn.Parameter

    def setup(self, target: Target, config: VeraConfig) -> None:
        """See `AdapterLayer.setup`."""
        self.dropout = config.vera_dropout
        self.vera_lambda_d = target.new(config.r, init=config.d_initial if config.init_weights else nn.init.normal_)
        self.vera_lambda_b = target.new(target.out_features, init=0.0 if config.init_weights else 1.0)

    def factors(self) -> Factors:
        """See `LowRankLayer.factors`: this layer's part of A and B, between its vectors."""
        b, d, kind = self.vera_lambda_b, self.vera_lambda_d, self.kind
        down, up = self.shared.vera_A, self.shared.vera_B
        if down.shape[1] != kind.in_features:
            down = down[:, : kind.in_features]
        if up.shape[0] != kind.out_features:
            up = up[: kind.out_features]
        # The layer may be on another device than the model's root.
        return Factors(up.to(b.device, b.dtype), down.to(b.device, b.dtype), None, b, d)
