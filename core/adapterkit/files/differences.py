"""Differences of whole weights and biases that a file has beside an adapter: the modules that they change, in full."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from adapterkit.contract import LayerNames
from adapterkit.errors import CheckpointError
from adapterkit.formats import Translation
from adapterkit.model import BaseModules
from adapterkit.tensors import real_value

# What LyCORIS calls them (full differences, and norms), and ComfyUI; and the parameter that each is added to.
_PARAMETERS = {"diff": "weight", "diff_b": "bias", "w_norm": "weight", "b_norm": "bias"}


def with_differences(
    found: Translation, modules: BaseModules
) -> tuple[dict[str, Tensor], tuple[str, ...], tuple[str, ...]]:
    """The tensors of another program's file, with whole modules in place of differences.

    `W' = W + diff` is computed in float32. Differences stay, and are reported, at layers that the adapter changes as
    well, and where the module is not there or has no values.

    Returns:
        The tensors; the paths of the modules; and the keys of differences of zeros, which are left out.

    Raises:
        CheckpointError: a difference has another size than the parameter, or is the second one for it.
    """
    tensors = dict(found.tensors)
    keys = [key for key in tensors if key.rpartition(".")[2] in _PARAMETERS and key not in found.passed]
    zeros = [key for key in keys if not tensors[key].any()]
    known = {paths[0]: module for module, paths in modules.paths_of.items() if module._parameters} if keys else {}
    names, changed = LayerNames(known), dict[str, dict[str, Tensor]]()
    for key in keys:
        difference, (name, _, local) = tensors.pop(key), key.rpartition(".")
        path, parameter = names.find(name), _PARAMETERS[local]
        if key in zeros:
            continue
        own = None if path is None or path in found.layers else _value(known[path], parameter)
        # An entry of modules_to_save means every module whose path ends like it.
        if path is None or own is None or any(other.endswith(f".{path}") for other in modules.all_paths):
            tensors[key] = difference
        elif own.numel() != difference.numel() or not difference.is_floating_point():
            raise CheckpointError(
                f"{key!r} holds {difference.dtype} of shape {tuple(difference.shape)}; {path!r} has floating numbers "
                f"of shape {tuple(own.shape)} there."
            )
        elif parameter in changed.get(path, ()):
            raise CheckpointError(
                f"{key!r} is a second difference for the {parameter} of {path!r}. One of them must go."
            )
        else:
            wide = torch.promote_types(own.dtype, torch.float32)
            changed.setdefault(path, {})[parameter] = own + difference.to(own.device, wide).view(own.shape)
    for path, given in changed.items():
        module = known[path]
        held = [*module._parameters, *(module._buffers.keys() - module._non_persistent_buffers_set)]
        whole = {name: real_value(module, name) for name in held if getattr(module, name) is not None} | given
        tensors |= {f"{path}.{name}": tensor for name, tensor in whole.items()}
    return tensors, tuple(changed), tuple(zeros)


def _value(module: nn.Module, parameter: str) -> Tensor | None:
    """The value of a module's own parameter, if it has one of floating numbers."""
    if module._parameters.get(parameter) is None:
        return None
    value = real_value(module, parameter)
    return None if value.is_meta or not value.is_floating_point() else value
