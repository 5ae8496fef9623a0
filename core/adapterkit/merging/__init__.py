"""Merging adapters into a model's weights, and giving the weights back bit for bit.

In: adapters on a model. Out: a checked plan, and the weights with the changes in them.
Uses: errors, tensors, kinds, contract, forward, model.
"""

from adapterkit.merging.changes import Change, check_in_memory, parted_names, plan
from adapterkit.merging.plain import obstacle
from adapterkit.merging.ties import FLAG, Parting, nested, number_of
from adapterkit.merging.weights import Done, Merged, carry_out, give_back, merge_module, take_back, take_heads

__all__ = [
    "FLAG",
    "Change",
    "Done",
    "Merged",
    "Parting",
    "carry_out",
    "check_in_memory",
    "give_back",
    "merge_module",
    "nested",
    "number_of",
    "obstacle",
    "parted_names",
    "plan",
    "take_back",
    "take_heads",
]
