"""LoRA as an adapterkit plugin."""

from adapterkit_lora.config import LoraConfig
from adapterkit_lora.layer import LoraLayer

__all__ = ["LoraConfig", "LoraLayer"]
