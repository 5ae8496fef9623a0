"""Lightning: a callback with which checkpoints hold adapters alone, and a resumed fit goes on bit for bit."""

from __future__ import annotations

import random
import warnings
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from adapterkit.adapters import Adapters, penalty
from adapterkit.checkpoints import check_setting, compact, setting
from adapterkit.contract import ATTRIBUTE
from adapterkit.errors import AdapterWarning, CheckpointError, ConfigError
from adapterkit.integrations.models import adapted_models

# Each package has a `Callback` of its own, and its `Trainer` knows that one alone.
_PACKAGES = [name for name in ("lightning.pytorch", "pytorch_lightning") if find_spec(name.partition(".")[0])]
_CALLBACKS: list[Any] = [import_module(name).Callback for name in _PACKAGES]
# The keys of a checkpoint for the training states, for how the adapters acted, and for the random generators' states.
STATES, SETTINGS, GENERATORS = "adapterkit", "adapterkit_setting", "adapterkit_random"


class AdapterCheckpoints(*_CALLBACKS):  # type: ignore[misc]
    """`Trainer(callbacks=[AdapterCheckpoints()])`, for a module that has adapted models inside, such as `self.model`.

    For `lightning` and for `pytorch_lightning`, which must be installed.

    - A checkpoint holds everything but the frozen parameters of the adapted models: the adapters, what else trains, and
      buffers such as the statistics of batch norms.
    - `fit(ckpt_path=...)` goes on bit for bit from the end of an epoch, for every method: what a state dict does not
      have of the adapters is restored too, and the random generators of every process.
    - `test(ckpt_path="best")` and `load_from_checkpoint` restore the adapters; make them in the module's `__init__` or
      `configure_model`, on the same base.
    - `ak.penalty` is a part of the loss (not under manual optimization), and `adapters.step()` follows each step of an
      optimizer.

    `ModelCheckpoint(save_weights_only=True)` asks no callback, so it writes the whole model.

    Raises:
        ConfigError: the module has no adapters when the fit starts.
        CheckpointError: a fit that resumes from a checkpoint without the state of an adapter that the module has, or in
            which the adapters acted otherwise.
    """

    def __init__(self) -> None:
        super().__init__()
        self._steps = 0

    def state_dict(self) -> dict[str, Any]:
        """Not empty, so that Lightning warns if a fit resumes without this callback."""
        return {"version": 1}

    def on_fit_start(self, trainer: Any, pl_module: nn.Module) -> None:
        """Check that there are adapters, and warn of what would write the whole model."""
        if not any(True for _ in adapted_models(pl_module)):
            raise ConfigError(
                f"The {type(pl_module).__name__} has no adapters. Add them in its __init__ or configure_model: "
                "ak.attach(self.model).add(name, config)."
            )
        if any(getattr(callback, "save_weights_only", False) for callback in trainer.checkpoint_callbacks):
            warnings.warn(
                "ModelCheckpoint(save_weights_only=True) asks no callback, so its checkpoints hold the whole model.",
                AdapterWarning,
                stacklevel=2,
            )

    def on_train_start(self, trainer: Any, pl_module: nn.Module) -> None:
        """Count steps from those of the checkpoint on."""
        self._steps = trainer.global_step

    def on_save_checkpoint(self, trainer: Any, pl_module: nn.Module, checkpoint: dict[str, Any]) -> None:
        """Leave the frozen parameters out, and add what a state dict does not have of the adapters."""
        state, states = checkpoint["state_dict"], checkpoint.setdefault(STATES, {})
        for path, adapters in adapted_models(pl_module):
            checkpoint.setdefault(SETTINGS, {})[path] = setting(adapters, held=adapters.names)
            # The state dict says it too, but a test and `load_from_checkpoint` need not act as the training did.
            state.pop(path + ATTRIBUTE, None)
            getattr(state, "_metadata", {}).get(path.removesuffix("."), {}).pop(ATTRIBUTE, None)
            if adapters.merged:  # the weights are not the base's
                continue
            for key in _frozen(adapters):
                state.pop(path + key, None)
            held = {(tensor.data_ptr(), tensor.shape) for tensor in state.values() if isinstance(tensor, Tensor)}
            states[path] = {}
            for name in adapters.names:
                whole = compact(adapters._adapters[name], adapters.model, adapters.training_state(name))
                states[path][name] = {k: t for k, t in whole.items() if (t.data_ptr(), t.shape) not in held}

        own = _random_states()
        every: list[Any] = [own]
        if dist.is_available() and dist.is_initialized():
            every = [None] * dist.get_world_size()
            dist.all_gather_object(every, own)
        checkpoint[GENERATORS] = every

    def on_load_checkpoint(self, trainer: Any, pl_module: nn.Module, checkpoint: dict[str, Any]) -> None:
        """Restore what a state dict does not have of the adapters."""
        if trainer.state.fn == "fit" and trainer.precision in ("bf16-true", "16-true", "64-true"):
            trainer.precision_plugin.convert_module(pl_module)  # as it was then; Lightning does so after this
        states: dict[str, dict[str, dict[str, Tensor]]] = checkpoint.get(STATES, {})
        found = [(path, adapters) for path, adapters in adapted_models(pl_module) if not adapters.merged]
        lacking = [(path, name) for path, each in found for name in each.names if name not in states.get(path, ())]
        if lacking and trainer.state.fn == "fit":
            path, name = lacking[0]
            raise CheckpointError(
                f"The checkpoint has no training state of the adapter {name!r} at {path.removesuffix('.')!r}. It was "
                "written without AdapterCheckpoints, or by a module with other adapters."
            )
        for path, adapters in adapted_models(pl_module) if trainer.state.fn == "fit" else ():
            if path in checkpoint.get(SETTINGS, ()):
                check_setting(adapters, checkpoint[SETTINGS][path], "The checkpoint")
        for path, adapters in found:
            for name in [name for name in adapters.names if name in states.get(path, ())]:
                adapters.load_training_state(name, {**adapters.training_state(name), **states[path][name]})
        every = checkpoint.get(GENERATORS, ())
        if trainer.state.fn == "fit" and len(every) == trainer.world_size:
            _set_random_states(every[trainer.global_rank])

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
        """Add the penalty, scaled as Lightning has scaled the loss."""
        if not pl_module.automatic_optimization:
            return
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        scale = (1.0 if scaler is None else scaler.get_scale()) / trainer.accumulate_grad_batches
        for _path, adapters in adapted_models(pl_module):
            term = penalty(adapters.model)
            if term.requires_grad:
                loss.add_(term.to(loss.device), alpha=scale)

    def on_train_batch_end(self, trainer: Any, pl_module: nn.Module, *_: Any) -> None:
        """Let the adapters make their step if an optimizer has made one."""
        if trainer.global_step != self._steps:
            self._steps = trainer.global_step
            for _path, adapters in adapted_models(pl_module):
                adapters.step()


def _random_states() -> dict[str, Any]:
    numpy: Any = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": random.getstate(),
        "numpy": (numpy[0], torch.from_numpy(numpy[1].astype(np.int64)), *numpy[2:]),
    }


def _set_random_states(states: dict[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    if len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])
    random.setstate(states["python"])
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))


def _frozen(adapters: Adapters) -> set[str]:
    """The keys of the base's parameters that do not train."""
    own = {id(parameter) for name in adapters.names for parameter in adapters.parameters(name)}
    held = adapters.model.state_dict(keep_vars=True).items()
    return {k for k, t in held if isinstance(t, nn.Parameter) and not t.requires_grad and id(t) not in own}
