"""Sources on a model: its adapters as they are now."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from adapterkit.kinds import dense
from adapterkit.merging import Merged
from adapterkit.model import Adapter
from adapterkit.report.sources import Source, of_adapter
from adapterkit.tensors import as_wholes


def live_sources(adapters: Iterable[Adapter], merged: Merged) -> list[Source]:
    """A source for each of these adapters of one model.

    Args:
        merged: what is merged now: the sizes of the base's weights are those before it.
    """
    return [of_adapter(adapter, _base_norm(adapter, merged)) for adapter in adapters]


def _base_norm(adapter: Adapter, merged: Merged) -> Callable[[str], float | None]:
    def found(path: str) -> float | None:
        module = adapter.heads.get(path, adapter.hosts[path])
        kept = merged.kept.get(module)
        with as_wholes(module, module.modules()):
            weight = adapter.layers[path].kind.read(module) if kept is None else kept.values.get("weight")
            weight = None if weight is None else dense(weight)
            return None if weight is None or weight.is_meta else norm_of(weight)

    return found


def norm_of(weight: Tensor) -> float:
    """The Frobenius norm, summed in float32 (float64 for float64)."""
    return float(torch.linalg.vector_norm(weight.detach(), dtype=torch.promote_types(weight.dtype, torch.float32)))
