"""Tensors that are not simply in this process's memory: sharded, offloaded, held by a graph.

In: a model's parameters and buffers. Out: their whole values, and whether and how they can be written to.
Uses: errors.
"""

from adapterkit.tensors.interrupts import uninterrupted
from adapterkit.tensors.offload import execution_device, hook_objects, is_hooked, real_value, remove_hooks
from adapterkit.tensors.sharded import as_wholes, by_first_rank, groups_of, is_sharded, shape_of, size_of, whole
from adapterkit.tensors.wrapped import (
    check_averaged,
    check_can_grow,
    check_can_replace,
    has_fsdp1,
    is_fsdp,
    refuse_fsdp1,
    reshard,
    watch,
)

__all__ = [
    "as_wholes",
    "by_first_rank",
    "check_averaged",
    "check_can_grow",
    "check_can_replace",
    "execution_device",
    "groups_of",
    "has_fsdp1",
    "hook_objects",
    "is_fsdp",
    "is_hooked",
    "is_sharded",
    "real_value",
    "refuse_fsdp1",
    "remove_hooks",
    "reshard",
    "shape_of",
    "size_of",
    "uninterrupted",
    "watch",
    "whole",
]
