"""Layers that tensor parallelism splits between processes: torch's `parallelize_module`, transformers' `tp_plan`.

Each process holds a slice of the layer's weight, a `DTensor`, and every process holds the whole adapter. In a forward
the adapter's tensors become replicated `DTensor`s too. Then torch's rules for `DTensor`s slice what each process
computes, sum up what the processes computed in parts, and do the same for the gradients.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from adapterkit.contract import twin
from adapterkit.errors import UnsupportedError
from adapterkit.tensors import is_dtensor, is_fsdp

if TYPE_CHECKING:
    from adapterkit.forward.plan import Plan

_STYLES = "transformers.distributed.tensor_parallel"


def mesh_of(module: nn.Module) -> Any:
    """The device mesh over which the module's weight is split now; `None` if it is whole.

    In a forward, FSDP2 has put whole tensors in place of its shards, so a `DTensor` there is tensor parallelism's.
    """
    weight: Any = module._parameters.get("weight")
    return weight.device_mesh if weight is not None and is_dtensor(weight) else None


def follow(
    model: nn.Module,
    layers: Mapping[str, Any],
    heads: Collection[str],
    hosts: Mapping[str, nn.Module],
    modules: Iterable[nn.Module],
) -> None:
    """Check that a new adapter can act where tensor parallelism splits its hosts, and give all processes equal values.

    Args:
        layers, heads, hosts: the adapter's, by path.
        modules: all modules of the adapter. They get the values of the first process: initial ones may be random.

    Raises:
        UnsupportedError: it cannot act there.
    """
    if is_fsdp(model):  # its shards are no slices in a forward
        return
    for path, host in hosts.items():
        reason = _why_not(host, layers.get(path), path in heads)
        if reason:
            raise UnsupportedError(
                f"The adapter cannot act at {path!r}: {reason}. Leave that layer out, or load the model without tensor "
                "parallelism."
            )
    mesh = next((mesh for mesh in map(mesh_of, hosts.values()) if mesh is not None), None)
    if mesh is None:
        return
    for module in modules:
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None and not tensor.is_meta:
                dist.broadcast(tensor.detach(), group=mesh.get_group(), group_src=0)


def _why_not(module: nn.Module, layer: Any, copied: bool) -> str:
    """Why no adapter that has this layer, or a copy, can act at the module; empty if it can."""
    if copied and any(mesh_of(inner) is not None for inner in module.modules()):
        return "tensor parallelism splits it between processes, and no copy of it can be trained"
    mesh, unknown = mesh_of(module), "the model's tp_plan changes it in a way that adapters do not follow"
    if mesh is None:  # styles that change gradients, and releases of transformers before `DTensor`s
        styled = getattr(module.__dict__.get("forward"), "__module__", "") == _STYLES
        return unknown if styled or getattr(module, "_hf_tp_plan", None) is not None else ""
    from torch.distributed.tensor import Replicate, Shard

    plain = isinstance(module, nn.Linear | nn.Embedding) and mesh.ndim == 1
    placements = module._parameters["weight"].placements  # type: ignore[union-attr]
    if not plain or any(type(placement) not in (Shard, Replicate) for placement in placements):
        return unknown
    if layer is not None and not layer.additive:
        return f"tensor parallelism splits it, and the method {layer.method!r} computes the output itself"
    return ""


def run_split(plan: Plan, mesh: Any, base: Callable[[Any], Any], x: Tensor) -> Any:
    """`base(x)`, which is the split module's own forward, with what acts there.

    torch's styles call the module's forward with `DTensor`s; transformers' replace it, and take and give local tensors.
    """
    module: Any = plan.module
    if not is_dtensor(module.weight):  # the plan was made outside of a forward, on FSDP2's shards
        return plan.changed(base, x)
    lookup, local = isinstance(module, nn.Embedding), not is_dtensor(x)
    out_features, in_features = module.weight.shape[::-1] if lookup else module.weight.shape
    placements: list[Any] = []

    def whole_base(value: Any) -> Any:
        out = _lifted(base(value.to_local() if local else value), mesh, out_features)
        placements[:] = out.placements
        return out

    split = copy.copy(plan)
    split.only_layer = None
    for name in ("layers", "biases"):
        setattr(split, name, [(_replicated(part, mesh), strength) for part, strength in getattr(plan, name)])
    out = split.changed(whole_base, _lifted(x, mesh, None if lookup else in_features))
    return out.redistribute(placements=placements).to_local() if local else out


def _lifted(tensor: Tensor, mesh: Any, size: int | None = None) -> Any:
    """A local tensor as a `DTensor`: a slice of one whose last dimension has `size`, or the same in all processes."""
    if is_dtensor(tensor):
        return tensor
    from torch.distributed.tensor import DTensor, Replicate, Shard

    if size is None or tensor.shape[-1] == size:
        return DTensor.from_local(tensor, mesh, [Replicate()], run_check=False)
    shape = torch.Size((*tensor.shape[:-1], size))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(tensor, mesh, [Shard(-1)], run_check=False, shape=shape, stride=stride)


def _replicated(part: nn.Module, mesh: Any) -> Any:
    """An adapter layer or bias with `DTensor`s in the place of its tensors, and of those that it shares."""
    found = twin(part, lambda tensor: _lifted(tensor, mesh))
    shared = part.__dict__.get("shared")
    if isinstance(shared, nn.Module):
        found.__dict__["shared"] = twin(shared, lambda tensor: _lifted(tensor, mesh))
    return found
