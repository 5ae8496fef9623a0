"""PEFT's `add_weighted_adapter`, by `Adapters.combine`."""

from __future__ import annotations

from collections.abc import Sequence

from adapterkit.adapters import Adapters
from adapterkit.combining import Space
from adapterkit.contract import MajoritySign

# PEFT's types of combination: our method, the space it works in, and whether the result has a rank of its own.
_TYPES: dict[str, tuple[str, Space, bool]] = {
    "cat": ("linear", "delta", False),
    "svd": ("linear", "delta", True),
    **{name: (name, "factors", False) for name in ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")},
    **{f"{name}_svd": (name, "delta", True) for name in ("ties", "dare_linear", "dare_ties", "magnitude_prune")},
}


def combine(
    adapters: Adapters,
    names: Sequence[str],
    weights: Sequence[float],
    name: str,
    combination_type: str,
    *,
    svd_rank: int | None,
    density: float | None,
    majority_sign_method: MajoritySign,
) -> None:
    """Add an adapter that combines others, as PEFT's `add_weighted_adapter` does. One of this name stays as it is.

    Args:
        combination_type: `"cat"`: the exact sum; `"svd"` and `"..._svd"`: changes combined, and truncated to a rank;
            others: A and B combined separately.

    Raises:
        ValueError: an unknown adapter or type, one that is named twice or has no weight, ranks that differ where A and
            B are combined, or several heads for one module.
    """
    if name in adapters:
        return
    missing = [other for other in names if other not in adapters]
    if missing:
        raise ValueError(f"Adapter {missing[0]} does not exist")
    if len(weights) != len(names) or len({*names}) < len(names):
        raise ValueError(f"Give each adapter once and with one weight, not {[*names]} with {[*weights]}.")
    kind = "linear" if len(names) == 1 else combination_type
    if kind not in _TYPES:
        raise ValueError(f"Invalid combination_type: {combination_type}")
    method, space, truncates = _TYPES[kind]
    ranks = [_rank(adapters, other) for other in names]
    if space == "factors" and len(set(ranks)) > 1:
        raise ValueError(
            "All adapters must have the same r value when using combination_type linear, ties, dare_ties or "
            f"dare_linear. They have {ranks}."
        )
    heads = [other for other in names if adapters.heads(other)]
    paths = [path for other in heads for path in adapters.heads(other)]
    if len(set(paths)) < len(paths):
        raise ValueError(
            "Cannot add weighted adapters if they target the same module with modules_to_save, but found "
            f"{len(paths) - len(set(paths))} such instance(s)."
        )
    adapters.combine(
        name,
        dict(zip(names, map(float, weights), strict=True)),
        method=method,
        space=space,
        rank=(svd_rank or max(ranks)) if truncates else None,
        heads=heads[0] if heads else None,
        density=None if method == "linear" else density,
        majority_sign_method=majority_sign_method if "ties" in method else "total",
    )


def _rank(adapters: Adapters, name: str) -> int:
    """The largest rank of an adapter's layers."""
    return max(int(adapters.config(name).at(path).r) for path in adapters.layers(name))  # type: ignore[attr-defined]
