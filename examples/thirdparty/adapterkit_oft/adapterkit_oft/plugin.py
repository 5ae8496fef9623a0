"""OFT as a plugin of adapterkit."""

from __future__ import annotations

import adapterkit as ak
from adapterkit_oft.config import OFTConfig
from adapterkit_oft.layer import OFTLayer


class OFTPlugin(ak.Plugin):
    """OFT: `W R^T`, R block-diagonal and orthogonal."""

    config, layer, prefix = OFTConfig, OFTLayer, "oft_"

    def inject(self, target: ak.Target, config: OFTConfig, shared: None) -> ak.AdapterLayer | None:
        """Linear layers alone.

        An embedding's input is row numbers. A convolution reads patches that overlap: no rotated input gives what a
        rotated kernel would.
        """
        return None if target.kind.lookup or len(target.kind.down_shape(1)) > 2 else OFTLayer(target, config)


plugin = OFTPlugin()
