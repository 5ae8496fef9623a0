"""The head of a combination: the head of one adapter, their mean, one head over all labels, or none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from adapterkit.errors import ConfigError, unknown
from adapterkit.model import LabelSet

if TYPE_CHECKING:
    from adapterkit.combining.combine import Source

CHOICES = ("average", "concat", "drop")

# The tensors of each head by path and name in the head.
Heads = dict[str, dict[str, Tensor]]


def combine_heads(sources: Sequence[Source], choice: str | None) -> tuple[Heads, LabelSet | None]:
    """The heads of the result, in new memory, and its label set.

    Args:
        choice: the name of one of the adapters, `"average"`, `"concat"` or `"drop"`.

    Raises:
        ConfigError: there are heads and no choice, or heads that cannot be combined so.
        UnknownNameError: the choice is neither.
    """
    owners = [source for source in sources if source.heads]
    names = [source.name for source in sources]
    if choice is not None and choice not in CHOICES and choice not in names:
        raise unknown("choice of heads", choice, [*names, *CHOICES])
    if choice in names:  # before the other words: an adapter may be called "drop"
        own = sources[names.index(choice)]
        # Tied tensors stay one.
        copies = {id(t): t.detach().clone() for head in own.heads.values() for t in head.values()}
        return {path: {name: copies[id(t)] for name, t in head.items()} for path, head in own.heads.items()}, own.labels
    if not owners or choice == "drop":
        return {}, None
    if choice is None:
        listed = ", ".join(f"heads={name!r}" for name in [*(o.name for o in owners), *CHOICES])
        have = "has a head" if len(owners) == 1 else "have heads"
        raise ConfigError(
            f"{', '.join(repr(o.name) for o in owners)} {have}. Choose one of {listed} for the head of the result."
        )
    _check_same_tensors(owners, choice)
    return _average(owners) if choice == "average" else _concat(owners)


def outputs_of(head: Mapping[str, Tensor]) -> dict[str, int]:
    """The linear layers of a head by their path in it, with their number of rows; the last has a row for each class."""
    layers = {name.removesuffix("weight").removesuffix("."): t for name, t in head.items() if _is_weight(name, t)}
    return {path: tensor.shape[0] for path, tensor in layers.items()}


def _is_weight(name: str, tensor: Tensor) -> bool:
    named = name == "weight" or name.endswith(".weight")
    return named and tensor.dim() == 2 and tensor.is_floating_point() and tensor.numel() > 0


def _average(owners: Sequence[Source]) -> tuple[Heads, LabelSet | None]:
    """The mean of equal heads, tensor by tensor."""
    heads: Heads = {}
    for path, head in owners[0].heads.items():
        heads[path] = {}
        for name, tensor in head.items():
            found = [owner.heads[path][name].detach() for owner in owners]
            if len({t.shape for t in found}) > 1:
                shapes = ", ".join(f"{o.name!r} has {tuple(t.shape)}" for o, t in zip(owners, found, strict=True))
                raise ConfigError(
                    f"heads='average' needs equal shapes, but at {path}.{name} {shapes}. Use heads='concat'."
                )
            mean = torch.stack([t.double() for t in found]).mean(0) if tensor.is_floating_point() else found[0].clone()
            heads[path][name] = mean.to(tensor.dtype)
    return heads, owners[0].labels


def _concat(owners: Sequence[Source]) -> tuple[Heads, LabelSet | None]:
    """One head over all labels, with the rows of all output layers."""
    if any(owner.labels is None or len(owner.heads) != 1 for owner in owners):
        raise ConfigError("heads='concat' needs adapters with one head and a label set each.")
    ((path, first),) = owners[0].heads.items()
    counts = [len(owner.labels.id2label) for owner in owners if owner.labels is not None]
    places = []
    for owner, count in zip(owners, counts, strict=True):
        found = [place for place, rows in outputs_of(owner.heads[path]).items() if rows == count]
        if not found:
            raise ConfigError(f"heads='concat': no linear layer of the head {path!r} has one row for each label.")
        places.append(f"{found[-1]}." if found[-1] else "")
    _check_rest_equal(owners, path, places[0])
    head = {name: tensor.detach().clone() for name, tensor in first.items()}
    for name in ("weight", "bias"):
        if places[0] + name in head:
            pairs = zip(owners, places, strict=True)
            head[places[0] + name] = _joined([owner.heads[path][place + name] for owner, place in pairs])
    return {path: head}, _all_labels(owners)


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    """The rows of all tensors, in the widest dtype: torch cannot concatenate float8 with another dtype."""
    dtype = max((t.dtype for t in tensors), key=lambda dtype: dtype.itemsize)
    return torch.cat([t.detach().to(dtype) for t in tensors])


def _check_same_tensors(owners: Sequence[Source], choice: str) -> None:
    if len({tuple(owner.heads) for owner in owners}) > 1:
        listed = "; ".join(f"{owner.name!r}: {', '.join(owner.heads)}" for owner in owners)
        raise ConfigError(f"heads={choice!r} needs heads at the same modules, but they are at {listed}.")
    for path, head in owners[0].heads.items():
        other = next((owner for owner in owners if owner.heads[path].keys() != head.keys()), None)
        if other is not None:
            raise ConfigError(
                f"heads={choice!r} needs heads with the same tensors, but at {path!r} {owners[0].name!r} has "
                f"{', '.join(head)}, and {other.name!r} has {', '.join(other.heads[path])}."
            )
        for name, tensor in head.items():
            if len({owner.heads[path][name].is_floating_point() for owner in owners}) > 1:
                raise ConfigError(
                    f"heads={choice!r}: {path}.{name} is {tensor.dtype} in {owners[0].name!r}, but not all adapters "
                    "have floating numbers there. One of them is quantised or damaged."
                )


def _check_rest_equal(owners: Sequence[Source], path: str, place: str) -> None:
    """Check that all layers before the output layer are the same, because only then rows can be concatenated."""
    for name, tensor in owners[0].heads[path].items():
        is_output = name in (f"{place}weight", f"{place}bias")
        if not is_output and not all(_equal(tensor, owner.heads[path][name]) for owner in owners[1:]):
            raise ConfigError(
                f"heads='concat' stacks output layers, but {path}.{name}, which leads to them, differs between the "
                f"adapters. Choose one head: heads={owners[0].name!r}."
            )


def _equal(one: Tensor, other: Tensor) -> bool:
    wide = torch.float32 if one.is_floating_point() and one.dtype.itemsize == 1 else one.dtype
    return one.dtype == other.dtype and torch.equal(one.to(wide), other.to(wide))


def _all_labels(owners: Sequence[Source]) -> LabelSet:
    """Every label of every adapter; a label of two adapters gets the name of its adapter as a prefix."""
    named = [(o.name, label) for o in owners if o.labels is not None for label in _in_order(o.labels.id2label)]
    often = Counter(label for _, label in named)
    return LabelSet({i: label if often[label] == 1 else f"{own}/{label}" for i, (own, label) in enumerate(named)})


def _in_order(id2label: Mapping[int, str]) -> list[str]:
    return [id2label[i] for i in sorted(id2label)]
