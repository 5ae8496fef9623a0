"""LoKr as a plugin of adapterkit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

import adapterkit as ak
from adapterkit_lokr.config import LoKrConfig
from adapterkit_lokr.foreign import LoKrFormat
from adapterkit_lokr.layer import LoKrLayer


class LoKrPlugin(ak.Plugin):
    """LoKr: `dW = scaling kron(w1, w2)`."""

    config, layer, prefix = LoKrConfig, LoKrLayer, "lokr_"

    def sizes(self, tensors: Mapping[str, Tensor]) -> nn.Module | None:
        """Known where both factors are there; a convolution where w2 has a kernel."""
        t = tensors
        first = t["lokr_w1"].shape if "lokr_w1" in t else _product(t, "lokr_w1_a", "lokr_w1_b")
        second = t["lokr_w2"].shape if "lokr_w2" in t else _product(t, "lokr_w2_a", "lokr_w2_b")
        if {"lokr_t2", "lokr_w2_a", "lokr_w2_b"} <= t.keys():
            second = torch.Size((t["lokr_w2_a"].shape[1], t["lokr_w2_b"].shape[1], *t["lokr_t2"].shape[2:]))
        if first is None or second is None or 0 in (*first, *second):
            return None
        return ak.empty_layer(first[0] * second[0], first[1] * second[1], *second[2:])

    def formats(self) -> Sequence[ak.Format]:
        """LyCORIS's."""
        return [LoKrFormat()]


def _product(t: Mapping[str, Tensor], up: str, down: str) -> torch.Size | None:
    return torch.Size((t[up].shape[0], t[down].shape[1])) if up in t and down in t else None


plugin = LoKrPlugin()
