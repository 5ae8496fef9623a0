"""OFT, orthogonal fine-tuning (Qiu et al. 2023, arXiv 2306.07280): `W R^T`, R block-diagonal and orthogonal.

Each block of R follows from a skew-symmetric matrix Q by Cayley's formula, `R = (I - Q) (I + Q)^-1`. Q starts at zero,
so that a new adapter changes nothing. Files: PEFT's; and those of LyCORIS (Diag-OFT) and kohya-ss, which rotate the
outputs, `R W`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import adapterkit as ak


@dataclass(frozen=True, kw_only=True)
class OFTConfig(ak.AdapterConfig):
    """`oft_block_size` is the side of the blocks, or `r` their number; the other one is 0."""

    method = "oft"
    not_implemented = {"coft": False, "eps": ..., "module_dropout": 0.0}

    r: int = 0
    oft_block_size: int = 32
    block_share: bool = False
    use_cayley_neumann: bool = True
    num_cayley_neumann_terms: int = 5
    init_weights: bool = True

    def check(self) -> None:
        if (self.r > 0) == (self.oft_block_size > 0):
            raise ak.ConfigError(
                f"One of r = {self.r} and oft_block_size = {self.oft_block_size} must be 0, the other not."
            )


class OFTLayer(ak.AdapterLayer):
    """`oft_R.weight (blocks, side (side - 1) / 2)` has the entries of each Q above its diagonal."""

    def setup(self, target: ak.Target, config: OFTConfig) -> None:
        """The number or the side of the blocks is the divisor that is nearest to the one asked for."""
        if not target.kind.is_plain:  # PEFT rotates the patches of a convolution, which no kernel of it does
            raise ak.UnsupportedError(f"OFT is for linear layers; {target.path!r} is a {target.kind.name}.")
        size, wanted = target.in_features, config.r or config.oft_block_size
        nearest = min((d for d in range(1, size + 1) if size % d == 0), key=lambda d: (abs(d - wanted), d))
        self.side = size // nearest if config.r else nearest
        rows = 1 if config.block_share else size // self.side
        init = 0.0 if config.init_weights else partial(nn.init.normal_, std=0.1)
        self.oft_R = ak.Holder(weight=target.new(rows, self.side * (self.side - 1) // 2, init=init))

    def rotations(self) -> Tensor:
        """The blocks of R; with `use_cayley_neumann` by `(I - Q)^-1 = I + Q + Q^2 + ...`, cut off as PEFT does."""
        weight, terms = self.oft_R.weight, self.config.num_cayley_neumann_terms
        upper = weight.to(torch.promote_types(weight.dtype, torch.float32))
        rows, columns = torch.triu_indices(self.side, self.side, 1, device=upper.device)
        q = upper.new_zeros(len(upper), self.side, self.side)
        q[:, rows, columns] = upper
        q, one = q - q.mT, torch.eye(self.side).to(q)
        if not self.config.use_cayley_neumann:
            solved: Tensor = torch.linalg.solve(one + q, one - q, left=False)
            return solved
        total = power = one
        for number in range(1, max(terms, 4) if terms > 2 else terms):
            power = power @ q
            total = total + (1 if number == max(terms, 4) - 1 else 2) * power
        return total

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """`W R^T`, block by block."""
        parts = weight.unflatten(1, (-1, self.side))
        turned = self.rotations().to(weight.dtype).expand(parts.shape[1], -1, -1)
        return torch.einsum("onc,nkc->onk", parts, turned).flatten(1), bias


class OFTRowsLayer(ak.AdapterLayer):
    """`oft_blocks (blocks, side, side)`, with Q as a difference to their transpose; and `oft_rescale (out,)`."""

    def setup(self, target: ak.Target, config: OFTConfig) -> None:
        file = target.file or {}
        side = file["oft_blocks"].shape[-1] or 1
        if target.out_features % side:
            raise ak.CheckpointError(f"{target.path!r} has {target.out_features} outputs, and no blocks of {side}.")
        self.oft_blocks = target.new(target.out_features // side, side, side)
        if "oft_rescale" in file:
            self.oft_rescale = target.new(target.out_features, init=1.0)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """`R W`, block by block, with its rows rescaled."""
        q, one = self.oft_blocks - self.oft_blocks.mT, torch.eye(self.oft_blocks.shape[-1]).to(self.oft_blocks)
        rotations = torch.linalg.solve(one + q, one - q).to(weight.dtype)
        found = (rotations @ weight.unflatten(0, rotations.shape[:2])).flatten(0, 1)
        return found * self.oft_rescale[:, None] if hasattr(self, "oft_rescale") else found, bias


class OFTFormat(ak.Format):
    """`lora_unet_conv_in.oft_blocks`, `rescale` and `alpha`, the largest length of Q for each output."""

    config_type = OFTConfig
    names = {"rescale": "oft_rescale"}
    factors = frozenset({"oft_blocks"})

    def config(self, layers: Mapping[str, ak.ForeignLayer], metadata: Mapping[str, str], **fields: Any) -> OFTConfig:
        side = next(iter(layers.values())).tensors["oft_blocks"].shape[-1]
        return OFTConfig(oft_block_size=max(side, 1), use_cayley_neumann=False, **fields)

    def tensors(self, layer: ak.ForeignLayer, config: OFTConfig) -> dict[str, Tensor]:
        """A Q that is too long is shortened here, once."""
        blocks, limit = layer.wide("oft_blocks"), (layer.number("alpha") or 0.0) * layer.kind.out_features
        if blocks.dim() != 3:
            raise ak.UnsupportedError(f"{layer.keys['oft_blocks']!r}: this is BOFT, several rotations of one weight.")
        if limit > 0:
            blocks = blocks * min(1.0, limit / (float((blocks - blocks.mT).norm()) + 1e-8))
        rescale = layer.tensors.get("oft_rescale")
        return {"oft_blocks": blocks} | ({} if rescale is None else {"oft_rescale": rescale.flatten()})


class OFTPlugin(ak.Plugin):
    """What is rotated follows from a file."""

    config, layer, prefix = OFTConfig, OFTLayer, "oft_"

    def inject(self, target: ak.Target, config: OFTConfig, shared: None) -> ak.AdapterLayer:
        return (OFTRowsLayer if "oft_blocks" in (target.file or {}) else OFTLayer)(target, config)

    def formats(self) -> Sequence[ak.Format]:
        """LyCORIS' and kohya-ss's."""
        return [OFTFormat()]


plugin = OFTPlugin()
