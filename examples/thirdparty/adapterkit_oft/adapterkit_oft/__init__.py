"""OFT as an adapterkit plugin."""

from adapterkit_oft.config import OFTConfig
from adapterkit_oft.layer import OFTLayer

__all__ = ["OFTConfig", "OFTLayer"]
