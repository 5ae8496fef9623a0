"""Which part of an adapter each tensor of a file belongs to, and which tensors fit there.

An adapter that is built from a file, one that is on a model already, and one that is looked at without a model all ask
here. Keys are those of a file without PEFT's prefix; `adapterkit.contract.keys` has a table of them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from adapterkit.contract import BIASES, HEADS, LAYERS, AdapterConfig, KeyRule, Names, Shared, beside
from adapterkit.errors import CheckpointError
from adapterkit.model.adapter import Adapter
from adapterkit.model.heads import TASK_HEADS
from adapterkit.model.modules import inside
from adapterkit.results import LoadReport, Mismatch
from adapterkit.tensors import Slot, apart, module_slots

Tensors = Mapping[str, Tensor]
Paths = Mapping[str, str]

_TASKS_WITH_HEADS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")

# With bias="all" PEFT writes the biases of heads twice more: the same value, and one that does not act.
_REPEATED = ("modules_to_save", "original_module")


@dataclass(frozen=True)
class SortedTensors:
    """The tensors of a file by the part of an adapter that they belong to.

    Attributes:
        layers, heads, biases: by the path of their module, and by name in the part.
        shared: by name.
        repeated: keys of tensors that PEFT writes again, and that are not needed.
        rest: all others, by key.
    """

    layers: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    heads: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    biases: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    shared: dict[str, Tensor] = field(default_factory=dict)
    repeated: list[str] = field(default_factory=list)
    rest: dict[str, Tensor] = field(default_factory=dict)

    def of(self, container: str, path: str) -> dict[str, Tensor]:
        """Those of one of `Adapter.parts`."""
        groups = {LAYERS: self.layers, HEADS: self.heads, BIASES: self.biases}
        return groups[container].get(path, {})


def sort_tensors(
    tensors: Tensors, rule: KeyRule, layers: Paths, heads: Paths, biases: Paths, *, shared: bool
) -> SortedTensors:
    """Sort the tensors of a file by the parts that an adapter has.

    Args:
        layers, heads, biases: the modules that have such a part. Each of a module's paths is a key; the value is the
            path by which the adapter knows it.
        shared: whether its layers share tensors.
    """
    # Before PEFT 0.7 there was no `base_layer`.
    places = {place: known for path, known in biases.items() for place in (path, beside(path, layers))}
    found, bias_keys = SortedTensors(), {f"{place}.bias": known for place, known in places.items()}
    for key, tensor in tensors.items():
        split = rule.split(key, layers)
        if split is not None and split[0] in layers:
            found.layers.setdefault(layers[split[0]], {})[split[1]] = tensor
        elif (head := inside(key, heads)) is not None:
            place = f"{beside(head, layers)}."
            if key.startswith(tuple(f"{head}.{name}." for name in _REPEATED)):
                found.repeated.append(key)
            elif key.startswith(place):
                found.heads.setdefault(heads[head], {})[key.removeprefix(place)] = tensor
            else:
                found.rest[key] = tensor
        elif key in bias_keys and bias_keys[key] not in found.biases:
            found.biases.setdefault(bias_keys[key], {})["bias"] = tensor
        elif shared and rule.owns(key):
            found.shared[key] = tensor
        else:
            found.rest[key] = tensor
    return found


def sort_for(
    adapter: Adapter, layers: Iterable[str], tensors: Tensors, rule: KeyRule, *, shared: bool
) -> SortedTensors:
    """Sort the tensors of a file by the parts of an adapter on a model, with layers at these paths."""

    def known(paths: Iterable[str]) -> Paths:
        return {place: path for path in paths for place in adapter.places(path)}

    return sort_tensors(tensors, rule, known(layers), known(adapter.heads), known(adapter.biases), shared=shared)


def layer_tensors(tensors: Tensors, rule: KeyRule, layers: Iterable[str]) -> dict[str, dict[str, Tensor]]:
    """The tensors of these layers, by path and name in the layer."""
    return sort_tensors(tensors, rule, {path: path for path in layers}, {}, {}, shared=False).layers


def heads_in_file(keys: Iterable[str], wanted: str | Sequence[str] | None) -> list[str]:
    """The modules of a file that `modules_to_save` names, without those inside another one.

    PEFT takes a module whose path is an entry, or merely ends like one (`"head"`: `overhead`).
    """
    names = Names(filter(None, [wanted] if isinstance(wanted, str) else wanted or ()))
    found: dict[str, None] = {}
    for key in keys:
        if not any(name in key for name in names.names):  # most keys, in one look
            continue
        parts = key.split(".")
        paths = (".".join(parts[:i]) for i in range(1, len(parts)))
        head = next((path for path in paths if names.match(path) or path.endswith(names.names)), None)
        if head is not None:
            found[head] = None
    return list(found)


def with_heads(config: AdapterConfig, rule: KeyRule, keys: Iterable[str]) -> AdapterConfig:
    """The config of a file with the heads that the file holds in full, and that `modules_to_save` does not name.

    For a task of classification or of answers to questions, PEFT trains the head without being told, and until 0.8 it
    did not write that down.
    """
    wanted = config.modules_to_save
    if isinstance(wanted, str):
        return config
    full = [k for k in keys if rule.split(k) is None and not k.endswith("bias") and ".base_layer." not in k]
    named, anywhere = heads_in_file(full, wanted), config.task_type in _TASKS_WITH_HEADS
    found = heads_in_file((key for key in full if inside(key, named) is None), TASK_HEADS)
    heads = [path for path in found if anywhere or "." not in path]
    return config.replace(modules_to_save=(*(wanted or ()), *heads)) if heads else config


@dataclass
class Fit:
    """How given tensors fit an adapter, by their keys in a file.

    Attributes:
        optional: keys that are not missed.
        missing, unexpected, mismatched, exempt, ignored: see `LoadReport`.
        taken: memory that the adapter's tensors have already.
    """

    rule: KeyRule
    optional: Collection[str] = ()
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[Mismatch] = field(default_factory=list)
    exempt: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    taken: set[int] = field(default_factory=set)

    def match(self, module: nn.Module, given: Tensors, place: str) -> list[tuple[Slot, Tensor]]:
        """The slots of a module with the tensors that fit there; nothing is written. What does not fit is noted.

        Args:
            given: tensors by their names in the module.
            place: what the module's keys begin with: its path and a dot.

        Raises:
            CheckpointError: a tensor of whole numbers where floating ones are needed.
        """
        slots, values = dict(module_slots(module)), []
        # `setup` makes these buffers, so a file need not have them.
        non_persistent = [local for local, _ in module.named_buffers() if local not in slots]
        for local in given:
            if local not in slots:
                (self.ignored if local in non_persistent else self.unexpected).append(place + local)
        if isinstance(module, Shared):
            self.exempt += [place + local for local in non_persistent if local not in given]
        for local, slot in slots.items():
            slot.key = key = place + local
            own, tensor = slot.tensor, given.get(local)
            if tensor is None:
                if key not in self.optional:
                    (self.exempt if self.rule.may_lack(key) else self.missing).append(key)
            elif own.is_floating_point() and not tensor.is_floating_point():
                raise CheckpointError(
                    f"{key!r} holds {tensor.dtype}, and floating numbers are needed: it is quantised, or damaged."
                )
            elif own.shape != tensor.shape:
                self.mismatched.append(Mismatch(key, tuple(tensor.shape), tuple(own.shape)))
            else:
                values.append((slot, tensor))
        return values

    def assign(self, module: nn.Module, given: Tensors, place: str, device: torch.device | None, *, cast: bool) -> None:
        """Give a new module the tensors that fit, in memory of their own.

        Args:
            device: `None`, or the meta device: each tensor stays where the module's is, or where it is itself.
            cast: to the module's dtypes.
        """
        for slot, tensor in self.match(module, given, place):
            own = slot.tensor
            at = tensor.device if own.is_meta else own.device
            narrow = own.is_floating_point() and tensor.dtype.itemsize == 1  # float8, which nothing computes with
            dtype = own.dtype if cast or narrow else tensor.dtype
            to = at if device is None or device.type == "meta" else device
            slot.assign(apart(tensor.detach().to(to, dtype).contiguous(), self.taken))

    def add_rest(self, found: SortedTensors) -> None:
        """Note the tensors that belong to no part."""
        self.unexpected += found.rest
        self.ignored += found.repeated

    def report(self) -> LoadReport:
        """What users get."""
        keys = (tuple(self.missing), tuple(self.unexpected))
        return LoadReport(*keys, tuple(self.mismatched), tuple(self.exempt), tuple(self.ignored))
