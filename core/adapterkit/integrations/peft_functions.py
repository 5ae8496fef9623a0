"""PEFT's functions that look for its own layers in a model, answered for views.

Each calls another function of its module with the model. That one is replaced here, and calls PEFT's for every model
that is no view. So a caller may have imported PEFT's function before.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from peft import PeftConfig
from peft.tuners import tuners_utils
from peft.utils import hotswap, save_and_load
from torch import Tensor, nn

from adapterkit.contract import BIASES, FILE_PREFIX, default_registry
from adapterkit.errors import CheckpointError, UnsupportedError
from adapterkit.formats import AdapterFiles
from adapterkit.forward import PerAdapter
from adapterkit.integrations.peft_layers import beside
from adapterkit.integrations.peft_names import peft_key, plain


def answer(view_type: type[nn.Module]) -> None:
    """Let PEFT's functions work on views of this class, or say what to call instead."""
    _replace(view_type, save_and_load, "_get_adapter_state_dict_key_prefixes", _adapter_keys)
    _replace(view_type, tuners_utils, "_get_tuner_state_dict_key_prefixes", _tuner_keys)
    _replace(view_type, tuners_utils.BaseTuner, "_get_learnable_bias_state_dict", _biases)
    _replace(view_type, hotswap, "hotswap_adapter_from_state_dict", _swap)
    _replace(view_type, hotswap, "_convert_scalings_to_tensor", _takes_every_scaling)
    _replace(view_type, hotswap, "_pad_lora_weights", _has_room)


def _replace(view_type: type[nn.Module], module: ModuleType | type, name: str, own: Callable[..., Any]) -> None:
    theirs = getattr(module, name, None)
    if theirs is None:  # another version of PEFT
        return

    @functools.wraps(theirs)
    def answered(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        inside = getattr(model, "_orig_mod", model)  # of a compiled view
        inside = getattr(inside, "_fsdp_wrapped_module", inside)
        return own(inside, *args, **kwargs) if isinstance(inside, view_type) else theirs(model, *args, **kwargs)

    setattr(module, name, answered)


def _adapter_keys(view: Any) -> set[str]:
    """For `get_base_model_state_dict` and `set_base_model_state_dict`: what keys of adapters begin with."""
    return {path for path, module in view.base_model.model.named_modules() if isinstance(module, PerAdapter)}


def _tuner_keys(view: Any, adapter_name: str | None = None) -> set[str]:
    """What the keys of adapters begin with in the view's state dict, but those of trained copies of modules."""
    name = "" if adapter_name is None else f".{adapter_name}"
    found = {f"base_model.{local}{name}" for local in view.base_model.shared()}
    for path, module in view.base_model.model.named_modules():
        found |= {f"{FILE_PREFIX}{path}.{local}{name}" for local, part in beside(module) if local}
    return found


def _biases(view: Any, state_dict: dict[str, Tensor], config: PeftConfig) -> dict[str, Tensor]:
    """The biases that the adapter of `config` trains, under the keys of the base's: PEFT trains those themselves."""
    found = dict[str, Tensor]()
    for name, own in view.peft_config.items():
        for path, bias in view.adapters._adapter(name).biases.items() if own is config else ():
            key = peft_key(view.base_model.model, f"{path}.bias")
            trained = state_dict[peft_key(view.base_model.model, f"{path}.{BIASES}.{name}.bias")]
            base = state_dict[key]
            found[key] = trained if bias.base is None else base + (trained - bias.base.to(base.device))
    return found


def _swap(
    view: Any, state_dict: dict[str, Tensor], adapter_name: str, config: PeftConfig, parameter_prefix: str = "lora_"
) -> None:
    """`hotswap_adapter` by `Adapters.swap`, from tensors under PEFT's keys with the adapter's name in them.

    Raises:
        ValueError: the adapter is merged.
        RuntimeError: these tensors do not fit the adapter. Nothing has changed then.
    """
    adapters = view.adapters
    if adapter_name in adapters.merged:
        raise ValueError(f"Adapter {adapter_name!r} is merged. Unmerge it first: view.unmerge_adapter().")
    if adapters.heads(adapter_name):
        raise UnsupportedError(
            f"PEFT's hotswap_adapter knows no modules_to_save, which adapter {adapter_name!r} has. Call "
            f"ak.attach(model).swap({adapter_name!r}, folder) instead."
        )
    named = re.compile(rf"(\.{parameter_prefix}[^.]+)\.{re.escape(adapter_name)}(?=\.|$)")
    tensors = {named.sub(r"\1", key): tensor for key, tensor in state_dict.items()}
    files = AdapterFiles(Path("the adapter of hotswap_adapter"), plain(config.to_dict()), tensors, {})
    try:
        adapters._swap(adapter_name, files)
    except CheckpointError as error:
        raise RuntimeError(str(error)) from error


def _takes_every_scaling(view: Any) -> bool:
    """For `prepare_model_for_compiled_hotswap`: `Adapters.swap` folds another scaling into the up factor."""
    return bool(view.adapters.names)


def _has_room(view: Any, target_rank: int) -> bool:
    """For `prepare_model_for_compiled_hotswap`: whether all layers have this rank.

    Raises:
        ValueError: a layer has a larger rank.
        UnsupportedError: a layer has a smaller one. It keeps its parameters, and so its rank.
    """
    for name in view.adapters.names:
        method = default_registry.method_of(view.adapters.config(name))
        for path, layer in view.adapters.layers(name).items():
            factors = method.factors(layer, scaled=False)
            rank = 0 if factors is None else factors.rank
            if rank > target_rank:
                raise ValueError(
                    f"Trying to pad the adapter to the target rank {target_rank}, but the original rank is larger "
                    f"({rank}). Leave target_rank out, or give {rank}."
                )
            if rank < target_rank:
                raise UnsupportedError(
                    f"Adapter {name!r} has the rank {rank} at {path!r}, and prepare_model_for_compiled_hotswap cannot "
                    f"make it larger in a view. Add an adapter with r={target_rank} instead, compile the model, and "
                    f"call hotswap_adapter, or ak.attach(model).swap(name, folder): it has room for all files up to "
                    "its own rank, and for every lora_alpha."
                )
    return True
