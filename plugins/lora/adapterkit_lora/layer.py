"""The LoRA layer: its parameters, its initial values and its factors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from adapterkit import ConfigError, Factors, Holder, LowRankLayer, Target, kaiming
from adapterkit_lora.adopt import adopted
from adapterkit_lora.config import LoraConfig

# What `Target.new` takes.
Init = float | Callable[[Tensor], object]


class LoraLayer(LowRankLayer):
    """`dW = scaling * B A`: A `(r, in)`, B `(out, r)`, in the shapes of the layer kind's files."""

    lora_embedding_A: Tensor
    lora_embedding_B: Tensor

    def setup(self, target: Target, config: LoraConfig) -> None:
        """See `AdapterLayer.setup`."""
        kind, r = target.kind, config.r
        self.r, self.lookup, self.dropout = r, kind.lookup, config.lora_dropout
        self.scaling = config.lora_alpha / (math.sqrt(r) if config.use_rslora else r)
        init_down, init_up = self.initial_values(target, config)
        down, up = target.new(*kind.down_shape(r), init=init_down), target.new(*kind.up_shape(r), init=init_up)
        if not kind.lookup:
            bound = 0.0 if config.init_lora_weights else 1 / math.sqrt(r)
            fill = partial(nn.init.uniform_, a=-bound, b=bound)
            bias = target.new(target.out_features, init=fill) if config.lora_bias else None
            self.lora_A, self.lora_B = Holder(weight=down, bias=None), Holder(weight=up, bias=bias)
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

    def factors(self) -> Factors:
        """See `LowRankLayer.factors`."""
        if self.lookup:
            return Factors(self.lora_embedding_B, self.lora_embedding_A, None, self.scaling)
        up = self.lora_B
        return Factors(up.weight, self.lora_A.weight, up.bias, self.scaling)

    def adopt(self, other: LoraLayer | None) -> Mapping[str, Tensor]:
        """See `AdapterLayer.adopt`: of another rank that is not larger, and any scaling."""
        return adopted(self, other)

    def accepts(self, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        """See `AdapterLayer.accepts`: PEFT's form for convolutions with groups; the kernel in one dimension."""
        given, own = (shapes.get("lora_B.weight"), shapes.get("lora_A.weight")), self.kind.ungrouped_shapes(self.r)
        if own is not None and given == own:
            return True
        # Files alone do not always tell a convolution from a linear layer: `(r, channels * kernel)` is written then.
        return given == ((self.kind.out_features, self.r), (self.r, self.kind.in_features))


def orthogonal(r: int) -> tuple[Init, Init]:
    """A and B from the odd and the even rows of one orthogonal matrix, so that `B A = 0`."""
    q: Tensor = torch.linalg.qr(torch.randn(r, r))[0]

    def fill_down(parameter: Tensor) -> None:
        columns = parameter[0].numel()
        value = torch.randn(columns, r // 2, device=parameter.device) @ q[0::2].to(parameter.device) / 10
        parameter.copy_(value.t().reshape(parameter.shape))

    def fill_up(parameter: Tensor) -> None:
        value = torch.randn(parameter.shape[0], r // 2, device=parameter.device) @ q[1::2].to(parameter.device) / 10
        parameter.copy_(value.reshape(parameter.shape))

    return fill_down, fill_up
