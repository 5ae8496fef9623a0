"""The contract of an adapter method: what its author writes, and how the library finds and checks it.

In: plugins, from entry points or `ak.register`. Out: configs, layers, key rules, and the `Method` that calls the hooks.
Uses: errors, door, migration, results, tensors, kinds.
"""

from adapterkit.contract.combiners import Combiner, CombinerOptions, MajoritySign
from adapterkit.contract.config import AdapterConfig
from adapterkit.contract.field_types import Dropout, Limit, Probability, Rank
from adapterkit.contract.formats import (
    DOTTED,
    FLAT,
    GENERATORS,
    OPTIONAL,
    ForeignFile,
    ForeignLayer,
    Format,
    LayerNames,
    component,
    empty_layer,
    exactly,
)
from adapterkit.contract.hookspecs import EXTENSIONS_GROUP, hookimpl
from adapterkit.contract.keys import (
    ATTRIBUTE,
    BIASES,
    CONTAINERS,
    FILE_PREFIX,
    HEADS,
    LAYERS,
    SHARED,
    KeyRule,
    beside,
    file_key,
    part_name,
    split_memory_key,
    strip_file_prefix,
    unwrapped_key,
)
from adapterkit.contract.layers import (
    INPUT_DROPOUT,
    AdapterLayer,
    DenseLayer,
    Holder,
    LowRankLayer,
    Shared,
    Target,
    device_of,
    kaiming,
    shared_tensors,
    twin,
    widened,
    without_values,
)
from adapterkit.contract.method import Method, Plugin, plugin
from adapterkit.contract.patterns import Names, Pattern, PatternTable, Rule
from adapterkit.contract.registry import (
    DISABLE_VARIABLE,
    Extension,
    Installed,
    Registry,
    default_registry,
    switched_off,
)
