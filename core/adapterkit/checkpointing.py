"""Gradient checkpointing over a frozen base: torch's reentrant form needs an input that requires a gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class InputGradients:
    """A hook on the input embeddings that makes their output require a gradient when that is needed.

    It is needed in training, if a module of the model checkpoints in torch's reentrant form: that form
    gives no gradient at all to what is inside a segment none of whose inputs requires one. Whether it does is
    looked up in each forward, so checkpointing may be switched on before or after adding an adapter.
    """

    def __init__(self, model: nn.Module) -> None:
        self.modules = [m for m in model.modules() if hasattr(m, "gradient_checkpointing")]

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        """Torch calls this after each forward of the input embeddings."""
        if torch.is_grad_enabled() and module.training and any(map(_reentrant, self.modules)):
            for tensor in output if isinstance(output, tuple) else (output,):
                if isinstance(tensor, Tensor) and tensor.is_floating_point() and not tensor.requires_grad:
                    tensor.requires_grad_(True)

    @classmethod
    def install(cls, model: nn.Module) -> RemovableHandle | None:
        """Put the hook on the model's input embeddings; `None` if the model cannot checkpoint."""
        hook = cls(model)
        get = getattr(model, "get_input_embeddings", None)
        if not hook.modules or not callable(get):
            return None
        try:
            embeddings = get()
        except NotImplementedError:
            return None
        if not isinstance(embeddings, nn.Module):
            return None
        return embeddings.register_forward_hook(hook)


def _reentrant(module: nn.Module) -> bool:
    if not module.gradient_checkpointing:
        return False
    function = getattr(module, "_gradient_checkpointing_func", None)
    return bool(getattr(function, "keywords", {}).get("use_reentrant", True))
