"""What adapters have at a module, in PEFT's containers by adapter: `layer.lora_A["default"].weight`.

Containers are made when somebody asks. They hold the model's own parameters, and nothing can be put in or taken out.
"""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from peft import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from adapterkit.contract import INPUT_DROPOUT, LAYERS, AdapterLayer
from adapterkit.errors import UnsupportedError
from adapterkit.integrations.peft_names import prefix_of

NOT_REMOVED = "An adapter cannot be removed from a layer alone. From the whole model: ak.attach(model).remove({!r})."


class _Fixed:
    """A container that refuses changes."""

    def put(self, name: str, value: Any) -> None:
        """What an adapter has, when the container is made."""
        super().__setitem__(name, value)  # type: ignore[misc]

    def __setitem__(self, name: str, value: Any) -> None:
        if name in self and value is self[name]:  # type: ignore[operator, index]
            return  # `container[name] += 1` has changed it in place
        raise UnsupportedError(
            f"What {name!r} has at a layer is the adapter's own, and cannot be set here. Change it in place: "
            "parameter.data.copy_(values), or dropout.p = 0.1."
        )

    def __delitem__(self, name: str) -> None:
        raise UnsupportedError(NOT_REMOVED.format(name))

    def clear(self) -> None:
        raise UnsupportedError(NOT_REMOVED.format("mood"))


class ModuleDict(_Fixed, nn.ModuleDict):
    """Modules by adapter."""


class ParameterDict(_Fixed, nn.ParameterDict):
    """Parameters by adapter."""


class Buffers(_Fixed, BufferDict):
    """Buffers by adapter."""


class Values(UserDict[str, Any]):
    """Numbers by adapter, such as `r`. `change(name, value)` is called where one is set; without it that is refused."""

    def __init__(self, values: Mapping[str, Any], change: Callable[[str, Any], None] | None = None) -> None:
        self.data, self.change = dict(values), change

    def __setitem__(self, name: str, value: Any) -> None:
        if self.change is None:
            raise UnsupportedError(
                "The values of a layer are those of its adapter's config, and cannot be set here. How strong an "
                f"adapter acts is ak.attach(model).activate({name!r}, strengths={{{name!r}: 0.5}})."
            )
        self.change(name, value)
        self.data[name] = value

    def __delitem__(self, name: str) -> None:
        raise UnsupportedError(NOT_REMOVED.format(name))

    def __reduce__(self) -> Any:
        return dict, (dict(self),)

    def copy(self) -> Any:
        """The values now."""
        return dict(self.data)


def by_adapter(parts: Iterable[tuple[str, nn.Module]]) -> dict[str, Any]:
    """What the parts of adapters have under each name: `{"lora_A": ModuleDict({"default": ...})}`."""
    found: dict[str, Any] = {}
    for name, part in parts:
        for container, members in (
            (ModuleDict, part._modules),
            (ParameterDict, part._parameters),
            (Buffers, part._buffers),
        ):
            for local, value in members.items():
                if value is not None and local != INPUT_DROPOUT:
                    found.setdefault(local, container()).put(name, value)
    return found


def containers_at(host: nn.Module) -> dict[str, nn.Module]:
    """The containers that PEFT's layer has at an adapted module, also those that are empty there."""
    layers: Any = host._modules[LAYERS]
    found = by_adapter(_parts(host))
    for name, layer in layers._modules.items():
        if local := dropout_name(layer):
            found.setdefault(local, ModuleDict()).put(name, layer._modules.get(INPUT_DROPOUT) or nn.Identity())
        for local in _names_in_peft(layer):
            found.setdefault(local, ModuleDict())
    return found


def may_be_at(host: nn.Module, name: str) -> bool:
    """Whether `containers_at` may have this name. It makes none: libraries ask modules for names that they lack."""
    layers: Any = host._modules[LAYERS]
    if any(name in names for _, part in _parts(host) for names in (part._modules, part._parameters, part._buffers)):
        return True
    own = layers._modules.values()
    return any(name in _names_in_peft(layer) for layer in own) or (
        name.endswith("dropout") and any(name == dropout_name(layer) for layer in own)
    )


def tuner_class(layer: AdapterLayer) -> type[BaseTunerLayer]:
    """PEFT's class for the layers of an adapter's type: `LoraLayer`."""
    tuner = PEFT_TYPE_TO_TUNER_MAPPING.get(layer.config.to_dict()["peft_type"])
    return getattr(tuner, "tuner_layer_cls", BaseTunerLayer)


def _parts(host: nn.Module) -> list[tuple[str, nn.Module]]:
    """The adapter layers of a module, and what they share with other layers."""
    layers: Any = host._modules[LAYERS]
    shared = [(name, layer.shared) for name, layer in layers._modules.items() if layer.shared is not None]
    return [*layers._modules.items(), *shared]


def _names_in_peft(layer: AdapterLayer) -> tuple[str, ...]:
    """The names of PEFT's containers for a layer of this type: a Linear has an empty `lora_embedding_A`, too."""
    return getattr(tuner_class(layer), "adapter_layer_names", ())


def dropout_name(layer: AdapterLayer) -> str:
    """PEFT's name for the dropout of a layer, such as `lora_dropout`. Empty if its method has none."""
    name = prefix_of(layer.config) + "dropout"
    return name if layer.dropout or hasattr(layer.config, name) else ""
