"""Heads: copies of modules, trained in full and kept with the adapter (PEFT's `modules_to_save`), and their labels."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Self

import torch
from torch import Tensor, nn

from adapterkit.contract import CONTAINERS, Names
from adapterkit.errors import CheckpointError, ConfigError, SelectionError, StateError, UnsupportedError, nearest
from adapterkit.forward import ACTIVE, strip
from adapterkit.kinds import is_special
from adapterkit.model.modules import BaseModules, inside
from adapterkit.tensors import gathered, hook_objects, is_fsdp, module_slots, real_value, remove_hooks, seeded, shape_of

AUTO = "auto"
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

# How the classes of models with a task head end, and the `task_type` that PEFT's files have for them.
_TASKS = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForImageClassification": None,
    "ForMultipleChoice": None,
}
# Names of heads: of models that do not say which child is their body, and in files that do not say what they hold.
TASK_HEADS = ("classifier", "score", "qa_outputs", "classification_head")


def head_paths(modules: BaseModules, modules_to_save: str | Sequence[str] | None) -> tuple[str, ...]:
    """Paths of the modules that `modules_to_save` names, without those inside another one of them.

    Raises:
        SelectionError: an entry matches nothing, or matches a module that is never called.
    """
    if modules_to_save is None:
        return ()
    if modules_to_save == AUTO:
        return task_heads(modules.model)
    names = Names([modules_to_save] if isinstance(modules_to_save, str) else modules_to_save)
    found: list[str] = []
    for module, paths in modules.paths_of.items():
        matched = list(filter(None, map(names.match, paths)))  # all of them: each may use another entry
        reason = modules.why_ignored(module) if matched else None
        if reason is not None:
            raise SelectionError(f"modules_to_save {matched[0]!r} cannot be trained as a copy: {reason}.")
        found += paths[:1] if matched and inside(paths[0], found) is None else []
    unused = [n for n in names.names if n not in names.used]
    if unused:
        close = [c for n in unused for c in nearest(n, modules.all_paths)]
        hint = f" Nearest: {', '.join(map(repr, close))}." if close else ""
        raise SelectionError(
            f"modules_to_save {', '.join(map(repr, unused))} matched no module; an entry is an exact path or a "
            f"suffix at a dot.{hint}"
        )
    return tuple(found)


def task_heads(model: nn.Module) -> tuple[str, ...]:
    """The task head of a transformers model: every child with parameters except the body.

    That is everything new after `from_pretrained`: `classifier`, `score`, but also DistilBERT's `pre_classifier`.
    """
    if not any(c.__name__.endswith((*_TASKS,)) for c in type(model).__mro__):
        return ()
    body = getattr(model, "base_model_prefix", "")
    children = {n: c for n, c in model.named_children() if next(c.parameters(), None) is not None}
    if body in children:
        return tuple(n for n in children if n != body and not isinstance(children[n], nn.ModuleList))
    return tuple(n for n in children if n in TASK_HEADS)


def task_type(model: nn.Module) -> str | None:
    """PEFT's `task_type` for an adapter with the head of this model; `None`: PEFT has none."""
    names = [cls.__name__ for cls in type(model).__mro__]
    return next((task for end, task in _TASKS.items() if any(name.endswith(end) for name in names)), None)


def output_layers(model: nn.Module) -> set[nn.Module]:
    """Layers that `"all-linear"` leaves out: the output embedding and everything in the task head."""
    get = getattr(model, "get_output_embeddings", None)
    output = get() if callable(get) else None
    heads = [model.get_submodule(path) for path in task_heads(model)]
    return {*([output] if isinstance(output, nn.Module) else ()), *(m for head in heads for m in head.modules())}


def copy_head(module: nn.Module, path: str) -> nn.Module:
    """A copy of the module at `path` with real values, without adapters and without accelerate's hooks.

    Raises:
        UnsupportedError: it cannot be copied, or the copy could not be trained.
        StateError: FSDP2 shards it by itself.
    """
    if is_fsdp(module):
        raise StateError(
            f"{path!r} cannot be trained as a copy: FSDP shards that module by itself, and no copy can be made of "
            "it. Add the adapter before fully_shard."
        )
    # Not to be copied: hooks, which refer to the offloaded weights of the whole model or to the user's own things, what
    # acts, which refers to all adapters, and their parts in the module, such as their own copies of it.
    hooks = [hook for m in module.modules() for kind in _HOOKS for hook in getattr(m, kind).values()]
    active = [m.__dict__[ACTIVE] for m in module.modules() if ACTIVE in m.__dict__]
    kept = {id(thing): thing for thing in (*hook_objects(module), *hooks, *active)}
    parts = {id(m._modules.get(container)): None for m in module.modules() for container in CONTAINERS}
    with gathered(module, module.modules()):
        reason = _untrainable(module)
        if reason is not None:
            raise UnsupportedError(f"{path!r} cannot be trained as a copy: {reason}.")
        try:
            head: nn.Module = copy.deepcopy(module, kept | parts)
        except Exception as error:
            why = f"copying it raises {type(error).__name__}: {error}"
            raise UnsupportedError(f"{path!r} cannot be trained as a copy: {why}") from error
    remove_hooks(head, module)
    for kind in _HOOKS:  # the module keeps its hooks and calls the copy
        getattr(head, kind).clear()
    strip(head)
    return head.requires_grad_(True)


def _untrainable(root: nn.Module) -> str | None:
    """Why a copy of this module could not be trained, or `None`."""
    for name, p in root.named_parameters():
        if is_special(p) or not (p.is_floating_point() or p.is_complex()):
            return (
                f"its {name} is a {type(p).__name__} ({p.dtype}), which takes no gradient: it is quantised, or holds "
                "whole numbers. Leave it out of the quantisation, or out of modules_to_save"
            )
    for path, module in root.named_modules():
        for hook in module._forward_pre_hooks.values():
            if type(hook).__module__.startswith("torch.nn.utils."):  # it sets the module's weight, not the copy's
                return (
                    f"{type(hook).__name__} computes {f'{path}.' if path else 'its '}weight before each forward. Make "
                    "it permanent first, or use torch.nn.utils.parametrizations"
                )
    return None


def set_rows(layer: nn.Linear, rows: int) -> None:
    """Replace a linear layer's parameters by ones with another number of rows, without values."""
    for name, own in layer.named_parameters():
        setattr(layer, name, nn.Parameter(own.new_empty(rows, *own.shape[1:])))
    layer.out_features = rows


def adopt_rows(head: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give linear layers of the head the number of rows that a file has for them.

    Only the number of rows may differ, and the bias must have as many. Anything else stays as it is, so that it is
    reported as mismatched.
    """
    for path, layer in head.named_modules():
        prefix = f"{path}." if path else ""
        weight, bias = tensors.get(prefix + "weight"), tensors.get(prefix + "bias")
        if not isinstance(layer, nn.Linear) or weight is None or weight.shape == layer.weight.shape:
            continue
        rows = weight.shape[:1]
        fits = rows.numel() > 0 and weight.shape[1:] == layer.weight.shape[1:]
        if fits and (layer.bias is None or (bias is not None and bias.shape == rows)):
            set_rows(layer, weight.shape[0])


def resize_new_head(
    heads: Sequence[nn.Module], chosen: LabelSet | None, base: LabelSet | None, model: nn.Module, seed: int | None
) -> LabelSet | None:
    """The label set of a new adapter with these heads. Their last layer of the model's size is resized to it.

    The new rows are initialised in the model's own way.

    Args:
        chosen: what `add` was asked for; `None`: the model's own.
        base: the model's own label set.
        seed: of the adapter's initial values.

    Raises:
        ConfigError: there is no head to resize, or it is not known which layer to resize.
    """
    if chosen is None:
        return base if heads else None
    if not heads or base is None:
        why = "it has no head (modules_to_save)" if base is not None else "the model has no config with labels"
        raise ConfigError(f"num_labels and id2label set the size of an adapter's head, but {why}. Leave them out.")
    old, new = len(base.id2label), len(chosen.id2label)
    if old == new:
        return chosen
    outputs = [m for head in heads for m in head.modules() if isinstance(m, nn.Linear) and m.out_features == old]
    if not outputs:
        names = ", ".join(type(head).__name__ for head in heads)
        raise ConfigError(
            f"num_labels={new}: no linear layer of the head ({names}) has {old} outputs, so it is "
            "unknown which one to resize. Resize the model's head before adding the adapter."
        )
    set_rows(outputs[-1], new)
    initialise_rows(outputs[-1], model, seed)
    return chosen


@torch.no_grad()
def initialise_rows(layer: nn.Linear, model: nn.Module, seed: int | None) -> None:
    """Give the output layer of a new head initial values, in the model's own way."""
    layer.__dict__.pop("_is_hf_initialized", None)
    initialise = getattr(model, "_init_weights", None)
    with seeded(seed, [layer.weight.device]) as begin:
        begin("rows of the head")
        layer.reset_parameters()
        if callable(initialise):
            initialise(layer)


def head_values(head: nn.Module, module: nn.Module, model: nn.Module, seed: int) -> Iterator[tuple[str, Tensor]]:
    """The initial values of a new head like this, by their names in it: the module's own, and new rows."""
    resized: dict[nn.Module, nn.Linear] = {}
    for name, slot in module_slots(head, non_persistent=True):
        owner, value = slot.owner, real_value(module.get_submodule(name.rpartition(".")[0]), slot.name)
        if isinstance(owner, nn.Linear) and value.shape != shape_of(slot.tensor):
            if owner not in resized:
                sizes = owner.in_features, owner.out_features, owner.bias is not None
                resized[owner] = nn.Linear(*sizes, device=value.device, dtype=slot.tensor.dtype)
                initialise_rows(resized[owner], model, seed)
            value = resized[owner].get_parameter(slot.name).detach()
        yield name, value


_METADATA_KEY = "adapterkit.id2label"


@dataclass(frozen=True)
class LabelSet:
    """The classes that a head tells apart, and the kind of loss that transformers chose for them.

    Attributes:
        id2label: class names by number, from 0.
        problem_type: transformers' `config.problem_type`, which it sets at the first loss and keeps.
        label2id: `config.label2id` of the model's own label set, which need not be the reverse of `id2label`.
    """

    id2label: Mapping[int, str]
    problem_type: str | None = None
    label2id: Mapping[str, int] | None = None

    @classmethod
    def of(cls, model: nn.Module) -> Self | None:
        """The label set in the model's config, or `None` if it has none."""
        config = getattr(model, "config", None)
        id2label = getattr(config, "id2label", None)
        if not isinstance(id2label, Mapping) or not id2label:
            return None
        try:
            numbered = {int(k): str(v) for k, v in id2label.items()}
        except (TypeError, ValueError):  # something else of that name
            return None
        label2id = getattr(config, "label2id", None)
        return cls(numbered, getattr(config, "problem_type", None), label2id)

    @classmethod
    def numbered(cls, count: int) -> Self:
        """Classes without names: `LABEL_0`, `LABEL_1`, ..., as in transformers."""
        return cls({i: f"LABEL_{i}" for i in range(count)})

    @classmethod
    def chosen(cls, num_labels: int | None, id2label: Mapping[int, str] | None) -> Self | None:
        """The label set that `add(..., num_labels=, id2label=)` asks for; `None`: the model's own.

        Raises:
            ConfigError: a number below 1, class numbers with gaps, or two values that disagree.
        """
        if num_labels is None and id2label is None:
            return None
        given: Any = num_labels
        whole = isinstance(given, Integral) and not isinstance(given, bool)
        if num_labels is not None and (not whole or num_labels < 1):
            raise ConfigError(f"num_labels = {num_labels!r} must be a positive number of classes.")
        if id2label is None:
            assert num_labels is not None
            return cls.numbered(int(num_labels))
        if not isinstance(id2label, Mapping):
            raise ConfigError(f"id2label = {id2label!r} must be a mapping from class numbers to names.")
        if set(id2label) != set(range(len(id2label))) or not id2label:
            raise ConfigError(f"id2label must number its classes 0, 1, 2, ... without gaps, not {list(id2label)}.")
        if num_labels not in (None, len(id2label)):
            raise ConfigError(f"num_labels = {num_labels} disagrees with id2label, which has {len(id2label)} classes.")
        return cls({i: str(id2label[i]) for i in range(len(id2label))})

    @classmethod
    def of_rows(cls, layers: Sequence[tuple[int, int | None]], own: Self) -> Self:
        """The label set of heads in a file that does not name the classes.

        The classes are numbered if a layer has other rows than the base's layer. Else they are the base's.

        Args:
            layers: the rows of each linear layer of the heads, and of the base's; `None`: the base has no such layer.
            own: the base's label set.
        """
        other = [rows for rows, before in layers if rows != before]
        unknown = any(before is None for _, before in layers)
        if not other or (unknown and len(own.id2label) in other):
            return own
        return cls.numbered(other[-1])

    def apply(self, model: nn.Module) -> None:
        """Write this label set into the model's config, and its size where the model computes its loss from it."""
        config: Any = model.config
        config.id2label = dict(self.id2label)
        reverse = {name: i for i, name in self.id2label.items()}
        config.label2id = reverse if self.label2id is None else self.label2id
        config.problem_type = self.problem_type
        if "num_labels" in model.__dict__:
            model.num_labels = len(self.id2label)  # type: ignore[assignment]

    def to_metadata(self) -> dict[str, str]:
        """An entry for the safetensors header, because `adapter_config.json` is PEFT's."""
        return {_METADATA_KEY: json.dumps({str(i): name for i, name in self.id2label.items()})}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> Self | None:
        """The label set in a safetensors header, or `None`.

        Raises:
            CheckpointError: the entry is malformed.
        """
        text = metadata.get(_METADATA_KEY)
        if text is None:
            return None
        try:
            found = {int(i): str(name) for i, name in json.loads(text).items()}
            return cls.chosen(None, found)
        except (ValueError, AttributeError, TypeError, RecursionError) as error:
            raise CheckpointError(f"The file's label set is malformed: {text[:80]!r}.") from error
