"""The forward of an adapted model: which adapters are active, and what a module then computes.

In: a module with its adapter layers, heads and biases, and what is active in this thread. Out: the module's output.
Uses: errors, tensors, kinds, contract.
"""

from adapterkit.forward import tensor_parallel
from adapterkit.forward.arithmetic import delta, drops
from adapterkit.forward.heads import (
    BiasLayer,
    bias_place,
    callable_head,
    check_trained_dtype,
    give_dtypes_back,
    trained_dtype,
)
from adapterkit.forward.plan import Base, Call, Plan, input_name, is_checked, of_input, run, run_layers, summable
from adapterkit.forward.readers import ACTIVE, Path, declare_reader, effective_weight, readers_of
from adapterkit.forward.state import Active, Block, State, Strength, lock, strength_at
from adapterkit.forward.surgery import (
    PerAdapter,
    calls_adapters,
    check_free,
    check_free_root,
    derive,
    install,
    let_read,
    original_class,
    own_forward,
    stop_reading,
    strip,
    uninstall,
)
