"""Layer kinds: what a layer is, whatever the adapter method.

In: a module of a model. Out: its canonical weight `(out, in)`, how to read, write and apply it, and `Factors`.
Uses: errors, tensors.
"""

from adapterkit.kinds.any_module import AnyModule, no_weight
from adapterkit.kinds.base import LayerKind, dense, is_special, plus
from adapterkit.kinds.conv import Conv1d, Conv2d, Conv3d
from adapterkit.kinds.embedding import Embedding
from adapterkit.kinds.factors import Factors, numerical_rank
from adapterkit.kinds.linear import Linear, PackedLinear, TransposedLinear
from adapterkit.kinds.tiles import AddTile

BUILTIN: tuple[type[LayerKind], ...] = (Linear, TransposedLinear, Conv1d, Conv2d, Conv3d, Embedding, PackedLinear)
