"""What becomes of the heads when adapters are combined: one's, their mean, all labels side by side, or none."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from adapterkit.errors import ConfigError, unknown
from adapterkit.model import Adapter, LabelSet, set_rows

CHOICES = ("average", "concat", "drop")

Heads = tuple[dict[str, nn.Module], LabelSet | None]


def combine_heads(adapters: Sequence[Adapter], choice: str | None) -> Heads:
    """The result's heads by path, and its label set.

    Args:
        choice: the name of one of the adapters, `"average"`, `"concat"` or `"drop"`.

    Raises:
        ConfigError: there are heads and no choice, or heads that cannot be combined so.
        UnknownNameError: the choice is neither.
    """
    owners = [adapter for adapter in adapters if adapter.heads]
    names = [adapter.name for adapter in adapters]
    if choice is not None and choice not in CHOICES and choice not in names:
        raise unknown("choice of heads", choice, [*names, *CHOICES])
    if choice in names:  # before the other words: an adapter may be called "drop"
        own = adapters[names.index(choice)]
        return copy.deepcopy(own.heads), own.labels
    if not owners or choice == "drop":
        return {}, None
    if choice is None:
        listed = ", ".join(f"heads={name!r}" for name in [*(o.name for o in owners), *CHOICES])
        raise ConfigError(
            f"There are heads ({', '.join(repr(o.name) for o in owners)}), and which the result is to have is not "
            f"said. Choose one of {listed}."
        )
    return _average(owners) if choice == "average" else _concat(owners)


def _average(owners: Sequence[Adapter]) -> Heads:
    """The mean of equal heads, tensor by tensor."""
    _check_same_modules(owners, "average")
    heads = {path: copy.deepcopy(head) for path, head in owners[0].heads.items()}
    for path, head in heads.items():
        for name, tensor in head.state_dict(keep_vars=True).items():
            found = [owner.heads[path].state_dict()[name] for owner in owners]
            if len({t.shape for t in found}) > 1:
                shapes = ", ".join(f"{o.name!r} has {tuple(t.shape)}" for o, t in zip(owners, found, strict=True))
                raise ConfigError(f"heads='average' needs equal shapes; at {path}.{name} {shapes}. Use heads='concat'.")
            if tensor.is_floating_point():
                tensor.data.copy_(torch.stack([t.double() for t in found]).mean(0))
    return heads, owners[0].labels


def _concat(owners: Sequence[Adapter]) -> Heads:
    """One head over all labels: the rows of the output layers one under another."""
    _check_same_modules(owners, "concat")
    if any(owner.labels is None or len(owner.heads) != 1 for owner in owners):
        raise ConfigError("heads='concat' needs adapters with one head and a label set each.")
    ((path, first),) = owners[0].heads.items()
    counts = [len(owner.labels.id2label) for owner in owners if owner.labels is not None]
    outputs = [_output(owner.heads[path], count) for owner, count in zip(owners, counts, strict=True)]
    if any(found is None for found in outputs):
        raise ConfigError(f"heads='concat': no linear layer of the head {path!r} has one row for each label.")
    place, _ = outputs[0] or ("", None)
    layers = [found[1] for found in outputs if found is not None]
    _check_rest_equal(owners, path, place)
    head = copy.deepcopy(first)
    output = head.get_submodule(place)
    assert isinstance(output, nn.Linear)
    biases = [layer.bias for layer in layers if layer.bias is not None]
    set_rows(output, _rows([layer.weight for layer in layers]), _rows(biases) if biases else None)
    return {path: head}, _all_labels(owners)


def _rows(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.detach() for t in tensors])


def _output(head: nn.Module, count: int) -> tuple[str, nn.Linear] | None:
    found = [(n, m) for n, m in head.named_modules() if isinstance(m, nn.Linear) and m.out_features == count]
    return found[-1] if found else None


def _check_same_modules(owners: Sequence[Adapter], choice: str) -> None:
    if len({tuple(owner.heads) for owner in owners}) > 1:
        listed = "; ".join(f"{owner.name!r}: {', '.join(owner.heads)}" for owner in owners)
        raise ConfigError(f"heads={choice!r} needs heads at the same modules; there are {listed}.")


def _check_rest_equal(owners: Sequence[Adapter], path: str, place: str) -> None:
    """Rows can be put together only if what leads to the output layer is the same for all."""
    inside = f"{place}." if place else ""
    for name, tensor in owners[0].heads[path].state_dict().items():
        is_output = name.removeprefix(inside) in ("weight", "bias") and name.startswith(inside)
        others = [owner.heads[path].state_dict()[name] for owner in owners[1:]]
        if not is_output and not all(torch.equal(tensor, other) for other in others):
            raise ConfigError(
                f"heads='concat' stacks output layers, but {path}.{name}, which leads to them, differs between the "
                f"adapters. Take one head: heads={owners[0].name!r}."
            )


def _all_labels(owners: Sequence[Adapter]) -> LabelSet:
    """Every label of every adapter; one that two have is told apart by the adapter's name."""
    named = [(o.name, label) for o in owners if o.labels is not None for label in _in_order(o.labels.id2label)]
    often = Counter(label for _, label in named)
    return LabelSet({i: label if often[label] == 1 else f"{own}/{label}" for i, (own, label) in enumerate(named)})


def _in_order(id2label: Mapping[int, str]) -> list[str]:
    return [id2label[i] for i in sorted(id2label)]
