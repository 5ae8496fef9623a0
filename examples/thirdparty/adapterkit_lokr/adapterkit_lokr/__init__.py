"""LoKr as an adapterkit plugin."""

from adapterkit_lokr.config import LoKrConfig
from adapterkit_lokr.layer import LoKrLayer

__all__ = ["LoKrConfig", "LoKrLayer"]
