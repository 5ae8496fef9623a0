"""Trained biases: a copy per adapter, so that disabling gives the base back and each adapter has its own."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from adapterkit.kinds import LayerKind

# Where the bias stands in the output of layers that are no layer kind: (type, dimensions after the bias's).
# Exact types: a subclass may lay its output out in another way.
_LAST_DIM = (nn.Linear, nn.LayerNorm)
_CHANNEL_DIM = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.GroupNorm)
_CONV_DIMS: Mapping[type[nn.Module], int] = {
    nn.ConvTranspose1d: 1,
    nn.ConvTranspose2d: 2,
    nn.ConvTranspose3d: 3,
}


class BiasLayer(nn.Module):
    """One adapter's own bias of one module; acts as `output + (own - base)`, so several adapters add up.

    Args:
        base: the module's bias, shape `(out,)`: the initial value. It is kept, because the module's own
            changes when another adapter is merged; on the meta device only from then on, for it has no values yet.
        trailing: dimensions of the output behind the bias's own; `-1`: the bias's is dimension 1.
    """

    base: Tensor | None

    def __init__(self, base: Tensor, trailing: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(base.clone())
        self.register_buffer("base", None if base.is_meta else base.clone(), persistent=False)
        self.trailing = trailing

    def shift(self, bias: Tensor) -> Tensor:
        """`own - base`; `bias` is the module's, which is the base where that is not kept."""
        return self.bias - (bias if self.base is None else self.base)

    def keep_base(self, bias: Tensor) -> None:
        """The module's `bias` is about to change: keep it as the base if none is kept."""
        if self.base is None:
            self.base = bias.detach().clone()

    def change(self, bias: Tensor, out: Tensor) -> Tensor:
        """`own - base` in the shape that broadcasts over `out`."""
        trailing = out.dim() - 2 if self.trailing < 0 else self.trailing
        return self.shift(bias).view(-1, *(1,) * trailing)


def bias_place(cls: type[nn.Module], kind: LayerKind | None) -> int | None:
    """How many dimensions of a layer's output stand behind its bias's; `None` if that is not known."""
    if kind is not None:
        return kind.spread(torch.empty(kind.out_features, device="meta")).dim() - 1
    if cls in _LAST_DIM:
        return 0
    if cls in _CHANNEL_DIM:
        return -1
    return _CONV_DIMS.get(cls)
