"""PEFT: an adapted model as a `peft.PeftModel`, and the adapters of a live `PeftModel` taken over.

Who asks a `PeftModel` for what, and where the answer is:

    TRL, Trainer, accelerate  calls: add, disable, generate, save, load        `PeftView` in `peft_view`
    users, PEFT's functions   `base_model`: what acts, configs, merging        `Tuner` in `peft_tuner`
    loops over modules        `isinstance(m, LoraLayer)`, `m.scaling[name]`    `LayerView`, `HeadView` in `peft_layers`
                              `m.lora_A[name].weight`, `m.lora_dropout`        `peft_containers`
    loops over parameters     names: `...q_proj.lora_A.default.weight`         `peft_key` in `peft_names`
    PEFT's functions          its own layers in a model                        `answer` in `peft_functions`
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, overload

from torch import nn

from adapterkit.adapters import Adapters, attach
from adapterkit.contract import AdapterConfig
from adapterkit.errors import StateError, UnsupportedError, usage

if TYPE_CHECKING:
    from peft import PeftModel

    from adapterkit.integrations.peft_view import PeftView


@overload
def as_peft(what: nn.Module) -> PeftView: ...
@overload
def as_peft(what: AdapterConfig) -> Any: ...
@usage()
def as_peft(what: nn.Module | AdapterConfig) -> Any:
    """A view of an adapted model that is a `peft.PeftModel`, for TRL and other tools that are written for PEFT.

    The view holds no state of its own: it shows the adapters that `ak.attach(model)` has, in PEFT's words, and what is
    done to one is done to the other. It works with every method, also with those that PEFT lacks. TRL looks for the
    adapter `"default"`.

        ak.attach(model).add("default", ak.config("lora", r=8))
        trainer = DPOTrainer(ak.as_peft(model), args=..., train_dataset=...)

    Args:
        what: a model with adapters. Or a config, for a tool that makes the adapter itself: the result is a
            `peft.PeftConfig` with which `peft.get_peft_model` returns such a view
            (`SFTTrainer(model, peft_config=ak.as_peft(config))`).

    Raises:
        UnsupportedError: PEFT is not installed.
        StateError: the model has no adapters.
    """
    try:
        from adapterkit.integrations.peft_names import VIEW, MethodConfig, check_name
        from adapterkit.integrations.peft_view import PeftView
    except ImportError as error:
        raise UnsupportedError("as_peft needs PEFT: pip install 'adapterkit[peft]'") from error

    if isinstance(what, AdapterConfig):
        return MethodConfig(what, task_type=VIEW)
    if isinstance(what, PeftView):
        return what
    adapters = attach(what)
    if not adapters.names:
        raise StateError(
            "The model has no adapters. Add one first: ak.attach(model).add('default', config). Tools that are "
            "written for PEFT look for an adapter of that name."
        )
    for name in adapters.names:
        check_name(name)
    return PeftView.of(adapters)


@usage()
def from_peft(model: PeftModel) -> Adapters:
    """Take over the adapters of a live `PeftModel`. Its base model is plain again and has them instead.

    The base model stays the same object, and so do the parameters: an optimizer that holds them goes on. Outputs, the
    active adapters, `requires_grad`, heads (`modules_to_save`) and trained biases are as before. PEFT trains biases of
    the base itself; these values are the adapter's now, and the base keeps a copy. The `PeftModel` is of no use
    afterwards.

    Args:
        model: a `PeftModel`, also one that `torch.compile` or `DistributedDataParallel` wraps.

    Returns:
        The adapters of the base model: `ak.attach(model.get_base_model())`. Those of a view (`as_peft`) are there
        already.

    Raises:
        ConfigError: not a `PeftModel`.
        UnknownNameError: no installed method makes an adapter of this type.
        UnsupportedError: an option that its method does not have, prompt learning, several types in one model
            (`PeftMixedModel`), or scalings of an adapter that does not act that were changed.
        StateError: an adapter is merged, or the layers do not agree about which adapters act.
        CheckpointError, SelectionError: the adapters would not be at the same layers.

        After an error the `PeftModel` is as it was.
    """
    try:
        from adapterkit.integrations.peft_takeover import take_over
    except ImportError as error:
        raise UnsupportedError("from_peft needs PEFT: pip install 'adapterkit[peft]'") from error
    return take_over(model)
