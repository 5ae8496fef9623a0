"""The LoRA layer: its parameters, its initial values and its factors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from adapterkit import AdapterLayer, ConfigError, Factors, FactorStack, Holder, Target
from adapterkit_lora.adopt import adopted
from adapterkit_lora.config import LoraConfig
from adapterkit_lora.start import first_values


class Factor(Holder):
    """One factor; holds `weight` (and `bias`), so that keys read `lora_A.weight`."""

    def held(self, name: str) -> Tensor | None:
        """Its parameter of this name, as a matrix.

        It is read where a module holds it: in the forward of a small layer `nn.Module`'s search for an attribute
        takes longer than the arithmetic. A parametrized or replicated (`DataParallel`) one is not there.
        """
        own = self._parameters
        value: Tensor | None = own[name] if name in own else getattr(self, name)
        return value if value is None or value.dim() <= 2 else value.flatten(1)


class LoraLayer(AdapterLayer):
    """`delta(x) = scaling * B A dropout(x)`: A `(r, in)`, B `(out, r)`, in the shapes of the layer kind's files.

    With PiSSA or OLoRA, A0 and B0 are the initial factors, and the layer adds
    `scaling * (B A dropout(x) - B0 A0 x)`: the same as training A, B beside the residual
    `W - scaling * B0 A0`, but without touching W, which other adapters use too. At the start the two
    terms cancel exactly.
    """

    r: int
    scaling: float
    dropout: float
    lookup: bool
    lora_embedding_A: Tensor
    lora_embedding_B: Tensor
    lora_init_A: Tensor
    lora_init_B: Tensor

    def setup(self, target: Target, config: LoraConfig) -> None:
        """See `AdapterLayer.setup`."""
        kind, r = target.kind, config.r
        self.r, self.lookup, self.dropout = r, kind.lookup, config.lora_dropout
        self.scaling = config.lora_alpha / (math.sqrt(r) if config.use_rslora else r)
        init_down, init_up = first_values(target, config, self.scaling)
        down, up = target.new(*kind.down_shape(r), init=init_down), target.new(*kind.up_shape(r), init=init_up)
        if kind.lookup:  # PEFT's names for embeddings, without `.weight`
            if config.lora_bias:
                raise ConfigError(
                    f"lora_bias has no meaning at {target.path!r}: an embedding has no bias. Leave it out."
                )
            self.lora_embedding_A, self.lora_embedding_B = down, up
        else:
            bound = 0.0 if config.init_lora_weights else 1 / math.sqrt(r)
            fill = partial(nn.init.uniform_, a=-bound, b=bound)
            bias = target.new(target.out_features, init=fill) if config.lora_bias else None
            self.lora_A, self.lora_B = Factor(weight=down, bias=None), Factor(weight=up, bias=bias)
        if config.trains_residual:
            self.register_buffer("lora_init_A", down.detach().clone())
            self.register_buffer("lora_init_B", up.detach().clone())

    def matrices(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """`A (r, in)`, `B (out, r)` and B's bias, without the scaling."""
        if self.lookup:
            return self.lora_embedding_A, self.lora_embedding_B, None
        parts: Any = self._modules
        return parts["lora_A"].held("weight"), parts["lora_B"].held("weight"), parts["lora_B"].held("bias")

    def initial(self) -> tuple[Tensor, Tensor] | None:
        """`A0 (r, in)` and `B0 (out, r)` of PiSSA or OLoRA, else `None`."""
        if "lora_init_A" not in self._buffers:
            return None
        return self.lora_init_A.flatten(1), self.lora_init_B.flatten(1)

    def delta(self, x: Tensor) -> Tensor:
        """See `AdapterLayer.delta`."""
        hidden, up, bias = self._projected(x)
        out = self.kind.expand(hidden, up, bias)
        first = self.initial()
        if first is not None:
            out = out - self.kind.apply(x, Factors(first[1], first[0]))
        return out * self.scaling

    def add_to(self, out: Tensor, x: Tensor) -> Tensor:
        """See `AdapterLayer.add_to`: scaled and added in one pass over the output, and rounded once."""
        if "lora_init_A" in self._buffers:
            return super().add_to(out, x)  # its two terms must cancel before they meet the output
        hidden, up, bias = self._projected(x)
        return self.kind.expand_onto(out, hidden, up, bias, self.scaling)

    def _projected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """`A dropout(x)`, and what it goes through: `B` and B's bias."""
        down, up, bias = self.matrices()
        return self.kind.project(x, down, self.dropout if self.training else 0.0), up, bias

    @classmethod
    def stacked(cls, layers: Sequence[LoraLayer], slots: Tensor | None) -> FactorStack | None:
        """See `AdapterLayer.stacked`; not while a dropout acts."""
        found = [None if layer.training and layer.dropout else layer.factors() for layer in layers]
        factors = [f for f in found if f is not None]
        return FactorStack(factors, slots) if len(factors) == len(found) else None

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

    def factors(self) -> Factors | None:
        """The exact `dW`, scaling included; of rank `2 r` with PiSSA or OLoRA. `None`: it has no such form."""
        down, up, bias = self.matrices()
        if self.kind.is_ungrouped(Factors(up, down)):
            return None
        first = self.initial()
        if first is not None:
            down, up = torch.cat([down, first[0]]), torch.cat([up, -first[1]], dim=1)
        # Half-precision parameters are exact in float32, their product with the scaling in half precision is not.
        dtype = torch.promote_types(up.dtype, torch.float32)
        scaled_bias = None if bias is None else bias.to(dtype) * self.scaling
        return Factors(up.to(dtype) * self.scaling, down.to(dtype), scaled_bias, self.scaling)
