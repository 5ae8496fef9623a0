"""VB-LoRA: the factors of all layers are mixed from one bank of vectors (Li et al. 2024, arXiv 2405.15179).

A and B are cut into vectors of length b. Each is `sum_k softmax(top_k(z))_k v_k` over the bank `v (h, b)`; the logits
`z (h,)` of each vector, and the bank, are trained. `dW = B A`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

import adapterkit as ak


@dataclass(frozen=True, kw_only=True)
class VBLoRAConfig(ak.AdapterConfig):
    """`num_vectors` is h, `topk` k, and `vector_length` is b, which divides the sizes of the layers."""

    method, starts_as_identity = "vblora", False
    not_in_files = ("exclude_modules",)
    not_implemented = {"save_only_topk_weights": False}

    r: ak.Rank = 4
    num_vectors: int = 256
    vector_length: int = 256
    topk: int = 2
    vblora_dropout: ak.Dropout = 0.0
    init_vector_bank_bound: float = 0.02
    init_logits_std: float = 0.1


class VBLoRAShared(ak.Shared):
    """The bank."""

    vblora_vector_bank: nn.Parameter

    def setup(self, targets: Sequence[ak.Target], config: VBLoRAConfig, root: ak.Target) -> None:
        """Uniform within the bound."""
        bound = config.init_vector_bank_bound
        init = partial(nn.init.uniform_, a=-bound, b=bound)
        self.vblora_vector_bank = root.new(config.num_vectors, config.vector_length, init=init)


class VBLoRALayer(ak.LowRankLayer):
    """The logits of A `(r, in / b, h)` and of B `(out / b, r, h)`."""

    def setup(self, target: ak.Target, config: VBLoRAConfig) -> None:
        """Normal logits."""
        length = config.vector_length
        if target.in_features % length or target.out_features % length:
            raise ak.ConfigError(f"vector_length = {length} must divide the sizes of {target.path!r}.")
        new = partial(target.new, init=partial(nn.init.normal_, std=config.init_logits_std))
        self.vblora_logits_A = new(config.r, target.in_features // length, config.num_vectors)
        self.vblora_logits_B = new(target.out_features // length, config.r, config.num_vectors)
        self.dropout = config.vblora_dropout

    def mixed(self, logits: Tensor) -> Tensor:
        """The mixtures that the logits choose."""
        values, places = logits.topk(self.config.topk, dim=-1)
        bank: Tensor = self.shared.vblora_vector_bank
        return (values.softmax(-1)[..., None] * bank[places]).sum(-2)

    def factors(self) -> ak.Factors:
        """B and A."""
        up = self.mixed(self.vblora_logits_B).transpose(1, 2).flatten(0, 1)
        return ak.Factors(up, self.mixed(self.vblora_logits_A).flatten(1))


plugin = ak.plugin(VBLoRAConfig, VBLoRALayer, prefix="vblora_", shared=VBLoRAShared)
