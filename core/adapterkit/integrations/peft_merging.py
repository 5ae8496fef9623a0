"""PEFT's calls that merge and combine adapters, by those of `Adapters`."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from torch import nn

from adapterkit.adapters import Adapters
from adapterkit.combining import Space
from adapterkit.contract import MajoritySign
from adapterkit.integrations.peft_names import pefts_errors

# PEFT's types of combination: our method, the space it works in, and whether the result has a rank of its own.
_TYPES: dict[str, tuple[str, Space, bool]] = {
    "cat": ("linear", "delta", False),
    "svd": ("linear", "delta", True),
    **{name: (name, "factors", False) for name in ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")},
    **{f"{name}_svd": (name, "delta", True) for name in ("ties", "dare_linear", "dare_ties", "magnitude_prune")},
}


def merge(adapters: Adapters, names: Sequence[str], safe: bool) -> None:
    """Merge those of these adapters that are not merged yet. A weight that is tied gets one of its own.

    Raises:
        ValueError: with `safe`, values that are not finite.
    """
    wanted = _unmerged(adapters, names)
    if wanted:
        with pefts_errors():
            adapters.merge(*wanted, safe=safe, untie=True)


def merge_for_good(adapters: Adapters, names: Sequence[str], safe: bool) -> nn.Module:
    """Merge those of these adapters that are not merged yet, and return the plain model. See `merge`."""
    wanted = _unmerged(adapters, names)
    if not wanted:
        adapters.activate()  # else the active ones, which nobody named, would be merged
    with pefts_errors():
        return adapters.merge_and_detach(*wanted, safe=safe, untie=True)


def _unmerged(adapters: Adapters, names: Sequence[str]) -> list[str]:
    if isinstance(names, str):
        raise TypeError(f"adapter_names should be a list of strings, got {names!r}.")
    merged = adapters.merged
    wanted = [name for name in names if name not in merged]
    if merged and wanted:
        warnings.warn(
            f"Already following adapters were merged {','.join(merged)}. "
            f"You are now additionally merging {','.join(wanted)}.",
            stacklevel=4,
        )
    elif not wanted:
        warnings.warn("All adapters are already merged, nothing to do.", stacklevel=4)
    return wanted


def unmerge(adapters: Adapters) -> None:
    """Unmerge what is merged."""
    if adapters.merged:
        adapters.unmerge()
    else:
        warnings.warn("Already unmerged. Nothing to do.", stacklevel=4)


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
