"""(IA)3: activations are scaled by learned vectors (Liu et al. 2022, arXiv 2205.05638). Files: PEFT's.

`base(l * x)` at feed-forward layers, `l * base(x)` at all others: one number for each channel. l starts at one.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

import adapterkit as ak


@dataclass(frozen=True, kw_only=True)
class IA3Config(ak.AdapterConfig):
    """`feedforward_modules`: the targets whose input is scaled, as suffixes or a regular expression for the path."""

    method = "ia3"

    feedforward_modules: str | Sequence[str] | None = None
    init_ia3_weights: bool = True
    fan_in_fan_out: bool = False

    def scales_input(self, path: str) -> bool:
        """Whether the layer at `path` is a feed-forward layer."""
        wanted = self.feedforward_modules or ()
        if isinstance(wanted, str):
            return re.fullmatch(wanted, path) is not None
        return any(path == name or path.endswith(f".{name}") for name in wanted)


class IA3Layer(ak.AdapterLayer):
    """`ia3_l` has PEFT's shapes: `(1, in)` or `(out, 1)`, and `(1, channels, 1, ...)` for a convolution."""

    def setup(self, target: ak.Target, config: IA3Config) -> None:
        """A convolution's input has channels, not the columns of its weight."""
        self.scales_input = config.scales_input(target.path)
        if self.scales_input and target.kind.lookup:
            raise ak.UnsupportedError(f"The input of {target.path!r} is row numbers, which cannot be scaled.")
        _, width, *kernel = target.kind.down_shape(1)
        self.groups = int(getattr(target.kind, "groups", 1))
        channels = width * self.groups if self.scales_input else target.out_features
        shape = (1, channels, *(1 for _ in kernel)) if self.scales_input or kernel else (channels, 1)
        self.ia3_l = target.new(*shape, init=1.0 if config.init_ia3_weights else nn.init.normal_)

    def forward(self, base: ak.Base, x: Tensor) -> Tensor:
        """Scaling the activation costs less than scaling the weight."""
        scale = self.kind.spread(self.ia3_l.flatten())
        out: Tensor = base(x * scale) if self.scales_input else base(x) * scale
        return out

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The columns of the weight scaled, or its rows and the bias."""
        scale = self.ia3_l.flatten()
        if not self.scales_input:
            return weight * scale[:, None], None if bias is None else bias * scale
        # (group, row of the group, channel of the group, place of the kernel)
        blocks = weight.reshape(self.groups, weight.shape[0] // self.groups, scale.numel() // self.groups, -1)
        return (blocks * scale.view(self.groups, 1, -1, 1)).reshape(weight.shape), bias


plugin = ak.plugin(IA3Config, IA3Layer, prefix="ia3_")
