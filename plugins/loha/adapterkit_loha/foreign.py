"""LoHa files of LyCORIS and kohya-ss."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

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
from adapterkit_loha.config import LoHaConfig
from adapterkit_loha.layer import with_kernel

_FACTORS = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
_CORES = ("hada_t1", "hada_t2")
_CONVOLUTIONS: Mapping[int, type[nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_LOCALS = frozenset({*_FACTORS, *_CORES, "alpha", "scalar", "dora_scale"})


def readings(key: str) -> Iterator[tuple[str, str]]:
    """What a key may mean: `lora_unet_conv_in.hada_w1_a` is `hada_w1_a` of the module `lora_unet_conv_in`."""
    module, _, local = key.rpartition(".")
    if local in _LOCALS:
        yield module, local


def read(tensors: Mapping[str, Tensor], layers: Mapping[str, LayerKind]) -> ForeignLayers:
    """The layers that the file has factors for.

    Raises:
        UnsupportedError: they are decomposed (DoRA).
    """
    found = ForeignLayers.read(tensors, layers, readings).keep(lambda keys: not keys.keys().isdisjoint(_FACTORS))
    for keys in found.keys.values():
        if "dora_scale" in keys:
            raise UnsupportedError(f"{keys['dora_scale']!r}: this LoHa is weight-decomposed (DoRA), which is no LoHa.")
    return found


def config_of(tensors: Mapping[str, Tensor], layers: Mapping[str, LayerKind]) -> LoHaConfig | None:
    """The config of a file without one: ranks from shapes, alphas from tensors, else the ranks."""
    found = read(tensors, layers)
    if not found.keys:
        return None
    ranks = {path: _rank(found, path) for path in found.keys}
    r, rank_pattern = with_patterns(ranks)
    alphas = {path: found.number(path, "alpha") or float(rank) for path, rank in ranks.items()}
    alpha, alpha_pattern = with_patterns(alphas)
    cores = {_has_cores(found, path) for path in found.keys if _kernel(found.kinds[path])}
    return LoHaConfig(
        target_modules=found.target_modules,
        modules_to_save=None,
        r=r,
        alpha=alpha,
        rank_pattern=rank_pattern,
        alpha_pattern=alpha_pattern,
        use_effective_conv2d=cores == {True},
    )


def renamed(config: LoHaConfig, tensors: Mapping[str, Tensor], layers: Mapping[str, LayerKind]) -> Mapping[str, Tensor]:
    """The tensors under PEFT's names and in its shapes, with what the config does not say folded in, exactly.

    `scalar` multiplies `w1_a`, and so does `(alpha / r) / scaling` where the file's alpha is not the config's.
    """
    found = read(tensors, layers)
    if all(_is_native(found, path) for path in found.keys):
        return tensors
    result = found.rest
    for path, keys in found.keys.items():
        values = {local: tensors[key] for local, key in keys.items() if local in _FACTORS + _CORES}
        if not _is_native(found, path):
            values = _in_form(found, path, config, values)
        result |= {f"{path}.{local}": tensor for local, tensor in values.items()}
    return result


def layers_of(tensors: Mapping[str, Tensor]) -> dict[str, nn.Module]:
    """The layers that the factors are for, on the meta device: linear ones, or convolutions where there are cores."""
    groups: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        for module, local in readings(key):
            groups.setdefault(module, {})[local] = tensor
    made = {module: _layer_of(group) for module, group in groups.items() if not group.keys().isdisjoint(_FACTORS)}
    return {module: layer for module, layer in made.items() if layer is not None}


def _layer_of(tensors: Mapping[str, Tensor]) -> nn.Module | None:
    """The layer with factors of these shapes; a size whose factor is not there is 1."""
    factors = {local: t for local, t in tensors.items() if local in _FACTORS + _CORES}
    if any(t.dim() < 2 or 0 in t.shape for t in factors.values()):
        return None
    cores = all(core in factors for core in _CORES)
    outputs = next((factors[n].shape[1 if cores else 0] for n in ("hada_w1_a", "hada_w2_a") if n in factors), 1)
    inputs = next((factors[n].shape[1] for n in ("hada_w1_b", "hada_w2_b") if n in factors), 1)
    kernel = factors["hada_t1"].shape[2:] if cores else ()
    if len(kernel) not in _CONVOLUTIONS:
        return nn.Linear(inputs, outputs, bias=False, device="meta")
    cls = _CONVOLUTIONS[len(kernel)]
    return cls(inputs, outputs, tuple(kernel), bias=False, device="meta")


def written(
    config: LoHaConfig, tensors: Mapping[str, Mapping[str, Tensor]], layers: Mapping[str, LayerKind]
) -> ForeignFile:
    """The layers under LyCORIS's names, which are PEFT's, each with its alpha; cores without PEFT's dimension of 1."""
    table: PatternTable = PatternTable(config.alpha_pattern, "alpha_pattern")
    found = {}
    for path, held in tensors.items():
        kernel = _kernel(layers[path])
        values = {n: t.reshape(*t.shape[:2], *kernel) if n in _CORES else t for n, t in held.items()}
        alpha: float = table.get(path, config.alpha)
        found[path] = values | {"alpha": torch.tensor(alpha, dtype=torch.float32)}
    return ForeignFile(found)


def _is_native(found: ForeignLayers, path: str) -> bool:
    return found.is_native(path) and found.keys[path].keys().isdisjoint(("alpha", "scalar"))


def _in_form(found: ForeignLayers, path: str, config: LoHaConfig, values: dict[str, Tensor]) -> dict[str, Tensor]:
    kernel = _kernel(found.kinds[path])
    if _has_cores(found, path):
        if config.use_effective_conv2d and kernel:
            shape = (*kernel, 1) if len(kernel) == 1 else kernel
            values |= {core: _core(found, path, core).reshape(*values[core].shape[:2], *shape) for core in _CORES}
        else:
            values = _flat(found, path)
    scale = found.number(path, "scalar")
    scale = 1.0 if scale is None else scale
    alpha = found.number(path, "alpha")
    if alpha is not None:
        own: float = PatternTable(config.alpha_pattern, "alpha_pattern").get(path, config.alpha)
        scale *= (alpha or _rank(found, path)) / (own or 1.0)
    if scale != 1.0 and "hada_w1_a" in values:
        values["hada_w1_a"] = _wide(values["hada_w1_a"]) * scale
    return values


def _flat(found: ForeignLayers, path: str) -> dict[str, Tensor]:
    """A convolution's core worked into `B (r, in * kernel)`: the same `dW` for a config without effective ones."""
    values = {}
    for n, core in ((1, "hada_t1"), (2, "hada_t2")):
        up, down = found.matrix(path, f"hada_w{n}_a"), found.matrix(path, f"hada_w{n}_b")
        if up is not None and down is not None:
            values[f"hada_w{n}_a"] = up.t()
            values[f"hada_w{n}_b"] = with_kernel(_wide(_core(found, path, core)), _wide(down))
    return values


def _core(found: ForeignLayers, path: str, core: str) -> Tensor:
    tensor, kind, rank = found.matrix(path, core), found.kinds[path], _rank(found, path)
    kernel = kind.down_shape(rank)[2:]
    assert tensor is not None
    if tensor.shape[:2] != (rank, rank) or tensor.numel() != rank * rank * math.prod(kernel):
        raise CheckpointError(
            f"{found.keys[path][core]!r} has shape {tuple(tensor.shape)}; the core at the {kind.name} {path!r} is "
            f"{(rank, rank, *kernel)}."
        )
    return tensor


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _has_cores(found: ForeignLayers, path: str) -> bool:
    return all(core in found.keys[path] for core in _CORES)


def _kernel(kind: LayerKind) -> tuple[int, ...]:
    """The kernel of a convolution that PEFT's effective form is for, else `()`."""
    kernel = kind.down_shape(1)[2:]
    return kernel if math.prod(kernel) > 1 else ()


def _rank(found: ForeignLayers, path: str) -> int:
    """Of `w_b (r, in)`, else of `w_a`: `(r, out)` beside a core, `(out, r)` without one."""
    for local in ("hada_w1_b", "hada_w2_b"):
        factor = found.matrix(path, local)
        if factor is not None:
            return factor.shape[0]
    local = next(name for name in ("hada_w1_a", "hada_w2_a") if name in found.keys[path])
    factor = found.matrix(path, local)
    assert factor is not None
    return factor.shape[0 if _has_cores(found, path) else 1]
