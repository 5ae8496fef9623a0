"""Embeddings, scaled ones included."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapterkit.kinds.base import LayerKind, is_floating_weight, runs_forward_of


@dataclass(frozen=True)
class Embedding(LayerKind):
    """`torch.nn.Embedding`: the linear map on one-hot rows, canonical weight `(dim, num_embeddings)`.

    Gemma, BART and others multiply the rows by an `embed_scale` inside the layer; the change is multiplied as well,
    by the value that the layer has when it runs. Two sorts of tables are left out: one with `max_norm` rewrites its own
    rows while it is read, and a subclass with another `forward`, such as the positions of BART, looks up other rows
    than it is given.

    Attributes:
        scaled_by: the layer that holds its `embed_scale`, if it has one.
    """

    name, module_type = "Embedding", nn.Embedding
    lookup = transposed = True
    sample_dims = 0

    padding_idx: int | None
    scale_grad_by_freq: bool
    scaled_by: nn.Module | None = field(default=None, compare=False, repr=False)

    @classmethod
    def of(cls, module: nn.Module) -> Self | None:
        """See `LayerKind.of`."""
        if not isinstance(module, nn.Embedding) or not is_floating_weight(module, 2):
            return None
        plain = runs_forward_of(module, nn.Embedding)
        if module.max_norm is not None or not (plain or hasattr(module, "embed_scale")):
            return None
        return cls(
            out_features=module.embedding_dim,
            in_features=module.num_embeddings,
            padding_idx=module.padding_idx,
            scale_grad_by_freq=module.scale_grad_by_freq,
            scaled_by=None if plain else module,
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """The copy of an adapted model scales by its own layer; the copy of an adapter alone by the same layer."""
        return replace(self, scaled_by=memo.get(id(self.scaled_by), self.scaled_by))

    def project(self, x: Tensor, down: Tensor, dropout: float = 0.0) -> Tensor:
        """See `LayerKind.project`. Dropping an entry of a one-hot input drops its whole row."""
        hidden = F.embedding(x, down.t(), self.padding_idx, scale_grad_by_freq=self.scale_grad_by_freq)
        if dropout > 0.0:
            hidden = hidden * F.dropout(torch.ones_like(hidden[..., :1]), dropout)
        return hidden

    def expand(self, hidden: Tensor, up: Tensor, bias: Tensor | None = None) -> Tensor:
        """See `LayerKind.expand`."""
        return self._scaled(F.linear(hidden, up, bias))

    def apply_weight(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, dropout: float = 0.0) -> Tensor:
        """See `LayerKind.apply_weight`."""
        rows = self.project(x, weight, dropout)
        return self._scaled(rows if bias is None else rows + bias)

    def work(self, x: Tensor, rank: int | None = None) -> int:
        """See `LayerKind.work`: reading rows takes none."""
        return 0 if rank is None else x.numel() * rank * self.out_features

    def _scaled(self, out: Tensor) -> Tensor:
        if self.scaled_by is None:
            return out
        layer: Any = self.scaled_by
        scale = layer.embed_scale
        if isinstance(scale, Tensor):  # the layer multiplies by what its dtype makes of it
            scale = scale.to(layer.weight.dtype)
        return out if scale is None else out * scale
