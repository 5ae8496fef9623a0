"""The VeRA layer: its parameters and its factors, and the random projections that all layers share."""

import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from adapterkit import AdapterWarning, Factors, LowRankLayer, Shared, Target
from adapterkit_vera.config import VeraConfig


def projections(r: int, in_features: int, out_features: int, key: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The random A `(r, in)` and B `(out, r)` of a key, float32: uniform within `sqrt(6 / columns)`.

    Bit for bit PEFT's: one stream of torch's CPU generator, A before B. On the meta device they have no values.
    """
    place = "meta" if device.type == "meta" else "cpu"
    generator = torch.Generator("cpu").manual_seed(key)
    down = torch.empty(r, in_features, dtype=torch.float32, device=place)
    up = torch.empty(out_features, r, dtype=torch.float32, device=place)
    for matrix in (down, up) if place == "cpu" else ():
        # In this order of operations: a bound that is rounded otherwise gives other bits.
        bound = math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(matrix.shape[1]))
        matrix.uniform_(-bound, bound, generator=generator)
    return down.to(device), up.to(device)


class VeraShared(Shared):
    """A and B of the sizes that the largest layers need; in files if `save_projection` says so."""

    vera_A: Tensor
    vera_B: Tensor

    def setup(self, targets: Sequence[Target], config: VeraConfig, root: Target) -> None:
        sizes = max(t.in_features for t in targets), max(t.out_features for t in targets)
        held = [root.file[name] for name in ("vera_A", "vera_B") if name in root.file] if root.file else []
        comes = config.save_projection and len(held) == 2  # what a file brings is not made first
        device = torch.device("meta") if comes else root.device
        made = projections(config.r, *sizes, config.projection_prng_key, device)
        for name, matrix in zip(("vera_A", "vera_B"), made, strict=True):
            self.register_buffer(name, matrix.to(root.dtype), persistent=config.save_projection)
        if config.save_projection or len(held) < 2 or device.type == "meta":
            return
        if not all(torch.equal(own.to(kept).cpu(), kept.cpu()) for own, kept in zip(made, held, strict=True)):
            warnings.warn(
                "This file holds projections vera_A, vera_B that are not those of its projection_prng_key = "
                f"{config.projection_prng_key}, and says save_projection = false, so they are not used. If the adapter "
                "was trained with them, set save_projection to true in its adapter_config.json.",
                AdapterWarning,
                stacklevel=2,
            )


class VeraLayer(LowRankLayer):
    """`dW = diag(b) B diag(d) A` with this layer's d `(r,)` and b `(out,)` and its part of the shared A and B."""

    def setup(self, target: Target, config: VeraConfig) -> None:
        self.dropout = config.vera_dropout
        self.vera_lambda_d = target.new(config.r, init=config.d_initial if config.init_weights else nn.init.normal_)
        self.vera_lambda_b = target.new(target.out_features, init=0.0 if config.init_weights else 1.0)

    def factors(self) -> Factors:
        b, d, kind = self.vera_lambda_b, self.vera_lambda_d, self.kind
        up, down = self.shared.vera_B[: kind.out_features], self.shared.vera_A[:, : kind.in_features]
        # The layer may be on another device than the model's root.
        return Factors(up.to(b.device, b.dtype), down.to(b.device, b.dtype), None, b, d)
