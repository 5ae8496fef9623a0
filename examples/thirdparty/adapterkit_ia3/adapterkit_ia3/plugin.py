"""(IA)3 as a plugin of adapterkit."""

from __future__ import annotations

import adapterkit as ak
from adapterkit_ia3.config import IA3Config
from adapterkit_ia3.layer import IA3Layer


class IA3Plugin(ak.Plugin):
    """(IA)3: activations scaled by learned vectors."""

    config, layer, prefix = IA3Config, IA3Layer, "ia3_"

    def inject(self, target: ak.Target, config: IA3Config, shared: None) -> ak.AdapterLayer | None:
        """An embedding's input is row numbers, which cannot be scaled."""
        return None if target.kind.lookup and config.scales_input(target.path) else IA3Layer(target, config)


plugin = IA3Plugin()
