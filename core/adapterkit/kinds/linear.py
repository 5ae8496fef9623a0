"""Linear layers: torch's, transformers' `Conv1D`, which keeps its weight as `(in, out)`, and packed ones."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor, nn

from adapterkit.errors import UnsupportedError
from adapterkit.kinds.base import LayerKind, is_floating_weight, is_original, runs_forward_of
from adapterkit.tensors import shape_of


@dataclass(frozen=True)
class Linear(LayerKind):
    """`torch.nn.Linear` and its subclasses with a floating weight."""

    name, module_type = "Linear", nn.Linear
    all_linear = True

    @classmethod
    def of(cls, module: nn.Module) -> Self | None:
        """See `LayerKind.of`."""
        if isinstance(module, nn.Linear) and is_floating_weight(module, 2):
            return cls(module.out_features, module.in_features)
        return None


@dataclass(frozen=True)
class TransposedLinear(LayerKind):
    """transformers' `Conv1D` (GPT-2): a linear layer with its weight stored as `(in, out)`."""

    name = "Conv1D"
    all_linear = transposed = True

    @classmethod
    def of(cls, module: nn.Module) -> Self | None:
        """See `LayerKind.of`. Imports nothing: if transformers is not loaded, no such layer exists."""
        utils = sys.modules.get("transformers.pytorch_utils")
        if utils is None or not isinstance(module, utils.Conv1D) or not is_floating_weight(module, 2):
            return None
        in_features, out_features = shape_of(module.weight)
        return cls(out_features, in_features)

    def computes_plainly(self, forward: Callable[..., Any], module: nn.Module) -> bool:
        """See `LayerKind.computes_plainly`."""
        return is_original(forward, sys.modules["transformers.pytorch_utils"].Conv1D, "forward")


@dataclass(frozen=True)
class PackedLinear(LayerKind):
    """A subclass of `torch.nn.Linear` that computes with packed integers, such as bitsandbytes' 4 and 8 bit layers.

    Adapters act on its output and train. A merge is refused: the sum would have to be packed again, with an error.
    """

    name = "packed Linear"
    all_linear = True

    @classmethod
    def of(cls, module: nn.Module) -> Self | None:
        """See `LayerKind.of`. torch's own forward does not compute with integers, so the class must have another."""
        if not isinstance(module, nn.Linear) or runs_forward_of(module, nn.Linear):
            return None
        weight = module._parameters.get("weight")
        if weight is None or weight.is_floating_point() or weight.is_complex():
            return None
        return cls(module.out_features, module.in_features)

    def fits(self, weight: Tensor) -> bool:
        """See `LayerKind.fits`: the shape of packed numbers says nothing."""
        return True

    def read(self, module: nn.Module) -> Tensor:
        """See `LayerKind.read`: an unpacked copy.

        Raises:
            UnsupportedError: the layer is of another library than bitsandbytes.
        """
        packed: Any = module.weight
        bitsandbytes: Any = sys.modules.get("bitsandbytes")
        if bitsandbytes is not None and isinstance(module, bitsandbytes.nn.Linear4bit):
            four_bits: Tensor = bitsandbytes.functional.dequantize_4bit(packed.data, packed.quant_state)
            return four_bits
        if bitsandbytes is not None and isinstance(module, bitsandbytes.nn.Linear8bitLt):
            scales = module.state.SCB if packed.SCB is None else packed.SCB  # the first forward moves them
            eight_bits: Tensor = bitsandbytes.functional.int8_vectorwise_dequant(packed.data, scales)
            return eight_bits
        raise UnsupportedError(
            f"The weight of a {type(module).__name__} is packed ({packed.dtype}), and only bitsandbytes says its "
            "numbers. What needs them needs the layer before it is quantised, or a layer kind of its own."
        )
