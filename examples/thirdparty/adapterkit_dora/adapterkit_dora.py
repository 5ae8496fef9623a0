"""DoRA, weight-decomposed low-rank adaptation (Liu et al. 2024, arXiv 2402.09353). Files: PEFT's LoRA with `use_dora`.

`W' = m * V / |V|` with `V = W + s B A`: `|V|` is the length of each row and is not differentiated. A is `(r, in)`, B
`(out, r)`, and m `(out,)` starts as `|V|`, so that a new adapter changes nothing.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import adapterkit as ak


@dataclass(frozen=True, kw_only=True)
class DoraConfig(ak.AdapterConfig):
    """`s = lora_alpha / r`, or `lora_alpha / sqrt(r)` with `use_rslora`; the other fields are LoRA's."""

    method, peft_type, marks, not_in_files = "dora", "LORA", {"use_dora": True}, ()
    patterns = {"rank_pattern": "r", "alpha_pattern": "lora_alpha"}
    not_implemented = {"megatron_core": "megatron.core", "qalora_group_size": 16}

    r: ak.Rank = 8
    lora_alpha: float = 8
    lora_dropout: ak.Dropout = 0.0
    use_rslora: bool = False
    init_lora_weights: bool = True
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)


class DoraLayer(ak.AdapterLayer):
    """The change depends on the weight, so `merged` says what the layer becomes."""

    up_factor = ("lora_B.weight", "lora_embedding_B")

    def setup(self, target: ak.Target, config: DoraConfig) -> None:
        """A and B have the shapes of the layer kind, and m those of an output's channels."""
        down, up = target.kind.down_shape(config.r), target.kind.up_shape(config.r)
        zero: Any = 0.0 if config.init_lora_weights else nn.init.normal_ if target.kind.lookup else ak.kaiming
        if target.kind.lookup:
            self.lora_embedding_A = target.new(*down, init=zero)
            self.lora_embedding_B = target.new(*up, init=nn.init.normal_)
        else:
            self.lora_A = ak.Holder(weight=target.new(*down, init=ak.kaiming))
            self.lora_B = ak.Holder(weight=target.new(*up, init=zero))
        shape = (1, target.out_features, *(1 for _ in down[2:])) if len(down) > 2 else (target.out_features,)
        start = lambda m: m.copy_(self.lengths(target.weight()).view(shape))  # noqa: E731
        self.lora_magnitude_vector = target.new(*shape, init=start)
        self.dropout = config.lora_dropout

    def direction(self, weight: Tensor) -> Tensor:
        """`V`."""
        c, names = self.config, ("lora_A.weight", "lora_B.weight")
        if self.kind.lookup:
            names = ("lora_embedding_A", "lora_embedding_B")
        down, up = (self.get_parameter(name).flatten(1).to(weight.dtype) for name in names)
        return torch.addmm(weight, up, down, alpha=c.lora_alpha / (math.sqrt(c.r) if c.use_rslora else c.r))

    def lengths(self, weight: Tensor) -> Tensor:
        """`|V|`."""
        found: Tensor = self.direction(weight).detach().norm(dim=1)
        return found

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """`m * V / |V|`."""
        share = self.lora_magnitude_vector.flatten() / self.lengths(weight)
        return self.direction(weight) * share[:, None], bias


plugin = ak.plugin(DoraConfig, DoraLayer, prefix="lora_")
