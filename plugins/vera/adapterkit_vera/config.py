"""The config of VeRA: PEFT's fields, and `exclude_modules`, which PEFT lacks here."""

from dataclasses import dataclass
from typing import Annotated

from adapterkit import AdapterConfig, ConfigError, Dropout, Limit, Rank


@dataclass(frozen=True, kw_only=True)
class VeraConfig(AdapterConfig):
    """Vector-based random matrix adaptation: `dW = diag(b) B diag(d) A` (Kopiczko et al. 2023, arXiv 2310.11454).

    A `(r, in)` and B `(out, r)` are random, frozen, and one for all layers of the adapter: as large as the
    largest needs, and each layer uses its part. Only the vectors d `(r,)` and b `(out,)` of each layer train.

    Args:
        r: the rank; much larger than LoRA's, since it costs `r` parameters a layer.
        projection_prng_key: the seed of A and B, which are PEFT's for the same key and sizes.
        save_projection: whether files hold A and B. Without them they are made again from the key.
        vera_dropout: probability of dropping each input entry of A, in training.
        d_initial: what every entry of d starts at.
        init_weights: `True`: b starts at zero. `False`: b at one and d normal.

    The other fields are `AdapterConfig`'s.
    """

    method = "vera"
    not_in_files = ("exclude_modules",)
    default_targets = {"phi": ("q_proj", "v_proj")}

    # A and B are made from the config alone: one of a few bytes must not ask for all memory.
    r: Annotated[Rank, Limit(lambda r: r <= 65_536, ": a rank of VeRA must be at most 65,536")] = 256
    projection_prng_key: int = 0
    save_projection: bool = True
    vera_dropout: Dropout = 0.0
    d_initial: float = 0.1
    init_weights: bool = True

    def check(self) -> None:
        if not -(2**63) <= self.projection_prng_key < 2**64:
            raise ConfigError(f"projection_prng_key = {self.projection_prng_key} must be a seed of 64 bits.")
