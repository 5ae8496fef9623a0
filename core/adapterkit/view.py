"""One adapter of a model: what `adapters["mood"]` gives."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from adapterkit.contract import AdapterConfig, AdapterLayer
from adapterkit.errors import usage_of_methods
from adapterkit.results import AdapterStatus, Printed, listed

if TYPE_CHECKING:
    from adapterkit.adapters import Adapters


@usage_of_methods("adapters['mood']")
@dataclass(frozen=True)
class AdapterView(Printed):
    """One adapter of a model, as it is now. Each call is the call of `Adapters` with this name.

    Attributes:
        adapters: all adapters of the model.
        name: the adapter's name.
    """

    adapters: Adapters
    name: str

    @property
    def config(self) -> AdapterConfig:
        """Its config."""
        return self.adapters.config(self.name)

    @property
    def layers(self) -> Mapping[str, AdapterLayer]:
        """Its layers, by the paths of their targets."""
        return self.adapters.layers(self.name)

    @property
    def heads(self) -> Mapping[str, nn.Module]:
        """Its own copies of modules, by path."""
        return self.adapters.heads(self.name)

    @property
    def status(self) -> AdapterStatus:
        """Its row of `Adapters.status`."""
        self.adapters.config(self.name)  # which refuses the name of an adapter that is gone
        return next(row for row in self.adapters.status().rows if row.name == self.name)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Its parameters, for an optimizer."""
        return self.adapters.parameters(self.name)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Its parameters with their names."""
        return self.adapters.named_parameters(self.name)

    def save(self, folder: str | Path, **options: Any) -> Path:
        """Write it to a folder; see `Adapters.save`."""
        return self.adapters.save(self.name, folder, **options)

    def merge(self, **options: Any) -> None:
        """Merge it into the base; see `Adapters.merge`."""
        self.adapters.merge(self.name, **options)

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            known = not name.startswith("_") and callable(getattr(type(self.adapters), name, None))
            hint = f" Write adapters.{name}, with the name." if known else ""
            raise AttributeError(f"'AdapterView' object has no attribute {name!r}.{hint}")

    def __str__(self) -> str:
        row = self.status
        states = {"active": row.active, "trains": row.trainable, "merged": row.merged}
        answers = ", ".join(f"{state}: {'yes' if holds else 'no'}" for state, holds in states.items())
        return "\n".join([str(row), f"  {answers}", f"  {self.config}", *listed("note", row.notes)])
