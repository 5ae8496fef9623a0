"""New adapters from known changes: combine, convert, extract.

In: the changes of adapters (or of two models), as factors. Out: one new adapter of any method that can express them.
Uses: errors, results, tensors, kinds, contract, forward, model, files, merging.
"""

from adapterkit.combining.combine import Source, check_sources, check_values, exact_change, mix
from adapterkit.combining.extraction import config_to_extract, extracted, module_of, same_layer
from adapterkit.combining.heads import outputs_of
from adapterkit.combining.lowrank import all_finite, check_size, rank_for_energy, svd, working
from adapterkit.combining.methods import Choices, Space
from adapterkit.combining.new_adapter import Changes, build_result, check_given, to_method
