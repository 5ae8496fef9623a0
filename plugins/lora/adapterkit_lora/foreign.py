"""LoRA files of other programs: kohya-ss's, LyCORIS's (LoCon) and diffusers', old and new."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from adapterkit import CheckpointError, ForeignFile, ForeignLayer, Format, LayerKind, UnsupportedError
from adapterkit_lora.config import LoraConfig

# Where diffusers keeps the fields of PEFT's config, each under the part of the pipeline: "unet.lora_alpha".
METADATA = "lora_adapter_metadata"
_DOWN, _UP, _MID = "lora_A.weight", "lora_B.weight", "lora_mid"
_TABLE = ("lora_embedding_A", "lora_embedding_B")
_OF_ATTENTION = re.compile(r"(.+?)(?:\.processor)?\.to_(q|k|v|out)_lora\.(down\.weight|up\.weight|alpha)")
_OF_PROCESSOR = {"down.weight": _DOWN, "up.weight": _UP, "alpha": "alpha"}
_LAYERS = {"out": ("to_out.0", "out_proj", "to_out")}


class LoraFormat(Format):
    """Keys such as `lora_unet_conv_in.lora_down.weight`, `unet.mid.attn1.processor.to_q_lora.down.weight`.

    And `unet.conv_in.lora_A.weight`, `text_encoder.layers.0.self_attn.q_proj.lora_linear_layer.up.weight`.
    """

    namings = ("kohya", "lycoris", "diffusers")
    factors = frozenset({_DOWN, _UP, *_TABLE})
    names = {  # noqa: RUF012 - a class variable by its base
        "lora_B.bias": "lora_B.bias",
        **{f"{there}.weight": own for there, own in (("lora_down", _DOWN), ("lora_up", _UP), ("lora_mid", _MID))},
        **{f"{part}.{there}": own for part in ("lora", "lora_linear_layer") for there, own in _OF_PROCESSOR.items()},
    }
    refused = dict.fromkeys(
        ("dora_scale", "lora_magnitude_vector", "lora_magnitude_vector.weight"),
        "DoRA, which scales the columns of the weight too, not LoRA",
    )

    def readings(self, key: str) -> Iterator[tuple[str, str]]:
        """See `Format.readings`."""
        if old := _OF_ATTENTION.fullmatch(key):
            for layer in _LAYERS.get(old[2], (f"to_{old[2]}", f"{old[2]}_proj")):
                yield f"{old[1]}.{layer}", _OF_PROCESSOR[old[3]]
        for module, local in super().readings(key):
            yield module.replace(".processor.", "."), local
            yield module, local

    def config(self, layers: Mapping[str, ForeignLayer], metadata: Mapping[str, str]) -> LoraConfig:
        """Ranks come from shapes; alphas from tensors, else from the metadata, else they are the ranks."""
        base = _in_metadata(layers, metadata)
        ranks = {path: _rank(layer) for path, layer in layers.items()}
        alphas = {path: layer.number("alpha") for path, layer in layers.items()}
        for path, rank in ranks.items():
            alphas[path] = alphas[path] or float(rank if base is None else base.at(path).lora_alpha)
        found = LoraConfig.with_values({"r": ranks, "lora_alpha": alphas})
        bias = any("lora_B.bias" in layer.tensors for layer in layers.values())
        if base is None:
            return found.replace(lora_bias=bias)
        names = ("r", "lora_alpha", *LoraConfig.patterns)
        return base.replace(lora_bias=base.lora_bias or bias, **{name: getattr(found, name) for name in names})

    def tensors(self, layer: ForeignLayer, config: LoraConfig) -> dict[str, Tensor]:
        """PEFT's names and shapes. A Tucker convolution's `mid (r, r, *kernel)`: `A' = mid x A`, `(r, in, *kernel)`."""
        kind, rank = layer.kind, _rank(layer)
        scale = layer.scale(rank, config.replace(r=rank).scaling)
        values = {name: t for name, t in layer.tensors.items() if name not in ("alpha", "scalar", _MID)}
        down, up, mid, table = (layer.matrix(local) for local in (_DOWN, _UP, _MID, _TABLE[1]))
        if down is not None:
            down = down if mid is None else _tucker(layer, mid, down)
            values[_DOWN] = _shaped(down, kind.in_features, kind.down_shape(rank))
        if up is not None:
            values[_UP] = _shaped(_times(up, scale), rank, kind.up_shape(rank))
        if table is not None:
            values[_TABLE[1]] = _times(table, scale)
        return values

    def write(
        self,
        naming: str,
        config: LoraConfig,
        tensors: Mapping[str, Mapping[str, Tensor]],
        kinds: Mapping[str, LayerKind],
        component: str,
    ) -> ForeignFile:
        """To the bit; the scaling as alphas, or in diffusers' metadata.

        Raises:
            UnsupportedError: the bias of B, or an embedding, which only diffusers' form has a name for.
        """
        if naming == "diffusers":
            fields = {f"{component}.{name}": value for name, value in config.to_dict().items()}
            return ForeignFile(tensors, {METADATA: json.dumps(fields, sort_keys=True)})
        found = {}
        for path, held in tensors.items():
            if held.keys() - {_DOWN, _UP}:
                raise UnsupportedError(
                    f"naming={naming!r} has no name for {min(held.keys() - {_DOWN, _UP})!r} of {path!r}. Keep PEFT's "
                    "format (naming='peft')."
                )
            alpha = config.at(path).replace(r=len(held[_DOWN])).scaling * len(held[_DOWN])
            found[path] = {
                "lora_down.weight": held[_DOWN],
                "lora_up.weight": held[_UP],
                "alpha": torch.tensor(alpha, dtype=torch.float32),
            }
        return ForeignFile(found)


def _rank(layer: ForeignLayer) -> int:
    for local, dim in ((_DOWN, 0), (_UP, 1), (_TABLE[0], 0), (_TABLE[1], 1)):
        factor = layer.matrix(local)
        if factor is not None:
            return factor.shape[dim]
    raise AssertionError(layer.path)


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _times(factor: Tensor, scale: float) -> Tensor:
    return factor if scale == 1.0 else _wide(factor) * scale


def _tucker(layer: ForeignLayer, mid: Tensor, down: Tensor) -> Tensor:
    r = down.shape[0]
    if mid.shape[:2] != (r, r) or down[0].numel() != down.shape[1]:
        raise CheckpointError(
            f"{layer.keys[_MID]!r} of shape {tuple(mid.shape)} does not go with the factor of shape "
            f"{tuple(down.shape)}: a Tucker core is (r, r, kernel), and its factor (r, in)."
        )
    return torch.einsum("mn...,nj->mj...", _wide(mid), _wide(down.flatten(1)))


def _shaped(factor: Tensor, columns: int, shape: tuple[int, ...]) -> Tensor:
    """A factor in the shape of the layer kind: `(r, in)` and `(r, in, 1, 1)` are one; anything else as it is."""
    return factor.reshape(shape) if factor.flatten(1).shape == (shape[0], columns) else factor


def _in_metadata(layers: Mapping[str, ForeignLayer], metadata: Mapping[str, str]) -> LoraConfig | None:
    """The config that diffusers wrote into the header, for the part of the pipeline that the layers' keys begin with.

    Raises:
        CheckpointError: it is not a JSON object.
        UnsupportedError: a field that changes the numbers and is not implemented.
    """
    text = metadata.get(METADATA)
    if text is None:
        return None
    try:
        values: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"The header's {METADATA!r} is no valid JSON: {error}.") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"The header's {METADATA!r} must hold a JSON object, not a {type(values).__name__}.")
    parts = {key.partition(".")[0] + "." for layer in layers.values() for key in layer.keys.values()}
    part = max((part for part in parts if any(name.startswith(part) for name in values)), default=None)
    if part is None:
        fields = {name: value for name, value in values.items() if "." not in name}
    else:
        fields = {name.removeprefix(part): value for name, value in values.items() if name.startswith(part)}
    return LoraConfig.from_dict(fields) if fields else None
