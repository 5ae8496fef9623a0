"""transformers: a mixin with which any `Trainer` trains every method, and keeps adapters alone in its checkpoints."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import SAFE_WEIGHTS_NAME

from adapterkit.adapters import Adapters, penalty
from adapterkit.checkpoints import (
    Saver,
    WrittenElsewhere,
    load_states,
    save_base_state,
    save_state,
    save_training,
    subfolder,
    tidy,
)
from adapterkit.contract import ATTRIBUTE, AdapterConfig
from adapterkit.errors import CheckpointError, StateError, UnsupportedError, warn
from adapterkit.formats import CONFIG_FILE
from adapterkit.integrations.models import adapters_in
from adapterkit.integrations.peft import as_peft

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


class AdapterTrainerMixin(_Base):
    """Before a trainer class: `class MyTrainer(AdapterTrainerMixin, Trainer)`; or before TRL's or your own.

    Attach the adapters to the model first. A plain `Trainer` trains and resumes adapters, too. With the mixin

    - a checkpoint holds the adapters that train, once and in PEFT's format, and what those files do not give back bit
      for bit (`adapter_state.safetensors`): PiSSA's factors, averages, the number of steps. What else trains in the
      base, and what batch norms count, is in `base_state.safetensors`. One adapter is in the folder itself, several
      are in subfolders;
    - `resume_from_checkpoint` and `load_best_model_at_end` restore all of that, whatever the model's class;
    - `ak.penalty(model)` is a part of the training loss, and `adapters.step()` follows each step of the optimizer;
    - a quantised base trains, if its quantisation lets gradients through;
    - the optimizer has a group of parameters for each adapter, with learning rates of their own.

    DeepSpeed writes its own checkpoint beside that. Under FSDP the engine writes the checkpoints, as without the mixin.

    Args:
        adapter_options: options of the optimizer for each adapter, `{"a": {"lr": 1e-3}, "b": {"lr": 1e-4}}`; see
            `Adapters.parameter_groups`. With these or a ratio all parameters of an adapter decay alike.
        lora_plus_ratio: how many times faster B learns than A (LoRA+, arXiv 2402.12354).
        peft_config: of TRL's trainers, which add the adapter `"default"` themselves; any config of adapterkit.

    Raises:
        ConfigError: the model has no adapters.
        CheckpointError: a checkpoint is of other adapters, or of other configs. Nothing has changed then.
        StateError: nothing requires a gradient when the training starts.
    """

    def __init__(
        self,
        *args: Any,
        adapter_options: Mapping[str, Mapping[str, Any]] | None = None,
        lora_plus_ratio: float | None = None,
        **kwargs: Any,
    ) -> None:
        self._adapter_options, self._lora_plus_ratio = adapter_options, lora_plus_ratio
        if isinstance(kwargs.get("peft_config"), AdapterConfig):  # TRL takes PEFT's own class alone
            kwargs["peft_config"] = as_peft(kwargs["peft_config"])
        with _passes_for_trainable(kwargs.get("model", args[0] if args else None)):
            super().__init__(*args, **kwargs)
        self.add_callback(_Step(self))

    @property
    def adapters(self) -> Adapters:
        """The adapters of the model."""
        model: Any = self.model
        return adapters_in(model)

    # The training

    def _move_model_to_device(self, model: Any, device: Any) -> None:
        if getattr(model, "hf_device_map", None) is None and any(p.is_meta for p in model.parameters()):
            raise StateError(
                "The model has weights that are offloaded or on the meta device, and Trainer moves it to one device. "
                "Load weights first, or offload it with accelerate.dispatch_model(model, device_map), which stays."
            )
        super()._move_model_to_device(model, device)

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """The loss, with the penalty in training."""
        found = super().compute_loss(model, inputs, *args, **kwargs)
        if not (torch.is_grad_enabled() and model.training):
            return found
        loss, *outputs = found if isinstance(found, tuple) else (found,)
        term = penalty(self.adapters.model).to(loss.device)
        if self._is_scaled(kwargs.get("num_items_in_batch")):
            term = term / self.current_gradient_accumulation_steps
        return (loss + term, *outputs) if outputs else loss + term

    def _is_scaled(self, num_items_in_batch: Any) -> bool:
        """Whether `training_step` leaves the loss as it is, because the sum over the accumulated batches is right."""
        scaled: bool | None = getattr(self, "loss_is_scaled_for_ga", None)
        if scaled is not None:
            return scaled
        by_model = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        return bool(by_model or self.compute_loss_func is not None)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The optimizer, with groups of parameters for each adapter if options of adapters were given."""
        trained: Any = self.model if model is None else model
        self._places(Path(str(self.args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-0")  # names that are no folder's
        if not any(p.requires_grad for p in trained.parameters()):
            merged = self.adapters.merged
            what = f"{merged[0]!r} is merged: call adapters.unmerge()" if merged else "call adapters.activate(name)"
            raise StateError(f"No parameter requires a gradient, so nothing would train. Before you train, {what}.")
        if self.optimizer is None and (self._adapter_options or self._lora_plus_ratio):
            given: Any = self.optimizer_cls_and_kwargs
            cls, options = given or self.get_optimizer_cls_and_kwargs(self.args)
            plain = {"lr": self.args.learning_rate, "weight_decay": self.args.weight_decay}
            by_adapter = dict.fromkeys(self.adapters.trainable, plain)
            by_adapter |= {name: {**plain, **own} for name, own in (self._adapter_options or {}).items()}
            groups = self.adapters.parameter_groups(by_adapter, lora_plus_ratio=self._lora_plus_ratio)
            known = {id(p) for group in groups for p in group["params"]}
            others = [p for p in trained.parameters() if p.requires_grad and id(p) not in known]
            groups += [{"params": others, **plain}] if others else []
            self.optimizer_cls_and_kwargs = cls, {**options, "params": groups}
        optimizer = super().create_optimizer(*(() if model is None else (model,)))
        if not (self.is_deepspeed_enabled or self.is_fsdp_enabled):  # whose groups are their own
            names = {id(p): name for name, p in trained.named_parameters()}
            for group in optimizer.param_groups:  # so a checkpoint tells the order of its averages
                group["param_names"] = [names.get(id(p), "") for p in group["params"]]
        return optimizer

    # Checkpoints

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """See `Trainer.save_model`. Under DeepSpeed every process takes part in writing the adapters."""
        if self.is_deepspeed_enabled and self._saves_adapters:
            self._write_adapters(Path(output_dir or str(self.args.output_dir)))
        super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        by_engine = self.is_fsdp_enabled or (state_dict is not None and not self.is_deepspeed_enabled)
        if by_engine or not self._saves_adapters:
            super()._save(output_dir, state_dict)
            return
        own = getattr(self._unwrapped, "save_pretrained", None)
        if own is None or isinstance(own, Saver):
            super()._save(output_dir, WrittenElsewhere())  # everything but the model
            if own is None:
                (folder / SAFE_WEIGHTS_NAME).unlink(missing_ok=True)  # that is an empty file now
            if not self.is_deepspeed_enabled:
                self._write_adapters(folder)
        else:  # the model writes the adapters in its own layout, as sentence-transformers does
            super()._save(output_dir, None)
            for name, place in self._places(folder).items() if self.args.should_save else ():
                save_state(self.adapters, name, place)
        if not self.is_deepspeed_enabled and self.args.should_save:
            self._write_beside(folder)

    def _write_beside(self, folder: Path) -> None:
        trained = save_base_state(self.adapters, self._unwrapped, folder)
        if trained:
            warn(
                f"Parameters train that belong to no adapter, such as {trained[0]!r} ({len(trained)} in all). They are "
                "in the checkpoints of the training and in no adapter's file: adapters.load does not restore them."
            )

    @property
    def _unwrapped(self) -> Any:
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    @property
    def _saves_adapters(self) -> bool:
        """Whether a checkpoint holds adapters alone: some train or act, and none is in the weights."""
        return bool(self.adapters.trainable or self.adapters.active) and not self.adapters.merged

    def _places(self, folder: Path) -> dict[str, Path]:
        """Where each adapter goes: in a checkpoint those that train, elsewhere all."""
        first = self.adapters.trainable or self.adapters.active
        names = first if folder.name.startswith(f"{PREFIX_CHECKPOINT_DIR}-") else self.adapters.names
        return {name: folder if (name,) == first else subfolder(folder, name) for name in names}

    def _write_adapters(self, folder: Path) -> None:
        places, own = self._places(folder), getattr(self._unwrapped, "save_pretrained", None)
        if isinstance(own, Saver):
            own.holds_base(folder, training=True)
        for name, place in places.items():
            save_training(self.adapters, name, place, writes=self.args.should_save)
        if self.args.should_save:
            tidy(folder, places.values())

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *args: Any, **kwargs: Any) -> None:
        folder = Path(resume_from_checkpoint)
        if load_states(self.adapters, folder, self._unwrapped):
            return
        alone = (folder / CONFIG_FILE).is_file() and not any(folder.glob("model*.safetensors"))
        if alone and isinstance(self._unwrapped, PreTrainedModel):
            raise CheckpointError(
                f"{folder} holds an adapter and no state of a training with adapterkit, as PEFT's checkpoints do. To "
                "resume that training give the trainer ak.as_peft(model), with the adapter under the name 'default'. "
                "To start a new one from it: adapters.load(folder, name, trainable=True)."
            )
        super()._load_from_checkpoint(resume_from_checkpoint, *args, **kwargs)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and self.is_deepspeed_enabled:  # which loads what the model's parameters are
            super()._load_optimizer_and_scheduler(checkpoint)
            load_states(self.adapters, Path(checkpoint))
            return
        before = self._parameter_names()
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
        except ValueError as error:
            why = str(error)
        else:
            why = "" if self._parameter_names() == before else "its parameters are in another order"
        if why:
            raise CheckpointError(
                f"The optimizer in {checkpoint} does not fit the optimizer here: {why}. Before you resume, give the "
                "trainer the same optimizer, adapter_options and lora_plus_ratio as then."
            )

    def _parameter_names(self) -> list[Any]:
        """The names that the groups of the optimizer have. `load_state_dict` brings those of the checkpoint."""
        return [group.get("param_names") for group in getattr(self.optimizer, "param_groups", ())]

    def _load_best_model(self) -> None:
        folder = Path(str(self.state.best_model_checkpoint))
        if not load_states(self.adapters, folder, self._unwrapped, resumes=False):
            super()._load_best_model()

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Upload adapters in subfolders too: `Trainer` copies those of the folder itself alone."""
        for config in Path(checkpoint_folder).glob(f"*/{CONFIG_FILE}"):
            shutil.copytree(config.parent, Path(str(self.args.output_dir)) / config.parent.name, dirs_exist_ok=True)
        super()._push_from_checkpoint(checkpoint_folder)


class _Step(TrainerCallback):
    """`Adapters.step` after each step of the optimizer."""

    def __init__(self, trainer: AdapterTrainerMixin) -> None:
        self._trainer = trainer

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        if not self._trainer.accelerator.optimizer_step_was_skipped:
            self._trainer.adapters.step()


@contextmanager
def _passes_for_trainable(model: Any) -> Iterator[None]:
    """Let a quantised model with adapters pass `validate_quantization_for_training`, which knows PEFT's alone."""
    quantised = isinstance(model, nn.Module) and ATTRIBUTE in model.__dict__ and getattr(model, "is_quantized", False)
    if not quantised:
        yield
        return
    quantizer: Any = model.hf_quantizer
    if not quantizer.is_trainable:
        raise UnsupportedError(
            f"No adapter can be trained on a model that is quantised with {quantizer.quantization_config.quant_method}:"
            " transformers says that no gradients pass through it."
        )
    model.is_quantized = False
    try:
        yield
    finally:
        model.is_quantized = True
