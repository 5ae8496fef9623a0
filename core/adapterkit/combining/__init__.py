"""New adapters out of changes that are known: combine, convert, extract.

In: the changes of adapters (or of two models), as factors. Out: one new adapter of any method that can hold them.
Uses: errors, results, kinds, contract, forward, model, files, merging.
"""

from adapterkit.combining.extraction import check_asked, extracted, module_of, same_layer, wanted_layers
from adapterkit.combining.lowrank import check_size, svd, working
from adapterkit.combining.methods import Space
from adapterkit.combining.sources import Choices, Workspace, check_same_base, check_sources, mix

__all__ = [
    "Choices",
    "Space",
    "Workspace",
    "check_asked",
    "check_same_base",
    "check_size",
    "check_sources",
    "extracted",
    "mix",
    "module_of",
    "same_layer",
    "svd",
    "wanted_layers",
    "working",
]
