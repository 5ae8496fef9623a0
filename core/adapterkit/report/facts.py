"""Facts: what an adapter is, in rows of a name and a value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from adapterkit.report.findings import AdapterFinding
from adapterkit.report.sources import Source

_MOST_LABELS = 12


def facts(adapter: AdapterFinding) -> list[tuple[str, str]]:
    """Name and value of each fact that the adapter has."""
    source = adapter.source
    ranks = sorted({layer.rank for layer in adapter.layers.values()})
    found = [
        ("method", source.config.method),
        ("settings", ", ".join(f"{name} = {_short(value)}" for name, value in source.settings.items())),
        ("rank", _span(ranks)),
        ("targets", _targets(source)),
        ("target_modules", _short(source.config.target_modules)),
        ("parameters", f"{sum(t.numel() for t in source.parameters.values()):,}"),
        ("size", _bytes(sum(t.numel() * t.element_size() for t in source.parameters.values()))),
        ("dtype", ", ".join(sorted({str(t.dtype).removeprefix("torch.") for t in source.parameters.values()}))),
        ("base", source.config.base_model_name_or_path or "not said"),
        ("task", source.config.task_type or ""),
        ("heads", "; ".join(f"{h.path} {_shapes(h.shapes)}" for h in source.heads)),
        ("labels", _labels(source.labels)),
        ("biases", f"{len(source.biases)} trained" if source.biases else ""),
        ("size of dW", f"{adapter.norm:.4g} (Frobenius, all targets)" if adapter.layers else ""),
        ("read from", source.place or ""),
    ]
    return [(name, value) for name, value in found if value]


def target_table(adapters: Sequence[AdapterFinding]) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Columns and rows: what several adapters share."""
    rows = [
        ("targets", [str(len(a.source.kinds)) for a in adapters]),
        ("only its own", [_examples(_own(i, adapters)) for i in range(len(adapters))]),
        ("heads", ["; ".join(f"{h.path} {_shapes(h.shapes)}" for h in a.source.heads) or "none" for a in adapters]),
        ("labels", [_labels(a.source.labels) or "none" for a in adapters]),
        ("base", [a.source.config.base_model_name_or_path or "not said" for a in adapters]),
    ]
    return [a.name for a in adapters], rows


def head_note(adapters: Sequence[AdapterFinding]) -> str:
    """What the heads mean for one adapter out of several."""
    owners = [a for a in adapters if a.source.heads]
    if not owners:
        return "None has a head of its own."
    shapes = {tuple(h.shapes.items()) for a in owners for h in a.source.heads}
    paths = {h.path for a in owners for h in a.source.heads}
    if len(owners) == 1:
        return f"Only {owners[0].name} has a head; a result takes it with heads={owners[0].name!r}, or drops it."
    if len(shapes) > len(paths):
        return "Their heads have different sizes: put the labels side by side (heads='concat') or choose one's."
    return "Their heads have the same sizes: choose one's, average them, or put the labels side by side ('concat')."


def _own(i: int, adapters: Sequence[AdapterFinding]) -> list[str]:
    others = {path for j, other in enumerate(adapters) if j != i for path in other.source.kinds}
    return [path for path in adapters[i].source.kinds if path not in others]


def _examples(paths: Sequence[str]) -> str:
    if not paths:
        return "none"
    return f"{len(paths)}: {paths[0]}" + (", …" if len(paths) > 1 else "")


def _targets(source: Source) -> str:
    kinds = dict.fromkeys(source.kinds.values())
    return ", ".join(f"{sum(k == kind for k in source.kinds.values())} {kind}" for kind in kinds)


def _span(values: Sequence[int]) -> str:
    if not values:
        return ""
    return str(values[0]) if len(values) == 1 else f"{values[0]} to {values[-1]}"


def _short(value: object) -> str:
    if isinstance(value, Mapping):
        return f"{len(value)} patterns"
    if isinstance(value, tuple | list):
        return ", ".join(map(str, value[:8])) + (f" and {len(value) - 8} more" if len(value) > 8 else "")
    return "" if value is None else str(value)


def _labels(labels: Sequence[str]) -> str:
    more = f" and {len(labels) - _MOST_LABELS} more" if len(labels) > _MOST_LABELS else ""
    return f"{len(labels)}: {', '.join(labels[:_MOST_LABELS])}{more}" if labels else ""


def _shapes(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join("×".join(map(str, shape)) for shape in shapes.values() if len(shape) > 1) or "no matrix"


def _bytes(count: float) -> str:
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}" if unit != "bytes" else f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.3g} GB"
