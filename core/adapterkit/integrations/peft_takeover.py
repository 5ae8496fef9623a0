"""The adapters of a live `peft.PeftModel`, taken over with the parameters that they have."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
from peft import PeftConfig, PeftModel
from peft.tuners.lora.layer import MultiheadAttention
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, get_peft_model_state_dict
from torch import Tensor, nn

from adapterkit.adapters import Adapters, attach
from adapterkit.contract import AdapterConfig, strip_file_prefix
from adapterkit.errors import AdapterWarning, ConfigError, StateError, UnsupportedError
from adapterkit.files import EVERYWHERE, file_places, load_adapter
from adapterkit.formats import AdapterFiles
from adapterkit.forward import Strength
from adapterkit.integrations.peft_names import from_peft_config
from adapterkit.integrations.peft_view import PeftView
from adapterkit.model import Adapter, inner_model

# A module of the base model, its name for a child, PEFT's module there, and the base model's own.
_Place = tuple[nn.Module, str, nn.Module, nn.Module]

# With these values of `init_lora_weights` PEFT subtracts the initial factors from the base's weights.
_CHANGE_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")


def take_over(model: PeftModel) -> Adapters:
    """See `adapterkit.from_peft`."""
    if isinstance(model, PeftView):
        return model.adapters
    inner = inner_model(model)
    model = inner if isinstance(inner, PeftModel) else model
    _check(model)
    active = _active(model)
    configs = {name: _config(config) for name, config in model.peft_config.items()}
    state = model.state_dict(keep_vars=True)
    given = {name: _tensors(model, name, state) for name in configs}
    required = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with _freed(model.get_base_model(), required) as (adapters, before):
        made = [_built(adapters, name, config, given[name]) for name, config in configs.items()]
        strengths = {adapter.name: _strength(adapter, before, acts=adapter.name in active) for adapter in made}
        trains = any(p.requires_grad for adapter in made if adapter.name in active for p in adapter.parameters())
        for adapter in made:
            adapters._install(adapter)
        adapters.activate(*active, trainable=trains, strengths={name: strengths[name] for name in active})
    for adapter in made:
        for path, bias in adapter.biases.items():  # the base keeps a copy
            adapter.hosts[path]._parameters["bias"] = nn.Parameter(bias.bias.detach().clone(), requires_grad=False)
    adapters.model.__dict__.pop("peft_config", None)
    _require_alone(adapters.model, required)
    return adapters


@contextmanager
def _freed(
    base: nn.Module, required: Sequence[nn.Parameter]
) -> Iterator[tuple[Adapters, Mapping[nn.Module, nn.Module]]]:
    """The base model's own modules in place of PEFT's, for good if nothing fails.

    Gives the adapters of the base model, and PEFT's module for each that it wraps.
    """
    places = list(_peft_places(base, set()))
    adapters = attach(base)
    names = adapters.names
    try:
        for parent, child, _, plain in places:
            parent._modules[child] = plain
        yield adapters, {plain: module for _, _, module, plain in places}
    except BaseException:
        for name in adapters.names[len(names) :]:
            adapters.remove(name)
        if not names:
            adapters.detach()
        for parent, child, module, _ in places:
            parent._modules[child] = module
        _require_alone(base, required)
        raise


def _check(model: object) -> None:
    """Raise for what cannot be taken over, whatever its adapters are."""
    if isinstance(model, peft.PeftMixedModel):
        raise UnsupportedError(
            "from_peft takes a PeftModel. A PeftMixedModel has adapters of several types in a layer."
        )
    if not isinstance(model, PeftModel):
        injected = getattr(model, "_hf_peft_config_loaded", False)
        hint = " Save what model.add_adapter made, make the model again, and call adapters.load." if injected else ""
        raise ConfigError(f"from_peft needs a peft.PeftModel, not a {type(model).__name__}.{hint}")
    for name, config in model.peft_config.items():
        if config.is_prompt_learning:
            raise UnsupportedError(
                f"Adapter {name!r} is of type {config.peft_type!s}: it learns a prompt and changes no layer, so "
                "no method can take it over."
            )


def _active(model: PeftModel) -> list[str]:
    """The adapters that act in every layer that has them.

    Raises:
        StateError: an adapter is merged, or others act in one layer than in another.
    """
    layers, active = model.get_layer_status(), model.active_adapters
    merged = next((layer.merged_adapters[0] for layer in layers if layer.merged_adapters), None)
    if merged is not None:
        raise StateError(f"{merged!r} is merged into the base. Call unmerge_adapter() first.")
    enabled = {layer.enabled for layer in layers}
    acting = [[name for name in layer.active_adapters if name in layer.available_adapters] for layer in layers]
    expected = [[name for name in active if name in layer.available_adapters] for layer in layers]
    if len(enabled) != 1 or acting != expected:
        raise StateError("The layers of this PeftModel do not agree about which adapters act. Call set_adapter first.")
    return active if True in enabled else []


def _config(config: PeftConfig) -> AdapterConfig:
    """The config of the adapter as it is now: the base has what initial values took from it."""
    init = getattr(config, "init_lora_weights", None)
    if not isinstance(init, str):
        return from_peft_config(config)
    if init.startswith(_CHANGE_BASE):
        warnings.warn(
            f"PEFT's init_lora_weights={init!r} has changed the weights of the base, so the adapter and its files go "
            "with this base alone. Save the base model, too.",
            AdapterWarning,
            stacklevel=4,
        )
    now: Any = copy.copy(config)
    now.init_lora_weights = True
    return from_peft_config(now)


def _tensors(model: PeftModel, name: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parameters and buffers of an adapter, by their keys in a file without PEFT's prefix."""
    found = get_peft_model_state_dict(model, state_dict=state, adapter_name=name, save_embedding_layers=False)
    return strip_file_prefix(found)


def _peft_places(parent: nn.Module, seen: set[nn.Module]) -> Iterator[_Place]:
    """Every place in the base model where PEFT has put a module."""
    seen.add(parent)
    for child, module in parent._modules.items():
        plain: Any = module
        while isinstance(plain, BaseTunerLayer | AuxiliaryTrainingWrapper):
            if not isinstance(plain, BaseTunerLayer | ModulesToSaveWrapper) or isinstance(plain, MultiheadAttention):
                raise UnsupportedError(f"No method can take over a {type(plain).__name__} of PEFT, such as {child!r}.")
            plain = plain.get_base_layer() if isinstance(plain, BaseTunerLayer) else plain.original_module
        if module is not None and plain is not module:
            yield parent, child, module, plain
        if plain is not None and plain not in seen:
            yield from _peft_places(plain, seen)


def _built(adapters: Adapters, name: str, config: AdapterConfig, tensors: dict[str, Tensor]) -> Adapter:
    """The adapter for the plain base, with PEFT's own parameters and buffers in it; not installed yet."""
    adapters._check_new_name(name)
    files = AdapterFiles(Path(f"The PeftModel's adapter {name!r}"), config.to_dict(), tensors, {EVERYWHERE: ""})
    adapter, _ = load_adapter(adapters.model, name, files, adapters._active, strict=True, dtype="file")
    tied = next((path for path in adapter.aliases if path in {**adapter.layers, **adapter.heads}), None)
    if tied is not None:
        raise UnsupportedError(
            f"{tied!r} is one module with {', '.join(map(repr, adapter.aliases[tied]))}. PEFT adapts the first path "
            "alone, and here an adapter acts under all of them, so the outputs would change."
        )
    for key, _, slot in file_places(adapter):
        if key in tensors:
            slot.assign(tensors[key])
    return adapter


def _strength(adapter: Adapter, wrappers: Mapping[nn.Module, Any], *, acts: bool) -> Strength:
    """What PEFT multiplies the adapter's change by, beyond what its config says: `set_scale` and the like.

    Raises:
        UnsupportedError: the adapter does not act now, so it has no strength.
    """
    ratios = dict[str, float | None]()
    for path, layer in adapter.layers.items():
        own, scaling = getattr(layer, "scaling", None), getattr(wrappers[adapter.hosts[path]], "scaling", None)
        if own and isinstance(scaling, dict):
            ratio = float(scaling[adapter.name] / own)
            ratios[path] = 1.0 if math.isclose(ratio, 1.0) else ratio
    if set(ratios.values()) <= {1.0}:
        return 1.0
    if not acts:
        raise UnsupportedError(
            f"The scalings of adapter {adapter.name!r} were changed since it was made. They are taken over as the "
            "strengths of an active adapter, and this one is not. Activate it, or reset the scalings (set_scale) first."
        )
    return ratios


def _require_alone(base: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
    """Let these parameters of the model require gradients, and no others."""
    for parameter in base.parameters():
        parameter.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)
