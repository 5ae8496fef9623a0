"""The LoRA layer: its parameters, its initial values and its factors."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from adapterkit import ConfigError, Factors, Holder, LowRankLayer, Target, kaiming
from adapterkit_lora.config import LoraConfig

# What `Target.new` takes.
Init = float | Callable[[Tensor], object]


class LoraLayer(LowRankLayer):
    """`dW = scaling * B A`: A `(r, in)`, B `(out, r)`, in the shapes of the layer kind's files."""

    up_factor = ("lora_B.weight", "lora_B.bias", "lora_embedding_B")

    def setup(self, target: Target, config: LoraConfig) -> None:
        """See `AdapterLayer.setup`."""
        self.r, self.scaling, self.dropout = config.r, config.scaling, config.lora_dropout
        init_down, init_up = self.initial_values(target, config)
        down_shape, up_shape = shapes(target, config.r)
        down, up = target.new(*down_shape, init=init_down), target.new(*up_shape, init=init_up)
        if not target.kind.lookup:
            init_bias = 0.0 if config.init_lora_weights else self._uniform
            bias = target.new(target.out_features, init=init_bias) if config.lora_bias else None
            self.lora_A = Holder(weight=down, bias=None)
            self.lora_B = Holder(weight=up, bias=bias)
        elif config.lora_bias:
            raise ConfigError(f"lora_bias has no meaning at {target.path!r}: an embedding has no bias. Leave it out.")
        else:  # PEFT's names for embeddings, without `.weight`
            self.lora_embedding_A, self.lora_embedding_B = down, up

    def initial_values(self, target: Target, config: LoraConfig) -> tuple[Init, Init]:
        """How A and B are filled, as `config.init_lora_weights` says."""
        init = config.init_lora_weights
        if init == "orthogonal":
            return orthogonal(config.r)
        if target.kind.lookup:
            return 0.0 if init else nn.init.normal_, nn.init.normal_
        if init == "gaussian":
            return partial(nn.init.normal_, std=1 / config.r), 0.0
        return kaiming, 0.0 if init else kaiming

    def _uniform(self, bias: Tensor) -> None:
        nn.init.uniform_(bias, -(self.r**-0.5), self.r**-0.5)

    def factors(self) -> Factors:
        """See `LowRankLayer.factors`."""
        if self.kind.lookup:
            return Factors(self.lora_embedding_B, self.lora_embedding_A, scale=self.scaling)
        up = self.lora_B
        return Factors(up.weight, self.lora_A.weight, up.bias, self.scaling)


def shapes(target: Target, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of A and B: those of the layer kind, or of the file where it has one of two other forms.

    A may read all channels of a convolution with groups, as PEFT's does; and files whose writer could not tell a
    convolution from a linear layer have its kernel flat, `(r, channels * kernel)`.
    """
    kind, file = target.kind, target.file or {}
    if {"lora_A.weight", "lora_B.weight"} <= file.keys():
        down, up = tuple(file["lora_A.weight"].shape), tuple(file["lora_B.weight"].shape)
        if (up, down) in (kind.ungrouped_shapes(r), ((kind.out_features, r), (r, kind.in_features))):
            return down, up
    return kind.down_shape(r), kind.up_shape(r)


def orthogonal(r: int) -> tuple[Init, Init]:
    """A and B from the odd and the even rows of one orthogonal matrix, so that `B A = 0`."""
    q: Tensor = torch.linalg.qr(torch.randn(r, r))[0]

    def fill_down(parameter: Tensor) -> None:
        value = torch.randn(parameter[0].numel(), r // 2) @ q[0::2] / 10
        parameter.copy_(value.t().reshape(parameter.shape))

    def fill_up(parameter: Tensor) -> None:
        value = torch.randn(len(parameter), r // 2) @ q[1::2] / 10
        parameter.copy_(value.reshape(parameter.shape))

    return fill_down, fill_up
