"""Models that several processes train: DDP, FSDP and DeepSpeed.

They fix which parameters they average when they are set up. A parameter that is added or unfrozen later is trained by
each process alone. FSDP2 and DeepSpeed's ZeRO-3 leave each process only a shard of a parameter: reading or writing its
whole value is a collective operation, so every process must call it.
"""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.nn.parallel import DistributedDataParallel

from adapterkit.errors import AdapterError, SaveError, StateError

if TYPE_CHECKING:
    from adapterkit.model import Adapter

# Whole values of sharded parameters


def shape_of(tensor: Tensor) -> torch.Size:
    """The shape of the whole tensor. ZeRO-3 leaves an empty tensor in place of a partitioned one."""
    shape: torch.Size = getattr(tensor, "ds_shape", tensor.shape)
    return shape


def size_of(tensors: Iterable[Tensor]) -> int:
    """How many numbers the whole tensors hold."""
    return sum(shape_of(tensor).numel() for tensor in tensors)


def is_dtensor(tensor: Tensor) -> bool:
    """Whether this is one of torch's `DTensor`s, which FSDP2 uses."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def _is_partitioned(tensor: Tensor) -> bool:
    """Whether DeepSpeed ZeRO-3 manages this parameter, gathered now or not."""
    return hasattr(tensor, "ds_id")


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds only a part of the tensor."""
    return is_dtensor(tensor) or _is_partitioned(tensor)


def _deepspeed_gathered(parameters: list[Any], **options: Any) -> AbstractContextManager[object]:
    if not parameters:
        return nullcontext()
    import deepspeed

    found: AbstractContextManager[object] = deepspeed.zero.GatheredParameters(parameters, **options)
    return found


@torch.no_grad()
def whole(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The whole values of these tensors, without gradients; copies where a tensor is sharded."""
    with _deepspeed_gathered([t for t in tensors if _is_partitioned(t) and shape_of(t) != t.shape]):
        values: list[Any] = [t.detach().clone() if _is_partitioned(t) else t.detach() for t in tensors]
    for i, value in enumerate(values):
        if is_dtensor(value):
            # Offloaded shards are on the CPU, but the processes of GPUs can only communicate through their GPUs.
            values[i] = value.to(value.device_mesh.device_type).full_tensor().to(value.device)
    return values


def full(tensor: Any) -> Any:
    """The whole value of FSDP2's shards, with gradients; any other tensor as it is.

    Raises:
        StateError: DeepSpeed ZeRO-3 has partitioned it.
    """
    if _is_partitioned(tensor) and shape_of(tensor) != tensor.shape:
        raise StateError("DeepSpeed ZeRO-3 has partitioned the adapter, so its penalty cannot be computed. Use ZeRO-2.")
    return tensor.to(tensor.device_mesh.device_type).full_tensor() if is_dtensor(tensor) else tensor


@contextmanager
def gathered(
    model: nn.Module, modules: Iterable[nn.Module], *, writing: bool = False, gradients: bool = False
) -> Iterator[None]:
    """Replace the sharded parameters of `modules` by plain parameters with their whole values, inside the block.

    Args:
        model: the model that contains the modules.
        writing: write what the block wrote into the parameters back to the shards, unless it raises.
        gradients: the plain parameters have the whole gradients of FSDP2's shards.

    Raises:
        StateError: torch's older FSDP holds the parameters, or an error has ended a forward under FSDP2 halfway.
    """
    modules = list(modules)
    if modules:
        refuse_fsdp1(model)
    reshard(model)
    _refuse_interrupted(model)
    places: list[tuple[nn.Module, str, Any]] = [
        (m, name, p) for m in modules for name, p in m._parameters.items() if p is not None and is_sharded(p)
    ]
    sharded = list({id(p): p for _, _, p in places}.values())
    plain = {id(p): nn.Parameter(value, p.requires_grad) for p, value in zip(sharded, whole(sharded), strict=True)}
    for p in sharded if gradients else ():
        plain[id(p)].grad = None if p.grad is None else whole([p.grad])[0]
    try:
        for module, name, p in places:
            module._parameters[name] = plain[id(p)]
        yield
    finally:
        for module, name, p in places:
            module._parameters[name] = p
    if not writing:
        return
    _write([(p, plain[id(p)]) for p in sharded])
    optimizer: Any = getattr(_engine_of(model), "optimizer", None)
    if hasattr(optimizer, "refresh_fp32_params"):
        optimizer.refresh_fp32_params()  # the optimizer's own copies would undo the change at its next step


@torch.no_grad()
def _write(values: Sequence[tuple[Any, Tensor]]) -> None:
    """Write whole values into sharded tensors. Each process passes the same values."""
    partitioned = [parameter for parameter, _ in values if _is_partitioned(parameter)]
    if any(getattr(parameter, "_ds_z3_gathered_param_context_depth", 0) for parameter in partitioned):
        raise StateError("DeepSpeed's GatheredParameters holds the adapter now. Call this outside its block.")
    with _deepspeed_gathered(partitioned, modifier_rank=0):
        for parameter, value in values:
            if _is_partitioned(parameter):
                parameter.data.copy_(value)
            else:
                from torch.distributed.tensor import distribute_tensor

                mesh = parameter.device_mesh
                moved = value.to(mesh.device_type, parameter.dtype)
                shard = distribute_tensor(moved, mesh, parameter.placements, src_data_rank=None)
                parameter.to_local().copy_(shard.to_local())


def process_groups(tensors: Iterable[Tensor]) -> list[Any]:
    """The process groups over which these tensors are sharded."""
    found: list[Any] = []
    for tensor in tensors:
        mesh, group = getattr(tensor, "device_mesh", None), getattr(tensor, "ds_process_group", None)
        found += [] if mesh is None else mesh.get_all_groups()
        found += [] if group is None else [group]
    return list({id(group): group for group in found}.values())


def agreed(number: int, model: nn.Module, tensors: Iterable[Tensor]) -> int:
    """The first process's number, in all that divide these tensors or average the model's gradients."""
    ddp = [wrapper.process_group for wrapper in wrappers_of(model) if isinstance(wrapper, DistributedDataParallel)]
    box = [number]
    for group in [*process_groups(tensors), *ddp]:
        dist.broadcast_object_list(box, group=group, group_src=0)
    return box[0]


def in_first_process(groups: Sequence[Any], action: Callable[[], None]) -> None:
    """Run `action` in the first process of these groups, and in every process if there are none.

    All others wait, and raise the error that it raises.
    """
    error: AdapterError | None = None
    if all(dist.get_rank(group) == 0 for group in groups):
        try:
            action()
        except AdapterError as raised:
            error = raised
        except Exception as raised:  # noqa: BLE001 - the other processes wait, whatever it is
            error = SaveError(f"The first process failed: {type(raised).__name__}: {raised}")
    for group in groups:
        box = [error]
        dist.broadcast_object_list(box, group=group, group_src=0)
        error = box[0]
    if error is not None:
        raise error


# What is around a model

# A model does not know the wrapper around it, so wrappers are collected when they are made.
_wrappers: weakref.WeakSet[nn.Module] = weakref.WeakSet()


@cache
def watch_wrappers() -> None:
    """Collect the wrappers that exist and, from now on, those that are made."""
    register_module_module_registration_hook(_collect)
    for found in gc.get_objects() if _is_distributed() else ():
        if issubclass(type(found), nn.Module):
            _collect(found)


def _collect(parent: nn.Module, name: str = "", child: nn.Module | None = None) -> None:
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if isinstance(parent, DistributedDataParallel) or (fsdp and isinstance(parent, fsdp.FullyShardedDataParallel)):
        _wrappers.add(parent)


def wrappers_of(model: nn.Module) -> list[Any]:
    """The wrappers for several processes that the model is in: DDP's and torch's older FSDP's."""
    return [wrapper for wrapper in list(_wrappers) if any(module is model for module in wrapper.modules())]


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _fsdp(roots: Iterable[nn.Module], name: str) -> list[Any]:
    """The modules in `roots` of this class of `torch.distributed.fsdp`, which may not be imported yet."""
    fsdp = sys.modules.get("torch.distributed.fsdp") if _is_distributed() else None
    if fsdp is None:
        return []
    return [module for root in roots for module in root.modules() if isinstance(module, getattr(fsdp, name))]


def has_fsdp1(model: nn.Module) -> bool:
    """Whether torch's older `FullyShardedDataParallel` is around the model or in it."""
    return bool(_fsdp((*wrappers_of(model), model), "FullyShardedDataParallel"))


def refuse_fsdp1(model: nn.Module) -> None:
    """Raise `StateError` if torch's older FSDP is around the model or in it."""
    if has_fsdp1(model):
        raise StateError(
            "The model is in FullyShardedDataParallel, which hides its parameters from everything else. Give save and "
            "state_dict a full state dict (source=...), or shard the model with fully_shard."
        )


def is_fsdp(module: nn.Module) -> bool:
    """Whether FSDP2 shards this module, or modules inside it, separately from those around it."""
    return bool(_fsdp((module,), "FSDPModule"))


def reshard(model: nn.Module) -> None:
    """Have FSDP2 put its shards back: after a forward its root holds copies in the dtype of the computation."""
    for module in _fsdp((model,), "FSDPModule"):
        module.reshard()


def _refuse_interrupted(model: nn.Module) -> None:
    """Raise `StateError` if FSDP2 cannot put its shards back, because a forward has raised an error in between.

    What is written then goes to copies, which are thrown away.
    """
    for module in _fsdp((model,), "FSDPModule"):
        state = module._get_fsdp_state()
        groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
        if any(getattr(group, "is_unsharded", False) for group in groups):
            raise StateError(
                "A forward under fully_shard was ended by an error, and FSDP keeps its copies of the parameters in "
                "place. Call model.reset_iter_state() on the outermost sharded module, as torch says, and then this."
            )


def _engine_of(model: nn.Module) -> Any:
    """The DeepSpeed engine around the model, or `None`. The engine's hook on the model refers to it."""
    for hook in model._forward_pre_hooks.values():
        if getattr(hook, "__module__", "") == "deepspeed.runtime.engine":
            for cell in getattr(hook, "__closure__", None) or ():
                if isinstance(cell.cell_contents, nn.Module):
                    return cell.cell_contents
    return None


# Which parameters are averaged


def check_can_grow(model: nn.Module, name: str) -> None:
    """Raise `StateError` if the model can take no new parameters, as under ZeRO-3."""
    refuse_fsdp1(model)
    if _engine_of(model) is not None and any(map(_is_partitioned, model.parameters())):
        raise StateError(
            f"Adapter {name!r} cannot be added: the model is in a DeepSpeed engine with ZeRO stage 3, which takes no "
            "new parameters. Add all adapters before deepspeed.initialize."
        )


def check_averaged(model: nn.Module, adapter: Adapter) -> None:
    """Raise `StateError` if each process would train this adapter alone."""
    for setup, known in _averaging(model).items():
        if not {id(p) for p in adapter.parameters()} <= {id(p) for p in known}:
            raise StateError(
                f"Adapter {adapter.name!r} cannot be trained: its parameters were missing or frozen when the model was "
                f"given to {setup}. Their gradients are not averaged, so each process would train another adapter. Add "
                "and activate it before that, or use it as it is, with trainable=False."
            )


def _averaging(model: nn.Module) -> dict[str, list[Tensor]]:
    """Everything that averages gradients of the model, with the parameters whose gradients it averages."""
    found: dict[str, list[Tensor]] = {}
    if not _is_distributed():
        return found
    engine = _engine_of(model)
    if engine is not None:
        groups = [group["params"] for group in getattr(engine.basic_optimizer, "param_groups", ())]
        for name in ("bit16_groups", "bf16_groups", "fp16_groups"):
            groups += getattr(engine.optimizer, name, ())
        found["deepspeed.initialize"] = [p for group in groups for p in group]
    if is_fsdp(model):
        reshard(model)
        found["fully_shard"] = [p for p in model.parameters() if is_dtensor(p)]
    if has_fsdp1(model):
        found["FullyShardedDataParallel"] = [p for p in model.parameters() if getattr(p, "_fsdp_flattened", False)]
    ddp = [wrapper for wrapper in wrappers_of(model) if isinstance(wrapper, DistributedDataParallel)]
    if ddp:
        buckets = [bucket for wrapper in ddp for bucket in wrapper.reducer._get_zeros_like_grad_buckets()]
        found["DistributedDataParallel"] = [p for bucket in buckets for p in bucket.parameters()]
    return found
