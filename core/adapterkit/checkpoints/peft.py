"""PEFT is refused on a model with adapters: it would freeze them, and leave them out of its files."""

from __future__ import annotations

import sys
from functools import cache
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from adapterkit.contract import ATTRIBUTE
from adapterkit.errors import ConfigError


@cache
def watch_peft() -> None:
    """From now on an error is raised if PEFT, or transformers with PEFT, adapts a model with adapters."""
    register_module_module_registration_hook(_refuse)


def _refuse(parent: nn.Module, name: str, child: nn.Module | None) -> None:
    """Raise `ConfigError` if PEFT takes a model with adapters. To register the model is the first that it does."""
    if name not in ("model", "base_model") or child is None or not _is_of_peft(parent) or _is_of_peft(child):
        return
    for module in child.modules():
        adapters: Any = module.__dict__.get(ATTRIBUTE)
        own = [] if adapters is None else [name for name in adapters.names if name not in adapters.merged]
        if own:
            child.__dict__.pop("_hf_peft_config_loaded", None)  # transformers has set it already
            raise ConfigError(
                f"The model has adapters of adapterkit ({', '.join(map(repr, own))}), which PEFT would freeze and "
                "leave out of its files. Add another adapter with ak.attach(model).add(name, config), load one that "
                "PEFT wrote with ak.attach(model).load(folder, name), and give ak.as_peft(model) to tools that are "
                "written for PEFT. To leave the model to PEFT, call merge_and_detach() or detach() of its adapters."
            )


def _is_of_peft(module: nn.Module) -> bool:
    """Whether the module is PEFT's, around a model that it adapts. Views (`as_peft`) are not."""
    peft: Any = sys.modules.get("peft")
    if peft is None or type(module).__module__.startswith("adapterkit."):
        return False
    found = (peft.tuners.tuners_utils.BaseTuner, peft.PeftModel, peft.PeftMixedModel)
    return any(cls in type(module).__mro__ for cls in found)
