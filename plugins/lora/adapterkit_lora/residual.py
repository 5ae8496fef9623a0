"""PiSSA and OLoRA: LoRA that begins with the weight's own leading part and trains it beside the rest."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from adapterkit import Base, CheckpointError, Factors, Target
from adapterkit_lora.config import LoraConfig
from adapterkit_lora.layer import LoraLayer


class ResidualLayer(LoraLayer):
    """`dW = scaling * (B A - B0 A0)` with the initial factors A0 and B0, so W itself, which others use too, stays.

    With dropout: `scaling * (B A dropout(x) - B0 A0 x)`, which is training A and B beside `W - scaling * B0 A0`. At
    the start the two terms cancel exactly.
    """

    lora_init_A: Tensor
    lora_init_B: Tensor

    def setup(self, target: Target, config: LoraConfig) -> None:
        super().setup(target, config)
        self.register_buffer("lora_init_A", self.lora_A.weight.detach().clone())
        self.register_buffer("lora_init_B", self.lora_B.weight.detach().clone())

    def factors(self) -> Factors:
        up, down, _, scale, _ = super().factors()
        return Factors(torch.cat([up, -self.lora_init_B], 1), torch.cat([down, self.lora_init_A]), scale=scale)

    def forward(self, base: Base, x: Tensor) -> Tensor:
        up, down, _, scale, _ = super().factors()
        trained = self.kind.apply(x, Factors(up, down), self.dropout if self.training else 0.0)
        initial = self.kind.apply(x, Factors(self.lora_init_B, self.lora_init_A))
        out: Tensor = base(x) + (trained - initial) * scale
        return out


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
