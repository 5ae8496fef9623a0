"""PiSSA and OLoRA: LoRA that begins with the weight's own leading part and trains it beside the rest."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from adapterkit import Base, CheckpointError, Factors, StateError, Target
from adapterkit_lora.config import LoraConfig
from adapterkit_lora.layer import Init, LoraLayer


class ResidualLayer(LoraLayer):
    """`dW = scaling * (B A - B0 A0)` with the initial factors A0 and B0, so W itself, which others use too, stays.

    With dropout: `scaling * (B A dropout(x) - B0 A0 x)`, which is training A and B beside `W - scaling * B0 A0`. At
    the start the two terms cancel exactly.
    """

    lora_init_A: Tensor
    lora_init_B: Tensor

    def setup(self, target: Target, config: LoraConfig) -> None:
        """See `AdapterLayer.setup`."""
        super().setup(target, config)
        self.register_buffer("lora_init_A", self.lora_A.weight.detach().clone())
        self.register_buffer("lora_init_B", self.lora_B.weight.detach().clone())

    def initial_values(self, target: Target, config: LoraConfig) -> tuple[Init, Init]:
        """See `LoraLayer.initial_values`."""
        if target.file is not None:
            return 0.0, 0.0
        down, up = leading_factors(target, config)
        return lambda parameter: parameter.copy_(down), lambda parameter: parameter.copy_(up)

    def factors(self) -> Factors:
        """See `LowRankLayer.factors`: of rank `2 r`."""
        up, down, _, scale, _ = super().factors()
        return Factors(torch.cat([up, -self.lora_init_B], 1), torch.cat([down, self.lora_init_A]), scale=scale)

    def forward(self, base: Base, x: Tensor) -> Tensor:
        """See `AdapterLayer.forward`."""
        up, down, _, scale, _ = super().factors()
        trained = self.kind.apply(x, Factors(up, down), self.dropout if self.training else 0.0)
        initial = self.kind.apply(x, Factors(self.lora_init_B, self.lora_init_A))
        out: Tensor = base(x) + (trained - initial) * scale
        return out


def leading_factors(target: Target, config: LoraConfig) -> tuple[Tensor, Tensor]:
    """`A0 (r, in)` and `B0 (out, r)` that PiSSA or OLoRA takes from the weight.

    PiSSA: `scaling * B0 A0` is the best approximation of W of rank r. OLoRA: `A0, B0` are the leading parts of
    `W = Q R`.
    """
    r, start = config.r, f"init_lora_weights={config.init_lora_weights!r}"
    if target.kind.lookup or len(target.kind.down_shape(1)) > 2:
        raise StateError(
            f"{start} is for linear layers; {target.path!r} is a {target.kind.name}. Leave it out with exclude_modules."
        )
    weight = target.weight()
    if weight.is_meta:
        raise StateError(
            f"{start} needs the weight of {target.path!r}, which is on the meta device. Load the base first."
        )
    if r > min(weight.shape):
        raise StateError(f"{start} takes r <= min(in, out) = {min(weight.shape)} at {target.path!r}, not {r}.")
    if config.init_lora_weights == "olora":
        q, rest = torch.linalg.qr(weight)
        return rest[:r], q[:, :r]
    if config.pissa_iterations is None:
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    else:
        u, s, v = torch.svd_lowrank(weight, r, niter=config.pissa_iterations)
        vh = v.t()
    root = (s[:r] / config.scaling).sqrt()
    return root[:, None] * vh[:r], u[:, :r] * root


def to_file(config: LoraConfig, tensors: Mapping[str, Tensor]) -> tuple[LoraConfig, dict[str, Tensor]]:
    """PiSSA and OLoRA as plain LoRA of rank 2 r with the same scaling: `[B, -B0] [A; A0]`."""
    written = {}
    for key, first in tensors.items():
        path, found, _ = key.rpartition(".lora_init_A")
        if found:
            down, up = f"{path}.lora_A.weight", f"{path}.lora_B.weight"
            written[down] = torch.cat([tensors[down], first])
            written[up] = torch.cat([tensors[up], -tensors[f"{path}.lora_init_B"]], dim=1)
    grow = math.sqrt(2) if config.use_rslora else 2
    plain = config.replace(
        init_lora_weights=True,
        r=2 * config.r,
        lora_alpha=grow * config.lora_alpha,
        rank_pattern={key: 2 * rank for key, rank in config.rank_pattern.items()},
        alpha_pattern={key: grow * alpha for key, alpha in config.alpha_pattern.items()},
    )
    return plain, written


def from_file(config: LoraConfig, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The reverse of `to_file`, for an adapter that is PiSSA or OLoRA here.

    Raises:
        CheckpointError: the file has the trained factors alone, and the start of them was random.
    """
    read = dict(tensors)
    for key, tensor in tensors.items():
        path, found, _ = key.rpartition(".lora_A.weight")
        if not found or tensor.shape[0] != 2 * (rank := config.at(path).r):
            continue
        read[key], read[f"{path}.lora_init_A"] = tensor[:rank], tensor[rank:]
        up = tensors.get(f"{path}.lora_B.weight")
        if up is not None:
            read[f"{path}.lora_B.weight"], read[f"{path}.lora_init_B"] = up[:, :rank], -up[:, rank:]
    if config.pissa_iterations is not None and len(read) == len(tensors):
        raise CheckpointError(
            f"These are the trained factors of init_lora_weights={config.init_lora_weights!r} alone. That start is "
            "random, so it cannot be computed again from the base; save the adapter in its converted form instead."
        )
    return read
