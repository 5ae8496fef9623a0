"""The LoHa layer: its parameters, its initial values, its dropouts and its factors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapterkit import AdapterLayer, CheckpointError, Factors, FactorStack, Target, kaiming
from adapterkit_loha.config import LoHaConfig
from adapterkit_loha.forms import cheapest, delta, khatri_rao, whole

# Up to this rank a merge multiplies by the Khatri-Rao factors. Above it, two products of rank r and a pass over a tile
# in the cache take less time than one product of rank r^2; where that begins hardly depends on the layer's size.
MERGED_BY_FACTORS = 5


def kept_rows(rows: int, rank_dropout: float, module_dropout: float, like: Tensor) -> Tensor:
    """What training multiplies each row of the change by, `(rows,)`: zero where it is dropped.

    `rank_dropout` drops rows, and divides the others by the share that is left; `module_dropout` drops all.
    """
    keep = (torch.rand(rows, device=like.device) > rank_dropout).to(like.dtype)
    # Where nothing is left the share is 0, and 0 / 0 must be 0.
    keep = keep / keep.mean().clamp(min=0.5 / rows)
    return keep * (torch.rand(1, device=like.device) > module_dropout)


class LoHaLayer(AdapterLayer):
    """`dW = scaling * (A1 B1) * (A2 B2)`: A `(out, r)` is `hada_w*_a`, B `(r, in)` is `hada_w*_b`.

    An effective convolution has `hada_w*_a (r, out)`, `hada_w*_b (r, channels)` and a core `hada_t*
    (r, r, *kernel)`, with `B[i, (c, k)] = sum_j t[i, j, k] w_b[j, c]`.
    """

    r: int
    scaling: float
    rank_dropout: float
    module_dropout: float
    effective: bool
    hada_w1_a: nn.Parameter
    hada_w1_b: nn.Parameter
    hada_w2_a: nn.Parameter
    hada_w2_b: nn.Parameter
    hada_t1: nn.Parameter
    hada_t2: nn.Parameter

    def setup(self, target: Target, config: LoHaConfig) -> None:
        """See `AdapterLayer.setup`."""
        r, out, down = config.r, target.out_features, target.kind.down_shape(config.r)
        kernel = down[2:]
        self.r, self.scaling = r, config.alpha / r
        self.rank_dropout, self.module_dropout = config.rank_dropout, config.module_dropout
        self.effective = config.use_effective_conv2d and math.prod(kernel) > 1
        a, b = ((r, out), (r, down[1])) if self.effective else ((out, r), (r, target.in_features))
        self.hada_w1_a, self.hada_w1_b = target.new(*a, init=kaiming), target.new(*b, init=kaiming)
        self.hada_w2_a = target.new(*a, init=kaiming)
        self.hada_w2_b = target.new(*b, init=0.0 if config.init_weights else kaiming)
        if self.effective:
            core = (r, r, *kernel, 1) if len(kernel) == 1 else (r, r, *kernel)  # as PEFT's files have it
            self.hada_t1, self.hada_t2 = target.new(*core, init=kaiming), target.new(*core, init=kaiming)

    def pair(self) -> tuple[Factors, Factors]:
        """`(A1, B1)` and `(A2, B2)`, without the scaling."""
        if not self.effective:
            return Factors(self.hada_w1_a, self.hada_w1_b), Factors(self.hada_w2_a, self.hada_w2_b)
        first = Factors(self.hada_w1_a.t(), with_kernel(self.hada_t1, self.hada_w1_b))
        return first, Factors(self.hada_w2_a.t(), with_kernel(self.hada_t2, self.hada_w2_b))

    def delta(self, x: Tensor) -> Tensor:
        """See `AdapterLayer.delta`."""
        return delta(self.kind, x, *self._acting()) * self.scaling

    def add_to(self, out: Tensor, x: Tensor) -> Tensor:
        """See `AdapterLayer.add_to`: scaled and added in one pass."""
        return torch.add(out, delta(self.kind, x, *self._acting()), alpha=self.scaling)

    def with_weight(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        """See `AdapterLayer.with_weight`; where `cheapest` says so."""
        if any(p is not None and p.dtype != weight.dtype for p in self._parameters.values()):
            return None
        trains = torch.is_grad_enabled() and (x.requires_grad or self.hada_w1_a.requires_grad)
        if cheapest(self.kind, x, self.r, trains=trains, weight=True) != "whole":
            return None
        return whole(self.kind, x, weight, bias, self._acting(), self.scaling)

    def _acting(self) -> tuple[Factors, Factors]:
        """The pair as it acts in this forward: in training without the rows that are dropped."""
        first, second = self.pair()
        if self.training and (self.rank_dropout or self.module_dropout):
            kept = kept_rows(self.kind.out_features, self.rank_dropout, self.module_dropout, first.up)
            first = first._replace(up=first.up * kept[:, None])
        return first, second

    def tile_adder(self, dtype: torch.dtype) -> Callable[[Tensor, slice, slice], object] | None:
        """See `AdapterLayer.tile_adder`: `(A1 B1) * (A2 B2)`, of which only a tile is made at a time."""
        if self.r <= MERGED_BY_FACTORS:
            return None
        up1, down1, up2, down2 = (t.to(dtype) for f in self.pair() for t in f[:2])
        up1 = up1 * self.scaling

        def add(block: Tensor, rows: slice, columns: slice) -> None:
            block.addcmul_(up1[rows] @ down1[:, columns], up2[rows] @ down2[:, columns])

        return add

    @classmethod
    def stacked(cls, layers: Sequence[LoHaLayer], slots: Tensor | None) -> FactorStack | None:
        """See `AdapterLayer.stacked`: by the Khatri-Rao factors, of rank `r * r`; not while a dropout acts."""
        if any(layer.training and (layer.rank_dropout or layer.module_dropout) for layer in layers):
            return None
        return FactorStack([layer.factors() for layer in layers], slots)

    def adopt(self, other: LoHaLayer | None) -> Mapping[str, Tensor]:
        """See `AdapterLayer.adopt`: smaller ranks filled up with zeros, the other's scaling worked into A1."""
        if other is None:
            return {"hada_w2_a": torch.zeros_like(self.hada_w2_a)}
        if other.r > self.r:
            raise CheckpointError(f"its rank is {other.r}, and the adapter's is {self.r}")
        if self.effective and not other.effective:
            raise CheckpointError(
                "it has no cores of an effective convolution, and the adapter has (use_effective_conv2d)"
            )
        if self.scaling == 0 != other.scaling:
            raise CheckpointError("the adapter's scaling is 0 (alpha), so it can change nothing")
        given: dict[str, Tensor] = dict(other.named_parameters())
        if other.effective and not self.effective:
            first, second = other.pair()
            given = {"hada_w1_a": first.up, "hada_w1_b": first.down, "hada_w2_a": second.up, "hada_w2_b": second.down}
        if other.scaling != self.scaling:
            given["hada_w1_a"] = given["hada_w1_a"] * (other.scaling / self.scaling)
        return {name: filled_up(value, self.get_parameter(name).shape) for name, value in given.items()}

    def factors(self) -> Factors:
        """The exact `dW`, scaling included, of rank `r * r`."""
        first, second = self.pair()
        return khatri_rao(Factors(first.up * self.scaling, first.down), second)


def filled_up(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """The tensor with zeros behind its values in each dimension where `shape` has more."""
    more = [wide - own for own, wide in zip(tensor.shape, shape, strict=True)]
    filled: Tensor = F.pad(tensor, [n for last in reversed(more) for n in (0, last)])
    return filled


def with_kernel(core: Tensor, channels: Tensor) -> Tensor:
    """`B (r, channels * kernel)` of an effective convolution: `core (r, r, *kernel)` times `channels (r, channels)`."""
    return torch.einsum("ijk,jc->ick", core.flatten(2), channels).flatten(1)
