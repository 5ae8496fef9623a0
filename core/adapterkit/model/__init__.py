"""Adapters on a live model: which layers they change, and all that belongs to one adapter.

In: a model and a config. Out: the selected layers, and one adapter's layers, heads, biases and shared tensors.
Uses: errors, results, tensors, kinds, contract, forward, rows.
"""

from adapterkit.model.adapted import AdaptedModel
from adapterkit.model.adapter import Adapter, acting_heads, checked_strengths, finite_number, training_among
from adapterkit.model.build import LayerBuilder, build_adapter, completed, initial_shared, initial_values
from adapterkit.model.heads import LabelSet, copy_head, resize_new_head, task_type
from adapterkit.model.modules import BaseModules, base_parameters, inner_model, inside, named_modules
from adapterkit.model.optimizing import parameter_groups
from adapterkit.model.selection import ALL_LINEAR, Match, Selection, select, select_on
from adapterkit.model.sorting import Fit, heads_in_file, layer_tensors, sort_for, sort_tensors, with_heads
from adapterkit.model.vocabulary import resized_keys, resized_tables, tables
