"""LoHa files of LyCORIS and kohya-ss."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from adapterkit import CheckpointError, ForeignLayer, Format, LayerKind, UnsupportedError
from adapterkit_loha.config import LoHaConfig
from adapterkit_loha.layer import kernel_of, with_kernel

_CORES = ("hada_t1", "hada_t2")


class LoHaFormat(Format):
    """`lora_unet_conv_in.hada_w1_a`: PEFT's names, with an alpha for each layer, and a core for each convolution."""

    config_type = LoHaConfig
    namings = ("kohya", "lycoris")
    factors = frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"})
    scaled = frozenset({"hada_w1_a"})
    rows = {"hada_w1_a": 0, "hada_w2_a": 0}
    names = {core: core for core in _CORES}
    refused = {
        "dora_scale": "a LoHa that is weight-decomposed (DoRA), which no method here implements. LyCORIS can put "
        "it into the model (lycoris.create_lycoris_from_weights, then merge_to)"
    }

    def rank(self, tensors: Mapping[str, Tensor]) -> int:
        """Of `w_b (r, in)`, else of `w_a`: `(r, out)` beside a core, `(out, r)` without one."""
        a = 0 if tensors.keys() >= {*_CORES} else 1
        dims = {"hada_w1_b": 0, "hada_w2_b": 0, "hada_w1_a": a, "hada_w2_a": a}
        return next(tensors[local].shape[dim] for local, dim in dims.items() if local in tensors)

    def split(self, tensors: Mapping[str, Tensor], sizes: Sequence[int]) -> list[dict[str, Tensor]]:
        if tensors.keys() & {*_CORES}:
            raise UnsupportedError("A LoHa with cores is a convolution's, and a fused layer is a linear one.")
        return super().split(tensors, sizes)

    def config(self, layers: Mapping[str, ForeignLayer], metadata: Mapping[str, str], **fields: Any) -> Any:
        cores = {layer.tensors.keys() >= {*_CORES} for layer in layers.values() if kernel_of(layer.kind)}
        return super().config(layers, metadata, use_effective_conv2d=cores == {True}, **fields)

    def tensors(self, layer: ForeignLayer, config: LoHaConfig) -> dict[str, Tensor]:
        """PEFT's shapes; a core is worked into `B (r, in * kernel)` for a config without effective convolutions."""
        values, rank, kernel = super().tensors(layer, config), self.rank(layer.tensors), layer.kind.down_shape(1)[2:]
        for n, name in enumerate(_CORES, 1) if values.keys() >= {*_CORES} else ():
            core, up, down = layer.wide(name), f"hada_w{n}_a", f"hada_w{n}_b"
            if core.shape[:2] != (rank, rank) or core.numel() != rank * rank * math.prod(kernel):
                raise CheckpointError(
                    f"{layer.keys[name]!r} has shape {tuple(core.shape)}; the core at the {layer.kind.name} "
                    f"{layer.path!r} is {(rank, rank, *kernel)}."
                )
            if config.use_effective_conv2d and kernel_of(layer.kind):
                values[name] = core.reshape(rank, rank, *kernel_of(layer.kind))
            elif up in values and down in values:
                values[up], values[down] = values[up].t(), with_kernel(core, layer.wide(down))
        return {n: t for n, t in values.items() if n not in _CORES or config.use_effective_conv2d}

    def written(self, tensors: Mapping[str, Tensor], kind: LayerKind) -> dict[str, Tensor]:
        """Cores without PEFT's dimension of 1."""
        kernel = kind.down_shape(1)[2:]
        return {n: t.reshape(*t.shape[:2], *kernel) if n in _CORES else t for n, t in tensors.items()}
