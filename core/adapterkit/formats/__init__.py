"""The layouts of adapter files that programs write, and the one way from each of them to PEFT's.

In: an adapter's files as read, and the layers of a model, where there is one. Out: its method, its config and its
tensors in PEFT's names, and the program whose layout it was.
Uses: errors, kinds, contract, model.
"""

from adapterkit.formats.algorithms import algorithms_in
from adapterkit.formats.earlier_names import in_order, renaming
from adapterkit.formats.layouts import CONFIG_FILE, PEFT, AdapterFiles, layers_of, shapes_of
from adapterkit.formats.mlx import MLX_WEIGHTS, mlx_files
from adapterkit.formats.names import advice_on_names, original_names
from adapterkit.formats.refused import (
    TOKENS,
    check_beginning,
    check_config,
    check_content,
    warn_of_weights_beside,
    what_else,
)
from adapterkit.formats.translation import Translation, in_names_of, translate
from adapterkit.formats.wrapped import tensors_in
