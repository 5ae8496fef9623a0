"""DoRA, weight-decomposed low-rank adaptation (Liu et al. 2024, arXiv 2402.09353).

`W' = m * V / |V|` with `V = W + s B A`: `|V|` is the length of each row and is not differentiated. A is `(r, in)`, B
`(out, r)`, and m `(out,)` starts as `|V|`, so that a new adapter changes nothing.

Files: PEFT's LoRA with `use_dora`, and LyCORIS' and OneTrainer's with a `dora_scale`. Those may scale the columns in
place of the rows: `|V|` is then the length of each input channel, and m is `(1, channels)`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import adapterkit as ak
from adapterkit_lora import LoraFormat, LoraPlugin

_MAGNITUDE = "lora_magnitude_vector"


@dataclass(frozen=True, kw_only=True)
class DoraConfig(ak.AdapterConfig):
    """`s = lora_alpha / r`, or `lora_alpha / sqrt(r)` with `use_rslora`; the other fields are LoRA's."""

    method, peft_type, marks, not_in_files = "dora", "LORA", {"use_dora": True}, ()
    patterns = {"rank_pattern": "r", "alpha_pattern": "lora_alpha"}

    r: ak.Rank = 8
    lora_alpha: float = 8
    lora_dropout: ak.Dropout = 0.0
    use_rslora: bool = False
    init_lora_weights: bool = True
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    @property
    def scaling(self) -> float:
        """`s`."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


class DoraLayer(ak.AdapterLayer):
    """The change depends on the weight, so `merged` says what the layer becomes."""

    up_factor = ("lora_B.weight", "lora_embedding_B")

    def setup(self, target: ak.Target, config: DoraConfig) -> None:
        """A and B have the shapes of the layer kind, and m those of an output's channels."""
        down, up = target.kind.down_shape(config.r), target.kind.up_shape(config.r)
        zero: Any = 0.0 if config.init_lora_weights else nn.init.normal_ if target.kind.lookup else ak.kaiming
        if target.kind.lookup:
            self.lora_embedding_A = target.new(*down, init=zero)
            self.lora_embedding_B = target.new(*up, init=nn.init.normal_)
        else:
            self.lora_A = ak.Holder(weight=target.new(*down, init=ak.kaiming))
            self.lora_B = ak.Holder(weight=target.new(*up, init=zero))
        shape: tuple[int, ...] = (1, target.out_features, *(1 for _ in down[2:]))
        shape, self.channels = shape if len(down) > 2 else shape[1:], 0
        held = (target.file or {}).get(_MAGNITUDE)
        if held is not None and held.shape == (1, down[1]):
            shape, self.channels = (1, down[1]), down[1]
        start = lambda m: m.copy_(self.lengths(target.weight()).view(shape))  # noqa: E731
        self.lora_magnitude_vector = target.new(*shape, init=start)
        self.dropout = config.lora_dropout

    def direction(self, weight: Tensor) -> Tensor:
        """`V`."""
        names = ("lora_A.weight", "lora_B.weight")
        if self.kind.lookup:
            names = ("lora_embedding_A", "lora_embedding_B")
        down, up = (self.get_parameter(name).flatten(1).to(weight.dtype) for name in names)
        return torch.addmm(weight, up, down, alpha=self.config.scaling)

    def lengths(self, weight: Tensor) -> Tensor:
        """`|V|`: of each row, or of each input channel, which has several columns in a convolution."""
        v = self.direction(weight).detach()
        found: Tensor = v.unflatten(1, (self.channels, -1)).norm(dim=(0, 2)) if self.channels else v.norm(dim=1)
        return found

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """`m * V / |V|`."""
        v, share = self.direction(weight), self.lora_magnitude_vector.flatten() / self.lengths(weight)
        if self.channels:
            return v * share.repeat_interleave(v.shape[1] // self.channels), bias
        return v * share[:, None], bias


class DoraFormat(LoraFormat):
    """LoRA's names, and `dora_scale`: `(out, 1)` for the rows, `(1, channels)` for the columns; ones for a kernel."""

    config_type = DoraConfig
    names = {"dora_scale": _MAGNITUDE, _MAGNITUDE: _MAGNITUDE, f"{_MAGNITUDE}.weight": _MAGNITUDE} | {
        name: own for name, own in LoraFormat.names.items() if own not in ("lora_B.bias", "diff_b")
    }
    rows = LoraFormat.rows | {_MAGNITUDE: 0}
    refused = dict.fromkeys(("lora_B.bias", "diff_b"), "a DoRA with a trained bias, which is not implemented")

    def split(self, tensors: Mapping[str, Tensor], sizes: Sequence[int]) -> list[dict[str, Tensor]]:
        """The columns of several layers have a length together, so only a scale of rows can be split."""
        m = tensors.get(_MAGNITUDE)
        if m is not None and m.dim() > 1 and m.shape[0] == 1:
            raise ak.UnsupportedError("A dora_scale of columns holds for all of them together and cannot be split.")
        return super().split(tensors, sizes)

    def layers(self, tensors: Mapping[str, Tensor], kinds: Mapping[str, ak.LayerKind]) -> dict[str, ak.ForeignLayer]:
        """None, if no layer has a magnitude: the file is plain LoRA."""
        found = super().layers(tensors, kinds)
        plain = [layer for layer in found.values() if _MAGNITUDE not in layer.tensors]
        if len(plain) == len(found):
            return {}
        if plain and any(layer.keys.get(_MAGNITUDE, "").endswith("dora_scale") for layer in found.values()):
            raise ak.UnsupportedError(
                f"{next(iter(plain[0].keys.values()))!r} is plain LoRA, and other layers have a dora_scale. An adapter "
                "has one method: split the file into one for each, and let both adapters act."
            )
        return found

    def tensors(self, layer: ak.ForeignLayer, config: DoraConfig) -> dict[str, Tensor]:
        """PEFT's shape of m where it scales the rows: `(out,)`, `(1, out, 1, 1)` at a convolution."""
        values = super().tensors(layer, config)
        m, (_, channels, *kernel) = values.get(_MAGNITUDE), layer.kind.down_shape(1)
        rows = layer.kind.out_features
        if m is None or (m.dim() != 2 and not layer.keys[_MAGNITUDE].endswith("dora_scale")):
            return values
        if m.numel() == rows and m.shape[:1] == (rows,):
            values[_MAGNITUDE] = m.reshape(1, rows, *(1 for _ in kernel)) if kernel else m.flatten()
        elif m.numel() == channels and m.shape[:2] == (1, channels):
            values[_MAGNITUDE] = m.reshape(1, channels)
        else:
            raise ak.CheckpointError(
                f"{layer.keys[_MAGNITUDE]!r} has shape {tuple(m.shape)}; at {layer.path!r} it is {(rows, 1)} for the "
                f"rows or {(1, channels)} for the columns."
            )
        return values

    def written(self, tensors: Mapping[str, Tensor], kind: ak.LayerKind) -> dict[str, Tensor]:
        """The reverse."""
        m, ones = tensors[_MAGNITUDE], [1 for _ in kind.down_shape(1)[2:]]
        shape = (*m.shape, *ones) if m.dim() == 2 else (kind.out_features, 1, *ones)
        return {**tensors, _MAGNITUDE: m.reshape(shape)}


class DoraPlugin(ak.Plugin):
    """Its files are LoRA's with a magnitude."""

    config, layer, prefix = DoraConfig, DoraLayer, "lora_"

    def sizes(self, tensors: Mapping[str, Tensor]) -> nn.Module | None:
        """As LoRA's factors tell them."""
        return LoraPlugin().sizes(tensors)

    def formats(self) -> Sequence[ak.Format]:
        """LyCORIS', kohya-ss's, OneTrainer's and diffusers'."""
        return [DoraFormat()]


plugin = DoraPlugin()
