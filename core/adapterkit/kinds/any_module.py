"""Modules of any sort as targets: blocks, attention, routers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn, Self

from torch import Tensor, nn

from adapterkit.errors import UnsupportedError
from adapterkit.kinds.base import LayerKind


@dataclass(frozen=True)
class AnyModule(LayerKind):
    """A module that no other kind knows, for methods that adapt a module's call (`AdapterLayer.any_module`).

    It has no weight and no sizes: `out_features` and `in_features` are 0, and what needs a weight is refused.
    """

    name = "Module"
    has_weight = False

    out_features: int = 0
    in_features: int = 0

    @classmethod
    def of(cls, module: nn.Module) -> Self:
        """See `LayerKind.of`: takes every module, so it is not one of the kinds that are tried in turn."""
        return cls()

    def __str__(self) -> str:
        return self.name

    def fits(self, weight: Tensor) -> bool:
        """See `LayerKind.fits`."""
        return True

    def up_shape(self, rank: int) -> NoReturn:
        """See `LayerKind.up_shape`; raises `UnsupportedError`."""
        raise no_weight()

    def down_shape(self, rank: int) -> NoReturn:
        """See `LayerKind.down_shape`; raises `UnsupportedError`."""
        raise no_weight()

    def read(self, module: nn.Module) -> NoReturn:
        """See `LayerKind.read`; raises `UnsupportedError`."""
        raise no_weight(module)


def no_weight(module: nn.Module | None = None) -> UnsupportedError:
    """The error for something that needs the weight or the sizes of a module without a layer kind."""
    what = "This module" if module is None else f"A {type(module).__name__}"
    return UnsupportedError(
        f"{what} is adapted as a whole, so it has no weight (out, in). A layer finds sizes in `target.module` or "
        "`target.file`."
    )
