"""Layer numbers: which numbered layers of which stack `layers_to_transform` keeps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from adapterkit.config import AdapterConfig
from adapterkit.errors import ConfigError
from adapterkit.matching import Pattern


class LayerFilter:
    """Decides by layer number. A stack is the path before a number: `encoder.layer` in `encoder.layer.3.mlp`.

    Without `layers_pattern` the first number in a path counts, whatever the stack is called. With it,
    or with a mapping, only the named stacks count, and a layer outside all of them is left out. Negative
    numbers count from the end of their stack.

    Args:
        config: its `layers_to_transform` and `layers_pattern` are read.
        paths: every module path of the model: they say how long each stack is.
    """

    def __init__(self, config: AdapterConfig, paths: Iterable[str]) -> None:
        wanted = config.layers_to_transform
        self._active = wanted is not None
        if not self._active:
            self.rows: list[_Row] = []
            return
        self._sizes = _stack_sizes(paths)
        if isinstance(wanted, Mapping):
            if config.layers_pattern:
                raise ConfigError("layers_to_transform names its stacks itself here; leave layers_pattern out.")
            self.rows = [_Row(stack, numbers) for stack, numbers in wanted.items()]
        else:
            listed = config.layers_pattern
            patterns: Sequence[str | None] = [listed] if listed is None or isinstance(listed, str) else listed
            self.rows = [_Row(p, wanted) for p in patterns]

    def refuse(self, path: str) -> str | None:
        """Why the layer at `path` is left out, or `None` if it is kept."""
        if not self._active:
            return None
        for stack, number in _numbers(path):
            for row in self.rows:
                if row.names(stack):
                    if row.keeps(number, self._sizes[stack]):
                        return None
                    return f"layers_to_transform leaves out layer {number} of {stack!r}"
        return "layers_to_transform: it is in no stack that is counted"

    @property
    def unused(self) -> list[str]:
        """Stacks and numbers that have kept nothing so far."""
        return [message for row in self.rows for message in row.unused()]


class _Row:
    """One stack pattern (or every stack) and the numbers kept there."""

    def __init__(self, pattern: str | None, numbers: str | int | Sequence[int] | object) -> None:
        self.label = f"layers_to_transform {pattern!r}" if pattern else "layers_to_transform"
        self.pattern = Pattern(rf"(?:.*\.)?(?:{pattern})", "layers_pattern") if pattern else None
        self.everything = numbers == "all"
        if isinstance(numbers, str) and not self.everything:
            raise ConfigError(f"{self.label}: {numbers!r} is neither 'all' nor a list of layer numbers.")
        listed = [numbers] if isinstance(numbers, int) else numbers
        self.numbers: list[int] = [] if self.everything else list(listed)  # type: ignore[call-overload]
        self.used: set[int] = set()
        self.matched = False

    def names(self, stack: str) -> bool:
        return self.pattern is None or self.pattern.matches(stack)

    def keeps(self, number: int, size: int) -> bool:
        wanted = {number, number - size} & set(self.numbers)
        self.used |= wanted
        kept = self.everything or bool(wanted)
        self.matched |= kept
        return kept

    def unused(self) -> list[str]:
        if self.everything:
            return [] if self.matched else [self.label]
        return [f"{self.label} {n}" for n in self.numbers if n not in self.used]


def _numbers(path: str) -> list[tuple[str, int]]:
    """Every `(stack, number)` in a path: `a.0.b.1` has `("a", 0)` and `("a.0.b", 1)`."""
    parts = path.split(".")
    return [(".".join(parts[:i]), int(p)) for i, p in enumerate(parts) if p.isdecimal()]


def _stack_sizes(paths: Iterable[str]) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for path in paths:
        for stack, number in _numbers(path):
            sizes[stack] = max(sizes.get(stack, 0), number + 1)
    return sizes
