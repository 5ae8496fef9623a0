"""Tensors that are not simply in this process's memory: sharded, offloaded, held by a graph.

In: a model's parameters and buffers. Out: their whole values, whether and how they can be written to, random numbers to
begin with, and torch's default modes.
Uses: errors.
"""

from adapterkit.tensors.assign import Slot, apart, module_slots, put
from adapterkit.tensors.distributed import (
    agreed,
    check_averaged,
    check_can_grow,
    full,
    gathered,
    has_fsdp1,
    in_first_process,
    is_dtensor,
    is_fsdp,
    is_sharded,
    process_groups,
    refuse_fsdp1,
    reshard,
    shape_of,
    size_of,
    watch_wrappers,
    whole,
    wrappers_of,
)
from adapterkit.tensors.interrupts import uninterrupted
from adapterkit.tensors.offload import execution_device, hook_objects, is_hooked, real_value, remove_hooks
from adapterkit.tensors.seeds import new_seed, seeded
from adapterkit.tensors.settings import default_modes, without_autocast
