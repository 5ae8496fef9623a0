"""Tools that look for a model where a checkpoint holds adapters alone say what to do."""

from __future__ import annotations

import functools
import os
import sys
from pathlib import Path
from typing import Any

from adapterkit.checkpoints.training_files import STATE_FILE
from adapterkit.errors import CheckpointError

# The module and the name of a function that reads a checkpoint, and what reads one of adapters alone.
_READERS = (
    (
        "transformers.trainer",
        "load_sharded_checkpoint",
        "Put adapterkit.integrations.transformers.AdapterTrainerMixin before the trainer class, as then.",
    ),
    (
        "accelerate.accelerator",
        "load_accelerator_state",
        "Call adapterkit.integrations.accelerate.save_adapters_alone(accelerator) before load_state.",
    ),
)


def explain_unread_adapters() -> None:
    """Replace the errors of transformers and accelerate that a checkpoint has no model. Wraps each function once."""
    for module, name, cure in _READERS:
        original: Any = getattr(sys.modules.get(module), name, None)
        if original is not None and not hasattr(original, "_explains"):
            setattr(sys.modules[module], name, _explaining(original, cure))


def _explaining(original: Any, cure: str) -> Any:
    @functools.wraps(original)
    def read(*args: Any, **kwargs: Any) -> Any:
        try:
            return original(*args, **kwargs)
        except (OSError, ValueError) as error:
            for folder in (Path(each) for each in (*args, *kwargs.values()) if isinstance(each, str | os.PathLike)):
                if next(folder.rglob(STATE_FILE), None) is not None:
                    raise CheckpointError(f"{folder} holds adapters and no model. {cure}") from error
            raise

    read.__dict__["_explains"] = True
    return read
