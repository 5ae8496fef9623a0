"""LoRA files of other programs: kohya-ss's, LyCORIS's (LoCon) and diffusers', old and new."""

import functools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from adapterkit import CheckpointError, ForeignLayer, Format, LayerKind, UnsupportedError
from adapterkit_lora.config import LoraConfig

_DOWN, _UP, _BIAS, _MID = "lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_mid"
# The change of the layer's own bias, which is not scaled.
_DIFF = "diff_b"
_TABLE = ("lora_embedding_A", "lora_embedding_B")
_OF_ATTENTION = re.compile(r"(.+?)(?:\.processor)?\.to_(q|k|v|out)_lora\.(down\.weight|up\.weight|alpha)")
_OF_PROCESSOR = {"down.weight": _DOWN, "up.weight": _UP, "alpha": "alpha"}
_LAYERS = {"out": ("to_out.0", "out_proj", "to_out")}


class LoraFormat(Format):
    """Keys such as `lora_unet_conv_in.lora_down.weight`, `unet.mid.attn1.processor.to_q_lora.down.weight`.

    And `unet.conv_in.lora_A.weight`, `text_encoder.layers.0.self_attn.q_proj.lora_linear_layer.up.weight`.
    """

    config_type: type[Any] = LoraConfig
    alpha = "lora_alpha"
    namings = ("kohya", "lycoris", "diffusers")
    ranks = {_DOWN: 0, _UP: 1, _TABLE[0]: 0, _TABLE[1]: 1}
    factors = frozenset(ranks)
    scaled = frozenset({_UP, _TABLE[1]})
    rows = {_UP: 0, _BIAS: 0, _DIFF: 0}
    unwritten = frozenset({_BIAS, *_TABLE})
    names = {
        _BIAS: _BIAS,
        _DIFF: _DIFF,
        **{f"{there}.weight": own for there, own in (("lora_down", _DOWN), ("lora_up", _UP), ("lora_mid", _MID))},
        **{f"{part}.{there}": own for part in ("lora", "lora_linear_layer") for there, own in _OF_PROCESSOR.items()},
    }
    refused = dict.fromkeys(
        ("dora_scale", "lora_magnitude_vector", "lora_magnitude_vector.weight"),
        "DoRA, which scales the weight too, not LoRA. The method 'dora' of the package adapterkit-dora reads it",
    )

    def readings(self, key: str) -> Iterator[tuple[str, str]]:
        if old := _OF_ATTENTION.fullmatch(key):
            encoder = old[1].startswith("text_encoder") or old[1].endswith(".self_attn")  # with transformers' names
            layers = _LAYERS.get(old[2], (f"to_{old[2]}", f"{old[2]}_proj"))
            for layer in sorted(layers, key=lambda name: name.endswith("_proj") != encoder):
                yield f"{old[1]}.{layer}", _OF_PROCESSOR[old[3]]
        for module, local in super().readings(key):
            yield module.replace(".processor.", "."), local
            yield module, local

    def split(self, tensors: Mapping[str, Tensor], sizes: Sequence[int]) -> list[dict[str, Tensor]]:
        """A layer gets the ranks that change its own rows, where others have factors of their own beside them."""
        found = super().split(tensors, sizes)
        up, down, alpha = (tensors.get(name) for name in (_UP, _DOWN, "alpha"))
        if up is None or down is None or alpha is None or up.shape[1:] != down.shape[:1] or alpha.numel() != 1:
            return found
        for part in found:
            used = part[_UP].float().ne(0).any(0)
            if used.any() and not used.all():
                own = (float(alpha.real) or len(down)) * int(used.sum()) / len(down)
                part |= {_UP: part[_UP][:, used], _DOWN: down[used], "alpha": torch.tensor(own)}
        return found

    def join(self, parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Layers with other factors A get ranks of their own: `[B_q 0; 0 B_k] [A_q; A_k]`."""
        if any(part.keys() != {_DOWN, _UP, "alpha"} for part in parts):
            return super().join(parts)
        scales = [(float(part["alpha"]) or len(part[_DOWN])) / len(part[_DOWN]) for part in parts]
        if len({*scales}) > 1:
            parts = [{**part, _UP: part[_UP] * scale} for part, scale in zip(parts, scales, strict=True)]
        downs: list[Tensor] = []
        columns = []
        for part in parts:
            n = next((n for n, down in enumerate(downs) if torch.equal(down, part[_DOWN])), len(downs))
            downs += [part[_DOWN]] if n == len(downs) else []
            columns.append(sum(map(len, downs[:n])))
        down = torch.cat(downs)
        pads = [(start, len(down) - start - len(part[_DOWN])) for start, part in zip(columns, parts, strict=True)]
        up = torch.cat([nn.functional.pad(part[_UP], pad) for part, pad in zip(parts, pads, strict=True)])
        alpha = len(down) * (scales[0] if len({*scales}) == 1 else 1.0)
        return {_DOWN: down, _UP: up, "alpha": parts[0]["alpha"].new_tensor(alpha)}

    def layers(self, tensors: Mapping[str, Tensor], kinds: Mapping[str, LayerKind]) -> dict[str, ForeignLayer]:
        """Where some layers have the change of a bias, that of the others is zero: all have a bias, or none."""
        found = super().layers(tensors, kinds)
        if any(_DIFF in layer.tensors for layer in found.values()):
            for path, layer in found.items():
                if layer.tensors.keys().isdisjoint({_DIFF, _BIAS}) and not layer.kind.lookup:
                    dtype = next(t.dtype for local, t in layer.tensors.items() if local in self.factors)
                    zeros = torch.zeros(layer.kind.out_features, dtype=dtype)
                    found[path] = replace(layer, tensors={**layer.tensors, _DIFF: zeros})
        return found

    def config(self, layers: Mapping[str, ForeignLayer], metadata: Mapping[str, str], **fields: Any) -> Any:
        """B has a bias if the file has one."""
        found = super().config(layers, metadata, **fields)
        bias = any(layer.tensors.keys() & {_BIAS, _DIFF} for layer in layers.values())
        return found.replace(lora_bias=True) if bias else found

    def tensors(self, layer: ForeignLayer, config: Any) -> dict[str, Tensor]:
        """PEFT's names and shapes. A Tucker convolution's `mid (r, r, *kernel)`: `A' = mid x A`, `(r, in, *kernel)`."""
        values, rank = super().tensors(layer, config), self.rank(layer.tensors)
        if values.pop(_MID, None) is not None and _DOWN in values:
            mid, down = layer.wide(_MID), layer.wide(_DOWN)
            if mid.shape[:2] != (rank, rank) or down[0].numel() != down.shape[1]:
                raise CheckpointError(
                    f"{layer.keys[_MID]!r} of shape {tuple(mid.shape)} does not go with the factor of shape "
                    f"{tuple(down.shape)}: a Tucker core is (r, r, kernel), and its factor (r, in)."
                )
            values[_DOWN] = torch.einsum("mn...,nj->mj...", mid, down.flatten(1))
        if _DIFF in values:
            values |= _with_bias(values, values.pop(_DIFF), config.scaling)
        for local, shape in ((_DOWN, layer.kind.down_shape(rank)), (_UP, layer.kind.up_shape(rank))):
            if local in values and values[local].flatten(1).shape == (shape[0], math.prod(shape[1:])):
                values[local] = values[local].reshape(shape)  # `(r, in)` and `(r, in, 1, 1)` are one
        return values


def _with_bias(values: Mapping[str, Tensor], diff: Tensor, scaling: float) -> dict[str, Tensor]:
    """The factors, with the bias of B that makes this change of the layer's bias, in one dtype that rounds nothing."""
    if not scaling:
        raise UnsupportedError("A change of a bias cannot be that of a B that is scaled by 0.")
    held = {name: values[name] for name in (_DOWN, _UP, _BIAS) if name in values}
    dtypes = {tensor.dtype for tensor in (diff, *held.values())}
    if scaling != 1 or any(dtype.itemsize == 1 for dtype in dtypes):
        dtypes = {torch.float64 if torch.float64 in dtypes else torch.float32}
    dtype = functools.reduce(torch.promote_types, dtypes)
    found = {name: tensor.to(dtype) for name, tensor in held.items()}
    return {**found, _BIAS: diff.to(dtype) / scaling + found.get(_BIAS, 0)}
