"""The LoRA layer: its parameters, its initial values and its factors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from adapterkit import AdapterLayer, Factors, FactorStack, Holder, StateError, Target
from adapterkit_lora.adopt import adopted
from adapterkit_lora.config import LoraConfig


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

    def __init__(self, target: Target, r: int, scaling: float, config: LoraConfig) -> None:
        kind = target.kind
        super().__init__(kind, r=r, scaling=scaling, dropout=config.lora_dropout, lookup=kind.lookup)
        down, up = target.empty(*kind.down_shape(r)), target.empty(*kind.up_shape(r))
        bias = target.empty(target.out_features) if config.lora_bias else None
        if kind.lookup:  # PEFT's names for embeddings, without `.weight`
            self.hold(lora_embedding_A=down, lora_embedding_B=up)
        else:
            self.hold(lora_A=Factor(weight=down, bias=None), lora_B=Factor(weight=up, bias=bias))
        if config.trains_residual:
            self.register_buffer("lora_init_A", torch.empty_like(down))
            self.register_buffer("lora_init_B", torch.empty_like(up))

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


@torch.no_grad()
def initialise(layer: LoraLayer, target: Target, config: LoraConfig) -> None:
    """Give a new layer the values that `config.init_lora_weights` says."""
    down, up, bias = layer.matrices()
    init = config.init_lora_weights
    if bias is not None:
        bound = 1 / math.sqrt(layer.r)
        nn.init.zeros_(bias) if init else nn.init.uniform_(bias, -bound, bound)
    if config.trains_residual:
        _residual(layer, target, config)
    elif init == "orthogonal":
        _orthogonal(down, up)
    elif layer.lookup:
        nn.init.zeros_(down) if init else nn.init.normal_(down)
        nn.init.normal_(up)
    elif init == "gaussian":
        nn.init.normal_(down, std=1 / layer.r)
        nn.init.zeros_(up)
    else:
        kaiming_uniform(down)
        up.zero_() if init else kaiming_uniform(up)


def kaiming_uniform(matrix: Tensor) -> None:
    """`nn.init.kaiming_uniform_(matrix, a=math.sqrt(5))`, bit for bit: uniform within `1 / sqrt(columns)`.

    Its checks and its search for the gain take as long as the numbers of a small matrix.
    """
    # In this order of operations: a bound that is rounded otherwise gives other bits.
    bound = math.sqrt(3.0) * (math.sqrt(2.0 / (1 + math.sqrt(5) ** 2)) / math.sqrt(matrix.shape[1]))
    if not matrix.is_meta:
        matrix.uniform_(-bound, bound)


def _orthogonal(down: Tensor, up: Tensor) -> None:
    """A and B from the odd and the even rows of one orthogonal matrix, so that `B A = 0`."""
    r = down.shape[0]
    if down.is_meta:
        return
    q, _ = torch.linalg.qr(torch.randn(r, r, device=down.device))
    half = r // 2
    down.copy_((torch.randn(down.shape[1], half, device=down.device) @ q[0::2] / 10).t())
    up.copy_(torch.randn(up.shape[0], half, device=up.device) @ q[1::2] / 10)


def _residual(layer: LoraLayer, target: Target, config: LoraConfig) -> None:
    if target.kind.lookup or len(target.kind.down_shape(1)) > 2:
        raise StateError(
            f"init_lora_weights={config.init_lora_weights!r} is for linear layers; {target.path!r} is a "
            f"{target.kind.name}. Leave it out with exclude_modules."
        )
    first_down, first_up = leading_factors(target, layer.r, layer.scaling, config)
    down, up, _ = layer.matrices()
    for matrix, buffer, value in ((down, layer.lora_init_A, first_down), (up, layer.lora_init_B, first_up)):
        matrix.copy_(value)
        buffer.copy_(matrix)


def leading_factors(target: Target, r: int, scaling: float, config: LoraConfig) -> tuple[Tensor, Tensor]:
    """`A0 (r, in)` and `B0 (out, r)` that PiSSA or OLoRA takes from the weight.

    PiSSA: `scaling * B0 A0` is the best approximation of W of rank r. OLoRA: `A0, B0` are the leading parts of
    `W = Q R`.
    """
    weight = target.weight()
    if weight.is_meta:
        raise StateError(
            f"init_lora_weights={config.init_lora_weights!r} needs the weight of {target.path!r}, which is on the meta "
            "device. Load the base first."
        )
    if r > min(weight.shape):
        raise StateError(
            f"init_lora_weights={config.init_lora_weights!r} takes r <= min(in, out) = {min(weight.shape)} at "
            f"{target.path!r}, not {r}."
        )
    if config.init_lora_weights == "olora":
        q, rest = torch.linalg.qr(weight)
        return rest[:r], q[:, :r]
    if config.pissa_iterations is not None:
        u, s, v = torch.svd_lowrank(weight, r, niter=config.pissa_iterations)
        vh = v.t()
    else:
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    root = (s[:r] / scaling).sqrt()
    return root[:, None] * vh[:r], u[:, :r] * root
