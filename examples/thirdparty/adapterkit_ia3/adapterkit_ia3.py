"""(IA)3: activations are scaled by learned vectors (Liu et al. 2022, arXiv 2205.05638). Files: PEFT's and LyCORIS'.

`base(l * x)` at feed-forward layers, `l * base(x)` at all others: one number for each channel. l starts at one. LyCORIS
scales the weight and not the bias, and keeps `l - 1`.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
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


class IA3RowsLayer(ak.AdapterLayer):
    """`ia3_rows (out,)` scales the rows of the weight, and not the bias."""

    def setup(self, target: ak.Target, config: IA3Config) -> None:
        self.ia3_rows = target.new(target.out_features, init=1.0)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight * self.ia3_rows[:, None], bias


class IA3Format(ak.Format):
    """LyCORIS' `lora_unet_conv_in.weight`, `l - 1`, and `on_input`: 1 where it scales the input, 0 the output."""

    config_type = IA3Config
    names = {"weight": "weight"}
    factors = frozenset({"on_input"})

    def config(self, layers: Mapping[str, ak.ForeignLayer], metadata: Mapping[str, str], **fields: Any) -> IA3Config:
        """The layers whose input is scaled are the feed-forward ones."""
        paths = [path for path, layer in layers.items() if layer.number("on_input")]
        return IA3Config(feedforward_modules="|".join(map(re.escape, paths)) or None, **fields)

    def tensors(self, layer: ak.ForeignLayer, config: IA3Config) -> dict[str, Tensor]:
        """L in PEFT's shapes, or `ia3_rows`."""
        if "weight" not in layer.tensors:
            return {}
        scale = layer.tensors["weight"].to(torch.promote_types(layer.tensors["weight"].dtype, torch.float32)) + 1
        if layer.number("on_input"):
            return {"ia3_l": scale.reshape(1, -1, *(1 for _ in layer.kind.down_shape(1)[2:]))}
        return {"ia3_rows": scale.flatten()}


class IA3Plugin(ak.Plugin):
    """What a layer scales beside the inputs follows from a file."""

    config, layer, prefix = IA3Config, IA3Layer, "ia3_"

    def inject(self, target: ak.Target, config: IA3Config, shared: None) -> ak.AdapterLayer:
        return (IA3RowsLayer if "ia3_rows" in (target.file or {}) else IA3Layer)(target, config)

    def formats(self) -> Sequence[ak.Format]:
        """LyCORIS'."""
        return [IA3Format()]


plugin = IA3Plugin()
