"""VeRA as a plugin of adapterkit: `dW = diag(b) B diag(d) A`; see the config."""

import adapterkit as ak
from adapterkit_vera.config import VeraConfig
from adapterkit_vera.layer import VeraLayer, VeraShared

plugin = ak.plugin(VeraConfig, VeraLayer, prefix="vera_", shared=VeraShared)
