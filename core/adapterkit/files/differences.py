"""Differences of whole weights and biases that a file has beside an adapter: the modules that they change, in full."""

from __future__ import annotations

import torch
from torch import Tensor

from adapterkit.contract import LayerNames
from adapterkit.errors import CheckpointError
from adapterkit.formats import Translation
from adapterkit.model import BaseModules
from adapterkit.tensors import real_value

# What LyCORIS calls them (full differences, and norms), and ComfyUI; and the parameter that each is added to.
_PARAMETERS = {"diff": "weight", "diff_b": "bias", "w_norm": "weight", "b_norm": "bias"}


def with_differences(found: Translation, modules: BaseModules) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The tensors of another program's file, with whole modules in place of differences, and the paths of those.

    `W' = W + diff` is computed in float32. Differences stay, and are reported, at layers that the adapter changes as
    well, and where the module is not there or has no values.

    Raises:
        CheckpointError: a difference has another size than the parameter.
    """
    tensors = dict(found.tensors)
    keys = [key for key in tensors if key.rpartition(".")[2] in _PARAMETERS and key not in found.passed]
    if not keys:
        return tensors, ()
    known = {paths[0]: module for module, paths in modules.paths_of.items() if module._parameters}
    names, changed = LayerNames(known), dict[str, dict[str, Tensor]]()
    for key in keys:
        name, _, local = key.rpartition(".")
        path, parameter = names.find(name), _PARAMETERS[local]
        if path is None or path in found.layers or known[path]._parameters.get(parameter) is None:
            continue
        if any(other.endswith(f".{path}") for other in modules.all_paths):  # an entry for it means that one, too
            continue
        value = real_value(known[path], parameter)
        if value.is_meta or not value.is_floating_point():
            continue
        if value.numel() != tensors[key].numel():
            raise CheckpointError(f"{key!r} has shape {tuple(tensors[key].shape)}; {path!r} has {tuple(value.shape)}.")
        difference = tensors.pop(key).to(value.device, torch.promote_types(value.dtype, torch.float32))
        changed.setdefault(path, {})[parameter] = value + difference.view(value.shape)
    for path, given in changed.items():
        module = known[path]
        held = [*module._parameters, *(module._buffers.keys() - module._non_persistent_buffers_set)]
        rest = [name for name in held if name not in given and getattr(module, name) is not None]
        tensors |= {f"{path}.{name}": given.get(name, real_value(module, name)) for name in (*given, *rest)}
    return tensors, tuple(changed)
