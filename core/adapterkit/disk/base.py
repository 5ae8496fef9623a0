"""The base model as far as adapters' files need it: the kinds of its layers, and the values of its biases."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor, nn

from adapterkit.contract import AdapterConfig, default_registry
from adapterkit.disk.checkpoint import Checkpoint, has_weights
from adapterkit.disk.model import CONFIG, skeleton
from adapterkit.disk.names import match_names
from adapterkit.errors import CheckpointError
from adapterkit.kinds import LayerKind


class Base:
    """A base model.

    Attributes:
        model: its modules, on the meta device or not. It may be the model without its task's head, or with another.
    """

    def __init__(self, model: nn.Module, folder: Path | None = None) -> None:
        self.model = model
        self._folder = folder
        self._opened: tuple[Checkpoint, dict[str, str]] | None = None

    @classmethod
    def of(cls, given: str | Path | nn.Module | None) -> Base | None:
        """What `base=` means: a model, or a folder or hub id of one."""
        if given is None or isinstance(given, nn.Module):
            return None if given is None else cls(given)
        folder = Path(given).expanduser()
        return cls(skeleton(given), folder if folder.is_dir() else None)

    @classmethod
    def recorded(cls, config: AdapterConfig) -> Base | None:
        """The base that an adapter's config names, if it is a folder here."""
        place = config.base_model_name_or_path
        return cls.of(place) if place and (Path(place) / CONFIG).is_file() else None

    def kind(self, path: str) -> LayerKind:
        """What a layer is.

        Raises:
            CheckpointError: there is none of that path that can hold an adapter.
        """
        kinds = (default_registry.kind_of(module) for module in self._modules(path))
        found = next((kind for kind in kinds if kind is not None), None)
        if found is None:
            raise CheckpointError(
                f"The adapter changes {path!r}, and {type(self.model).__name__}, given as its base, has no such layer."
            )
        return found

    def has_bias(self, path: str) -> bool:
        """Whether a module has a bias of its own."""
        return any(module._parameters.get("bias") is not None for module in self._modules(path))

    def parameter(self, path: str, name: str) -> Tensor | None:
        """A parameter of a module, if its values are known: of a model in memory, or, mapped, in a folder's weights.

        Raises:
            CheckpointError: the folder's weights are damaged.
        """
        found = (module._parameters.get(name) for module in self._modules(path))
        own = next((parameter for parameter in found if parameter is not None), None)
        if own is not None and not own.is_meta:
            return own.detach()
        if self._opened is None and self._folder is not None and has_weights(self._folder):
            checkpoint = Checkpoint.open(self._folder)
            self._opened = checkpoint, dict(match_names(self.model, checkpoint.entries).in_file)
        if self._opened is None:
            return None
        checkpoint, names = self._opened
        key = next((names[f"{p}.{name}"] for p in self._paths(path) if f"{p}.{name}" in names), None)
        return None if key is None else checkpoint.tensor(key)

    def _paths(self, path: str) -> tuple[str, ...]:
        prefix = f"{getattr(self.model, 'base_model_prefix', '')}."
        return path, path.removeprefix(prefix), prefix + path

    def _modules(self, path: str) -> Iterator[nn.Module]:
        for candidate in self._paths(path):
            try:
                yield self.model.get_submodule(candidate)
            except AttributeError:
                continue
