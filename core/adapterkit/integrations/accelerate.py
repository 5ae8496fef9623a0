"""accelerate: `save_state` and `load_state` with the adapters in place of the whole model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import nn

from adapterkit.adapters import Adapters, adapters_in
from adapterkit.checkpoints import load_states, save_state, subfolder
from adapterkit.errors import ConfigError
from adapterkit.tensors import process_groups


def save_adapters_alone(accelerator: Accelerator) -> None:
    """Let `accelerator.save_state` write the adapters that train, and not the frozen model that they are on.

    Call it once, before or after `prepare`. `accelerator.load_state` restores the adapters, so that the training goes
    on bit for bit: PiSSA's factors, averages and the number of steps too. A resumed script makes the same calls.

    The adapters of the first prepared model are in the folder `adapters` of the checkpoint, each in a subfolder of its
    name, which `adapters.load` and PEFT read; those of the second are in `adapters_1`, and so on. Models without
    adapters, and models that train themselves or have merged adapters, are saved in full as well.

    Under FSDP and DeepSpeed these engines save the base, too. DeepSpeed leaves frozen parameters out if you ask it to:
    `save_state(folder, exclude_frozen_parameters=True)` and `load_state(folder, load_module_strict=False)`.

    Raises:
        CheckpointError: `load_state` finds other adapters, or adapters of another config. No adapter has changed then.
    """

    def save(models: list[nn.Module], weights: list[Any], folder: str) -> None:
        for i, place, adapters in _adapted(accelerator, folder):
            for name in adapters.trainable:
                # Where adapters are sharded, every process takes part and the first one writes.
                if accelerator.is_main_process or process_groups(adapters.parameters(name)):
                    adapters.save(name, subfolder(place, name))
                    save_state(adapters, name, subfolder(place, name))
            if weights and adapters.trainable and _is_frozen(adapters):
                del weights[i]

    def load(models: list[nn.Module], folder: str) -> None:
        for i, place, adapters in _adapted(accelerator, folder):
            if load_states(adapters, place) and models and _is_frozen(adapters):
                del models[i]

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def _adapted(accelerator: Accelerator, folder: str) -> Iterator[tuple[int, Path, Adapters]]:
    """The number of each prepared model with adapters, the last one first, the adapters, and their folder."""
    for i, model in reversed([*enumerate(accelerator._models)]):
        try:
            adapters = adapters_in(model)
        except ConfigError:  # accelerate saves and loads it in full
            continue
        yield i, Path(folder) / (f"adapters_{i}" if i else "adapters"), adapters


def _is_frozen(adapters: Adapters) -> bool:
    """Whether nothing but adapters has changed in the model."""
    own = {id(parameter) for name in adapters for parameter in adapters.parameters(name)}
    trains = any(parameter.requires_grad and id(parameter) not in own for parameter in adapters.model.parameters())
    return not trains and not adapters.merged
