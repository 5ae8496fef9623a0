"""`as_peft` views in the place of every `PeftModel` that PEFT's own tests make."""

from __future__ import annotations

from typing import Any

from peft import PeftConfig, PeftModel
from torch import nn

from adapterkit.integrations.peft_view import PeftView, _classes


def install() -> None:
    """Make `get_peft_model`, `PeftModel(...)`, its subclasses and their `from_pretrained` give views."""
    from_pretrained = PeftModel.from_pretrained.__func__

    def new(cls: type, *args: Any, **kwargs: Any) -> Any:
        config = kwargs.get("peft_config", args[1] if len(args) > 1 else None)
        if issubclass(cls, PeftView) or config is None or config.is_prompt_learning:
            return object.__new__(cls)
        view = object.__new__(_classes.get(config.task_type, PeftView))
        # Python calls `__init__` if this is an instance of `cls`.
        return view if isinstance(view, cls) else PeftView(*args, **kwargs)

    def load(cls: type[PeftModel], model: nn.Module, model_id: Any, *args: Any, **kwargs: Any) -> Any:
        config = kwargs.get("config") or PeftConfig.from_pretrained(model_id, **kwargs)
        if config.is_prompt_learning:
            return from_pretrained(cls, model, model_id, *args, **kwargs)
        return PeftView.from_pretrained(model, model_id, *args, **kwargs)

    PeftModel.__new__ = new
    PeftModel.from_pretrained = classmethod(load)
