"""LoRA files of other programs: kohya-ss's, LyCORIS's (LoCon) and diffusers', old and new."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from adapterkit import (
    CheckpointError,
    ForeignFile,
    ForeignLayers,
    LayerKind,
    PatternTable,
    UnsupportedError,
    with_patterns,
)
from adapterkit_lora.config import LoraConfig

# Where diffusers keeps the fields of PEFT's config, each under the part of the pipeline: "unet.lora_alpha".
METADATA = "lora_adapter_metadata"
_DOWN, _UP, _MID = "lora_A.weight", "lora_B.weight", "lora_mid"
_TABLE = ("lora_embedding_A", "lora_embedding_B")
_MAGNITUDES = ("dora_scale", "lora_magnitude_vector", "lora_magnitude_vector.weight")
_LOCALS = {
    **{name: name for name in (_DOWN, _UP, "lora_B.bias", *_TABLE, "alpha", "scalar", *_MAGNITUDES)},
    **{f"{name}.weight": own for name, own in (("lora_down", _DOWN), ("lora_up", _UP), ("lora_mid", _MID))},
    **{f"{name}.down.weight": _DOWN for name in ("lora", "lora_linear_layer")},
    **{f"{name}.up.weight": _UP for name in ("lora", "lora_linear_layer")},
    **{f"{name}.alpha": "alpha" for name in ("lora", "lora_linear_layer")},
}
_LOCAL = re.compile(rf"(.+?)\.({'|'.join(re.escape(n) for n in sorted(_LOCALS, key=len, reverse=True))})")
_OF_ATTENTION = re.compile(r"(.+?)(?:\.processor)?\.to_(q|k|v|out)_lora\.(down\.weight|up\.weight|alpha)")
_OF_PROCESSOR = {"down.weight": _DOWN, "up.weight": _UP, "alpha": "alpha"}


def readings(key: str) -> Iterator[tuple[str, str]]:
    """What a key may mean: a module's name, and a name of PEFT's, `alpha`, `scalar` or `lora_mid`.

    `lora_unet_conv_in.lora_down.weight`, `unet.mid.attn1.processor.to_q_lora.down.weight`,
    `text_encoder.layers.0.self_attn.q_proj.lora_linear_layer.up.weight`, `unet.conv_in.lora_A.weight`.
    """
    old = _OF_ATTENTION.fullmatch(key)
    if old is not None:
        for layer in {"out": ("to_out.0", "out_proj", "to_out")}.get(old[2], (f"to_{old[2]}", f"{old[2]}_proj")):
            yield f"{old[1]}.{layer}", _OF_PROCESSOR[old[3]]
    plain = _LOCAL.fullmatch(key)
    if plain is not None:
        yield plain[1], _LOCALS[plain[2]]
        yield plain[1].replace(".processor.", "."), _LOCALS[plain[2]]


def read(tensors: Mapping[str, Tensor], layers: Mapping[str, LayerKind]) -> ForeignLayers:
    """The layers that the file has factors for.

    Raises:
        UnsupportedError: it is DoRA.
    """
    found = ForeignLayers.read(tensors, layers, readings).keep(lambda keys: not keys.keys().isdisjoint(_FACTORS))
    for keys in found.keys.values():
        magnitude = next((keys[name] for name in _MAGNITUDES if name in keys), None)
        if magnitude is not None:
            raise UnsupportedError(
                f"{magnitude!r}: this is DoRA, which scales the columns of the weight too, not LoRA."
            )
    return found


def layers_of(tensors: Mapping[str, Tensor]) -> dict[str, nn.Module]:
    """The layers that the factors are for, on the meta device; `readings` says what their keys mean without a model."""
    groups: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        found = list(readings(key))
        if found:
            module, local = next((r for r in found if ".processor." not in r[0]), found[0])
            groups.setdefault(module, {})[local] = tensor
    made = {module: _layer_of(group) for module, group in groups.items() if not group.keys().isdisjoint(_FACTORS)}
    return {module: layer for module, layer in made.items() if layer is not None}


def _layer_of(tensors: Mapping[str, Tensor]) -> nn.Module | None:
    """The layer with factors of these shapes; a size whose factor is not there is 1."""
    table, embedded = (tensors.get(name) for name in _TABLE)
    down, up, mid = (tensors.get(name) for name in (_DOWN, _UP, _MID))
    if any(t is not None and (t.dim() < 2 or 0 in t.shape) for t in (table, embedded, down, up, mid)):
        return None
    if table is not None or embedded is not None:
        rows, dim = (1 if table is None else table.shape[1]), (1 if embedded is None else embedded.shape[0])
        return nn.Embedding(rows, dim, device="meta")
    inputs, outputs = (1 if down is None else down.shape[1]), (1 if up is None else up.shape[0])
    kernel = mid.shape[2:] if mid is not None else () if down is None else down.shape[2:]
    if len(kernel) not in _CONVOLUTIONS:
        return nn.Linear(inputs, outputs, bias=False, device="meta")
    groups = 1 if down is None or up is None or mid is not None else down.shape[0] // up.shape[1]
    fits = groups > 0 and inputs % groups == 0 and outputs % groups == 0  # PEFT's factors that cross groups
    groups, cls = groups if fits else 1, _CONVOLUTIONS[len(kernel)]
    return cls(inputs, outputs, tuple(kernel), groups=groups, bias=False, device="meta")


def written(
    naming: str, config: LoraConfig, tensors: Mapping[str, Mapping[str, Tensor]], component: str
) -> ForeignFile:
    """The layers under another program's names, to the bit; the scaling as alphas, or in diffusers' metadata.

    Raises:
        UnsupportedError: the bias of B, or an embedding, which only diffusers' form has a name for.
    """
    if naming == "diffusers":
        fields = {f"{component}.{name}": value for name, value in config.to_dict().items()}
        return ForeignFile(tensors, {METADATA: json.dumps(fields, sort_keys=True)})
    return ForeignFile({path: _renamed_out(naming, config, path, held) for path, held in tensors.items()})


def _renamed_out(naming: str, config: LoraConfig, path: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    other = next((name for name in tensors if name not in (_DOWN, _UP)), None)
    if other is not None:
        raise UnsupportedError(
            f"naming={naming!r} has no name for {other!r} of {path!r}. Keep PEFT's format (naming='peft')."
        )
    down, up = tensors[_DOWN], tensors[_UP]
    # With rsLoRA the same scaling, as an alpha that is divided by the rank; to float32's rounding.
    alpha = config_scaling(config, path, down.shape[0]) * down.shape[0]
    return {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(alpha, dtype=torch.float32)}


_FACTORS = (_DOWN, _UP, *_TABLE)
_CONVOLUTIONS: Mapping[int, type[nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def config_of(
    tensors: Mapping[str, Tensor], layers: Mapping[str, LayerKind], metadata: Mapping[str, str]
) -> LoraConfig | None:
    """The config of a file without one: ranks from shapes; alphas from tensors, else from metadata, else the ranks."""
    found = read(tensors, layers)
    if not found.keys:
        return None
    ranks = {path: _rank(found, path) for path in found.keys}
    base, alphas = _from_metadata(found, metadata)
    r, rank_pattern = with_patterns(ranks)
    for path, rank in ranks.items():
        alpha = found.number(path, "alpha") or alphas.get(path)
        alphas[path] = float(rank) if alpha is None else alpha
    lora_alpha, alpha_pattern = with_patterns(alphas)
    return base.replace(
        target_modules=found.target_modules,
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        modules_to_save=None,
        r=r,
        lora_alpha=lora_alpha,
        rank_pattern=rank_pattern,
        alpha_pattern=alpha_pattern,
        lora_bias=base.lora_bias or any("lora_B.bias" in keys for keys in found.keys.values()),
    )


def renamed(config: LoraConfig, tensors: Mapping[str, Tensor], layers: Mapping[str, LayerKind]) -> Mapping[str, Tensor]:
    """The tensors under PEFT's names, with what the config does not say folded into the factors, exactly.

    `mid (r, r, *kernel)` of a Tucker convolution: `A' = mid x A`, `(r, in, *kernel)`. `scalar` multiplies B, and so
    does `(alpha / r) / scaling` where the file's alpha is not the config's.
    """
    if ForeignLayers.are_native(tensors, layers, (_DOWN, _UP, "lora_B.bias")):
        return tensors
    found = read(tensors, layers)
    extra = {"alpha", "scalar", _MID}  # which no file of PEFT's has
    foreign = [p for p, keys in found.keys.items() if not (found.is_native(p) and extra.isdisjoint(keys))]
    if not foreign:
        return tensors
    result = found.rest
    for path, keys in found.keys.items():
        values = {local: tensors[key] for local, key in keys.items() if local not in ("alpha", "scalar", _MID)}
        if path in foreign:
            values |= _folded(found, path, config)
        result |= {f"{path}.{local}": tensor for local, tensor in values.items()}
    return result


def _folded(found: ForeignLayers, path: str, config: LoraConfig) -> dict[str, Tensor]:
    kind, rank = found.kinds[path], _rank(found, path)
    down, up, mid, table = (found.matrix(path, local) for local in (_DOWN, _UP, _MID, _TABLE[1]))
    scale = found.number(path, "scalar")
    scale = 1.0 if scale is None else scale
    alpha = found.number(path, "alpha")
    if alpha is not None:
        scale *= _scaling(alpha or rank, rank) / (config_scaling(config, path, rank) or 1.0)
    values = {}
    if down is not None:
        down = down if mid is None else _tucker(found, path, mid, down)
        values[_DOWN] = _shaped(down, kind.in_features, kind.down_shape(rank))
    if up is not None:
        values[_UP] = _shaped(_times(up, scale), rank, kind.up_shape(rank))
    if table is not None:
        values[_TABLE[1]] = _times(table, scale)
    return values


def _times(factor: Tensor, scale: float) -> Tensor:
    return factor if scale == 1.0 else _wide(factor) * scale


def _tucker(found: ForeignLayers, path: str, mid: Tensor, down: Tensor) -> Tensor:
    r = down.shape[0]
    if mid.shape[:2] != (r, r) or down[0].numel() != down.shape[1]:
        raise CheckpointError(
            f"{found.keys[path][_MID]!r} of shape {tuple(mid.shape)} does not go with the factor of shape "
            f"{tuple(down.shape)}: a Tucker core is (r, r, kernel), and its factor (r, in)."
        )
    return torch.einsum("mn...,nj->mj...", _wide(mid), _wide(down.flatten(1)))


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _shaped(factor: Tensor, columns: int, shape: tuple[int, ...]) -> Tensor:
    """A factor in the shape of the layer kind: `(r, in)` and `(r, in, 1, 1)` are one; anything else as it is."""
    return factor.reshape(shape) if factor.flatten(1).shape == (shape[0], columns) else factor


def _rank(found: ForeignLayers, path: str) -> int:
    for local, dim in ((_DOWN, 0), (_UP, 1), ("lora_embedding_A", 0), ("lora_embedding_B", 1)):
        factor = found.matrix(path, local)
        if factor is not None:
            return factor.shape[dim]
    raise AssertionError(path)


def _scaling(alpha: float, rank: int) -> float:
    return alpha / rank if rank else 1.0


def config_scaling(config: LoraConfig, path: str, rank: int) -> float:
    """`lora_alpha / r`, or with its root, for a layer of this rank."""
    alpha: float = PatternTable(config.alpha_pattern, "alpha_pattern").get(path, config.lora_alpha)
    return _scaling(alpha, rank) * (math.sqrt(rank) if config.use_rslora else 1.0)


def _from_metadata(found: ForeignLayers, metadata: Mapping[str, str]) -> tuple[LoraConfig, dict[str, float]]:
    """What diffusers wrote into the header: a config, and the alpha of each layer.

    Raises:
        CheckpointError: it is no JSON object.
        UnsupportedError: a field that changes the numbers and is not implemented.
    """
    text = metadata.get(METADATA)
    if text is None:
        return LoraConfig(), {}
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"The header's {METADATA!r} is no valid JSON: {error}.") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"The header's {METADATA!r} must hold a JSON object, not a {type(values).__name__}.")
    fields = _fields_of(found, values)
    config = LoraConfig.from_dict(fields)
    table = PatternTable(config.alpha_pattern, "alpha_pattern")
    return config, {path: float(table.get(path, config.lora_alpha)) for path in found.keys} if fields else {}


def _fields_of(found: ForeignLayers, values: dict[str, Any]) -> dict[str, Any]:
    """The fields for the part of the pipeline that the layers' keys begin with; without such a part, all."""
    parts = {key.partition(".")[0] for keys in found.keys.values() for key in keys.values()}
    prefixes = {part + "." for part in parts if any(name.startswith(part + ".") for name in values)}
    if not prefixes:
        return {name: value for name, value in values.items() if "." not in name}
    prefix = max(prefixes)
    return {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}
