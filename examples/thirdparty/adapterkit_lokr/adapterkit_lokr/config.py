"""The config of LoKr: PEFT's fields."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from adapterkit import AdapterConfig, ConfigError


@dataclass(frozen=True, kw_only=True)
class LoKrConfig(AdapterConfig):
    """Kronecker product: `dW = scaling * kron(w1, w2)` (Yeh et al. 2023, arXiv 2309.14859).

    Args:
        r: the rank of a factor that is decomposed: w2, where that saves parameters.
        alpha: `scaling = alpha / r`.
        decompose_both: w1 is decomposed as well, where that saves parameters.
        decompose_factor: the number of rows and columns of w1, where it divides the layer's; `-1`: near the
            square root.
        use_effective_conv2d: a decomposed w2 of a convolution keeps the kernel in a core tensor of its own.
        rank_dropout: probability of dropping each row of `dW` in training; with `rank_dropout_scale` the others
            are divided by the share that is left.
        module_dropout: probability, in each training forward and layer, of leaving the change out.
        init_weights: `True`: w1 starts at zero. `"lycoris"`: w2 does. `False`: neither.
        rank_pattern, alpha_pattern: other values for some layers: a regular expression for the end of a
            path at a dot, and the value; the first that matches counts.

    The other fields are `AdapterConfig`'s.
    """

    method = "lokr"
    patterns = {"rank_pattern": "r", "alpha_pattern": "alpha"}  # noqa: RUF012 - a class variable by its base

    r: int = 8
    alpha: float = 8
    decompose_both: bool = False
    decompose_factor: int = -1
    use_effective_conv2d: bool = False
    rank_dropout: float = 0.0
    rank_dropout_scale: bool = False
    module_dropout: float = 0.0
    init_weights: bool | Literal["lycoris"] = True
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    @property
    def starts_as_identity(self) -> bool:
        """See `AdapterConfig.starts_as_identity`."""
        return self.init_weights is not False

    def check(self) -> None:
        """See `AdapterConfig.check`."""
        if min(self.r, *self.rank_pattern.values(), 1) < 1:
            raise ConfigError(f"r = {self.r} and rank_pattern = {self.rank_pattern}: a rank must be at least 1.")
        if self.decompose_factor < 1 and self.decompose_factor != -1:
            raise ConfigError(f"decompose_factor = {self.decompose_factor} must be at least 1, or -1.")
        for name in ("rank_dropout", "module_dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ConfigError(f"{name} = {getattr(self, name)} must be a probability, at least 0 and below 1.")
