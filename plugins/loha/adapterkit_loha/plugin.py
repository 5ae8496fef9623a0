"""LoHa as a plugin of adapterkit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

import adapterkit as ak
from adapterkit_loha.config import LoHaConfig
from adapterkit_loha.foreign import LoHaFormat
from adapterkit_loha.layer import LoHaEmbedding, LoHaLayer


class LoHaPlugin(ak.Plugin):
    """LoHa: `dW = scaling (A1 B1) * (A2 B2)`; see the config."""

    config, layer, prefix = LoHaConfig, LoHaLayer, "hada_"

    def inject(self, target: ak.Target, config: LoHaConfig, shared: None) -> ak.AdapterLayer:
        """At an embedding only what is looked up is made."""
        return (LoHaEmbedding if target.kind.lookup else LoHaLayer)(target, config)

    def sizes(self, tensors: Mapping[str, Tensor]) -> nn.Module | None:
        """A linear layer, or a convolution where there are cores."""
        held = {local: t for local, t in tensors.items() if local.startswith("hada_")}
        if any(t.dim() < 2 or 0 in t.shape for t in held.values()):
            return None
        cores = "hada_t1" in held and "hada_t2" in held
        up = next((held[name] for name in ("hada_w1_a", "hada_w2_a") if name in held), None)
        down = next((held[name] for name in ("hada_w1_b", "hada_w2_b") if name in held), None)
        out = 1 if up is None else up.shape[1 if cores else 0]
        return ak.empty_layer(out, 1 if down is None else down.shape[1], *(held["hada_t1"].shape[2:] if cores else ()))

    def formats(self) -> Sequence[ak.Format]:
        """LyCORIS's and kohya-ss's."""
        return [LoHaFormat()]


plugin = LoHaPlugin()
