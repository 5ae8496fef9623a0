"""LoHa as a plugin of adapterkit."""

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
        kernel = held["hada_t1"].shape[2:] if {"hada_t1", "hada_t2"} <= held.keys() else ()
        outs = [held[name].shape[1 if kernel else 0] for name in ("hada_w1_a", "hada_w2_a") if name in held]
        ins = [held[name].shape[1] for name in ("hada_w1_b", "hada_w2_b") if name in held]
        return ak.empty_layer(*outs[:1] or [1], *ins[:1] or [1], *kernel)

    def formats(self) -> Sequence[ak.Format]:
        """LyCORIS's and kohya-ss's."""
        return [LoHaFormat()]


plugin = LoHaPlugin()
