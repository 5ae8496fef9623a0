"""(IA)3 as an adapterkit plugin."""

from adapterkit_ia3.config import IA3Config
from adapterkit_ia3.layer import IA3Layer

__all__ = ["IA3Config", "IA3Layer"]
