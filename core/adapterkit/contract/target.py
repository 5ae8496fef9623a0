"""Target: one layer of the model that an adapter is about to change, as a method sees it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

from adapterkit.errors import UnsupportedError
from adapterkit.kinds import LayerKind, dense
from adapterkit.tensors import gathered


@dataclass(frozen=True)
class Target:
    """A layer to adapt.

    Attributes:
        path: its module path in the model, such as `"encoder.layer.0.attention.self.query"`.
        kind: what it is; has the sizes, and applies factors to inputs.
        module: the layer itself; `None` where only an adapter's files are known.
        dtype, device: what the adapter's parameters are to be made with.
        file: the tensors that a file, or a combination, has for this layer, by their local names, so that sizes may
            follow from them. `None` for a new adapter.
    """

    path: str
    module: nn.Module | None
    kind: LayerKind
    dtype: torch.dtype
    device: torch.device
    file: Mapping[str, Tensor] | None = None

    @property
    def out_features(self) -> int:
        """Rows of the canonical weight."""
        return self.kind.out_features

    @property
    def in_features(self) -> int:
        """Columns of the canonical weight."""
        return self.kind.in_features

    def weight(self) -> Tensor:
        """The layer's weight as a float32 (or float64) copy of shape `(out, in)`, for data-dependent initialisation.

        Raises:
            UnsupportedError: it is quantised, and does not say which numbers it stands for.
        """
        if self.module is None:
            return torch.empty(self.out_features, self.in_features, device="meta")
        with gathered(self.module, self.module.modules()):
            held = self.kind.read(self.module)
            weight = dense(held)
            if weight is None:
                raise UnsupportedError(
                    f"The weight of {self.path!r} is a {type(held).__name__}, which does not give the numbers that it "
                    "stands for. Begin with others than the weight's own, or add the adapter before it is quantised."
                )
            return weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)

    def bias(self) -> Tensor | None:
        """The layer's bias as a float32 (or float64) copy of shape `(out,)`; `None` if it has none."""
        if self.module is None:
            return None
        with gathered(self.module, self.module.modules()):
            bias = getattr(self.module, "bias", None)
            if not isinstance(bias, Tensor):
                return None
            return bias.detach().to(torch.promote_types(bias.dtype, torch.float32), copy=True)

    def new(self, *shape: int, init: float | Callable[[Tensor], object] = 0.0) -> nn.Parameter:
        """A new parameter of this shape, with the adapter's dtype and device.

        Args:
            init: the number that fills it, or a function that fills the tensor in place, such as `adapterkit.kaiming`.
                Where a file's values are about to come, and on the meta device, nothing is filled.
        """
        if self.file is not None:
            return nn.Parameter(_placeholder(shape, self.dtype))
        parameter = nn.Parameter(torch.empty(shape, dtype=self.dtype, device=self.device))
        if not parameter.is_meta:
            with torch.no_grad():
                init(parameter) if callable(init) else parameter.fill_(init)
        return parameter


@lru_cache(maxsize=256)
def _placeholder(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """What stands for a file's tensor until that is assigned: it has no values, so one serves all of its shape."""
    return torch.empty(shape, dtype=dtype, device="meta")
