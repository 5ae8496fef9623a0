"""LoHa files of LyCORIS and kohya-ss."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from adapterkit import CheckpointError, ForeignFile, ForeignLayer, Format, LayerKind
from adapterkit_loha.config import LoHaConfig
from adapterkit_loha.layer import with_kernel

_CORES = ("hada_t1", "hada_t2")


class LoHaFormat(Format):
    """`lora_unet_conv_in.hada_w1_a`: PEFT's names, with an alpha for each layer, and a core for each convolution."""

    config_type = LoHaConfig
    namings = ("kohya", "lycoris")
    factors = frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"})
    names = {core: core for core in _CORES}  # noqa: RUF012 - a class variable by its base
    refused = {"dora_scale": "a LoHa that is weight-decomposed (DoRA), which is not LoHa"}  # noqa: RUF012

    def rank(self, tensors: Mapping[str, Tensor]) -> int:
        """Of `w_b (r, in)`, else of `w_a`: `(r, out)` beside a core, `(out, r)` without one."""
        down = next((n for n in ("hada_w1_b", "hada_w2_b") if n in tensors), None)
        local = down or next(name for name in ("hada_w1_a", "hada_w2_a") if name in tensors)
        return tensors[local].shape[0 if down or _has_cores(tensors) else 1]

    def config(self, layers: Mapping[str, ForeignLayer], metadata: Mapping[str, str], **fields: Any) -> Any:
        """See `Format.config`."""
        cores = {_has_cores(layer.tensors) for layer in layers.values() if _kernel(layer.kind)}
        return super().config(layers, metadata, use_effective_conv2d=cores == {True}, **fields)

    def tensors(self, layer: ForeignLayer, config: LoHaConfig) -> dict[str, Tensor]:
        """PEFT's shapes; a core is worked into `B (r, in * kernel)` for a config without effective convolutions."""
        kernel = _kernel(layer.kind)
        values = {name: tensor for name, tensor in layer.tensors.items() if name not in ("alpha", "scalar")}
        if _has_cores(layer.tensors) and config.use_effective_conv2d and kernel:
            shape = (*kernel, 1) if len(kernel) == 1 else kernel
            values |= {core: self._core(layer, core).reshape(*values[core].shape[:2], *shape) for core in _CORES}
        elif _has_cores(layer.tensors):
            values = {}
            for n, core in ((1, "hada_t1"), (2, "hada_t2")):
                up, down = layer.matrix(f"hada_w{n}_a"), layer.wide(f"hada_w{n}_b")
                if up is not None and down is not None:
                    values[f"hada_w{n}_a"] = up.t()
                    values[f"hada_w{n}_b"] = with_kernel(self._core(layer, core), down)
        scale = layer.scale(self.rank(layer.tensors), config.scaling)
        if scale != 1.0 and "hada_w1_a" in values:
            values["hada_w1_a"] = (
                values["hada_w1_a"].to(torch.promote_types(values["hada_w1_a"].dtype, torch.float32)) * scale
            )
        return values

    def write(
        self,
        naming: str,
        config: LoHaConfig,
        tensors: Mapping[str, Mapping[str, Tensor]],
        kinds: Mapping[str, LayerKind],
        component: str,
    ) -> ForeignFile:
        """See `Format.write`; cores without PEFT's dimension of 1."""
        plain = {
            path: {n: t.reshape(*t.shape[:2], *_kernel(kinds[path])) if n in _CORES else t for n, t in held.items()}
            for path, held in tensors.items()
        }
        return super().write(naming, config, plain, kinds, component)

    def _core(self, layer: ForeignLayer, core: str) -> Tensor:
        tensor, rank = layer.wide(core), self.rank(layer.tensors)
        kernel = layer.kind.down_shape(rank)[2:]
        assert tensor is not None
        if tensor.shape[:2] != (rank, rank) or tensor.numel() != rank * rank * math.prod(kernel):
            raise CheckpointError(
                f"{layer.keys[core]!r} has shape {tuple(tensor.shape)}; the core at the {layer.kind.name} "
                f"{layer.path!r} is {(rank, rank, *kernel)}."
            )
        return tensor


def _has_cores(tensors: Mapping[str, Tensor]) -> bool:
    return all(core in tensors for core in _CORES)


def _kernel(kind: LayerKind) -> tuple[int, ...]:
    """The kernel of a convolution that PEFT's effective form is for, else `()`."""
    kernel = kind.down_shape(1)[2:]
    return kernel if math.prod(kernel) > 1 else ()
