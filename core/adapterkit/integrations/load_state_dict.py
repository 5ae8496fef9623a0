"""Restoring: what an adapted model's own `load_state_dict` takes back of what `save_pretrained` wrote."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, MutableMapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from adapterkit.contract import ATTRIBUTE, CONTAINERS, SHARED
from adapterkit.errors import AdapterWarning, CheckpointError
from adapterkit.files import file_places
from adapterkit.model import BaseModules, resized_keys
from adapterkit.tensors import shape_of

if TYPE_CHECKING:
    from adapterkit.adapters import Adapters

# Where PEFT keeps an adapted layer, and a module that it trains a copy of; and that copy.
_PEFT_BASE, _PEFT_HEAD = ("base_layer", "original_module"), "modules_to_save"


class Loader:
    """Watches the model's `load_state_dict`, with which trainers restore a checkpoint."""

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self._partial = False
        self._handles = (
            root.register_load_state_dict_pre_hook(self._before),
            root.register_load_state_dict_post_hook(self._after),
        )

    def remove(self) -> None:
        """Watch no longer."""
        for handle in self._handles:
            handle.remove()

    def _before(self, module: nn.Module, state: MutableMapping[str, Any], prefix: str, *others: Any) -> None:
        """Raise where an adapter that trains would stay as it is beside others that are restored.

        A state dict of the base alone may be loaded, with a warning.

        Raises:
            CheckpointError: the state dict is of other adapters than the model's, lacks some that train, or has other
                shapes for them.
        """
        adapters: Adapters = self.root.__dict__[ATTRIBUTE]
        known = {key for adapter in adapters._adapters.values() for key in adapter.memory_keys()}
        own = self.root.state_dict(keep_vars=True)
        base = {key: value for key, value in own.items() if key not in known}
        _from_peft(adapters, own, base, state, prefix)
        given = {key.removeprefix(prefix) for key in state if key.startswith(prefix)}
        foreign = sorted(key for key in given - known - base.keys() if {*CONTAINERS, SHARED} & set(key.split(".")))
        # New rows of a vocabulary are random, so these tables of the base are saved with adapters.
        tables = resized_keys(BaseModules(self.root))
        self._partial = not given <= tables and given <= known | set(foreign) | tables
        lacking = [
            name
            for name, adapter in adapters._adapters.items()
            if not given.intersection(adapter.memory_keys())
            and any(p.requires_grad and not p.is_meta for p in adapter.parameters())
        ]
        if (self._partial and (foreign or lacking)) or (foreign and lacking):
            here = ", ".join(map(repr, adapters.names))
            what = (
                f"holds tensors of adapters that the model lacks, such as {foreign[0]!r}" if foreign else "lacks them"
            )
            raise CheckpointError(
                f"The model trains {', '.join(map(repr, lacking)) or 'none of these'}, and the state dict {what}. The "
                f"model has {here}. Add the adapters that were saved, under the same names and with the same configs, "
                "before you resume; or load one from its folder: adapters.load(folder, name, trainable=True)."
            )
        for name, adapter in adapters._adapters.items():
            for key in adapter.memory_keys():
                mine, theirs = _shape(own.get(key)), _shape(state.get(prefix + key))
                if mine and theirs and mine != theirs:
                    raise CheckpointError(
                        f"Adapter {name!r} was saved with another config than the model's has: {key!r} is {theirs} in "
                        f"the state dict, and {mine} here (such as another rank). Add it with the config that was "
                        f"saved, or load it from its folder: adapters.load(folder, {name!r}, trainable=True)."
                    )
        if lacking and given and not given & known:
            warnings.warn(
                f"The state dict holds no adapters: {', '.join(map(repr, lacking))} stays as it is. To resume a "
                "training, load the adapter that was saved with it.",
                AdapterWarning,
                stacklevel=2,
            )

    def _after(self, module: nn.Module, result: Any) -> None:
        """The base's keys are not missing where only adapters were given: they are where they were."""
        if self._partial:
            ours = {
                key for adapter in self.root.__dict__[ATTRIBUTE]._adapters.values() for key in adapter.memory_keys()
            }
            result.missing_keys[:] = [key for key in result.missing_keys if key in ours]


def _shape(value: Any) -> tuple[int, ...] | None:
    return tuple(shape_of(value)) if isinstance(value, Tensor) else None


def _from_peft(
    adapters: Adapters,
    mine: Mapping[str, Tensor],
    base: Collection[str],
    state: MutableMapping[str, Any],
    prefix: str,
) -> None:
    """Give the state dict of a model that PEFT adapted the keys of this one, if it is of such a model.

    sentence-transformers restores a checkpoint so: it builds the model of the folder, whose adapter PEFT puts on, and
    hands its state dict over.

    Args:
        mine: the model's own state dict, for biases of the base.
        base: those of its keys that are no adapter's.
    """
    given = [key.removeprefix(prefix) for key in state if key.startswith(prefix)]
    if not any(name in key.split(".") and key not in base for key in given for name in _PEFT_BASE):
        return
    if len(adapters.active) != 1:
        raise CheckpointError(
            f"The state dict is of a model that PEFT adapted once, and here {', '.join(map(repr, adapters.active))} "
            "act. Activate the one adapter that it belongs to."
        )
    adapter = adapters._adapters[adapters.active[0]]
    # transformers puts on no adapter that has shared tensors.
    places = {file: memory for file, memory, _ in file_places(adapter)}
    for key in given:
        value, parts = state.pop(prefix + key), key.split(".")
        plain = ".".join(part for part in parts if part not in _PEFT_BASE)
        if key in places:  # a trained bias, which PEFT writes over the base's
            state[prefix + places[key]], state[prefix + plain] = value, mine[plain]
        elif plain in base:
            state[prefix + plain] = value
        else:  # the adapter's name stands somewhere in the key
            names = [".".join(parts[:i] + parts[i + 1 + (part == _PEFT_HEAD) :]) for i, part in enumerate(parts)]
            state[prefix + next((places[name] for name in names if name in places), key)] = value
