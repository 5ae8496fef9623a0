"""mlx-lm's folders: `adapter_config.json` with its own fields, and `adapters.safetensors` with transposed factors."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from adapterkit.contract import AdapterConfig, exactly
from adapterkit.errors import CheckpointError, UnsupportedError, warn
from adapterkit.formats.layouts import CONFIG_FILE, AdapterFiles
from adapterkit.kinds import LayerKind

MLX_WEIGHTS = "adapters.safetensors"
_PARAMETERS = "lora_parameters"
_DOWN, _UP, _MAGNITUDE = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"
_TABLE = {_DOWN: "lora_embedding_A", _UP: "lora_embedding_B"}
# mlx-lm's names, for `W + scale (a b)^T` with a of (in, r) and b of (r, out); m has the lengths of the rows of a DoRA.
_NAMES = {"lora_a": _DOWN, "lora_b": _UP, "m": _MAGNITUDE}
_FIRST = next(iter(_NAMES))
# What tables of embeddings are called, where there is no model to ask.
_EMBEDDINGS = ("embed_tokens", "word_embeddings", "tok_embeddings", "embed_in", "wte")
# A layer of a stack: its number, and its path below.
_IN_STACK = re.compile(r"^(?:.+\.)?(?:layers|h|blocks)\.(\d+)\.(.+)$")


def from_mlx(files: AdapterFiles, layers: Mapping[str, LayerKind] | None) -> AdapterFiles:
    """Turn LoRA and DoRA of mlx-lm into PEFT's: `alpha = scale * r`, since its scale is not divided by the rank.

    mlx-vlm calls the factors `A` and `B`, and the scale alpha. The keys tell whose a folder is, because converted
    configs have PEFT's fields beside mlx-lm's. Files of other programs are given back as they are.

    Raises:
        CheckpointError: no layer has factors, or the config has no scale.
        UnsupportedError: weights that were trained in full, quantised factors, or a file without its config.
    """
    config, endings = files.config, {key.rpartition(".")[2] for key in files.tensors}
    if config is None and _FIRST in endings:
        raise UnsupportedError(
            f"{files.folder} has mlx-lm's names, and its scale is in {CONFIG_FILE}. Give the folder that holds "
            f"both; a checkpoint's weights have to be called {MLX_WEIGHTS} there."
        )
    if config is None or ("peft_type" in config and _FIRST not in endings):
        return files
    if config.get("fine_tune_type") == "full":
        raise UnsupportedError(
            f"{files.folder}: mlx-lm trained the weights themselves here (fine_tune_type: full), so it is no "
            "adapter. Fuse it there (mlx_lm.fuse); ak.extract_files(base, fused) makes an adapter of it."
        )
    if _PARAMETERS in config:
        return _read(files, layers, "mlx-lm", _NAMES, config[_PARAMETERS])
    if {"rank", "alpha"} <= config.keys() and {"A", "B"} <= endings:
        given = {"scale": config["alpha"], "dropout": config.get("dropout", 0.0)}
        return _read(files, layers, "mlx-vlm", {"A": _DOWN, "B": _UP}, given)
    return files


def _read(
    files: AdapterFiles,
    layers: Mapping[str, LayerKind] | None,
    program: str,
    names: Mapping[str, str],
    parameters: Any,
) -> AdapterFiles:
    """The folder as PEFT's.

    Args:
        names: PEFT's names by the program's.
        parameters: the scale and the dropout.
    """
    tensors, ranks = dict[str, Tensor](), dict[str, int]()
    first = next(iter(names))
    for key, tensor in files.tensors.items():
        path, _, name = key.rpartition(".")
        own = names.get(name)
        if name.endswith(("_scales", "_biases")) or (own in _TABLE and tensor.dim() != 2):
            raise UnsupportedError(
                f"{files.folder}: {key!r} of shape {tuple(tensor.shape)} is quantised, or of all experts of a layer, "
                "which adapterkit does not read. Fuse it with mlx_lm.fuse."
            )
        if own is None or f"{path}.{first}" not in files.tensors:
            tensors[key] = tensor
            continue
        table = layers[path].lookup if layers and path in layers else path.rpartition(".")[2] in _EMBEDDINGS
        if own in _TABLE and table:
            own = _TABLE[own]
        tensors[f"{path}.{own}"] = tensor.t() if own != _MAGNITUDE else tensor
        ranks[path] = files.tensors[f"{path}.{first}"].shape[-1]
    config = _peft_config(files, parameters, ranks, layers)
    return dataclasses.replace(files, config=config).read_as(program, tensors)


def _peft_config(
    files: AdapterFiles, given: Any, ranks: Mapping[str, int], layers: Mapping[str, LayerKind] | None
) -> dict[str, Any]:
    """The fields of PEFT's config for these layers.

    Raises:
        CheckpointError: there are none, or the parameters have no scale.
    """
    config = files.config or {}
    scale, alpha = (given.get(name) for name in ("scale", "alpha")) if isinstance(given, Mapping) else (None, None)
    if not ranks or isinstance(scale, bool) or not isinstance(scale, int | float):
        raise CheckpointError(
            f"{files.folder}: its config is mlx-lm's, and its {_PARAMETERS!r} have no number 'scale', or no layer has "
            "factors."
        )
    rank = Counter(ranks.values()).most_common(1)[0][0]
    if isinstance(alpha, int | float) and alpha != rank:
        scale = scale * alpha / rank
        warn(
            f"{files.folder}: its config has an alpha of {alpha:g} beside the scale, as mlx-lm until 2024 wrote it. It "
            f"multiplied the scale by alpha / rank, so {scale:g} is taken. Later ones do not know alpha; if one of "
            f"them trained this, take it out of {CONFIG_FILE}."
        )
    base = config.get("model", config.get("base_model_name_or_path"))
    others = {path: own for path, own in ranks.items() if own != rank}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base if isinstance(base, str) else None,
        "target_modules": exactly(ranks, layers or ()),
        "r": rank,
        "lora_alpha": scale * rank,
        "rank_pattern": others,
        "alpha_pattern": {path: scale * own for path, own in others.items()},
        "lora_dropout": given.get("dropout", 0.0),
        "use_dora": any(key.endswith(".m") for key in files.tensors),
    }


def mlx_files(
    config: AdapterConfig,
    tensors: Mapping[str, Mapping[str, Tensor]],
    kinds: Mapping[str, LayerKind],
    paths: Collection[str],
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config and the tensors of an adapter as mlx-lm has them.

    It knows one rank and one scale: lower ranks are padded with zeros, and other scales are folded into b.

    Args:
        tensors: by path, and by PEFT's names.
        paths: of the model's modules, as far as they are known: mlx-lm counts the layers from the end.

    Raises:
        UnsupportedError: it is not LoRA or DoRA of linear layers and embeddings.
    """
    scales: dict[str, float] = {}
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    named: dict[str, Tensor] = {}
    for path, held in tensors.items():
        down, up = (held.get(name, held.get(_TABLE[name])) for name in (_DOWN, _UP))
        beside = held.keys() - {_DOWN, _UP, *_TABLE.values(), _MAGNITUDE}
        if config.type_in_files() != "LORA" or beside or down is None or up is None or down.dim() > 2:
            raise UnsupportedError(
                f"mlx-lm has LoRA and DoRA of linear layers and embeddings alone, and {path!r} is a {kinds[path].name} "
                f"with {', '.join(sorted(held))}. Convert the adapter with to='lora', or keep PEFT's format."
            )
        if _MAGNITUDE in held and kinds[path].lookup:
            raise UnsupportedError(
                f"{path!r}: the DoRA of an embedding in mlx-lm divides by other lengths than PEFT's. Leave it out."
            )
        own: Any = config.at(path)
        scales[path] = own.lora_alpha / (math.sqrt(down.shape[0]) if own.use_rslora else down.shape[0])
        factors[path] = (down, up)
        named |= {f"{path}.m": held[_MAGNITUDE]} if _MAGNITUDE in held else {}
    rank = max(down.shape[0] for down, _ in factors.values())
    scale = Counter(scales.values()).most_common(1)[0][0]
    for path, (down, up) in factors.items():
        scaled = up if scales[path] == scale else (up.double() * (scales[path] / scale)).to(up.dtype)
        missing = rank - down.shape[0]
        named[f"{path}.lora_a"] = F.pad(down, (0, 0, 0, missing)).t()
        named[f"{path}.lora_b"] = F.pad(scaled, (0, missing)).t()
    numbers = [int(found[1]) for found in map(_IN_STACK.fullmatch, paths) if found]
    parameters = {
        "rank": rank,
        "scale": scale,
        "dropout": getattr(config, "lora_dropout", 0.0),
        "keys": sorted({_IN_STACK.sub(r"\2", path) for path in factors}),
    }
    dora = any(key.endswith(".m") for key in named)
    return {
        "fine_tune_type": "dora" if dora else "lora",
        "model": config.base_model_name_or_path,
        "num_layers": max(numbers, default=-2) + 1,
        "lora_parameters": parameters,
    }, named
