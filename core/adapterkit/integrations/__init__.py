"""Integrations."""

from adapterkit.integrations.load_state_dict import Loader
from adapterkit.integrations.save_pretrained import install, uninstall

__all__ = ["Loader", "install", "uninstall"]
