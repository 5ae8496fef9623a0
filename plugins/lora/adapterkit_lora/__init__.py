"""LoRA as an adapterkit plugin.

Methods whose files are LoRA's with more in them build on `LoraFormat` and `LoraPlugin`.
"""

from adapterkit_lora.config import LoraConfig
from adapterkit_lora.foreign import LoraFormat
from adapterkit_lora.layer import LoraLayer
from adapterkit_lora.plugin import LoraPlugin

__all__ = ["LoraConfig", "LoraFormat", "LoraLayer", "LoraPlugin"]
