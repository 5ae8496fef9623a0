"""What A and B of LoRA start as: random, orthogonal, or a part of the weight (PiSSA, OLoRA)."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from adapterkit import StateError, Target, kaiming
from adapterkit_lora.config import LoraConfig

# What `Target.new` takes.
Init = float | Callable[[Tensor], object]


def initial_values(target: Target, config: LoraConfig) -> tuple[Init, Init]:
    """How A and B are filled, as `config.init_lora_weights` says."""
    init = config.start
    if config.trains_residual:
        return leading_factors(target, config) if target.file is None else (0.0, 0.0)
    if init == "orthogonal":
        return orthogonal(config.r)
    if target.kind.lookup:
        return 0.0 if init else nn.init.normal_, nn.init.normal_
    if init == "gaussian":
        return partial(nn.init.normal_, std=1 / config.r), 0.0
    return kaiming, 0.0 if init else kaiming


def orthogonal(r: int) -> tuple[Init, Init]:
    """A and B from the odd and the even rows of one orthogonal matrix, so that `B A = 0`."""
    q: Tensor = torch.linalg.qr(torch.randn(r, r))[0]

    def fill_down(parameter: Tensor) -> None:
        value = torch.randn(parameter[0].numel(), r // 2) @ q[0::2] / 10
        parameter.copy_(value.t().reshape(parameter.shape))

    def fill_up(parameter: Tensor) -> None:
        value = torch.randn(len(parameter), r // 2) @ q[1::2] / 10
        parameter.copy_(value.reshape(parameter.shape))

    return fill_down, fill_up


def leading_factors(target: Target, config: LoraConfig) -> tuple[Init, Init]:
    """Fill A and B with `A0 (r, in)` and `B0 (out, r)`, which PiSSA or OLoRA takes from the weight.

    PiSSA: `scaling * B0 A0` is the best approximation of W of rank r. OLoRA: `A0, B0` are the leading parts of
    `W = Q R`.
    """
    r, start = config.r, f"init_lora_weights={config.init_lora_weights!r}"
    if target.kind.lookup or len(target.kind.down_shape(1)) > 2:
        raise StateError(
            f"{start} is for linear layers; {target.path!r} is a {target.kind.name}. Leave it out with exclude_modules."
        )
    sizes = target.out_features, target.in_features
    if r > min(sizes):
        raise StateError(f"{start} takes r <= min(in, out) = {min(sizes)} at {target.path!r}, not {r}.")
    if target.device.type == "meta":  # nothing is filled there
        return 0.0, 0.0
    weight = target.weight()
    if weight.is_meta:
        raise StateError(
            f"{start} needs the weight of {target.path!r}, which is on the meta device. Load the base first."
        )
    if config.start == "olora":
        q, rest = torch.linalg.qr(weight)
        down, up = rest[:r], q[:, :r]
    else:
        if config.pissa_iterations is None:
            u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        else:
            u, s, v = torch.svd_lowrank(weight, r, niter=config.pissa_iterations)
            vh = v.t()
        root = (s[:r] / config.scaling).sqrt()
        down, up = root[:, None] * vh[:r], u[:, :r] * root
    return lambda parameter: parameter.copy_(down), lambda parameter: parameter.copy_(up)
