"""What an adapter's files hold beside its layers: heads, trained biases and tables of embeddings, by their keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from adapterkit.contract import AdapterConfig, KeyRule, Names
from adapterkit.disk.standin import Part

# PEFT writes what a head was before it was trained under these as well.
_SHADOWS = ("modules_to_save", "original_module")


def split_key(key: str, rule: KeyRule) -> tuple[str, str] | None:
    """`(path, local)` of a tensor of an adapter layer, `None` for any other.

    The last part that begins with the method's prefix begins the local name: a module may be called like it too.
    """
    parts = key.split(".")
    for i in range(len(parts) - 1, 0, -1):
        if rule.owns(parts[i]):
            return ".".join(parts[:i]), ".".join(parts[i:])
    return None


def other_modules(
    tensors: Mapping[str, Tensor], layers: Mapping[str, nn.Module], config: AdapterConfig, rule: KeyRule
) -> dict[str, nn.Module]:
    """The modules that keys which are no adapter layer's stand for, by path; `layers` get the biases that they train.

    Args:
        tensors: the file's, on the meta device, PEFT's prefix removed.
    """
    heads = _Heads(config.modules_to_save)
    inside: dict[str, dict[str, Tensor]] = {}
    found: dict[str, nn.Module] = {}
    for key, tensor in tensors.items():
        path, _, local = key.rpartition(".")
        host = layers.get(path.removesuffix(".base_layer"))
        if split_key(key, rule) is not None or key in rule.shared:
            continue
        if host is not None and local == "bias" and path.endswith(".base_layer") and tensor.is_floating_point():
            host._parameters["bias"] = nn.Parameter(tensor, requires_grad=False)
        elif (head := heads.of(key)) is not None:
            inside.setdefault(head, {})[key[len(head) + 1 :]] = tensor
        elif not path or not tensor.is_floating_point():
            continue
        elif local == "bias" and config.trained_biases == "all" and tensor.dim() == 1:
            found[path] = _norm(tensor)
        elif local == "weight" and tensor.dim() == 2 and host is None:
            found[path] = nn.Embedding(len(tensor), tensor.shape[1], dtype=tensor.dtype, device="meta")
    return found | {path: head_of(held) for path, held in inside.items()}


def head_of(tensors: Mapping[str, Tensor]) -> nn.Module:
    """A head with these tensors, by their names in it: linear layers where they may be ones."""
    own = {name: t for name, t in tensors.items() if "." not in name}
    head: nn.Module = Part()
    weight = own.get("weight")
    if weight is not None and weight.dim() == 2 and own.keys() <= {"weight", "bias"} and _has_numbers(weight):
        rows, columns = weight.shape
        head = nn.Linear(columns, rows, bias="bias" in own, dtype=weight.dtype, device="meta")
    # Into the tables themselves: a file may hold any names, and those that are attributes too would be refused.
    for name, tensor in own.items():
        if tensor.is_floating_point():
            head._parameters[name] = nn.Parameter(tensor, requires_grad=False)
        else:
            head._buffers[name] = tensor
    children: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        child, _, rest = name.partition(".")
        if rest:
            children.setdefault(child, {})[rest] = tensor
    for child, held in children.items():
        head._modules[child] = head_of(held)
    return head


class _Heads:
    """Which keys `modules_to_save` names: PEFT takes a module whose path is an entry or merely ends like one."""

    def __init__(self, wanted: str | Sequence[str] | None) -> None:
        self._names = Names([wanted] if isinstance(wanted, str) else wanted or ())

    def of(self, key: str) -> str | None:
        """The head that a key is inside of: the outermost module that is named."""
        parts = key.split(".")
        for i in range(1, len(parts)):
            path = ".".join(parts[:i])
            if self._names.match(path) or path.endswith(self._names.names):
                return None if parts[i] in _SHADOWS else path
        return None


def _norm(bias: Tensor) -> nn.Module:
    """A module that has this bias, and of which it is known where the bias acts."""
    module: nn.Module = nn.LayerNorm(tuple(bias.shape), dtype=bias.dtype, device="meta")
    module._parameters["bias"] = nn.Parameter(bias, requires_grad=False)
    return module


def _has_numbers(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.numel() > 0


def without_values(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same shapes and dtypes on the meta device, of those keys that can be a tensor's of some module."""
    return {key: torch.empty_like(t, device="meta") for key, t in tensors.items() if _is_a_place(key)}


def _is_a_place(key: str) -> bool:
    return all(part and not hasattr(nn.Module, part) for part in key.split("."))
