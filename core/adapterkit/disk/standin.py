"""Stand-ins: a model made of what adapters' files say about it, on the meta device.

It has a module at the path of each layer that the files change, of that layer's kind and sizes, and one for each head
and bias that they hold. The library's own selection, loading and combining work on it as on the model itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn


class Part(nn.Module):
    """A module that is known by what is in it; it is never run."""

    def forward(self, *args: object) -> None:
        """Nothing. What has no forward of its own is taken for a container, and refused as a head."""


def assemble(groups: Iterable[Mapping[str, nn.Module]]) -> nn.Module:
    """The model that has all these modules, in the natural order of their paths."""
    modules: dict[str, nn.Module] = {}
    for group in groups:
        for path, module in group.items():
            modules[path] = _joined(modules[path], module) if path in modules else module
    model = Part()
    for path in sorted(modules, key=natural):
        _put(model, path, modules[path])
    return model.requires_grad_(False)


def natural(path: str) -> list[tuple[int, str]]:
    """A key to sort paths by in which `layers.2` is before `layers.10`."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in path.split(".")]


def _joined(one: nn.Module, other: nn.Module) -> nn.Module:
    """One module for both: the more particular one, of the wider dtype; with the other's tensors that it lacks."""
    one, other = sorted((one, other), key=_detail, reverse=True)
    for name, parameter in other._parameters.items():
        if one._parameters.get(name) is None:
            one._parameters[name] = parameter  # the table itself: a file may have any names
    return one


def _detail(module: nn.Module) -> tuple[int, ...]:
    tensors = list(module.parameters())
    return tuple(max(of) for of in zip(*((p.dim(), p.dtype.itemsize, p.numel()) for p in tensors), strict=True))


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module at a path; not where an attribute has that name, such as a weight: no model has a module there."""
    *parents, name = path.split(".")
    for parent in parents:
        if parent not in model._modules:
            if hasattr(model, parent):
                return
            model._modules[parent] = Part()
        inner = model._modules[parent]
        assert inner is not None
        model = inner
    there = model._modules.get(name)
    if there is None and hasattr(model, name):
        return
    for child, inner_module in () if there is None else there._modules.items():
        module._modules[child] = inner_module
    model._modules[name] = module
