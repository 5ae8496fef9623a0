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
    named = next((source for source in sources if source.name == choice), None)
    if named is not None:  # before the other words: an adapter may be called "drop"
        # Tied tensors stay one.
        copies = {id(t): t.detach().clone() for head in named.heads.values() for t in head.values()}
        heads = {path: {name: copies[id(t)] for name, t in head.items()} for path, head in named.heads.items()}
        return heads, named.labels
    if choice is not None and choice not in CHOICES:
        raise unknown("choice of heads", choice, [*(source.name for source in sources), *CHOICES])
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
    return {
        name.removesuffix("weight").removesuffix("."): tensor.shape[0]
        for name, tensor in head.items()
        if f".{name}".endswith(".weight") and tensor.dim() == 2 and tensor.is_floating_point() and tensor.numel()
    }


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
    """One head over all labels, with the rows of all output layers. What leads to them must be equal.

    A label that two adapters have gets the name of its adapter as a prefix.
    """
    labels = [owner.labels.id2label for owner in owners if owner.labels is not None and len(owner.heads) == 1]
    if len(labels) < len(owners):
        raise ConfigError("heads='concat' needs adapters with one head and a label set each.")
    (path,) = owners[0].heads
    heads = [owner.heads[path] for owner in owners]
    places = []
    for head, own in zip(heads, labels, strict=True):
        found = [place for place, rows in outputs_of(head).items() if rows == len(own)]
        if not found:
            raise ConfigError(f"heads='concat': no linear layer of the head {path!r} has one row for each label.")
        places.append(f"{found[-1]}." if found[-1] else "")
    made = {name: tensor.detach().clone() for name, tensor in heads[0].items()}
    outputs = [places[0] + name for name in ("weight", "bias") if places[0] + name in made]
    for name, tensor in made.items():
        if name in outputs:
            continue
        # Torch compares no float8.
        wide = torch.float32 if tensor.is_floating_point() and tensor.dtype.itemsize == 1 else tensor.dtype
        others = [head[name] for head in heads[1:]]
        if not all(t.dtype == tensor.dtype and torch.equal(t.to(wide), tensor.to(wide)) for t in others):
            raise ConfigError(
                f"heads='concat' stacks output layers, but {path}.{name}, which leads to them, differs between the "
                f"adapters. Choose one head: heads={owners[0].name!r}."
            )
    for name in outputs:
        local = name.removeprefix(places[0])
        rows = [head[place + local].detach() for head, place in zip(heads, places, strict=True)]
        widest = max((t.dtype for t in rows), key=lambda dtype: dtype.itemsize)
        made[name] = torch.cat([t.to(widest) for t in rows])
    named = [(o.name, own[i]) for o, own in zip(owners, labels, strict=True) for i in sorted(own)]
    often = Counter(label for _, label in named)
    every = {i: label if often[label] == 1 else f"{own}/{label}" for i, (own, label) in enumerate(named)}
    return {path: made}, LabelSet(every)
