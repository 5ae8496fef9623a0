"""What PEFT calls things: the keys of parameters on a live model, and configs.

    part             on an adapted model                on a `PeftModel`
    base             p.<local>                          base_model.model.p[.original_module][.base_layer].<local>
    adapter layer    p.adapters.a.<first>.<rest>        base_model.model.p.<first>.a.<rest>
    head             p.adapter_heads.a.<local>          base_model.model.p.modules_to_save.a.<local>
    shared tensor    adapter_shared.a.<first>.<rest>    base_model.<first>.a.<rest>

PEFT trains biases of the base itself; a trained bias here keeps its own name, `p.adapter_biases.a.bias`.
"""

from __future__ import annotations

import enum
import re
import sys
import warnings
from collections.abc import Iterator, Set
from contextlib import contextmanager, suppress
from dataclasses import fields
from typing import Any

import peft
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftConfig
from torch import nn

from adapterkit.contract import FILE_PREFIX, HEADS, LAYERS, SHARED, AdapterConfig, default_registry, part_name
from adapterkit.errors import AdapterError, ConfigError
from adapterkit.forward import PerAdapter

# What precedes shared tensors on a `PeftModel`; all other keys begin with `FILE_PREFIX`.
_ROOT = "base_model."
_HEADS = "modules_to_save"
# The tasks for which PEFT trains the model's task head without being told.
_WITH_HEADS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
# What PEFT says where our message matches this: the class of its error, and what the text begins with.
_NOTHING = "No modules were targeted for adaptation. "
_ERRORS: dict[str, tuple[type[Exception], str]] = {
    "There is no default for target_modules": (ValueError, "Please specify `target_modules` in `peft_config`. "),
    "matched none of the": (
        getattr(getattr(peft.utils, "error", None), "NoMatchingPeftModuleError", ValueError),
        f"Target modules were not found in the base model. {_NOTHING}",
    ),
    "is left out; ": (
        ValueError,
        f"{_NOTHING}This might be caused by a combination of mismatched target modules and excluded modules, or: All "
        "modules were excluded. ",
    ),
    "is a container, whose forward": (
        TypeError,
        "modules_to_save cannot be applied to modules of type ModuleDict or ModuleList. ",
    ),
    "has no bias to merge the adapter's into": (
        RuntimeError,
        "Impossible to merge LoRA with `lora_bias=True` because the base layer has no bias. ",
    ),
    "and only one can act": (ValueError, "Only one adapter can be set at a time for ModulesToSaveWrapper. "),
    "an embedding has no bias": (ValueError, "lora_bias=True is not supported for Embedding. "),
    "and the batch has": (
        ValueError,
        "Length of `adapter_names` should be the same as the number of inputs, but got another one. ",
    ),
    "can only be added to a tensor": (
        TypeError,
        "Mixed batching is only supported for the following modules: Linear, Embedding, Conv1d, Conv2d, Conv3d. ",
    ),
    "Merging '(.+?)' into .* not finite": (
        ValueError,
        r"NaNs detected in the merged weights. The adapter \1 seems to be broken. ",
    ),
}
# The task type of a `MethodConfig` that `peft.get_peft_model` gets.
VIEW = "ADAPTERKIT"


def check_name(name: str) -> None:
    """Raise `ConfigError` if PEFT cannot have an adapter of this name."""
    if "." in name:
        raise ConfigError(
            f"PEFT's names of adapters have no dot. Call {name!r} by another name, such as {part_name(name)!r}: "
            "adapters.rename(old, new)."
        )


def peft_key(model: nn.Module, key: str) -> str:
    """PEFT's name for a key of the adapted model's state dict, or for the path of a module."""
    at: nn.Module | None = model
    parts, found = key.split("."), list[str]()
    for i, part in enumerate(parts):
        if at is None:
            found += parts[i:]
            break
        inside = at._modules.get(part)
        if isinstance(inside, PerAdapter):
            if len(parts) > i + 2 and part in (LAYERS, SHARED, HEADS):
                name, first, *rest = parts[i + 1 :]
                middle = (_HEADS, name, first) if part == HEADS else (first, name)
                return (_ROOT if part == SHARED else FILE_PREFIX) + ".".join((*found, *middle, *rest))
        else:
            found += _around(at)
        found.append(part)
        at = inside
    return FILE_PREFIX + ".".join(found)


def own_key(model: nn.Module, key: str) -> str:
    """The key of the adapted model's state dict, or the path of a module, that PEFT calls so."""
    left, found = key.removeprefix(FILE_PREFIX).split("."), list[str]()
    if left[0] + "." == _ROOT and len(left) > 2:
        _, first, name, *rest = left
        return ".".join((SHARED, name, first, *rest))
    at: nn.Module | None = model
    while left and at is not None:
        part, layers, around = left[0], at._modules.get(LAYERS), _around(at)
        if part == _HEADS and HEADS in at._modules:
            return ".".join((*found, HEADS, *left[1:]))
        if layers is not None and part not in at._modules and len(left) > 1 and left[1] in layers._modules:
            return ".".join((*found, LAYERS, left[1], part, *left[2:]))
        if around and left[: len(around)] == around:
            del left[: len(around)]
        if left:
            found.append(left.pop(0))
            at = at._modules.get(found[-1])
    return ".".join(found + left)


def _around(module: nn.Module) -> list[str]:
    """The names that PEFT puts between an adapted module and what is its own."""
    return ["original_module"] * (HEADS in module._modules) + ["base_layer"] * (LAYERS in module._modules)


class MethodConfig(PeftConfig):
    """A config of adapterkit as a `PeftConfig`, for methods that PEFT lacks and for `peft.get_peft_model`.

    Its attributes are the config's fields. Those that are set later count.
    """

    def __init__(self, config: AdapterConfig, *, task_type: str | None = None) -> None:
        super().__init__()
        self.__dict__.update(config.to_dict())
        self.inference_mode = False
        self._method, self._task_type = config.method, config.task_type
        if task_type is not None:
            self.task_type = task_type

    def to_dict(self) -> dict[str, Any]:
        """The fields as `adapter_config.json` holds them."""
        own = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        return own | {"task_type": self._task_type if self.task_type == VIEW else self.task_type}


def prefix_of(config: AdapterConfig) -> str:
    """What the names of a method's parameters begin with: `lora_`."""
    prefix = default_registry.method_of(config).key_rule(config).prefix
    return prefix if isinstance(prefix, str) else prefix[0]


def to_peft(config: AdapterConfig, *, trains: bool) -> PeftConfig:
    """The config as PEFT's own class; as a `MethodConfig` if PEFT has none that holds every field."""
    values = config.to_dict()
    peft_class = PEFT_TYPE_TO_CONFIG_MAPPING.get(values.pop("peft_type"))
    known = {field.name for field in fields(peft_class)} if peft_class is not None else set()
    neutral: tuple[object, ...] = (None, False, {}, [], "")
    made: PeftConfig = MethodConfig(config)
    if peft_class is not None and all(name in known or value in neutral for name, value in values.items()):
        # PEFT's advice is for those who choose the values, and what it refuses is a method of somebody else's.
        with warnings.catch_warnings(action="ignore"), suppress(TypeError, ValueError):
            made = peft_class(**{name: value for name, value in values.items() if name in known})
    made.inference_mode = not trains
    return made


def from_peft_config(config: PeftConfig) -> AdapterConfig:
    """The config of the installed method that makes PEFT's adapter of `config`.

    Raises:
        UnknownNameError: no installed method has its type.
        UnsupportedError: a field that the method does not implement.
    """
    values = {"modules_to_save": None, **plain(config.to_dict())}
    if values["modules_to_save"] is None and values.get("task_type") in _WITH_HEADS:
        values["modules_to_save"] = "auto"
    if isinstance(config, MethodConfig):
        method = default_registry.method(config._method)
    else:
        method = default_registry.claim(values, f"This {type(config).__name__}")
    return method.config_type().from_dict(values, where=f"This {type(config).__name__}", trained=False)


def both(own: type, theirs: type, module: str) -> Any:
    """A class that is ours and PEFT's, for those who ask with `isinstance`. `module` holds it, where pickle looks."""
    words = f"A `{own.__name__}` that is a `peft.{theirs.__name__}`."
    made = type(theirs.__name__, (own, theirs), {"__module__": module, "__doc__": words})
    setattr(sys.modules[module], made.__name__, made)
    return made


@contextmanager
def pefts_errors() -> Iterator[None]:
    """Let an error of the block be one of the class that PEFT raises, too, with its words before ours."""
    try:
        yield
    except AdapterError as error:
        for ours, (theirs, words) in _ERRORS.items():
            if found := re.search(ours, str(error)):
                kind = type(error) if isinstance(error, theirs) else type(theirs.__name__, (type(error), theirs), {})
                raise kind(f"{found.expand(words)}{error}") from error
        raise


def plain(value: Any) -> Any:
    """What a JSON file would give back."""
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, Set):
        return sorted(value)
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value
