"""Presence: whether the modules that an adapter is on are still the model's, as they were when it was put there."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from adapterkit.contract import unwrapped_key
from adapterkit.forward import calls_adapters
from adapterkit.model.adapter import Adapter
from adapterkit.model.modules import BaseModules

# What is said where such an adapter is written.
KEPT = "What is written there is what it was trained to until then."


class Presence:
    """What has become of one adapter's modules since it was put on them.

    Modules are replaced (`model.head = nn.Linear(...)`), deleted, given another class, or their weight another
    size (`resize_token_embeddings`). Wrapped and moved ones are still the model's, and the adapter acts there.
    """

    def __init__(self, adapter: Adapter, model: nn.Module) -> None:
        self.adapter, self.model = adapter, model
        # The way to each module, step by step: as long as it is the same, no walk over the model is needed.
        self._steps: dict[tuple[int, str], tuple[nn.Module, str, nn.Module | None]] = {}
        self._places = {path: (path, *adapter.aliases.get(path, ())) for path in adapter.hosts}
        for path in (place for places in self._places.values() for place in places):
            module: nn.Module | None = model
            for name in path.split("."):
                if module is None:
                    break
                child = module._modules.get(name)
                self._steps[id(module), name] = module, name, child
                module = child
        self._sizes = {path: _size(host) for path, host in adapter.hosts.items()}

    def changes(self) -> dict[str, str]:
        """What happened, to go on from `"'path' "`, for each module where the adapter does not act as it was added."""
        there = all(parent._modules.get(name) is child for parent, name, child in self._steps.values())
        known = None if there else BaseModules(self.model).paths_of
        found = {}
        for path, host in self.adapter.hosts.items():
            before, weight = self._sizes[path], host._parameters.get("weight")
            now = before if weight is None or weight.shape == before else _size(host)
            if known is not None and not _is_there(known.get(host, []), self._places[path]):
                found[path] = "was replaced"
            elif not calls_adapters(host):
                found[path] = f"was given another class ({type(host).__name__})"
            elif before and now and before != now:
                found[path] = f"has another weight, of shape {now} in place of {before}: it was replaced"
            elif path in self.adapter.layers and (what := self.adapter.layers[path].kind.changed(host)) is not None:
                found[path] = f"has {what}"
        for container, path, part in self.adapter.parts():
            slots = self.adapter.hosts[path]._modules.get(container)
            if path not in found and (slots is None or slots._modules.get(self.adapter.name) is not part):
                found[path] = "has another module in place of the adapter's own: it was replaced"
        return found


def _is_there(now: Sequence[str], before: Sequence[str]) -> bool:
    """Whether a module is at all of its places still, wrapped maybe; or at others alone, for it was moved."""
    kept = [any(unwrapped_key(p) == place or p.startswith(place + ".") for p in now) for place in before]
    return all(kept) or bool(now and not any(kept))


def _size(module: nn.Module) -> tuple[int, ...] | None:
    """The shape of the weight; `None` if it has none, or it is packed or in pieces, so that its shape says nothing."""
    weight = module._parameters.get("weight")
    if not isinstance(weight, Tensor) or nn.parameter.is_lazy(weight):
        return None
    return tuple(weight.shape) if weight.is_floating_point() and weight.dim() > 1 else None
