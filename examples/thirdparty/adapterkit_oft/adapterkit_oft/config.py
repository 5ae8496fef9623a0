"""The config of OFT: PEFT's fields."""

from __future__ import annotations

from dataclasses import dataclass

from adapterkit import AdapterConfig, ConfigError


@dataclass(frozen=True, kw_only=True)
class OFTConfig(AdapterConfig):
    """Orthogonal fine-tuning: `W R^T`, R block-diagonal and orthogonal (Qiu et al. 2023, arXiv 2306.07280).

    Args:
        oft_block_size: side of the blocks. Where it does not divide a layer's inputs, the nearest number that
            does is taken, as PEFT does.
        r: the number of blocks instead; one of the two must be 0.
        block_share: all blocks of a layer are one.
        use_cayley_neumann: the inverse in Cayley's formula is a sum of `num_cayley_neumann_terms` powers: faster,
            and orthogonal only as far as that converges.
        module_dropout: the share of a layer's blocks, rounded down, that are left out in each training forward.
        init_weights: `True`: R starts as the identity. `False`: near it.

    The other fields are `AdapterConfig`'s.
    """

    method = "oft"
    not_implemented = {"coft": False, "eps": 6e-5}  # noqa: RUF012 - a class variable by its base

    r: int = 0
    oft_block_size: int = 32
    block_share: bool = False
    use_cayley_neumann: bool = True
    num_cayley_neumann_terms: int = 5
    module_dropout: float = 0.0
    init_weights: bool = True

    @property
    def starts_as_identity(self) -> bool:
        """See `AdapterConfig.starts_as_identity`."""
        return self.init_weights

    def check(self) -> None:
        """See `AdapterConfig.check`."""
        if min(self.r, self.oft_block_size) < 0 or (self.r == 0) == (self.oft_block_size == 0):
            raise ConfigError(
                f"One of r = {self.r} and oft_block_size = {self.oft_block_size} must be 0, the other not."
            )
        if not 0.0 <= self.module_dropout < 1.0:
            raise ConfigError(f"module_dropout = {self.module_dropout} must be a share, at least 0 and below 1.")
        if self.num_cayley_neumann_terms < 1:
            raise ConfigError(f"num_cayley_neumann_terms = {self.num_cayley_neumann_terms} must be at least 1.")

    def blocks(self, in_features: int) -> tuple[int, int]:
        """How many blocks a layer of this width has, and their side."""
        if self.r:
            count = nearest_divisor(in_features, self.r)
            return count, in_features // count
        side = nearest_divisor(in_features, self.oft_block_size)
        return in_features // side, side


def nearest_divisor(number: int, wanted: int) -> int:
    """The divisor of `number` nearest to `wanted`, the smaller of two; as PEFT finds it."""
    return min((d for d in range(1, number + 1) if number % d == 0), key=lambda d: (abs(d - wanted), d))
