"""VeRA's mathematics as pure functions, and the layer that holds its parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapterkit import AdapterLayer, Factors, Shared, Target
from adapterkit_vera.config import VeraConfig

# Numbers in the layer's output up to which it costs more time than memory to make them again for the backward.
SMALL = 2**16


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


def scaled_up(up: Tensor, lambda_d: Tensor, lambda_b: Tensor) -> Tensor:
    """`diag(b) B diag(d)`, shape `(out, r)`: the up factor of the change, whose down factor is A."""
    return lambda_b[:, None] * up * lambda_d


class _Expand(torch.autograd.Function):
    """`b * (B (d * hidden))` with the features last. Keeps `hidden (tokens, r)` and nothing as wide as the output."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, up: Tensor, lambda_d: Tensor, lambda_b: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, up, lambda_d, lambda_b)
        out = F.linear(hidden * lambda_d, up)
        return out.mul_(lambda_b)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: gradient checkpointing makes them again for each time
        dtypes = [t.dtype for t in saved]
        hidden, up, lambda_d, lambda_b = (t.to(grad.dtype) for t in saved)  # autocast: its dtype
        scaled = (grad * lambda_b) @ up
        rows, grads = hidden.reshape(-1, hidden.shape[-1]), grad.reshape(-1, grad.shape[-1])
        for_d = (scaled * hidden).reshape(rows.shape).sum(0)
        # The gradient of b needs the output before b again. Summed over the tokens first, it is `(out, r)`.
        if len(rows) > len(lambda_d):
            for_b = ((grads.t() @ rows) * up) @ lambda_d
        else:
            for_b = (grads * F.linear(rows * lambda_d, up)).sum(0)
        return (scaled * lambda_d).to(dtypes[0]), None, for_d.to(dtypes[2]), for_b.to(dtypes[3])


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


class VeraLayer(AdapterLayer):
    """`delta(x) = b * (B (d * (A dropout(x))))` with this layer's d `(r,)` and b `(out,)` and the shared A and B."""

    shared: VeraShared
    dropout: float
    vera_lambda_d: nn.Parameter
    vera_lambda_b: nn.Parameter

    def setup(self, target: Target, config: VeraConfig) -> None:
        """See `AdapterLayer.setup`."""
        self.dropout = config.vera_dropout
        self.vera_lambda_d = target.new(config.r, init=config.d_initial if config.init_weights else nn.init.normal_)
        self.vera_lambda_b = target.new(target.out_features, init=0.0 if config.init_weights else 1.0)

    def projections(self) -> tuple[Tensor, Tensor]:
        """This layer's part of A `(r, in)` and B `(out, r)`: views, unless the layer has another dtype or device."""
        own, kind = self.vera_lambda_d, self.kind
        down, up = self.shared.vera_A, self.shared.vera_B
        if down.shape[1] != kind.in_features:
            down = down[:, : kind.in_features]
        if up.shape[0] != kind.out_features:
            up = up[: kind.out_features]
        if down.dtype != own.dtype or down.device != own.device:
            return down.to(own.device, own.dtype), up.to(own.device, own.dtype)
        return down, up

    def delta(self, x: Tensor) -> Tensor:
        """See `AdapterLayer.delta`."""
        hidden, up = self._projected(x)
        if self._keeps_output(hidden):
            return self.kind.expand(hidden * self.vera_lambda_d, up) * self.vera_lambda_b
        return self._expanded(hidden, up)

    def add_to(self, out: Tensor, x: Tensor) -> Tensor:
        """See `AdapterLayer.add_to`: multiplied by b and added in one pass."""
        hidden, up = self._projected(x)
        if self._keeps_output(hidden):
            return torch.addcmul(out, self.kind.expand(hidden * self.vera_lambda_d, up), self.vera_lambda_b)
        return out + self._expanded(hidden, up)

    def _projected(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`A dropout(x)`, and B."""
        down, up = self.projections()
        return self.kind.project(x, down, self.dropout if self.training else 0.0), up

    def _keeps_output(self, hidden: Tensor) -> bool:
        """Whether autograd may keep what is multiplied by b: it is small, or there is no backward of this kind."""
        if torch.compiler.is_compiling() or self.kind.spread(self.vera_lambda_b).dim() > 1:
            return False
        if self.kind.lookup or not torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
            return True
        return hidden.numel() // hidden.shape[-1] * self.kind.out_features <= SMALL

    def _expanded(self, hidden: Tensor, up: Tensor) -> Tensor:
        """`delta`, keeping nothing as wide as the output, or where the features are not last."""
        if torch.compiler.is_compiling() or self.kind.spread(self.vera_lambda_b).dim() > 1:
            return self.kind.expand(hidden, scaled_up(up, self.vera_lambda_d, self.vera_lambda_b))
        return _Expand.apply(hidden, up, self.vera_lambda_d, self.vera_lambda_b)  # type: ignore[no-untyped-call,no-any-return]

    @classmethod
    def stacked(cls, layers: Sequence[VeraLayer], slots: Tensor | None) -> VeraStack | None:
        """See `AdapterLayer.stacked`; for layers with the same projections, and not while a dropout acts."""
        if any(layer.training and layer.dropout for layer in layers):
            return None
        held = {(id(layer.shared.vera_A), id(layer.shared.vera_B), layer.vera_lambda_d.dtype) for layer in layers}
        return VeraStack(layers, slots) if len(held) == 1 else None

    def adopt(self, other: VeraLayer | None) -> Mapping[str, Tensor]:
        """See `AdapterLayer.adopt`: of the same projections alone, so of the same rank."""
        if other is None:
            return {"vera_lambda_b": torch.zeros_like(self.vera_lambda_b)}
        return dict(other.named_parameters())

    def factors(self) -> Factors:
        """The exact `dW`, of rank `r`."""
        down, up = self.projections()
        return Factors(scaled_up(up, self.vera_lambda_d, self.vera_lambda_b), down)


class VeraStack:
    """`b_i * (B (d_i * (A x_i)))` for each row `i`: A and B once for all, d and b by row."""

    def __init__(self, layers: Sequence[VeraLayer], slots: Tensor | None) -> None:
        self.first = layers[0]  # its projections are read when they are needed: `.to(...)` replaces them
        lambda_d, lambda_b = (torch.stack([getattr(layer, f"vera_lambda_{n}") for layer in layers]) for n in "db")
        self.lambda_d, self.lambda_b = (v[:, None] if slots is None else v[slots, None] for v in (lambda_d, lambda_b))

    def __call__(self, x: Tensor) -> Tensor:
        """`(rows, tokens, out)` for `x (rows, tokens, in)`."""
        down, up = self.first.projections()
        return F.linear(F.linear(x.to(down.dtype), down) * self.lambda_d, up) * self.lambda_b
