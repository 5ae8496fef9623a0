"""accelerate: `save_state` and `load_state` with the adapters in place of the whole model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from adapterkit.adapters import Adapters
from adapterkit.checkpoints import base_state, load_states, save_training, subfolder
from adapterkit.errors import CheckpointError, ConfigError, usage
from adapterkit.files import read_tensors, write_tensors
from adapterkit.integrations.models import adapters_in

_STATISTICS = "batch_norms.safetensors"


@usage("save_adapters_alone(accelerator)")
def save_adapters_alone(accelerator: Accelerator) -> None:
    """Let `accelerator.save_state` write the adapters that train, and not the frozen model that they are on.

    Call it once, before or after `prepare`. `accelerator.load_state` restores the adapters, so that the training goes
    on bit for bit: PiSSA's factors, averages and the number of steps too. A resumed script makes the same calls.

    The adapters of the first prepared model are in the folder `adapters` of the checkpoint, each in a subfolder of its
    name, which `adapters.load` and PEFT read; those of the second are in `adapters_1`, and so on. The statistics of the
    base's batch norms are there too. Models without adapters, and models that train themselves or have merged adapters,
    are saved in full as well.

    Under FSDP and DeepSpeed these engines save the base, too. DeepSpeed leaves frozen parameters out if you ask it to:
    `save_state(folder, exclude_frozen_parameters=True)` and `load_state(folder, load_module_strict=False)`.

    Raises:
        CheckpointError: `load_state` finds other adapters, or adapters of another config. No adapter has changed then.
    """

    def save(models: list[nn.Module], weights: list[Any], folder: str) -> None:
        on_each_node = accelerator.project_configuration.save_on_each_node
        writes = accelerator.is_local_main_process if on_each_node else accelerator.is_main_process
        for i, place, adapters in _adapted(accelerator, folder):
            for name in adapters.trainable:
                save_training(adapters, name, subfolder(place, name), writes=writes)
            if weights and adapters.trainable and _is_frozen(adapters):
                statistics = base_state(adapters, adapters.model)  # of batch norms: all parameters are frozen
                if writes and statistics:
                    write_tensors(statistics, place / _STATISTICS, {"format": "pt"})
                del weights[i]

    def load(models: list[nn.Module], folder: str) -> None:
        adapted = [*_adapted(accelerator, folder)]
        lost = sorted({*Path(folder).glob("adapters*")} - {place for _, place, _ in adapted})
        if lost:
            raise CheckpointError(
                f"{lost[0]} holds adapters, and here that model has none. Before you load, add the saved adapters, and "
                "prepare the models in the same order as then."
            )
        for i, place, adapters in adapted:
            if load_states(adapters, place) and models and _is_frozen(adapters):
                _restore_statistics(adapters, place / _STATISTICS)
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


def _restore_statistics(adapters: Adapters, file: Path) -> None:
    saved = read_tensors(file)[0] if file.is_file() else {}
    with torch.no_grad():
        for name, buffer in base_state(adapters, adapters.model).items():
            if name in saved:
                buffer.copy_(saved[name])


def _is_frozen(adapters: Adapters) -> bool:
    """Whether nothing but adapters has changed in the model."""
    trains = any(tensor.requires_grad for tensor in base_state(adapters, adapters.model).values())
    return not trains and not adapters.merged
