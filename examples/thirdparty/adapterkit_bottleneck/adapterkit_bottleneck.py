"""Bottleneck adapters after blocks of a model (Houlsby et al. 2019, arXiv 1902.00751).

`h + W_up f(W_down h + b_down) + b_up`, for the output h of a block: W_down `(size, width)` starts normal, and W_up
`(width, size)` at zero, so that a new adapter changes nothing.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn.functional import linear

import adapterkit as ak

FUNCTIONS: Any = {"gelu": nn.functional.gelu, "relu": nn.functional.relu, "tanh": nn.functional.tanh}


@dataclass(frozen=True, kw_only=True)
class BottleneckConfig(ak.AdapterConfig):
    """`width`: of the outputs of the blocks; `None`: that of the last linear layer inside each."""

    method = "bottleneck"

    size: int = 64
    width: int | None = None
    function: Literal["gelu", "relu", "tanh"] = "gelu"


def last_width(target: ak.Target) -> int:
    """How many features the last linear layer or embedding in a block gives; without a model, what the file has."""
    if target.module is None:
        return len((target.file or {})["bottleneck_up.weight"])
    names = ("out_features", "nf", "embedding_dim")  # of `nn.Linear`, transformers' `Conv1D` and `nn.Embedding`
    found = [int(getattr(module, n)) for module in target.module.modules() for n in names if hasattr(module, n)]
    if not found:
        raise ak.ConfigError(f"A {type(target.module).__name__} has no linear layer that tells its width: set width.")
    return found[-1]


class BottleneckLayer(ak.AdapterLayer):
    """It changes the output of the block, or the first entry of a tuple."""

    any_module = True

    def setup(self, target: ak.Target, config: BottleneckConfig) -> None:
        """W_down and W_up, each with a bias."""
        width, init = config.width or last_width(target), partial(nn.init.normal_, std=0.01)
        self.bottleneck_down = ak.Holder(weight=target.new(config.size, width, init=init), bias=target.new(config.size))
        self.bottleneck_up = ak.Holder(weight=target.new(width, config.size), bias=target.new(width))

    def forward(self, base: Any, *args: Any, **kwargs: Any) -> Any:
        """A block may be called in any way, and nothing is cast for it."""
        out = base(*args, **kwargs)
        return (self.changed(out[0]), *out[1:]) if isinstance(out, tuple) else self.changed(out)

    def changed(self, h: Tensor) -> Tensor:
        """`h + W_up f(W_down h + b_down) + b_up`."""
        down, up = self.bottleneck_down, self.bottleneck_up
        hidden = FUNCTIONS[self.config.function](linear(h.to(down.weight.dtype), down.weight, down.bias))
        return h + linear(hidden, up.weight, up.bias).to(h.dtype)


class BottleneckPlugin(ak.Plugin):
    """The features of a convolution's output are not last."""

    config, layer, prefix = BottleneckConfig, BottleneckLayer, "bottleneck_"

    def inject(self, target: ak.Target, config: BottleneckConfig, shared: None) -> BottleneckLayer | None:
        """`None` refuses the layer."""
        return None if hasattr(target.kind, "kernel") else BottleneckLayer(target, config)


plugin = BottleneckPlugin()
