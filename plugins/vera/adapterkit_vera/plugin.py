"""VeRA as a plugin of adapterkit."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor

import adapterkit as ak
from adapterkit_vera.config import VeraConfig
from adapterkit_vera.layer import VeraLayer, VeraShared, projections


class VeraPlugin(ak.Plugin):
    """VeRA: `dW = diag(b) B diag(d) A`; see the config."""

    config, layer, shared, prefix = VeraConfig, VeraLayer, VeraShared, "vera_"

    def from_file(self, config: VeraConfig, tensors: Mapping[str, Tensor]) -> tuple[VeraConfig, Mapping[str, Tensor]]:
        """Nothing changes. A warning says if the file has other projections than those that the key gives."""
        down, up = tensors.get("vera_A"), tensors.get("vera_B")
        if config.save_projection or down is None or up is None or down.dim() != 2 or up.dim() != 2:
            return config, tensors
        made = projections(config.r, down.shape[1], up.shape[0], config.projection_prng_key, torch.device("cpu"))
        if not all(torch.equal(own.to(held.dtype), held.cpu()) for own, held in zip(made, (down, up), strict=True)):
            warnings.warn(
                "This file holds projections vera_A, vera_B that are not those of its projection_prng_key = "
                f"{config.projection_prng_key}, and says save_projection = false, so they are not used. If the adapter "
                "was trained with them, set save_projection to true in its adapter_config.json.",
                ak.AdapterWarning,
                stacklevel=2,
            )
        return config, tensors


plugin = VeraPlugin()
