"""OFT's mathematics as pure functions, and the layer that holds its parameters."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from adapterkit import AdapterLayer, Base, Holder, Target
from adapterkit_oft.config import OFTConfig


def skew(upper: Tensor, side: int) -> Tensor:
    """Skew-symmetric `(blocks, side, side)` from the entries above the diagonal, `(blocks, side (side - 1) / 2)`."""
    rows, columns = torch.triu_indices(side, side, 1, device=upper.device)
    matrix: Tensor = upper.new_zeros(upper.shape[0], side, side)
    matrix[:, rows, columns] = upper
    return matrix - matrix.transpose(-2, -1)


def cayley(q: Tensor) -> Tensor:
    """`(I - Q) (I + Q)^-1`, orthogonal for skew-symmetric Q."""
    one = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device).expand_as(q)
    turned: Tensor = torch.linalg.solve(one + q, one - q, left=False)
    return turned


def cayley_neumann(q: Tensor, terms: int) -> Tensor:
    """`I + 2 Q + 2 Q^2 + ... + Q^n`: the inverse in `(I + Q) (I - Q)^-1` as a sum of powers; PEFT's terms."""
    total = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device).expand_as(q)
    if terms > 1:
        total = total + 2 * q
    if terms > 2:
        power = q @ q
        total = total + 2 * power
        for _ in range(3, terms - 1):
            power = power @ q
            total = total + 2 * power
        total = total + power @ q
    return total


class OFTLayer(AdapterLayer):
    """`base(x R)`, R block-diagonal, of `oft_R.weight (blocks, side (side - 1) / 2)`; one row if they are shared."""

    def setup(self, target: Target, config: OFTConfig) -> None:
        """See `AdapterLayer.setup`: zeros, of which R is the identity, or normal values."""
        self.count, self.side = config.blocks(target.in_features)
        self.terms = config.num_cayley_neumann_terms if config.use_cayley_neumann else None
        rows = 1 if config.block_share else self.count
        init = 0.0 if config.init_weights else partial(nn.init.normal_, std=0.1)
        self.oft_R = Holder(weight=target.new(rows, self.side * (self.side - 1) // 2, init=init))

    def rotations(self) -> Tensor:
        """The blocks of R, `(count, side, side)`, in float32 at least."""
        upper = self.oft_R.weight
        q = skew(upper.to(torch.promote_types(upper.dtype, torch.float32)), self.side)
        return (cayley(q) if self.terms is None else cayley_neumann(q, self.terms)).expand(self.count, -1, -1)

    def forward(self, base: Base, x: Tensor) -> Tensor:
        """See `AdapterLayer.forward`: the input rotated, which costs less than the weight."""
        blocks = self.rotations()
        if self.training and self.config.module_dropout and self.oft_R.weight.shape[0] > 1:
            blocks = self._some_left_out(blocks)
        parts = x.unflatten(-1, (self.count, self.side))
        turned: Tensor = torch.einsum("...nk,nkc->...nc", parts, blocks.to(x.dtype))
        out: Tensor = base(turned.flatten(-2))
        return out

    def _some_left_out(self, blocks: Tensor) -> Tensor:
        left_out = torch.randperm(self.count, device=blocks.device) < int(self.config.module_dropout * self.count)
        one = torch.eye(self.side, dtype=blocks.dtype, device=blocks.device)
        return torch.where(left_out[:, None, None], one, blocks)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """See `AdapterLayer.merged`: `W R^T`."""
        parts = weight.unflatten(1, (self.count, self.side))
        return torch.einsum("onc,nkc->onk", parts, self.rotations().to(weight.dtype)).flatten(1), bias
