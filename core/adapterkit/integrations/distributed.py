"""torch.distributed.checkpoint: a training's state of adapters, saved by some processes and restored by others."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.tensor import DTensor

from adapterkit.checkpoints import check_setting, compact, restore, setting
from adapterkit.contract import part_name
from adapterkit.errors import CheckpointError
from adapterkit.integrations.models import adapters_in

# The key of how all adapters acted. The others have a dot.
_SETTING = "setting"


class TrainingState(Stateful):
    """The training state of a model's adapters, as an object with `state_dict` and `load_state_dict`.

        dcp.save({"adapters": TrainingState(model), "optimizer": ...}, checkpoint_id=folder)
        dcp.load({"adapters": TrainingState(model), "optimizer": ...}, checkpoint_id=folder)

    It holds everything with which the adapters train on bit for bit (`Adapters.training_state`) and nothing of the
    base. The number of processes and the sharding may differ between `save` and `load`. Every process must make both
    calls. Other tools that save such objects take it too, such as accelerate's `register_for_checkpointing`.

    Args:
        model: the adapted model, wrapped or not.
        names: which adapters; without names those that train when it is saved or loaded.
        whole: gather FSDP2's shards, for tools that save with `torch.save`. `torch.distributed.checkpoint` saves each
            process's shards, so no process holds more.

    Raises:
        ConfigError: the model has no adapters.
        UnknownNameError: no such adapter.
    """

    def __init__(self, model: nn.Module, *names: str, whole: bool = False) -> None:
        self._adapters, self._names, self._whole = adapters_in(model), names, whole
        for name in names:
            self._adapters.config(name)

    def state_dict(self) -> dict[str, Any]:
        """Copies of the tensors, by `<adapter>.<key of its training state>`."""
        found: dict[str, Any] = {}
        for name in self._held:
            sharded = not self._whole and any(isinstance(p, DTensor) for p in self._adapters.parameters(name))
            state = self._adapters.training_state(name, sharded=sharded)
            state = compact(self._adapters._adapters[name], self._adapters.model, state)
            # Copies: torch.distributed.checkpoint reads into these tensors, and that may break off.
            found |= {f"{part_name(name)}.{key}": tensor.clone() for key, tensor in state.items()}
        return {_SETTING: setting(self._adapters, held=self._held), **found}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` gave, all or nothing.

        Raises:
            CheckpointError: it is of other adapters, an adapter was saved with another config, or adapters act that did
                not act then, or otherwise.
        """
        states: dict[str, dict[str, Any]] = {name: {} for name in self._held}
        names = {part_name(name): name for name in self._held}
        for key, value in state_dict.items():
            name, _, local = key.partition(".")
            if key == _SETTING:
                continue
            if name not in names:
                raise CheckpointError(
                    f"The checkpoint holds a training of adapter {name!r}, and here "
                    f"{', '.join(map(repr, states)) or 'none'} should be restored. Add and activate the adapters that "
                    "were saved, under the same names, before you load."
                )
            states[names[name]][local] = value
        if _SETTING in state_dict:
            check_setting(self._adapters, state_dict[_SETTING], "The checkpoint")
        restore(self._adapters, states)

    @property
    def _held(self) -> tuple[str, ...]:
        return self._names or self._adapters.trainable
