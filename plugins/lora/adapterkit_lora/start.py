"""What A and B of a new LoRA layer begin with: random numbers, or parts of the weight itself (PiSSA, OLoRA)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from adapterkit import CheckpointError, StateError, Target, kaiming
from adapterkit_lora.config import LoraConfig

# What `Target.new` takes.
Init = float | Callable[[Tensor], object]


def first_values(target: Target, config: LoraConfig, scaling: float) -> tuple[Init, Init]:
    """How A and B are filled, as `config.init_lora_weights` says. Where a file's values come, nothing is computed."""
    init = config.init_lora_weights
    if target.file is not None:
        return 0.0, 0.0
    if config.trains_residual:
        return tuple(partial(_copy, value) for value in leading_factors(target, config, scaling))  # type: ignore[return-value]
    if init == "orthogonal":
        return orthogonal(config.r)
    if target.kind.lookup:
        return 0.0 if init else nn.init.normal_, nn.init.normal_
    if init == "gaussian":
        return partial(nn.init.normal_, std=1 / config.r), 0.0
    return kaiming, 0.0 if init else kaiming


def _copy(value: Tensor, parameter: Tensor) -> None:
    parameter.copy_(value.reshape(parameter.shape))


def orthogonal(r: int) -> tuple[Init, Init]:
    """A and B from the odd and the even rows of one orthogonal matrix, so that `B A = 0`."""
    q: Tensor = torch.linalg.qr(torch.randn(r, r))[0]

    def fill_down(parameter: Tensor) -> None:
        columns = parameter[0].numel()
        value = torch.randn(columns, r // 2, device=parameter.device) @ q[0::2].to(parameter.device) / 10
        _copy(value.t(), parameter)

    def fill_up(parameter: Tensor) -> None:
        rows = parameter.shape[0]
        _copy(torch.randn(rows, r // 2, device=parameter.device) @ q[1::2].to(parameter.device) / 10, parameter)

    return fill_down, fill_up


def leading_factors(target: Target, config: LoraConfig, scaling: float) -> tuple[Tensor, Tensor]:
    """`A0 (r, in)` and `B0 (out, r)` that PiSSA or OLoRA takes from the weight.

    PiSSA: `scaling * B0 A0` is the best approximation of W of rank r. OLoRA: `A0, B0` are the leading parts of
    `W = Q R`.
    """
    r, start = config.r, f"init_lora_weights={config.init_lora_weights!r}"
    if target.kind.lookup or len(target.kind.down_shape(1)) > 2:
        raise StateError(
            f"{start} is for linear layers; {target.path!r} is a {target.kind.name}. Leave it out with exclude_modules."
        )
    weight = target.weight()
    if weight.is_meta:
        raise StateError(
            f"{start} needs the weight of {target.path!r}, which is on the meta device. Load the base first."
        )
    if r > min(weight.shape):
        raise StateError(f"{start} takes r <= min(in, out) = {min(weight.shape)} at {target.path!r}, not {r}.")
    if config.init_lora_weights == "olora":
        q, rest = torch.linalg.qr(weight)
        return rest[:r], q[:, :r]
    if config.pissa_iterations is not None:
        u, s, v = torch.svd_lowrank(weight, r, niter=config.pissa_iterations)
        vh = v.t()
    else:
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    root = (s[:r] / scaling).sqrt()
    return root[:, None] * vh[:r], u[:, :r] * root


def to_file(config: LoraConfig, tensors: Mapping[str, Tensor]) -> tuple[LoraConfig, dict[str, Tensor]]:
    """PiSSA and OLoRA as plain LoRA of rank 2 r with the same scaling: `[B, -B0] [A; A0]`."""
    written = {}
    for key, tensor in tensors.items():
        first = tensors.get(key.replace("lora_A.weight", "lora_init_A").replace("lora_B.weight", "lora_init_B"))
        if key.endswith("lora_A.weight") and first is not None:
            written[key] = torch.cat([tensor, first])
        elif key.endswith("lora_B.weight") and first is not None:
            written[key] = torch.cat([tensor, -first], dim=1)
    grow = math.sqrt(2) if config.use_rslora else 2
    plain = config.replace(
        init_lora_weights=True,
        r=2 * config.r,
        lora_alpha=grow * config.lora_alpha,
        rank_pattern={key: 2 * rank for key, rank in config.rank_pattern.items()},
        alpha_pattern={key: grow * alpha for key, alpha in config.alpha_pattern.items()},
    )
    return plain, written


def from_file(config: LoraConfig, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The reverse of `to_file`, for an adapter that is PiSSA or OLoRA here.

    Raises:
        CheckpointError: the file has the trained factors alone, and the start of them was random.
    """
    read = dict(tensors)
    for key, tensor in tensors.items():
        path, found, _ = key.rpartition(".lora_A.weight")
        if not found or tensor.shape[0] != 2 * (rank := config.at(path).r):
            continue
        read[key], read[f"{path}.lora_init_A"] = tensor[:rank], tensor[rank:]
        up = tensors.get(f"{path}.lora_B.weight")
        if up is not None:
            read[f"{path}.lora_B.weight"], read[f"{path}.lora_init_B"] = up[:, :rank], -up[:, rank:]
    if config.pissa_iterations is not None and len(read) == len(tensors):
        raise CheckpointError(
            f"These are the trained factors of init_lora_weights={config.init_lora_weights!r} alone. That start is "
            "random, so it cannot be computed again from the base; save the adapter in its converted form instead."
        )
    return read
