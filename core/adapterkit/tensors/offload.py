"""accelerate's hooks: on which device an offloaded module computes, and the values that the hooks keep elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from adapterkit.errors import StateError
from adapterkit.tensors.distributed import whole


def execution_device(module: nn.Module, tensor: Tensor) -> torch.device:
    """Where the module computes with `tensor`. Offloaded weights are on the meta device between forwards."""
    for hook in _hooks(module) if tensor.is_meta else ():
        device = getattr(hook, "execution_device", None)
        if device is not None:
            return torch.device(device)
    return tensor.device


def real_value(module: nn.Module, name: str) -> Tensor:
    """The value of the module's own parameter or buffer `name`, fetched if it is offloaded or sharded."""
    tensor: Any = {**module._buffers, **module._parameters}[name]
    for hook in _hooks(module) if tensor.is_meta else ():
        weights = getattr(hook, "weights_map", None)
        if weights is not None:
            value: Tensor = weights[name]
            return value.to(execution_device(module, tensor))
    return whole([tensor])[0]


@contextmanager
def fetched(*modules: nn.Module) -> Iterator[None]:
    """Load the parameters of `modules` for a block, if accelerate offloads them too.

    An adapter layer reads the parameters of modules below it without calling them, so the hooks there would not run.

    Raises:
        StateError: see `check_gradients`.
    """
    check_gradients(*modules)
    hooked = [(m, m.__dict__["_hf_hook"]) for part in modules for m in part.modules() if "_hf_hook" in m.__dict__]
    for module, hook in hooked:
        hook.pre_forward(module)
    try:
        yield
    finally:
        for module, hook in hooked:
            hook.post_forward(module, None)


def check_gradients(*modules: nn.Module) -> None:
    """Raise `StateError` if accelerate offloads a parameter of these that trains: its gradient would be lost.

    The hooks compute with another parameter, made for one forward.
    """
    parameters = (p for module in modules for p in module.parameters())
    if torch.is_grad_enabled() and any(p.is_meta and p.requires_grad for p in parameters):
        raise StateError(
            "An adapter that should train was offloaded by accelerate together with its model, so it would get no "
            "gradients. Add or load it after the model is offloaded, or use it without gradients: under "
            "torch.no_grad(), or activated with trainable=False."
        )


def is_hooked(module: nn.Module) -> bool:
    """Whether this very module has a hook of accelerate's."""
    return "_hf_hook" in module.__dict__


def hook_objects(root: nn.Module) -> list[Any]:
    """Every hook of `root` and the modules below it. Hooks refer to the offloaded weights of the whole model."""
    return [hook for module in root.modules() for hook in _hooks(module)]


def remove_hooks(root: nn.Module, original: nn.Module) -> None:
    """Remove accelerate's hooks from a copy of `original`, and give it the values of the offloaded parameters."""
    for path, copy in root.named_modules():
        source = original.get_submodule(path)
        if not is_hooked(source):
            continue
        from accelerate.hooks import remove_hook_from_module

        values = {name: real_value(source, name) for name, p in source._parameters.items() if p is not None}
        remove_hook_from_module(copy)
        copy.__dict__.pop("forward", None)
        for name, value in values.items():
            copy._parameters[name] = nn.Parameter(value.clone())


def _hooks(module: nn.Module) -> Iterator[Any]:
    hook = module.__dict__.get("_hf_hook")
    if hook is not None:
        yield from getattr(hook, "hooks", (hook,))
