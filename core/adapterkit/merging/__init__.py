"""Merging adapters into a model's weights, and giving the weights back bit for bit.

In: adapters on a model. Out: a checked plan, and the weights with the changes in them.
Uses: errors, tensors, kinds, contract, forward, model.
"""

from adapterkit.merging.changes import Change, give_own_memory, merge_module, plan
from adapterkit.merging.obstacles import obstacle
from adapterkit.merging.places import Place
from adapterkit.merging.tied_weights import FLAG, Parting, nested
from adapterkit.merging.weights import Merged, merging, take_heads
