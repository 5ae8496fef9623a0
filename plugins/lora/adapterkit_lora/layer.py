"""The LoRA layer: its parameters and its factors."""

from functools import partial

from torch import nn

from adapterkit import ConfigError, Factors, Holder, LowRankLayer, Target
from adapterkit_lora.config import LoraConfig
from adapterkit_lora.initial import initial_values


class LoraLayer(LowRankLayer):
    """`dW = scaling * B A`: A `(r, in)`, B `(out, r)`, in the shapes of the layer kind's files."""

    up_factor = ("lora_B.weight", "lora_B.bias", "lora_embedding_B")

    def setup(self, target: Target, config: LoraConfig) -> None:
        self.r, self.scaling, self.dropout = config.r, config.scaling, config.lora_dropout
        init_down, init_up = initial_values(target, config)
        down_shape, up_shape = shapes(target, config.r)
        down, up = target.new(*down_shape, init=init_down), target.new(*up_shape, init=init_up)
        if not target.kind.lookup:
            bound = config.r**-0.5
            init_bias = 0.0 if config.init_lora_weights else partial(nn.init.uniform_, a=-bound, b=bound)
            bias = target.new(target.out_features, init=init_bias) if config.lora_bias else None
            self.lora_A = Holder(weight=down, bias=None)
            self.lora_B = Holder(weight=up, bias=bias)
        elif config.lora_bias:
            raise ConfigError(f"lora_bias has no meaning at {target.path!r}: an embedding has no bias. Leave it out.")
        else:  # PEFT's names for embeddings, without `.weight`
            self.lora_embedding_A, self.lora_embedding_B = down, up

    def factors(self) -> Factors:
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
