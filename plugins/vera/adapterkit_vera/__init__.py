"""VeRA as an adapterkit plugin."""

from adapterkit_vera.config import VeraConfig
from adapterkit_vera.layer import VeraLayer

__all__ = ["VeraConfig", "VeraLayer"]
