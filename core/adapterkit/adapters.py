"""Adapters: all adapters of one model, and everything one does with them."""

from __future__ import annotations

from torch import nn

from adapterkit.combination import Combination
from adapterkit.errors import ConfigError
from adapterkit.host import ATTRIBUTE

# Wrappers that only forward to the model inside: the adapters are the inner model's.
_WRAPPERS = {"OptimizedModule": "_orig_mod", "DistributedDataParallel": "module", "DataParallel": "module"}


def attach(model: nn.Module) -> Adapters:
    """The adapters of this model: made at the first call, the same object at every later one.

    Changes nothing by itself. A model wrapped by `torch.compile` or `DistributedDataParallel` has the
    adapters of the model inside.

    Raises:
        ConfigError: not a module.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"attach needs a torch.nn.Module, not a {type(model).__name__}.")
    model = inner_model(model)
    found = model.__dict__.get(ATTRIBUTE)
    if found is None:
        found = model.__dict__[ATTRIBUTE] = Adapters(model)
    assert isinstance(found, Adapters)
    return found


def inner_model(model: nn.Module) -> nn.Module:
    """The model inside wrappers that only forward to it."""
    name = _WRAPPERS.get(type(model).__name__)
    inner = None if name is None else model._modules.get(name)
    return model if inner is None else inner_model(inner)


class Adapters(Combination):
    """The adapters of one model. Made by `attach`.

    A call that raises has changed nothing.
    """
