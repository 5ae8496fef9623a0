"""Why a merge into a layer would not have the adapter's effect: the layer does not just compute with its own weight."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from adapterkit.contract import CONTAINERS, twin
from adapterkit.forward import ACTIVE, own_forward
from adapterkit.kinds import LayerKind, is_special
from adapterkit.merging.places import own, put
from adapterkit.tensors import is_sharded

_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def is_writable(tensor: Tensor) -> bool:
    """Whether a tensor on the CPU is in writable memory. Writing to a read-only page would end the process.

    The kernel knows: it refuses to copy a byte (the one that is there already) from a pipe into a read-only page.
    """
    if not hasattr(os, "readv") or not tensor.numel():
        return True
    byte = (ctypes.c_char * 1).from_address(tensor.data_ptr())
    source, target = os.pipe()
    try:
        os.write(target, bytes(byte))
        return os.readv(source, [byte]) == 1
    except OSError:
        return False
    finally:
        os.close(source)
        os.close(target)


def obstacle(module: nn.Module, kind: LayerKind | None, names: tuple[str, ...]) -> str | None:
    """Why writing to these tensors of `module` would not have the adapter's effect; `None`: it would.

    A kind may vouch for the module. Otherwise the tensors must be the module's own, and its forward must compute the
    plain product with them: it is a known one, or a run on a copy of the layer proves it.
    """
    vouched = kind is not None and kind.vouches
    found = next(filter(None, (_not_plain(module, name, vouched) for name in names)), None)
    if found is not None or vouched:
        return found
    for hook in module._forward_pre_hooks.values():
        named = getattr(hook, "__qualname__", type(hook).__name__)
        return f"its forward pre-hook {named} may set the {names[0]} again in each forward. Remove the hook first"
    forward = own_forward(module)
    if forward is None:
        return "its forward was replaced on the instance, so it is unknown what it computes with its weight"
    if kind is None or kind.computes_plainly(forward, module) or _is_proven(module, kind, forward):
        return None
    return (
        f"{forward.__module__}.{forward.__qualname__} computes something else than the plain product with the weight "
        "that a merge changes"
    )


def _not_plain(module: nn.Module, name: str, vouched: bool) -> str | None:
    """Why this is not a tensor of the module's own, of plain floating numbers."""
    held = own(module, name)
    if held is None and is_parametrized(module, name):
        return (
            f"its {name} is computed in each forward by a parametrization. Save the adapter, detach, make the {name} "
            f"permanent (torch.nn.utils.parametrize.remove_parametrizations(layer, {name!r})), load and merge"
        )
    if held is None:
        hooks = ", ".join(type(hook).__name__ for hook in module._forward_pre_hooks.values())
        by = f" in each forward by its hook {hooks}. Make it permanent first (torch.nn.utils has the function)"
        return f"its {name} is neither a parameter nor a buffer, but computed{by if hooks else ''}"
    if is_sharded(held):
        return f"its {name} is sharded among processes. Save the adapter, and merge it on disk with ak.merge_checkpoint"
    if not vouched and (is_special(held) or held.layout is not torch.strided or held.dtype not in _FLOATING):
        layout = f"{held.dtype}, {held.layout}".replace("torch.", "")
        return (
            f"its {name} is a {type(held).__name__} ({layout}): quantised, sharded, or not of plain floating "
            "numbers. Merge into the plain model (in memory or with ak.merge_checkpoint) and quantise or shard it "
            "afterwards"
        )
    return None


@torch.no_grad()
def _is_proven(module: nn.Module, kind: LayerKind, forward: Callable[..., Any]) -> bool:
    """Whether the forward of a copy of the layer, with another weight and bias, computes what the kind says.

    It runs on small whole numbers, whose exact sums show a single entry that is masked, moved or scaled; and on numbers
    of many sizes and both signs, which show a forward that rounds or clips some of them.
    """
    if kind.sample_dims > 1:
        return False
    try:
        return all(_agrees(_plain_copy(module), kind, forward, whole=whole) for whole in (True, False))
    except Exception:  # noqa: BLE001 - a stranger's forward may raise anything
        return False


def _agrees(layer: Any, kind: LayerKind, forward: Callable[..., Any], *, whole: bool) -> bool:
    weight, bias = own(layer, "weight"), own(layer, "bias")
    assert weight is not None
    device = torch.device("cpu") if weight.is_meta else weight.device
    generator = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> Tensor:
        found = torch.randint(1, 4, shape, generator=generator, device="cpu").to(torch.float32)
        if not whole:
            found = (found % 2 * 2 - 1) * 10.0 ** -torch.rand(shape, generator=generator, device="cpu").mul_(4)
        return found.to(device)

    rows = 4 if kind.lookup else weight.shape[0]
    if kind.lookup:
        layer.num_embeddings, layer.padding_idx = rows, None
    x = torch.arange(rows, device=device) if kind.lookup else numbers(1 if whole else 3, kind.in_features)
    put(layer, "weight", nn.Parameter(numbers(rows, *weight.shape[1:]), requires_grad=False))
    if bias is not None:
        put(layer, "bias", nn.Parameter(numbers(*bias.shape), requires_grad=False))
    with ExitStack() as stack:  # no autocast, no compiler, no effect on the random numbers of others
        stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
        stack.enter_context(torch.autocast(device.type, enabled=False))
        if "torch._dynamo" in sys.modules:  # the forward may be compiled
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        found = forward(layer, x)
    same: Any = kind.of(layer)
    expected = same.apply_weight(x, same.read(layer), own(layer, "bias"))
    if kind.lookup:  # rows may be scaled by any number, because what is merged is scaled by it too
        expected = expected * (found.flatten()[0] / expected.flatten()[0])
    # A kind may scale the products, and rounding grows with the length of the sums.
    tolerance = 1e-6 if whole else 1e-6 * max(1.0, kind.in_features**0.5 / 32)
    margin = tolerance * float(expected.abs().max())
    return bool(expected.all()) and torch.allclose(found.to(expected.dtype), expected, tolerance, margin)


def _plain_copy(module: nn.Module) -> Any:
    """A copy of the module for one run: without adapters, with the same parameters."""

    def value(tensor: Tensor) -> Tensor:
        if isinstance(tensor, nn.Parameter):
            return tensor
        # In a model without values a single number, such as a scale, becomes 1.
        return torch.ones_like(tensor, device="cpu") if tensor.is_meta and tensor.numel() == 1 else tensor.clone()

    layer = twin(module, value).eval()
    for part in layer.modules():
        part.__dict__.pop(ACTIVE, None)
        for name in CONTAINERS:
            part._modules.pop(name, None)
    return layer
