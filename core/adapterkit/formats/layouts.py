"""What every layout of files has in common, and what is known of an adapter before its layout is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from adapterkit.kinds import LayerKind

CONFIG_FILE = "adapter_config.json"


@dataclass(frozen=True)
class AdapterFiles:
    """What an adapter folder holds; or a file of another program, which has no config.

    Attributes:
        config: the fields of `adapter_config.json`.
        metadata: the header of the safetensors file.
    """

    folder: Path
    config: dict[str, Any] | None
    tensors: dict[str, Tensor]
    metadata: dict[str, str]


class Layout(ABC):
    """How one program, or one way to write files, lays out an adapter."""

    program: str

    @abstractmethod
    def read(self, files: AdapterFiles, layers: Mapping[str, LayerKind] | None) -> AdapterFiles | None:
        """The same adapter one step nearer to PEFT's layout; `None`: the files are not of this one.

        Args:
            layers: those of the model; `None`: there is no model.
        """
