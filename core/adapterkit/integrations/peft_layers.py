"""What PEFT's functions look for in a model, its tuner layers and trained copies, made from adapted modules.

They are made when somebody asks, hold the model's own parameters, and own nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from adapterkit.contract import CONTAINERS, HEADS, LAYERS, AdapterConfig, AdapterLayer
from adapterkit.errors import UnsupportedError
from adapterkit.forward import ACTIVE, Active, original_class


def views(module: nn.Module) -> Iterator[nn.Module]:
    """The views of a module of an adapted model: of its adapter layers, and of its trained copies."""
    if LAYERS in module._modules:
        yield LayerView(module)
    if HEADS in module._modules:
        yield HeadView(module)


class _Live:
    """A container by adapter. An adapter that was removed since is not in it."""

    def __contains__(self, name: object) -> bool:
        held: Mapping[str, object] = self.__dict__["held"]
        return name in held and super().__contains__(name)  # type: ignore[misc]


class _Modules(_Live, nn.ModuleDict):
    pass


class _Parameters(_Live, nn.ParameterDict):
    pass


class _Buffers(_Live, BufferDict):
    pass


class _Values(_Live, dict[str, Any]):
    def __setitem__(self, name: str, value: Any) -> None:
        raise UnsupportedError(
            "The values of a layer are those of its adapter's config, and cannot be set here. How strong an adapter "
            f"acts is ak.attach(model).activate({name!r}, strengths={{{name!r}: 0.5}})."
        )

    def __reduce__(self) -> Any:
        return dict, (dict(self),)


def by_adapter(parts: Iterable[tuple[str, nn.Module]], held: Mapping[str, object]) -> dict[str, nn.Module]:
    """What adapters have under each name, as PEFT's containers by adapter: `{"lora_A": ModuleDict({"a": ...})}`.

    Args:
        held: the adapters that there are, now and later.
    """
    found: dict[str, Any] = {}

    def put(container: type, local: str, name: str, value: Any) -> None:
        if value is not None:
            if local not in found:
                found[local] = container()
                found[local].__dict__["held"] = held
            found[local][name] = value

    for name, part in parts:
        for local, module in part._modules.items():
            put(_Modules, local, name, module)
        for local, parameter in part._parameters.items():
            put(_Parameters, local, name, parameter)
        for local, buffer in part._buffers.items():
            put(_Buffers, local, name, buffer)
    return found


def _parts(host: nn.Module) -> list[tuple[str, nn.Module]]:
    """The adapter layers of a module, and what they share with other layers."""
    layers: Any = host._modules[LAYERS]
    shared = [(name, layer.shared) for name, layer in layers._modules.items() if layer.shared is not None]
    return [*layers._modules.items(), *shared]


def _fields(layers: Iterable[AdapterLayer]) -> set[str]:
    """The fields of their configs that not every method has."""
    return {f.name for layer in layers for f in fields(layer.config)} - {f.name for f in fields(AdapterConfig)}


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

    def __init__(self, host: nn.Module) -> None:
        super().__init__()
        layers: Any = host._modules[LAYERS]
        self._layers: dict[str, AdapterLayer] = layers._modules
        self._active: Active = host.__dict__[ACTIVE]
        self.base_layer: Any = bare(host)
        self._kind = next(iter(self._layers.values())).kind
        for name, container in by_adapter(_parts(host), self._layers).items():
            self._modules[name] = container

    def __getattr__(self, name: str) -> Any:
        """What is an attribute of this module; else a field of the layers' configs, by adapter: `r["default"]`."""
        if name in _fields(self.__dict__["_layers"].values()):
            return self._values({n: getattr(layer.config, name, None) for n, layer in self._layers.items()})
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
    def scaling(self) -> dict[str, float]:
        """What the change of each adapter is multiplied by: the scaling of its config, and its strength."""
        strength = self._active.state.strength
        return self._values({n: getattr(layer, "scaling", 1.0) * strength(n) for n, layer in self._layers.items()})

    def _values(self, values: Mapping[str, Any]) -> dict[str, Any]:
        found = _Values(values)
        found.__dict__["held"] = self._layers
        return found

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The change of the weight by an adapter, in the weight's layout; in float32 where the weight is packed."""
        layer, weight = self._layers[adapter], self.base_layer.weight
        own = layer.kind.read(self.base_layer)
        own = own.to(torch.promote_types(own.dtype, torch.float32))
        change = layer.merged(own, self.base_layer.bias)[0] - own
        found = layer.kind.laid_out(change * self._active.state.strength(adapter), weight)
        return found.to(weight.dtype) if weight.is_floating_point() else found  # else the weight is packed

    def __repr__(self) -> str:
        name = next(iter(self._layers))
        return f"{self._active.adapters[name].config.method}.{super().__repr__()}"

    def _get_name(self) -> str:
        return type(self.base_layer).__name__

    def get_base_layer(self) -> nn.Module:
        """The module without adapters."""
        found: nn.Module = self.base_layer
        return found

    @property
    def adapter_layer_names(self) -> tuple[str, ...]:
        """The names under which adapters have parameters."""
        return tuple(n for n, m in self._modules.items() if isinstance(m, nn.ModuleDict | nn.ParameterDict))

    @property
    def other_param_names(self) -> tuple[str, ...]:
        """The names under which adapters have buffers."""
        return tuple(n for n, m in self._modules.items() if isinstance(m, BufferDict))

    def _get_available_adapters(self) -> set[str]:
        return set(self._layers)

    def _all_available_adapter_names(self) -> list[str]:
        return sorted(self._layers)

    @property
    def active_adapters(self) -> list[str]:
        """The adapters that act, or would if they were not disabled."""
        return list(self._active.state.names or self._active.merged or self._active.default.names)

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
        """Whether no adapter acts."""
        return not (self._active.state.names or self._active.merged)


class HeadView(ModulesToSaveWrapper):
    """The adapters' own copies of one module as PEFT's wrapper of them."""

    def __init__(self, host: nn.Module) -> None:
        nn.Module.__init__(self)
        heads: Any = host._modules[HEADS]
        active: Active = host.__dict__[ACTIVE]
        self.original_module, self.modules_to_save = bare(host), nn.ModuleDict(heads._modules)
        self._adapters = set(heads._modules)
        self._active_adapter = [name for name in active.state.heads if name in self._adapters]
        self._disable_adapters = not (active.state.names or active.merged)

    def _get_name(self) -> str:
        return ModulesToSaveWrapper.__name__

    def _get_available_adapters(self) -> set[str]:
        return self._adapters


class Named:
    """A base of the classes of adapted modules, with which they answer to the names of PEFT's layers.

    `model.layers[0].q_proj.lora_A["default"]` is there, and `.base_layer`, although nothing of that is an attribute.
    """

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)  # type: ignore[misc]
        except AttributeError:
            for view in views(self) if _may_be_named(self, name) else ():  # type: ignore[arg-type]
                if hasattr(view, name):
                    return getattr(view, name)
            raise


_ATTRIBUTES = {name for view in (LayerView, HeadView) for name in vars(view) if not name.startswith("_")}
_ATTRIBUTES |= {"base_layer", "original_module", "modules_to_save"}


def _may_be_named(module: nn.Module, name: str) -> bool:
    """Whether a view may have this name, without making one: libraries ask modules for names that they lack."""
    if name in _ATTRIBUTES:
        return True
    layers: Any = module._modules.get(LAYERS)
    if layers is None:
        return False
    held = (names for _, part in _parts(module) for names in (part._modules, part._parameters, part._buffers))
    return name in _fields(layers._modules.values()) or any(name in names for names in held)
