"""The config of LoHa: PEFT's fields."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from adapterkit import AdapterConfig, Probability, Rank


@dataclass(frozen=True, kw_only=True)
class LoHaConfig(AdapterConfig):
    """Low-rank Hadamard product: `dW = scaling * (A1 B1) * (A2 B2)` (Hyeon-Woo et al. 2021, arXiv 2108.06098).

    `*` is elementwise; A1, A2 are `(out, r)`, B1, B2 `(r, in)`. `dW` has up to rank `r * r`, and exact factors
    of that rank, with the parameters of a LoRA of rank `2 r`.

    Args:
        r: the rank of each of the two products.
        alpha: `scaling = alpha / r`.
        rank_dropout: probability of dropping each row of `dW` in training; the others are divided by the
            share that is left. If none is left, the change is zero.
        module_dropout: probability, in each forward and layer, of leaving the change out in training; it is
            not rescaled otherwise.
        use_effective_conv2d: convolutions with a kernel larger than 1 keep it in a core tensor of their own,
            `B1 = t1 x w1_b` (proposition 3 of the paper), in one, two or three dimensions. Otherwise
            `in` is channels times kernel.
        init_weights: `True`: the second product starts at zero. `False`: none does.
        rank_pattern, alpha_pattern: other values for some layers: a regular expression for the end of a
            path at a dot, and the value; the first that matches counts.

    The other fields are `AdapterConfig`'s.
    """

    method = "loha"
    patterns = {"rank_pattern": "r", "alpha_pattern": "alpha"}

    r: Rank = 8
    alpha: float = 8
    rank_dropout: Probability = 0.0
    module_dropout: Probability = 0.0
    use_effective_conv2d: bool = False
    init_weights: bool = True
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    @property
    def scaling(self) -> float:
        """`alpha / r`."""
        return self.alpha / self.r
