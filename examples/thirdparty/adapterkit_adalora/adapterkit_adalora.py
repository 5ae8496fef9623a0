"""AdaLoRA: a budget of ranks that moves between the layers while it trains (Zhang et al. 2023, arXiv 2303.10512).

`dW = s B diag(E) A`, like a singular value decomposition: the penalty `|A A^T - I| + |B^T B - I|` keeps A `(r, in)` and
B `(out, r)` near to orthogonal. Directions of low importance, `|p dL/dp|` smoothed over the steps, have E set to 0.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import adapterkit as ak


@dataclass(frozen=True, kw_only=True)
class AdaLoraConfig(ak.AdapterConfig):
    """From `init_r` directions a layer to `target_r` on average, from step `tinit` to `total_step - tfinal`."""

    method, not_in_files = "adalora", ()
    not_implemented = {"r": 8, "init_lora_weights": True, "qalora_group_size": 16, "megatron_core": "megatron.core"}  # noqa: RUF012

    target_r: int = 8
    init_r: int = 12
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5
    total_step: int | None = None
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    rank_pattern: Mapping[str, Any] | None = None


class AdaLoraLayer(ak.LowRankLayer):
    """A file has the directions that are left, so its own tensors say how many there are."""

    up_factor = ("lora_B",)

    def setup(self, target: ak.Target, config: AdaLoraConfig) -> None:
        """A and B normal, E zero."""
        r = len(target.file["lora_E"]) if target.file and "lora_E" in target.file else config.init_r
        init = partial(nn.init.normal_, std=0.02)
        self.lora_A, self.lora_E = target.new(r, target.in_features, init=init), target.new(r, 1)
        self.lora_B = target.new(target.out_features, r, init=init)
        self.dropout = config.lora_dropout
        # In no file, but in the state of a training: what the steps remember.
        for name, p in list(self.named_parameters()):
            for average in ("mean", "spread"):
                zeros = torch.zeros(p.shape, dtype=p.dtype, device=target.device)
                self.register_buffer(f"{name}_{average}", zeros, persistent=False)
        mask = torch.ones(r, 1, dtype=torch.bool, device=target.device)
        self.register_buffer("lora_mask", mask, persistent=False)

    def factors(self) -> ak.Factors:
        """With PEFT's scaling."""
        return ak.Factors(
            self.lora_B, self.lora_A * self.lora_E, None, self.config.lora_alpha / (self.config.init_r + 1e-5)
        )


class AdaLoraShared(ak.Shared):
    """The penalty, and the step that moves the budget."""

    def penalty(self, layers: Mapping[str, Any]) -> Tensor:
        """The mean distance of `A A^T` and `B^T B` from the identity."""
        products = [m @ m.T for layer in layers.values() for m in (layer.lora_A, layer.lora_B.T)]
        mean: Tensor = torch.stack([(p - torch.eye(len(p)).to(p)).norm() for p in products]).mean()
        return mean * float(self.config.orth_reg_weight)

    @torch.no_grad()
    def step(self, number: int, layers: Mapping[str, Any]) -> None:
        """Smooth the importances; at every `deltaT`-th step choose the directions again; switch the others off."""
        c, last = self.config, self.config.total_step - self.config.tfinal
        for layer in layers.values() if number < last else ():
            for name, p in layer.named_parameters():
                mean, spread = layer.get_buffer(f"{name}_mean"), layer.get_buffer(f"{name}_spread")
                now = (p * p.grad).abs()
                mean.mul_(c.beta1).add_((1 - c.beta1) * now)
                spread.mul_(c.beta2).add_((1 - c.beta2) * (now - mean).abs())
        if number == last or (c.tinit < number < last and number % c.deltaT == 0):
            self.choose(number, last, layers)
        switches = number > c.tinit and (number >= last or number % c.deltaT == 0)
        for layer in layers.values() if switches else ():
            layer.lora_E.masked_fill_(~layer.lora_mask, 0.0)

    def choose(self, number: int, last: int, layers: Mapping[str, Any]) -> None:
        """The directions that are among the most important ones; their number falls with the cube of what is left."""
        c, start, end = self.config, sum(len(x.lora_E) for x in layers.values()), self.config.target_r * len(layers)
        left = 1 - (number - c.tinit) / (last - c.tinit) if number < last else 0.0
        scores = {}
        for path, x in layers.items():
            a, b, e = x.lora_A_mean * x.lora_A_spread, x.lora_B_mean * x.lora_B_spread, x.lora_E_mean * x.lora_E_spread
            scores[path] = e.view(-1) + a.mean(1) + b.mean(0)
        threshold = torch.cat(list(scores.values())).kthvalue(start - int((start - end) * left**3 + end))[0]
        for path, score in scores.items():
            layers[path].lora_mask.copy_((score > threshold)[:, None])


class AdaLoraPlugin(ak.Plugin):
    """A file has the directions that are on, and `rank_pattern` says which those are, as PEFT needs it."""

    config, layer, shared, prefix = AdaLoraConfig, AdaLoraLayer, AdaLoraShared, "lora_"

    def to_file(
        self, config: AdaLoraConfig, tensors: Mapping[str, Tensor]
    ) -> tuple[AdaLoraConfig, Mapping[str, Tensor]]:
        """All, where all are on or all are off (a new adapter)."""
        masks = {key: (t != 0).view(-1) for key, t in tensors.items() if key.endswith(".lora_E")}
        if all(mask.all() for mask in masks.values()) or not any(mask.any() for mask in masks.values()):
            return config, tensors
        written = {}
        for key, t in tensors.items():
            mask = masks[key.rpartition(".")[0] + ".lora_E"]
            written[key] = t[:, mask] if key.endswith(".lora_B") else t[mask]
        return config.replace(rank_pattern={key: mask.tolist() for key, mask in masks.items()}), written


plugin = AdaLoraPlugin()
