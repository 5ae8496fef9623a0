"""Besides: what `save_pretrained` finds beside what it writes, or writes beside the adapters, and can only tell."""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from torch import nn

from adapterkit.contract import ATTRIBUTE
from adapterkit.errors import AdapterWarning
from adapterkit.files import CONFIG_FILE
from adapterkit.model import named_modules

SAVE = "save_pretrained"
# What `Trainer` calls its checkpoints, which lie beside what it saves at the end.
_CHECKPOINT = "checkpoint-"
# Marks a class's `save_pretrained` that was wrapped already.
_TELLS = "_tells_of_adapters"


def warn_of_others(folder: Path, written: Collection[Path]) -> None:
    """Adapters in subfolders are of an earlier save, or somebody's own: they stay, and it is said."""
    found = {path.parent for path in folder.glob(f"*/{CONFIG_FILE}")} - {*written}
    others = sorted(place.name for place in found if not place.name.startswith(_CHECKPOINT))
    if others:
        warnings.warn(
            f"{folder} holds adapters that were not written now, in the subfolders "
            f"{', '.join(map(repr, others))}. Delete them if they are of an earlier save.",
            AdapterWarning,
            stacklevel=4,
        )


def let_outer_models_tell() -> None:
    """Have transformers' models say when they are saved and only a part of them has adapters. Done once."""
    transformers: Any = sys.modules.get("transformers.modeling_utils")
    if transformers is not None and not hasattr(transformers.PreTrainedModel.save_pretrained, _TELLS):
        transformers.PreTrainedModel.save_pretrained = _telling(transformers.PreTrainedModel.save_pretrained)


def _telling(own: Callable[..., Any]) -> Callable[..., Any]:
    """A class's `save_pretrained`, which says if a part of the model has adapters that the model does not know."""

    @functools.wraps(own)
    def save_pretrained(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        inside = () if SAVE in self.__dict__ else named_modules(self)
        for path, module in inside:
            if path and module.__dict__.get(ATTRIBUTE):
                warnings.warn(
                    f"The adapters are attached to {path!r} inside this model, which does not know them: their tensors "
                    "go into its file under names that from_pretrained leaves out, so that it gives the bare base. "
                    f"Save them too: ak.attach(model.{path}).save(name, folder); or attach them to the whole model.",
                    AdapterWarning,
                    stacklevel=2,
                )
                break
        return own(self, *args, **kwargs)

    save_pretrained.__dict__[_TELLS] = True
    return save_pretrained
