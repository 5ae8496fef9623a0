"""The (IA)3 layer."""

from __future__ import annotations

from torch import Tensor, nn

from adapterkit import AdapterLayer, Base, Target
from adapterkit_ia3.config import IA3Config


class IA3Layer(AdapterLayer):
    """`base(l * x)` for a feed-forward layer, else `l * base(x)`. One number for each channel.

    `ia3_l` has PEFT's shapes: `(1, in)` or `(out, 1)`, and `(1, channels, 1, ...)` for a convolution.
    """

    def setup(self, target: Target, config: IA3Config) -> None:
        """See `AdapterLayer.setup`: ones, or normal."""
        self.scales_input = config.scales_input(target.path)
        kernel = target.kind.down_shape(1)[2:]
        self.groups = int(getattr(target.kind, "groups", 1))
        channels = target.kind.down_shape(1)[1] * self.groups if self.scales_input else target.out_features
        flat = (1, channels) if self.scales_input else (channels, 1)
        shape = (1, channels, *(1 for _ in kernel)) if kernel else flat
        self.ia3_l = target.new(*shape, init=1.0 if config.init_ia3_weights else nn.init.normal_)

    def forward(self, base: Base, x: Tensor) -> Tensor:
        """See `AdapterLayer.forward`."""
        scale = self.kind.spread(self.ia3_l.flatten())
        out: Tensor = base(x * scale) if self.scales_input else base(x) * scale
        return out

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Rows of the weight and the bias scaled, or columns of the weight."""
        scale = self.ia3_l.flatten()
        if not self.scales_input:
            return weight * scale[:, None], None if bias is None else bias * scale
        # (group, row of the group, channel of the group, place of the kernel)
        blocks = weight.reshape(self.groups, weight.shape[0] // self.groups, scale.numel() // self.groups, -1)
        return (blocks * scale.view(self.groups, 1, -1, 1)).reshape(weight.shape), bias
