"""Layer kinds: what a target is. Methods know their mathematics, kinds know their layer."""

from adapterkit.kinds.base import LayerKind
from adapterkit.kinds.conv import Conv1d, Conv2d, Conv3d
from adapterkit.kinds.embedding import Embedding
from adapterkit.kinds.linear import Linear, TransposedLinear

BUILTIN: tuple[type[LayerKind], ...] = (Linear, TransposedLinear, Conv1d, Conv2d, Conv3d, Embedding)

__all__ = ["BUILTIN", "LayerKind"]
