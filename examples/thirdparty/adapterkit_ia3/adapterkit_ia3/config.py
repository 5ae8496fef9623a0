"""The config of (IA)3: PEFT's fields."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from adapterkit import AdapterConfig, ConfigError


@dataclass(frozen=True, kw_only=True)
class IA3Config(AdapterConfig):
    """Scaling of activations by learned vectors (Liu et al. 2022, arXiv 2205.05638).

    Args:
        feedforward_modules: targets whose *input* is scaled: a list of suffixes at a dot, each in
            `target_modules`, or a regular expression for the full path. All others' *output* is scaled.
        init_ia3_weights: `True`: vectors start at one. `False`: normal.
        fan_in_fan_out: of no effect: the layer kind knows its layout. Kept for files.

    The other fields are `AdapterConfig`'s.
    """

    method = "ia3"

    feedforward_modules: str | Sequence[str] | None = None
    init_ia3_weights: bool = True
    fan_in_fan_out: bool = False

    @property
    def starts_as_identity(self) -> bool:
        """See `AdapterConfig.starts_as_identity`."""
        return self.init_ia3_weights

    def check(self) -> None:
        """See `AdapterConfig.check`."""
        if isinstance(self.feedforward_modules, tuple) and isinstance(self.target_modules, tuple):
            others = set(self.feedforward_modules) - set(self.target_modules)
            if others:
                raise ConfigError(f"feedforward_modules {sorted(others)} must be in target_modules, too.")

    def scales_input(self, path: str) -> bool:
        """Whether the layer at `path` is a feed-forward layer."""
        wanted = self.feedforward_modules
        if wanted is None:
            return False
        if isinstance(wanted, str):
            return re.fullmatch(wanted, path) is not None
        return any(path == name or path.endswith(f".{name}") for name in wanted)
