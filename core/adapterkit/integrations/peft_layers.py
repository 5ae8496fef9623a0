"""What PEFT's functions and users look for in a model: its tuner layers and trained copies.

An adapted module of a model with a view is an instance of PEFT's classes for its adapters, and answers to the names of
PEFT's layers. The answers are those of a `LayerView` or a `HeadView`, which are made when somebody asks, hold the
model's own parameters, and own nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from adapterkit.adapters import Adapters
from adapterkit.contract import CONTAINERS, HEADS, LAYERS, AdapterConfig, AdapterLayer
from adapterkit.errors import UnsupportedError, unknown
from adapterkit.forward import ACTIVE, Active, original_class, strength_at
from adapterkit.integrations.peft_containers import (
    NOT_REMOVED,
    Buffers,
    ModuleDict,
    Values,
    containers_at,
    dropout_name,
    may_be_at,
    tuner_class,
)


def views(module: nn.Module) -> Iterator[nn.Module]:
    """The views of a module of an adapted model: of its adapter layers, and of its trained copies."""
    if LAYERS in module._modules:
        yield LayerView(module)
    if HEADS in module._modules:
        yield HeadView(module)


def beside(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """What PEFT has beside a module, by name: the containers of its adapter layers.

    Without adapter layers a module with trained copies is the wrapper of the copies itself, else that is beside it.
    """
    if LAYERS in module._modules:
        yield from containers_at(module).items()
    if {LAYERS, HEADS} <= module._modules.keys():
        yield "", HeadView(module)


def _fields(layers: Iterable[AdapterLayer]) -> set[str]:
    """The fields of their configs that not every method has."""
    return {f.name for layer in layers for f in fields(layer.config)} - {f.name for f in fields(AdapterConfig)}


def _layer_class(layer: AdapterLayer, host: nn.Module) -> type[BaseTunerLayer]:
    """PEFT's class for the layers of an adapter's type at this module: `lora.Linear`, also at GPT-2's `Conv1D`."""
    general, names = tuner_class(layer), [cls.__name__ for cls in original_class(host).__mro__]
    for name in ("Linear" if name == "Conv1D" else name for name in names):
        found = getattr(sys.modules[general.__module__], name, None)
        if isinstance(found, type) and issubclass(found, general):
            return found
    return general


def waiting_strength(layer: AdapterLayer) -> float:
    """With which strength PEFT's `set_adapter` lets the adapter of a layer act that does not act now."""
    return float(layer.__dict__.get("_peft_strength", 1.0))


def let_wait(layer: AdapterLayer, strength: float) -> None:
    """Set `waiting_strength`."""
    layer.__dict__["_peft_strength"] = strength


def bare(module: nn.Module) -> nn.Module:
    """The module without its adapters, with the same parameters."""
    cls = original_class(module)
    made: nn.Module = cls.__new__(cls)
    made.__dict__.update({name: value for name, value in module.__dict__.items() if name not in (ACTIVE, "forward")})
    made._modules = {name: child for name, child in module._modules.items() if name not in CONTAINERS}
    return made


@BaseTunerLayer.register
class LayerView(nn.Module):
    """The adapter layers at one module as a tuner layer of PEFT's.

    It has what each layer has, by adapter: `lora_A["default"].weight`, `hada_w1_a["default"]`.
    """

    quantization_backend = None
    cast_input_dtype_enabled = True

    def __init__(self, host: nn.Module) -> None:
        super().__init__()
        layers: Any = host._modules[LAYERS]
        self.__dict__["_host"], self._path = host, layers.path
        self._layers: dict[str, AdapterLayer] = layers._modules
        self._active: Active = host.__dict__[ACTIVE]
        classes: Any = self._active.extra
        self._adapters: Adapters = classes.adapters
        self.base_layer: Any = bare(host)
        self._kind = next(iter(self._layers.values())).kind
        self._modules.update(containers_at(host))

    def __getattr__(self, name: str) -> Any:
        """What is an attribute of this module; else a field of the layers' configs, by adapter: `r["default"]`."""
        if name not in self._modules and name in _fields(self.__dict__["_layers"].values()):
            return Values({n: getattr(layer.config, name, None) for n, layer in self._layers.items()})
        return super().__getattr__(name)

    @property
    def in_features(self) -> int:
        """Columns of the weight; channels of a convolution."""
        return int(getattr(self.base_layer, "in_channels", None) or self._kind.in_features)

    @property
    def out_features(self) -> int:
        """Rows of the weight."""
        return int(self._kind.out_features)

    @property
    def scaling(self) -> MutableMapping[str, float]:
        """What the change of each adapter is multiplied by: the scaling of its config, and its strength."""

        def change(name: str, value: float) -> None:
            own = self.own_scaling(name)
            if own == 0.0:
                raise UnsupportedError(
                    f"The config of adapter {name!r} has a scaling of 0 here, so no other can be set."
                )
            self.rescale(name, float(value) / own)

        return Values({name: self.own_scaling(name) * self.strength(name) for name in self._layers}, change)

    def own_scaling(self, name: str) -> float:
        """The scaling of an adapter's config at this layer."""
        if name not in self._layers:
            raise unknown("adapter", name, self._layers)
        return float(getattr(self._layers[name], "scaling", 1.0))

    def strength(self, name: str) -> float:
        """The strength of an adapter at this layer. Of one that does not act: with which `set_adapter` lets it act."""
        if name in self._active.state.names:
            strength = self._active.state.strength(name, self._path)
            return 1.0 if strength is None else strength
        return waiting_strength(self._layers[name]) if name in self._layers else 1.0

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The change of the weight by an adapter, in the weight's layout; in float32 where the weight is packed."""
        layer, weight = self._layers[adapter], self.base_layer.weight
        own = layer.kind.read(self.base_layer)
        own = own.to(torch.promote_types(own.dtype, torch.float32))
        change = layer.merged(own, getattr(self.base_layer, "bias", None))[0] - own
        found = layer.kind.laid_out(change * self.strength(adapter), weight)
        return found.to(weight.dtype) if weight.is_floating_point() else found  # else the weight is packed

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether `peft.convert_to_lora` can convert all adapters here: they add to the weight."""
        return all(layer.additive for layer in self._layers.values())

    # What acts at this layer alone

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Let these adapters act at this layer, and train here unless `inference_mode`; elsewhere all stays."""
        names = [adapter_names] if isinstance(adapter_names, str) else [*adapter_names]
        self._become({name: self.strength(name) for name in names}, () if inference_mode else names)

    def enable_adapters(self, enabled: bool) -> None:
        """Let the adapters act at this layer again, or no adapter."""
        names = self.active_adapters
        lost = [name for name in names if name in self._layers and self.strength(name) != 1.0]
        if enabled:
            self.set_adapter(names)
        elif lost:
            raise UnsupportedError(
                f"Adapter {lost[0]!r} has another scaling here, which is lost if the layer is switched off alone. Set "
                f"scaling[{lost[0]!r}] = 0 to switch it off, and to its value later."
            )
        else:
            self._become({}, ())

    def set_scale(self, adapter: str, scale: float) -> None:
        """Multiply the change of an adapter at this layer by `scale`."""
        if adapter in self._layers:
            self.rescale(adapter, scale)

    def scale_layer(self, scale: float) -> None:
        """Multiply the scalings of the adapters that act at this layer by `scale`."""
        for name in self._active.state.names:
            if name in self._layers:
                self.rescale(name, self.strength(name) * scale)

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scalings of the adapters that act at this layer by `scale`. `None`: those of the configs again."""
        for name in self._active.state.names:
            if name in self._layers:
                self.rescale(name, 1.0 if scale is None else self.strength(name) / scale)

    def rescale(self, name: str, strength: float) -> None:
        """Give an adapter another strength at this layer."""
        if name not in self._active.state.names:
            if name in self._active.default.names:
                raise UnsupportedError(f"Adapter {name!r} is disabled in this block. Scale it before or after.")
            let_wait(self._layers[name], strength)
            return
        acting = {n: self.strength(n) for n in self._active.state.names if n in self._layers}
        self._become({**acting, name: strength}, None)

    def _become(self, strengths: Mapping[str, float], trains: Collection[str] | None) -> None:
        """Let these adapters act at this layer with these strengths.

        Args:
            trains: those that train here; `None`: all as before.
        """
        adapters, path = self._adapters, self._path
        before, wanted = adapters.strengths, dict[str, dict[str, float | None]]()
        for name in dict.fromkeys((*before, *strengths)):
            if name not in adapters:
                raise ValueError(f"Adapter {name} not found.")
            if name not in before and adapters.heads(name):
                raise UnsupportedError(
                    f"Adapter {name!r} has modules_to_save, which cannot act at one layer alone. Call set_adapter of "
                    "the view."
                )
            adapter = adapters._adapter(name)
            places = (*adapter.layers, *adapter.biases)
            now = {at: strength_at(before[name], at) if name in before else None for at in places}
            wanted[name] = now | ({path: strengths.get(name)} if path in now else {})
        acting = {
            name: layers
            for name, layers in wanted.items()
            if (name in before and adapters.heads(name)) or any(strength is not None for strength in layers.values())
        }
        others = [
            layer for name in acting for at, layer in adapters.layers(name).items() if trains is None or at != path
        ]
        flags = [(parameter, parameter.requires_grad) for layer in others for parameter in layer.parameters()]
        trained = [name for name in acting if name in (*adapters.trainable, *(trains or ()))]
        adapters.activate(*acting, trainable=trained, strengths=acting)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for name, layer in self._layers.items():
            if trains is not None and name not in trains:
                layer.requires_grad_(False)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Whether what these adapters have at this layer requires gradients."""
        names = [adapter_names] if isinstance(adapter_names, str) else [*adapter_names]
        for name in self._layers.keys() & {*names}:
            self._layers[name].requires_grad_(requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        """Refuse, unless there is no such adapter at this layer: an adapter is removed from the whole model.

        Raises:
            UnsupportedError: there is.
        """
        if adapter_name in self._layers:
            raise UnsupportedError(NOT_REMOVED.format(adapter_name))

    def merge(self, *_: Any, **__: Any) -> None:
        """Refuse: an adapter is merged in the whole model.

        Raises:
            UnsupportedError: always.
        """
        raise UnsupportedError(
            "An adapter is merged in the whole model here, and not at one layer: merge_adapter() and unmerge_adapter() "
            "of the view do that. get_delta_weight(name) gives the change of this layer's weight."
        )

    unmerge = merge

    # What PEFT's layers have

    def __repr__(self) -> str:
        name = next(iter(self._layers))
        return f"{self._active.adapters[name].config.method}.{super().__repr__()}"

    def _get_name(self) -> str:
        return _layer_class(next(iter(self._layers.values())), self._host).__name__

    def get_base_layer(self) -> nn.Module:
        """The module without adapters."""
        found: nn.Module = self.base_layer
        return found

    @property
    def adapter_layer_names(self) -> tuple[str, ...]:
        """The names under which adapters have parameters."""
        return tuple(
            n
            for n, m in self._modules.items()
            if isinstance(m, nn.ModuleDict | nn.ParameterDict) and n not in self.other_param_names
        )

    @property
    def other_param_names(self) -> tuple[str, ...]:
        """The names under which adapters have buffers, and their dropouts."""
        dropouts = {*map(dropout_name, self._layers.values())}
        return tuple(n for n, m in self._modules.items() if isinstance(m, Buffers) or n in dropouts)

    def _get_available_adapters(self) -> set[str]:
        return set(self._layers)

    def _all_available_adapter_names(self) -> list[str]:
        return sorted(self._layers)

    @property
    def active_adapters(self) -> list[str]:
        """The adapters that act here, or would if they were not disabled or switched off at this layer alone."""
        state = self._active.state
        names = list(state.names or self._active.merged or self._active.default.names)
        return [
            name for name in names if name in self._layers and state.strength(name, self._path) is not None
        ] or names

    @property
    def active_adapter(self) -> list[str]:
        """The same."""
        return self.active_adapters

    @property
    def merged_adapters(self) -> list[str]:
        """The adapters that are in the weight now."""
        return [name for name in self._active.merged if name in self._layers]

    @property
    def merged(self) -> bool:
        """Whether an adapter is in the weight now."""
        return bool(self.merged_adapters)

    @property
    def disable_adapters(self) -> bool:
        """Whether no adapter acts in the model, or all that do are switched off at this layer."""
        state = self._active.state
        here = [name for name in state.names if name in self._layers]
        off = here and not any(state.strength(name, self._path) is not None for name in here)
        return bool(off) or not (state.names or self._active.merged)


_WHOLE_MODEL = (
    "A trained copy of a module acts with its adapter in the whole model, and not alone. Call set_adapter or "
    "disable_adapter of the view."
)


class HeadView(ModulesToSaveWrapper):
    """The adapters' own copies of one module as PEFT's wrapper of them.

    A module with copies and without adapter layers is an instance of it, and answers with an own one's attributes.
    Its parameters and buffers are those of the copy that acts.
    """

    def __getattr__(self, name: str) -> Any:
        found = nn.Module.__getattr__(self, name)
        heads: Any = None if isinstance(found, nn.Module) else self._modules.get(HEADS)
        if heads is not None:
            state = self.__dict__[ACTIVE].state
            acting = [head for head in state.heads if head in heads._modules and state.rows is None]
            return getattr(heads._modules[acting[-1]], name) if acting else found
        return found

    def __init__(self, host: nn.Module) -> None:
        nn.Module.__init__(self)
        heads: Any = host._modules[HEADS]
        active: Active = host.__dict__[ACTIVE]
        copies = ModuleDict()
        for name, head in heads._modules.items():
            copies.put(name, head)
        self.original_module, self.modules_to_save = bare(host), copies
        self._adapters = set(heads._modules)
        self._active_adapter = [name for name in active.state.heads if name in self._adapters]
        self._disable_adapters = not (active.state.names or active.merged)

    def _get_name(self) -> str:
        return ModulesToSaveWrapper.__name__

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Refuse, unless this copy acts already.

        Raises:
            UnsupportedError: another copy, or none, acts.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else [*adapter_names]
        if [name for name in names if name in self._adapters] != self._active_adapter:
            raise UnsupportedError(_WHOLE_MODEL)

    def enable_adapters(self, enabled: bool) -> None:
        """Refuse, unless it is so already.

        Raises:
            UnsupportedError: it is not.
        """
        if enabled == self._disable_adapters:
            raise UnsupportedError(_WHOLE_MODEL)


# What a `HeadView` holds.
_OF_HEADS = ("original_module", "modules_to_save", "_adapters", "_active_adapter", "_disable_adapters")


class WithPeftNames:
    """A base of the classes of adapted modules, with which they answer to the names of PEFT's layers.

    `model.layers[0].q_proj.lora_A["default"]` is there, and `.base_layer`, although nothing of that is an attribute.
    """

    def __repr__(self) -> str:
        found = next(views(self), None)  # type: ignore[arg-type]
        return super().__repr__() if found is None else repr(found)

    def __setattr__(self, name: str, value: Any) -> None:
        """As always, but `scaling` of a layer with adapters is theirs, and other names of PEFT's cannot be set."""
        state = self.__dict__
        own = name in state or any(name in state.get(kind, ()) for kind in ("_parameters", "_buffers", "_modules"))
        shown = not own and LAYERS in state.get("_modules", ())
        if shown and name == "scaling":
            LayerView(self).scaling.update(value)  # type: ignore[arg-type]
        elif shown and name != "quantization_backend" and _may_be_named(self, name):  # type: ignore[arg-type]
            raise UnsupportedError(
                f"{name!r} belongs to the adapters at this layer, and cannot be set here. Change values in place "
                "(parameter.data.copy_(values), scaling[name] = 0.5), or call set_adapter, enable_adapters or the "
                "methods of the view."
            )
        else:
            super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)  # type: ignore[misc]
        except AttributeError:
            for view in views(self) if _may_be_named(self, name) else ():  # type: ignore[arg-type]
                if hasattr(view, name):
                    return getattr(view, name)
            raise


_ATTRIBUTES = {name for view in (LayerView, HeadView) for name in vars(view) if not name.startswith("__")}
_ATTRIBUTES |= {"base_layer", *_OF_HEADS}


class PeftClasses:
    """`Active.extra` of a model with a view: what its adapted modules are to PEFT."""

    def __init__(self, adapters: Adapters) -> None:
        self.adapters = adapters

    def __call__(self, module: nn.Module) -> tuple[type, ...]:
        """`WithPeftNames`, and PEFT's classes for the adapters at the module: `lora.LoraLayer` and `lora.Linear`.

        The output layer is none of PEFT's. TRL's losses read its weight, and TRL refuses a layer of PEFT's there,
        because the weight lacks the change. Here it has it.
        """
        layers: Any = module._modules.get(LAYERS)
        if layers is None:
            return (WithPeftNames, HeadView) if HEADS in module._modules else (WithPeftNames,)
        if module is getattr(self.adapters.model, "get_output_embeddings", lambda: None)():
            return (WithPeftNames,)
        found: dict[type, None] = {BaseTunerLayer: None}
        for layer in layers._modules.values():
            found |= dict.fromkeys((tuner_class(layer), _layer_class(layer, module)))
        return (WithPeftNames, *found)


def _may_be_named(module: nn.Module, name: str) -> bool:
    """Whether a view may have this name, without making one: libraries ask modules for names that they lack."""
    if name in _ATTRIBUTES or LAYERS not in module._modules:
        return name in _ATTRIBUTES
    layers: Any = module._modules[LAYERS]
    return name in _fields(layers._modules.values()) or may_be_at(module, name)
