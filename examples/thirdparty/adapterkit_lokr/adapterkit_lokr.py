"""LoKr: the change is a Kronecker product (Yeh et al. 2023, arXiv 2309.14859). Files: PEFT's.

`dW = alpha / r * kron(w1, w2)`, w1 `(a, c)` and w2 `(b, d * kernel)`, for `a b` outputs and `c d` input channels. In
place of w2, and of w1, there may be two factors of rank r.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch

import adapterkit as ak


@dataclass(frozen=True, kw_only=True)
class LoKrConfig(ak.AdapterConfig):
    """w1 starts at zero, with `init_weights="lycoris"` w2, with `False` neither.

    w1 has `decompose_factor` rows and columns, where that divides the layer's; `-1`: near the square root. w2, and with
    `decompose_both` w1, is decomposed where that saves parameters.
    """

    method = "lokr"
    patterns = {"rank_pattern": "r", "alpha_pattern": "alpha"}
    not_implemented = {"use_effective_conv2d": False}

    r: ak.Rank = 8
    alpha: float = 8
    decompose_both: bool = False
    decompose_factor: int = -1
    rank_dropout: ak.Probability = 0.0
    rank_dropout_scale: bool = False
    module_dropout: ak.Probability = 0.0
    init_weights: bool | Literal["lycoris"] = True
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)


def split(number: int, factor: int) -> tuple[int, int]:
    """`(a, b)` with `a b = number`: a is `factor` if that divides it, else the largest divisor up to the root."""
    if factor > 0 and number % factor == 0:
        return factor, number // factor
    limit = min(math.isqrt(number), number if factor == -1 else factor)
    small = max(d for d in range(1, limit + 1) if number % d == 0)
    return small, number // small


class LoKrLayer(ak.DenseLayer):
    """`lokr_w1` and `lokr_w2`, or `lokr_w1_a` and `lokr_w1_b`, whose product it is."""

    def setup(self, target: ak.Target, config: LoKrConfig) -> None:
        r, (_, channels, *kernel) = config.r, target.kind.down_shape(1)
        (a, b), (c, d) = (split(n, config.decompose_factor) for n in (target.out_features, channels))
        self.row_dropout, self.row_dropout_rescales = config.rank_dropout, config.rank_dropout_scale
        self.module_dropout = config.module_dropout
        first, second = (0.0 if config.init_weights == zero else ak.kaiming for zero in (True, "lycoris"))
        if config.decompose_both and r < max(a, c) / 2:
            self.lokr_w1_a, self.lokr_w1_b = target.new(a, r, init=first), target.new(r, c, init=ak.kaiming)
        else:
            self.lokr_w1 = target.new(a, c, init=first)
        if r < max(b, d) / 2:
            self.lokr_w2_a = target.new(b, r, init=ak.kaiming)
            self.lokr_w2_b = target.new(r, d * math.prod(kernel), init=second)
        else:  # with the kernel of a convolution
            self.lokr_w2 = target.new(b, d, *kernel, init=second)

    def change(self) -> torch.Tensor:
        w1 = self.lokr_w1_a @ self.lokr_w1_b if hasattr(self, "lokr_w1_a") else self.lokr_w1
        w2 = self.lokr_w2_a @ self.lokr_w2_b if hasattr(self, "lokr_w2_a") else self.lokr_w2.flatten(1)
        return torch.kron(w1 * (self.config.alpha / self.config.r), w2)


plugin = ak.plugin(LoKrConfig, LoKrLayer, prefix="lokr_")
