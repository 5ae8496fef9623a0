"""AdaLoRA: a budget of ranks that moves between the layers while it trains (Zhang et al. 2023, arXiv 2303.10512).

`dW = s B diag(E) A`: the penalty `|A A^T - I| + |B^T B - I|` keeps A `(r, in)` and B `(out, r)` near to orthogonal.
Directions of low importance, `|p dL/dp|` smoothed over the steps, have E set to 0.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import adapterkit as ak

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class AdaLoraConfig(ak.AdapterConfig):
    """From `init_r` directions a layer to `target_r` on average, from step `tinit` to `total_step - tfinal`."""

    method, not_in_files = "adalora", ()
    not_implemented = {"r": ..., "init_lora_weights": ...}

    target_r: ak.Rank = 8
    init_r: ak.Rank = 12
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5
    total_step: int | None = None
    lora_alpha: float = 8
    lora_dropout: ak.Dropout = 0.0
    rank_pattern: Mapping[str, Any] | None = None


class AdaLoraLayer(ak.LowRankLayer):
    """A file has the directions that are left, and a training's state what the steps remember."""

    up_factor = ("lora_B",)

    def setup(self, target: ak.Target, config: AdaLoraConfig) -> None:
        r = len((target.file or {}).get("lora_E", range(config.init_r)))
        self.dropout, self.scaling = config.lora_dropout, config.lora_alpha / (config.init_r + 1e-5)
        self.lora_A = target.new(r, target.in_features, init=lambda a: a.normal_(std=0.02))
        self.lora_B = target.new(target.out_features, r, init=lambda b: b.normal_(std=0.02))
        self.lora_E = target.new(r, 1)
        for name, p in [*self.named_parameters()]:
            averages = p.new_zeros(2, *p.shape, device=target.device)
            self.register_buffer(f"{name}_averages", averages, persistent=False)
        self.register_buffer("lora_mask", torch.ones_like(self.lora_E, device=target.device), persistent=False)

    def factors(self) -> ak.Factors:
        return ak.Factors(self.lora_B, self.lora_A, scale=self.scaling, mid=self.lora_E.flatten())

    def importance(self) -> Tensor:
        """Of each direction: the mean importance times the mean uncertainty of its entries."""
        a, b, e = (self.get_buffer(f"lora_{name}_averages").prod(0) for name in "ABE")
        return e.flatten() + a.mean(1) + b.mean(0)


class AdaLoraShared(ak.Shared):
    """The penalty, and the step that moves the budget."""

    config: AdaLoraConfig

    def penalty(self, layers: Mapping[str, Any]) -> Tensor:
        matrices = [m for layer in layers.values() for m in (layer.lora_A, layer.lora_B.T)]
        apart = [(m @ m.T - torch.eye(len(m)).to(m)).norm() for m in matrices]
        return self.config.orth_reg_weight * torch.stack(apart).mean()

    @torch.no_grad()
    def step(self, number: int, layers: Mapping[str, Any]) -> None:
        """Smooth the importances; at every `deltaT`-th step choose the directions again; switch the others off."""
        c, held = self.config, list(layers.values())
        if c.total_step is None:
            raise ak.ConfigError("AdaLoRA's budget follows the number of steps of the training: set total_step.")
        last = c.total_step - c.tfinal
        for layer in held if number < last else ():
            for name, p in layer.named_parameters():
                mean, spread = layer.get_buffer(f"{name}_averages")
                mean.lerp_((p * p.grad).abs(), 1 - c.beta1)
                spread.lerp_(((p * p.grad).abs() - mean).abs(), 1 - c.beta2)
        if number == last or (c.tinit < number < last and number % c.deltaT == 0):
            scores, end = [layer.importance() for layer in held], c.target_r * len(held)
            left, start = 1 - (number - c.tinit) / (last - c.tinit), sum(map(len, scores))
            threshold = torch.cat(scores).kthvalue(start - int((start - end) * left**3 + end))[0]
            for layer, score in zip(held, scores, strict=True):
                layer.lora_mask.copy_((score > threshold)[:, None])
                layer.lora_E.mul_(layer.lora_mask)
        for layer in held if number > last else ():
            layer.lora_E.mul_(layer.lora_mask)


class AdaLoraPlugin(ak.Plugin):
    """A file has the directions that are on, and `rank_pattern` says which those are, as PEFT needs it."""

    config, layer, shared, prefix = AdaLoraConfig, AdaLoraLayer, AdaLoraShared, "lora_"

    def to_file(self, config: AdaLoraConfig, tensors: Tensors) -> tuple[AdaLoraConfig, Tensors]:
        """All, where all are on or all are off (a new adapter)."""
        masks = {key: (t != 0).flatten() for key, t in tensors.items() if key.endswith(".lora_E")}
        if all(mask.all() for mask in masks.values()) or not any(mask.any() for mask in masks.values()):
            return config, tensors
        written = {}
        for key, t in tensors.items():
            on = masks[key[:-1] + "E"]
            written[key] = t[:, on] if key.endswith("B") else t[on]
        return config.replace(rank_pattern={key: mask.tolist() for key, mask in masks.items()}), written


plugin = AdaLoraPlugin()
