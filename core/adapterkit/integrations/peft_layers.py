"""What PEFT's functions look for in a model, its tuner layers and trained copies, made from adapted modules.

They are made when somebody asks, hold the model's own parameters, and own nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from adapterkit.contract import CONTAINERS, HEADS, LAYERS
from adapterkit.forward import ACTIVE, Active, original_class

Parts = Mapping[str, nn.Module]


def views(module: nn.Module) -> Iterator[nn.Module]:
    """The views of a module of an adapted model: of its adapter layers, and of its trained copies."""
    if LAYERS in module._modules:
        yield LayerView(module)
    if HEADS in module._modules:
        yield HeadView(module)


def by_adapter(parts: Parts) -> dict[str, nn.Module]:
    """What adapters hold under each name, as PEFT's containers by adapter: `{"lora_A": ModuleDict({"a": ...})}`."""
    found: dict[str, Any] = {}
    for name, part in parts.items():
        for container, held in ((nn.ModuleDict, part._modules), (nn.ParameterDict, part._parameters)):
            for local, value in held.items():
                if value is not None:
                    found.setdefault(local, container())[name] = value
        for local, buffer in part._buffers.items():
            if buffer is not None:
                found.setdefault(local, BufferDict())[name] = buffer
    return found


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
        self._layers: dict[str, nn.Module] = dict(layers._modules)
        self._active: Active = host.__dict__[ACTIVE]
        self.base_layer = bare(host)
        for name, container in by_adapter(self._layers).items():
            self._modules[name] = container

    def __repr__(self) -> str:
        name = next(iter(self._layers))
        return f"{self._active.adapters[name].config.method}.{super().__repr__()}"

    def _get_name(self) -> str:
        return type(self.base_layer).__name__

    def get_base_layer(self) -> nn.Module:
        """The module without adapters."""
        return self.base_layer

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
    layers = module._modules.get(LAYERS)
    parts = layers._modules.values() if layers is not None else ()
    return name in _ATTRIBUTES or any(
        name in held
        for part in parts
        for held in (part._modules, part._parameters, part._buffers)  # type: ignore[union-attr]
    )
