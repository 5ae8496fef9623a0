"""Models trained on many processes: DDP, FSDP and DeepSpeed fix which parameters they average when they are set up.

What comes later, or was frozen then, would be trained by each process for itself.
"""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.nn.parallel import DistributedDataParallel

from adapterkit.errors import StateError

if TYPE_CHECKING:
    from adapterkit.model import Adapter

# The model inside does not know its wrapper, so wrappers are noticed when they are made.
_seen: weakref.WeakSet[nn.Module] = weakref.WeakSet()
# Where DeepSpeed's optimizers list the parameters they were made for.
_GROUPS = ("bit16_groups", "bf16_groups", "fp16_groups")


@cache
def watch() -> None:
    """Notice wrappers from now on, and find those that are there."""
    register_module_module_registration_hook(_notice)
    for found in gc.get_objects() if _is_distributed() else ():
        if issubclass(type(found), nn.Module):
            _notice(found)


def _notice(parent: nn.Module, name: str = "", child: nn.Module | None = None) -> None:
    if isinstance(parent, DistributedDataParallel) or _is_fsdp1(parent):
        _seen.add(parent)


def _is_fsdp1(module: nn.Module) -> bool:
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FullyShardedDataParallel)


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _around(model: nn.Module) -> Iterator[Any]:
    for wrapper in list(_seen):
        inside = next(wrapper.children(), None)
        if inside is model or any(module is model for module in wrapper.modules()):
            yield wrapper


def has_fsdp1(model: nn.Module) -> bool:
    """Whether the older `FullyShardedDataParallel` is around the model, or in it."""
    return any(map(_is_fsdp1, (*_around(model), *(model.modules() if _is_distributed() else ()))))


def engine_of(model: nn.Module) -> Any:
    """The DeepSpeed engine that the model is in, or `None`: its hook at the model knows it."""
    for hook in model._forward_pre_hooks.values():
        if getattr(hook, "__module__", "") == "deepspeed.runtime.engine":
            for cell in getattr(hook, "__closure__", None) or ():
                if isinstance(cell.cell_contents, nn.Module):
                    return cell.cell_contents
    return None


def is_dtensor(tensor: Tensor) -> bool:
    """Whether it is one of torch's `DTensor`s."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def is_partitioned(tensor: Tensor) -> bool:
    """Whether DeepSpeed ZeRO-3 holds it, gathered now or not."""
    return hasattr(tensor, "ds_id")


def reshard(model: nn.Module) -> None:
    """Have FSDP2 put its shards in place: after a forward its root holds copies, in the dtype it computes in."""
    for module in _fsdp_modules(model):
        module.reshard()


def is_fsdp(module: nn.Module) -> bool:
    """Whether FSDP2 shards this module, or modules inside it, apart from those around it."""
    return any(True for _ in _fsdp_modules(module))


def _fsdp_modules(root: nn.Module) -> Iterator[Any]:
    fsdp = sys.modules.get("torch.distributed.fsdp") if _is_distributed() else None
    if fsdp is not None:
        yield from (module for module in root.modules() if isinstance(module, fsdp.FSDPModule))


def refuse_fsdp1(model: nn.Module) -> None:
    """Raise `StateError` if torch's older FSDP is around the model or in it."""
    if has_fsdp1(model):
        raise StateError(
            "The model is in FullyShardedDataParallel, which keeps its parameters where nothing else can use them. "
            "Give save and state_dict a full state dict (source=...), or shard the model by fully_shard."
        )


def check_can_grow(model: nn.Module, name: str) -> None:
    """Raise `StateError` if no parameter may be added to the model any more: ZeRO-3 stumbles over it."""
    refuse_fsdp1(model)
    if engine_of(model) is not None and any(map(is_partitioned, model.parameters())):
        raise StateError(
            f"Adapter {name!r} cannot be added: the model is in a DeepSpeed engine with ZeRO stage 3, which takes no "
            "new parameters. Add all adapters before deepspeed.initialize."
        )


def check_averaged(model: nn.Module, adapter: Adapter) -> None:
    """Raise `StateError` if training this adapter would let the processes drift apart."""
    setup = _unaware(model, adapter) if _is_distributed() else None
    if setup is not None and gc.collect() >= 0:  # a wrapper that nobody has any more may be left
        setup = _unaware(model, adapter)
    if setup is not None:
        raise StateError(
            f"Adapter {adapter.name!r} cannot be trained: its parameters were not there, or were frozen, when the "
            f"model was given to {setup}. Their gradients are not averaged, so each process would train another "
            "adapter. Add and activate it before that; or use it as it is, with trainable=False."
        )


def check_can_replace(model: nn.Module, key: str) -> None:
    """Raise `StateError` if a parameter of the model may not be replaced by another."""
    for setup, _ in _setups(model) if _is_distributed() else ():
        raise StateError(
            f"{key!r} is loaded in another shape than it has, so another parameter must stand there, and {setup} "
            "averages only those that it was given. Load it before that."
        )


def _unaware(model: nn.Module, adapter: Adapter) -> str | None:
    """What averages the model's gradients, but not all of this adapter's."""
    for setup, averages in _setups(model):
        if not all(map(averages, adapter.parameters())):
            return setup
    return None


def _setups(model: nn.Module) -> Iterator[tuple[str, Callable[[nn.Parameter], bool]]]:
    """Each thing that averages gradients of the model, and whether it does so for a parameter."""
    engine = engine_of(model)
    if engine is not None:
        yield "deepspeed.initialize", _among(_of_engine(engine))
    if is_fsdp(model):
        reshard(model)
        yield "fully_shard", is_dtensor
    if has_fsdp1(model):
        yield "FullyShardedDataParallel", lambda p: getattr(p, "_fsdp_flattened", False)
    ddp = [wrapper for wrapper in _around(model) if isinstance(wrapper, DistributedDataParallel)]
    if ddp:
        buckets = [bucket for wrapper in ddp for bucket in wrapper.reducer._get_zeros_like_grad_buckets()]
        yield "DistributedDataParallel", _among(p for bucket in buckets for p in bucket.parameters())


def _of_engine(engine: Any) -> Iterator[Tensor]:
    """The parameters that a DeepSpeed engine's optimizer was made for."""
    for attribute in _GROUPS:
        for group in getattr(engine.optimizer, attribute, ()):
            yield from group
    for group in getattr(engine.basic_optimizer, "param_groups", ()):
        yield from group["params"]


def _among(known: Iterable[Tensor]) -> Callable[[nn.Parameter], bool]:
    ids = set(map(id, known))
    return lambda parameter: id(parameter) in ids
