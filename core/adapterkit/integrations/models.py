"""The models with adapters inside what a tool holds."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from adapterkit.adapters import Adapters
from adapterkit.contract import ATTRIBUTE
from adapterkit.errors import ConfigError


def adapted_models(module: nn.Module) -> Iterator[tuple[str, Adapters]]:
    """The adapters of each model inside that has some, the module itself included, with the prefix of its keys."""
    for path, model in module.named_modules():
        adapters = model.__dict__.get(ATTRIBUTE)
        if isinstance(adapters, Adapters) and adapters.names:
            yield f"{path}." if path else "", adapters


def adapters_in(model: nn.Module) -> Adapters:
    """The adapters of a model that a tool holds; they may be attached to a model inside it.

    Raises:
        ConfigError: there are none, or several models inside have some.
    """
    found = [adapters for _, adapters in adapted_models(model)]
    if len(found) != 1:
        what = "has no adapters" if not found else "has several models inside with adapters of their own"
        raise ConfigError(
            f"The {type(model).__name__} {what}. Add adapters to one model before you train: "
            "ak.attach(model).add(name, config)."
        )
    return found[0]
