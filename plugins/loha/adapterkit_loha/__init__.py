"""LoHa as an adapterkit plugin."""

from adapterkit_loha.config import LoHaConfig
from adapterkit_loha.layer import LoHaLayer

__all__ = ["LoHaConfig", "LoHaLayer"]
