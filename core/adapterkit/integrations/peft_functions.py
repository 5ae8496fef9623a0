"""PEFT's functions that look for its own layers in a model, answered for views.

Each calls another function of its module with the model. That one is replaced here, and calls PEFT's for every model
that is no view. So a caller may have imported PEFT's function before.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from peft import PeftConfig, PeftType
from peft.tuners import tuners_utils
from peft.utils import hotswap, save_and_load
from torch import Tensor, nn

from adapterkit.adapters import Adapters
from adapterkit.contract import BIASES, FILE_PREFIX, AdapterConfig, default_registry
from adapterkit.errors import CheckpointError, UnsupportedError
from adapterkit.files import swap_in
from adapterkit.formats import AdapterFiles
from adapterkit.forward import PerAdapter
from adapterkit.integrations.peft_layers import beside
from adapterkit.integrations.peft_names import peft_key, plain
from adapterkit.model import BaseModules, LayerBuilder, build_adapter, select_on

# The first factor of a layer in a file of LoRA's.
_DOWN = re.compile(r"\.lora_(embedding_A|A\.weight)$")


def answer(view_type: type[nn.Module]) -> None:
    """Let PEFT's functions work on views of this class, or say what to call instead."""
    _replace(view_type, save_and_load, "_get_adapter_state_dict_key_prefixes", _adapter_keys)
    _replace(view_type, tuners_utils, "_get_tuner_state_dict_key_prefixes", _tuner_keys)
    _replace(view_type, tuners_utils.BaseTuner, "_get_learnable_bias_state_dict", _biases)
    _replace(view_type, hotswap, "hotswap_adapter_from_state_dict", _swap)
    _replace(view_type, hotswap, "_convert_scalings_to_tensor", _takes_every_scaling)
    _replace(view_type, hotswap, "_pad_lora_weights", _make_room)


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
    found: list[tuple[str, Any]] = [(f"base_model.{local}", part) for local, part in view.base_model.shared().items()]
    for path, module in view.base_model.model.named_modules():
        found += [(f"{FILE_PREFIX}{path}.{local}", part) for local, part in beside(module) if local]
    if adapter_name is None:
        return {key for key, _ in found}
    return {f"{key}.{adapter_name}" for key, part in found if adapter_name in part}


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
    take_back = _room_for(adapters, adapter_name, tensors)
    try:
        adapters._swap(adapter_name, files)
    except BaseException as error:
        take_back()
        if isinstance(error, CheckpointError):
            unknown = ", ".join(state_dict.keys() - view.state_dict().keys())
            words = f"Hot swapping the adapter did not succeed, unexpected keys found: {unknown}. " if unknown else ""
            raise RuntimeError(f"{words}{error}") from error
        raise


def _room_for(adapters: Adapters, name: str, tensors: Mapping[str, Tensor]) -> Callable[[], None]:
    """Give LoRA's layers the largest rank of these tensors if one has no room, and return what takes that back."""
    found = {_DOWN.sub("", key): tensor.shape[0] for key, tensor in tensors.items() if _DOWN.search(key)}
    ranks = _ranks(adapters, name)
    if all(found.get(FILE_PREFIX + path, 0) <= rank for path, rank in ranks.items()):
        return lambda: None
    return _grow(adapters, name, max(*found.values(), *ranks.values()))


def _takes_every_scaling(view: Any) -> bool:
    """For `prepare_model_for_compiled_hotswap`: `Adapters.swap` folds another scaling into the up factor."""
    return bool(view.adapters.names)


def _make_room(view: Any, target_rank: int) -> bool:
    """For `prepare_model_for_compiled_hotswap`: give every adapter's layers this rank; the changes stay as they are.

    Raises:
        ValueError: a layer has a larger rank.
    """
    for name in view.adapters.names:
        larger = max(_ranks(view.adapters, name).values(), default=0)
        if larger > target_rank:
            raise ValueError(
                f"Trying to pad the adapter to the target rank {target_rank}, but the original rank is larger "
                f"({larger}). Leave target_rank out, or give {larger}."
            )
    for name in view.adapters.names:
        _grow(view.adapters, name, target_rank)
    return True


def _ranks(adapters: Adapters, name: str) -> dict[str, int]:
    """The rank of each layer of an adapter that has factors."""
    method = default_registry.method_of(adapters.config(name))
    factors = {path: method.factors(layer, scaled=False) for path, layer in adapters.layers(name).items()}
    return {path: found.rank for path, found in factors.items() if found is not None}


def _grow(adapters: Adapters, name: str, rank: int) -> Callable[[], None]:
    """Pad the factors of an adapter with zeros, up to this rank, with new parameters. The change stays as it is.

    With patterns it is the same but for roundings: PEFT swaps no other `alpha_pattern`, so the alphas stay, and the up
    factors are multiplied.

    Returns:
        A function that takes it back.

    Raises:
        UnsupportedError: the adapter is not LoRA, which alone PEFT swaps.
        CheckpointError: the method cannot express its own change in another rank (PiSSA, OLoRA).
    """
    adapter = adapters._adapter(name)
    old: Any = adapter.config
    if old.to_dict()["peft_type"] != PeftType.LORA:
        raise UnsupportedError(f"Adapter {name!r} is of the method {old.method!r}. PEFT gives LoRA alone another rank.")
    if set(_ranks(adapters, name).values()) <= {rank}:
        return lambda: None
    config = old.replace(r=rank, rank_pattern=dict.fromkeys(old.rank_pattern, rank))
    if not (old.rank_pattern or old.alpha_pattern):
        config = config.replace(lora_alpha=old.lora_alpha * old.scaling / config.scaling)
    modules = BaseModules(adapters.model)
    builder = LayerBuilder(default_registry.method_of(config), config)
    dtype = next(iter(adapter.parameters())).dtype
    with torch.random.fork_rng():
        larger, _ = build_adapter(modules, name, builder, select_on(modules, config), adapters._active, dtype=dtype)
    swap_in(larger, adapter, Path(f"adapter {name!r}"), adapters.model)
    for path, layer in adapter.layers.items():
        trains = {local: parameter.requires_grad for local, parameter in layer.named_parameters()}
        for local, parameter in larger.layers[path].train(layer.training).named_parameters():
            parameter.requires_grad_(trains[local])
    states = {path: dict(layer.__dict__) for path, layer in adapter.layers.items()}

    def become(config: AdapterConfig, states: Mapping[str, Mapping[str, Any]]) -> None:
        adapter.config = config
        for path, layer in adapter.layers.items():
            layer.__dict__.clear()
            layer.__dict__.update(states[path])
            adapters._active.replan(adapter.hosts[path])
        adapter.__dict__.pop("_first_and_last", None)

    become(config, {path: layer.__dict__ for path, layer in larger.layers.items()})
    return lambda: become(old, states)
