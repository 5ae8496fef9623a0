"""Sharded parameters: FSDP2's and DeepSpeed ZeRO-3's, read as a whole and written back to their shards.

Whatever reads or writes values here is a collective where there are shards: every process calls it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from adapterkit.errors import AdapterError, SaveError, StateError
from adapterkit.tensors.wrapped import engine_of, is_dtensor, is_partitioned, refuse_fsdp1, reshard


def shape_of(tensor: Tensor) -> torch.Size:
    """The shape of the whole: ZeRO-3 leaves an empty tensor in place of a partitioned one."""
    shape: torch.Size = getattr(tensor, "ds_shape", tensor.shape)
    return shape


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process has only a part of it, as FSDP2's `DTensor` or as ZeRO-3's partition."""
    return is_dtensor(tensor) or is_partitioned(tensor)


def size_of(tensors: Iterable[Tensor]) -> int:
    """How many numbers these tensors hold, as wholes."""
    return sum(shape_of(tensor).numel() for tensor in tensors)


@contextmanager
def as_wholes(model: nn.Module, modules: Iterable[nn.Module], *, writing: bool = False) -> Iterator[None]:
    """While the block runs, plain parameters with the whole values stand in place of these modules' sharded ones.

    Args:
        model: of which the modules are a part.
        writing: what the block writes goes to the shards after it; if it raises, nothing does.

    Raises:
        StateError: torch's older FSDP holds them, or a value that was written has another shape.
    """
    modules = dict.fromkeys(modules)
    if modules:
        refuse_fsdp1(model)
    reshard(model)
    held = ((m, name, p) for m in modules for name, p in m._parameters.items())
    places = [(m, name, p) for m, name, p in held if p is not None and is_sharded(p)]
    own = list({id(p): p for _, _, p in places}.values())
    stands = {id(p): nn.Parameter(value, p.requires_grad) for p, value in zip(own, whole(own), strict=True)}
    for module, name, p in places:
        module._parameters[name] = stands[id(p)]
    written: list[tuple[Tensor, Tensor]] = []
    try:
        yield
        for module, name, p in places if writing else ():
            value = module._parameters[name]
            assert value is not None
            if value.shape != shape_of(p):
                raise StateError(
                    f"A sharded parameter of shape {tuple(shape_of(p))} cannot take a value of shape "
                    f"{tuple(value.shape)}. Load it under another name before the model is sharded."
                )
            written.append((p, value.detach()))
    finally:
        for module, name, p in places:
            module._parameters[name] = p
    write(written)
    optimizer: Any = getattr(engine_of(model), "optimizer", None) if writing else None
    if hasattr(optimizer, "refresh_fp32_params"):
        optimizer.refresh_fp32_params()  # its own copies would undo what was written in the next step


@torch.no_grad()
def whole(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The values of these tensors, without gradients; of those that are sharded, copies of the whole."""
    partitioned = [t for t in tensors if is_partitioned(t) and shape_of(t) != t.shape]
    with _deepspeed().GatheredParameters(partitioned) if partitioned else nullcontext():
        return [_full(t) if is_dtensor(t) else t.detach().clone() if is_partitioned(t) else t.detach() for t in tensors]


def _full(tensor: Any) -> Tensor:
    # Offloaded shards are on the CPU, where the processes of GPUs have nothing to talk by.
    full: Tensor = tensor.detach().to(tensor.device_mesh.device_type).full_tensor()
    return full.to(tensor.device)


@torch.no_grad()
def write(values: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Write whole values into sharded tensors; each process gives the same."""
    partitioned = []
    for own, value in values:
        if is_partitioned(own):
            partitioned.append((own, value))
        else:
            _distribute(own, value)
    if any(getattr(own, "_ds_z3_gathered_param_context_depth", 0) for own, _ in partitioned):
        raise StateError("DeepSpeed's GatheredParameters holds the adapter now. Call this outside of its block.")
    if partitioned:
        with _deepspeed().GatheredParameters([own for own, _ in partitioned], modifier_rank=0):
            for own, value in partitioned:
                own.data.copy_(value)


def _distribute(own: Any, value: Tensor) -> None:
    from torch.distributed.tensor import distribute_tensor

    mesh = own.device_mesh
    given = value.to(mesh.device_type, own.dtype)
    shard = distribute_tensor(given, mesh, own.placements, src_data_rank=None)
    own.to_local().copy_(shard.to_local())


def groups_of(tensors: Iterable[Tensor]) -> list[Any]:
    """The process groups that these tensors are sharded over."""
    found: dict[int, Any] = {}
    for tensor in tensors:
        mesh, group = getattr(tensor, "device_mesh", None), getattr(tensor, "ds_process_group", None)
        for each in (*(mesh.get_all_groups() if mesh is not None else ()), *((group,) if group is not None else ())):
            found[id(each)] = each
    return list(found.values())


def by_first_rank(groups: Sequence[Any], action: Callable[[], None]) -> None:
    """Run `action` in the first process of these groups; all wait for it, and raise what it raises."""
    import torch.distributed as dist

    error: AdapterError | None = None
    if all(dist.get_rank(group) == 0 for group in groups):
        try:
            action()
        except AdapterError as raised:
            error = raised
        except Exception as raised:  # noqa: BLE001 - whatever it is, the others wait
            error = SaveError(f"The first process failed: {type(raised).__name__}: {raised}")
    for group in groups:
        box = [error]
        dist.broadcast_object_list(box, group=group, group_src=0)
        error = box[0]
    if error is not None:
        raise error


def _deepspeed() -> Any:
    import deepspeed

    return deepspeed.zero
