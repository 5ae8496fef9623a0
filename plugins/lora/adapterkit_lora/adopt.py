"""What a LoRA layer must hold to do what another adapter's layer does, of another rank, scaling or start."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from adapterkit import CheckpointError, Factors

if TYPE_CHECKING:
    from adapterkit_lora.layer import LoraLayer


def adopted(own: LoraLayer, other: LoraLayer | None) -> dict[str, Tensor]:
    """The tensors of `own`, by name, with which it does what `other` does; `None`: nothing.

    With `s` and `s'` the scalings, `s B A = s' B' A'` for `A = [A'; 0]` and `B = [(s' / s) B', 0]`: exact if `s' / s`
    is a power of two. A layer of PiSSA or OLoRA has initial factors too, which act as `-B0 A0`: they take as many ranks
    again.

    Raises:
        CheckpointError: it has not the room.
    """
    (down, up, bias), residual = _trained(own), "lora_init_A" in own._buffers
    given = (down, torch.zeros_like(up), None) if other is None else _effective(other, own.scaling)
    room = 2 * own.r if residual else own.r
    new_down, new_up, new_bias = _with_zeros(own, given, room)
    if new_bias is not None and bias is None:
        raise CheckpointError("B has a bias, and the adapter's has none (lora_bias)")
    rank = up.shape[1]
    first_down, first_up = new_down[: down.shape[0]], new_up[:, :rank]
    if own.lookup:
        return {"lora_embedding_A": first_down, "lora_embedding_B": first_up}
    down_shape, up_shape = (own.get_parameter(f"lora_{name}.weight").shape for name in "AB")
    found = {"lora_A.weight": first_down.reshape(down_shape), "lora_B.weight": first_up.reshape(up_shape)}
    if bias is not None:
        found["lora_B.bias"] = torch.zeros_like(bias) if new_bias is None else new_bias
    if residual:
        found["lora_init_A"] = new_down[own.r :].reshape(down_shape)
        found["lora_init_B"] = -new_up[:, own.r :].reshape(up_shape)
    return found


def _trained(own: LoraLayer) -> tuple[Tensor, Tensor, Tensor | None]:
    """`A (r, in)`, `B (out, r)` and B's bias that train."""
    if own.lookup:
        return own.lora_embedding_A, own.lora_embedding_B, None
    return own.lora_A.weight.flatten(1), own.lora_B.weight.flatten(1), own.lora_B.bias


def _effective(other: LoraLayer, scaling: float) -> tuple[Tensor, Tensor, Tensor | None]:
    """`A (r, in)`, `B (out, r)` and B's bias of plain LoRA of this scaling that does what `other` does."""
    up, down, bias, *_ = other.factors().flat()
    if other.scaling == scaling:
        return down, up, bias
    if scaling == 0:
        raise CheckpointError("the adapter's scaling is 0 (lora_alpha), so it can change nothing")
    ratio = other.scaling / scaling
    return down, up * ratio, None if bias is None else bias * ratio


def _with_zeros(
    own: LoraLayer, given: tuple[Tensor, Tensor, Tensor | None], room: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The same factors filled up with zeros to the rank `room`; those that act across groups only as they are."""
    (down, up, bias), (own_down, own_up, _) = given, _trained(own)
    across = own.kind.is_ungrouped(Factors(own_up, own_down)), own.kind.is_ungrouped(Factors(up, down))
    if any(across):
        if (down.shape, up.shape) != (own_down.shape, own_up.shape):
            raise CheckpointError("a factor acts across the groups of the convolution, and the adapter's sizes differ")
        return given
    rank = down.shape[0]
    if rank > room:
        raise CheckpointError(f"its rank is {rank}, and the adapter has room for {room}")
    return F.pad(down, (0, 0, 0, room - rank)), F.pad(up, (0, room - rank)), bias
