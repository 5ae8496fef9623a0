"""Why a merge into a layer would not have the adapter's effect: the layer does not just compute with its own weight."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from adapterkit.contract import CONTAINERS
from adapterkit.forward import ACTIVE, own_forward
from adapterkit.kinds import LayerKind
from adapterkit.tensors import is_sharded

_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def own(module: nn.Module, name: str) -> Tensor | None:
    """The module's own parameter or buffer of this name; `None` if the module computes it."""
    found: Tensor | None = module._parameters.get(name)
    return module._buffers.get(name) if found is None else found


def put(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Set the module's own parameter or buffer of this name."""
    held: dict[str, Any] = module._parameters if name in module._parameters else module._buffers
    held[name] = tensor


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
    found = next(filter(None, (_not_own(module, name, vouched) for name in names)), None)
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


def _not_own(module: nn.Module, name: str, vouched: bool) -> str | None:
    held = own(module, name)
    if held is None:
        return _computed(module, name)
    if is_sharded(held):
        return f"its {name} is sharded among processes. Save the adapter, and merge it on disk with ak.merge_checkpoint"
    if vouched or _is_ordinary(held):
        return None
    layout = f"{held.dtype}, {held.layout}".replace("torch.", "")
    return (
        f"its {name} is a {type(held).__name__} ({layout}): quantised, sharded, or not of plain floating numbers. "
        "Merge into the plain model (in memory or with ak.merge_checkpoint) and quantise or shard it afterwards"
    )


def _is_ordinary(tensor: Tensor) -> bool:
    """Whether it is a dense tensor of floating numbers, with no code but torch's own behind it."""
    cls = type(tensor)
    ordinary = cls.__torch_dispatch__ is Tensor.__torch_dispatch__ and tensor.layout is torch.strided
    return ordinary and tensor.dtype in _FLOATING


def _computed(module: nn.Module, name: str) -> str:
    if is_parametrized(module, name):
        return (
            f"its {name} is computed in each forward by a parametrization. Save the adapter, detach, make the {name} "
            f"permanent (torch.nn.utils.parametrize.remove_parametrizations(layer, {name!r})), load and merge"
        )
    hooks = ", ".join(type(hook).__name__ for hook in module._forward_pre_hooks.values())
    by = f" in each forward by its hook {hooks}. Make it permanent first (torch.nn.utils has the function)"
    return f"its {name} is neither a parameter nor a buffer, but computed{by if hooks else ''}"


@torch.no_grad()
def _is_proven(module: nn.Module, kind: LayerKind, forward: Callable[..., Any]) -> bool:
    """Whether the forward of a copy of the layer, with another weight and bias, computes what the kind says.

    It runs on one input of small whole numbers, whose sums show a single entry that is masked, moved or scaled; and on
    three of numbers of many sizes and both signs, which show a forward that rounds or clips its weight or its input.
    """
    if kind.sample_dims > 1:
        return False
    layer = _copy(module)
    weight, bias = own(layer, "weight"), own(layer, "bias")
    assert weight is not None
    device = torch.device("cpu") if weight.is_meta else weight.device
    generator = torch.Generator().manual_seed(0)

    def whole(*shape: int) -> Tensor:
        return torch.randint(1, 4, shape, generator=generator).to(device, torch.float32)

    def of_any_size(*shape: int) -> Tensor:
        sizes = 10.0 ** -torch.rand(shape, generator=generator).mul_(4).to(device)
        return sizes * (whole(*shape) % 2 * 2 - 1)

    rows = 4 if kind.lookup else weight.shape[0]
    if kind.lookup:
        layer.num_embeddings, layer.padding_idx = rows, None  # type: ignore[assignment]
    try:
        for numbers, inputs in ((whole, 1), (of_any_size, 3)):
            x = torch.arange(rows, device=device) if kind.lookup else numbers(inputs, kind.in_features)
            put(layer, "weight", nn.Parameter(numbers(rows, *weight.shape[1:]), requires_grad=False))
            if bias is not None:
                put(layer, "bias", nn.Parameter(numbers(*bias.shape), requires_grad=False))
            with _in_plain_torch(device):
                found = forward(layer, x)
            same: Any = kind.of(layer)
            expected = same.apply_weight(x, same.read(layer), own(layer, "bias"))
            if kind.lookup:  # rows may be scaled by any number, because what is merged is scaled by it too
                expected = expected * (found.flatten()[0] / expected.flatten()[0])
            tolerance = 1e-6  # sums of products of 1, 2 and 3 are exact in float32, but a kind may scale them
            margin = tolerance * float(expected.abs().max())
            if not expected.all() or not torch.allclose(found.to(expected.dtype), expected, tolerance, margin):
                return False
    except Exception:  # noqa: BLE001 - a stranger's forward may raise anything
        return False
    return True


@contextmanager
def _in_plain_torch(device: torch.device) -> Iterator[None]:
    """Without autocast or a compiler, and without effect on the random numbers of others."""
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
        stack.enter_context(torch.autocast(device.type, enabled=False))
        if "torch._dynamo" in sys.modules and hasattr(torch.compiler, "set_stance"):  # the forward may be compiled
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


def _copy(module: nn.Module) -> nn.Module:
    """A copy of the module and those below it for one run: without adapters, with the same parameters."""
    made: nn.Module = object.__new__(type(module))
    made.__dict__.update(module.__dict__)
    made.__dict__.pop(ACTIVE, None)
    made.__dict__["_parameters"] = dict(module._parameters)
    buffers = made.__dict__["_buffers"] = dict(module._buffers)
    for name, buffer in buffers.items():
        if buffer is not None:  # a single number on the meta device, as in a model without values, becomes 1
            as_one = buffer.is_meta and buffer.numel() == 1
            buffers[name] = torch.ones(buffer.shape, dtype=buffer.dtype) if as_one else buffer.clone()
    children = {n: m for n, m in module._modules.items() if n not in CONTAINERS}
    made.__dict__["_modules"] = {n: None if m is None else _copy(m) for n, m in children.items()}
    made.__dict__["training"] = False
    return made
