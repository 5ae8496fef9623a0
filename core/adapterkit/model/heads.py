"""Heads: modules trained in full and kept with the adapter (PEFT's `modules_to_save`)."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from adapterkit.contract import Names
from adapterkit.errors import ConfigError, SelectionError, UnsupportedError, nearest
from adapterkit.forward import ACTIVE, is_adapted, strip
from adapterkit.kinds import is_special
from adapterkit.model.modules import BaseModules, Uncalled
from adapterkit.tensors import gathered, hook_objects, remove_hooks

AUTO = "auto"
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

_TASKS = (
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForImageClassification",
    "ForQuestionAnswering",
    "ForMultipleChoice",
)
# Names of the head where a model does not say which child is its body.
_HEAD_NAMES = ("classifier", "score", "qa_outputs", "classification_head")


def head_paths(modules: BaseModules, modules_to_save: str | Sequence[str] | None) -> tuple[str, ...]:
    """Paths of the modules that `modules_to_save` names; a module inside another named one is left to it.

    Raises:
        SelectionError: an entry matches nothing, or a module that is never called.
    """
    if modules_to_save is None:
        return ()
    if modules_to_save == AUTO:
        return task_heads(modules.model)
    names = Names([modules_to_save] if isinstance(modules_to_save, str) else modules_to_save)
    uncalled = Uncalled(modules)
    found = []
    for module, paths in modules.paths_of.items():
        entry = next(filter(None, list(map(names.match, paths))), None)  # all: each may use another entry
        if entry is None:
            continue
        reason = uncalled.reason(paths[0], module)
        if reason is not None:
            raise SelectionError(f"modules_to_save {entry!r} cannot be trained as a copy: {reason}.")
        found.append(paths[0])
    unused = [n for n in names.names if n not in names.used]
    if unused:
        close = [c for n in unused for c in nearest(n, modules.all_paths)]
        hint = f" Nearest: {', '.join(map(repr, close))}." if close else ""
        raise SelectionError(
            f"modules_to_save {', '.join(map(repr, unused))} matched no module; an entry is an exact path or a "
            f"suffix at a dot.{hint}"
        )
    return outermost(found)


def outermost(paths: Iterable[str]) -> tuple[str, ...]:
    """The paths that lie inside none of the others, in their order."""
    known = list(paths)
    return tuple(p for p in known if not any(p.startswith(other + ".") for other in known))


def task_heads(model: nn.Module) -> tuple[str, ...]:
    """The task head of a transformers model: the children with parameters beside the body.

    Covers what is fresh after `from_pretrained`: `classifier`, `score`, but also DistilBERT's `pre_classifier`.
    """
    if not any(c.__name__.endswith(_TASKS) for c in type(model).__mro__):
        return ()
    body = getattr(model, "base_model_prefix", "")
    children = {n: c for n, c in model.named_children() if any(True for _ in c.parameters())}
    if body in children:
        return tuple(n for n in children if n != body and not isinstance(children[n], nn.ModuleList))
    return tuple(n for n in children if n in _HEAD_NAMES)


def output_layers(model: nn.Module) -> set[nn.Module]:
    """Layers that `"all-linear"` leaves alone: the output embedding and everything in the task head."""
    layers: set[nn.Module] = set()
    get = getattr(model, "get_output_embeddings", None)
    output = get() if callable(get) else None
    if isinstance(output, nn.Module):
        layers.add(output)
    for path in task_heads(model):
        layers.update(model.get_submodule(path).modules())
    return layers


def copy_head(module: nn.Module, path: str) -> nn.Module:
    """A copy of the module at `path` without adapters and without accelerate's hooks, holding real values.

    Raises:
        UnsupportedError: it cannot be copied, or the copy could not be trained.
    """
    # Hooks are shared: accelerate's hold the whole model's offloaded weights, and a user's the user's things.
    own = (hook for m in module.modules() for kind in _HOOKS for hook in getattr(m, kind).values())
    hooks = [*hook_objects(module), *own]
    active = [
        m.__dict__[ACTIVE] for m in module.modules() if is_adapted(m)
    ]  # which knows all adapters and their modules
    with gathered(module, module.modules()):
        reason = _untrainable(module)
        if reason is not None:
            raise UnsupportedError(f"{path!r} cannot be trained as a copy: {reason}.")
        try:
            head: nn.Module = copy.deepcopy(module, {id(kept): kept for kept in (*hooks, *active)})
        except Exception as error:
            why = f"copying it raises {type(error).__name__}: {error}"
            raise UnsupportedError(f"{path!r} cannot be trained as a copy: {why}") from error
    remove_hooks(head, module)
    for kind in _HOOKS:  # the module's own fire there; the copy is called by it
        getattr(head, kind).clear()
    strip(head)
    return head.requires_grad_(True)


def _untrainable(root: nn.Module) -> str | None:
    """Why a copy of this module could not be trained, or `None`."""
    for path, module in root.named_modules():
        place = f"{path}." if path else ""
        for name, p in module._parameters.items():
            if p is not None and (is_special(p) or not (p.is_floating_point() or p.is_complex())):
                return (
                    f"its {place}{name} is a {type(p).__name__} ({p.dtype}), which takes no gradient: quantised, or of "
                    "whole numbers. Leave that module out when the model is quantised, or out of modules_to_save"
                )
        for hook in module._forward_pre_hooks.values():
            if type(hook).__module__.startswith("torch.nn.utils."):  # it would set the module's own, not the copy's
                return (
                    f"{type(hook).__name__} computes {place or 'its '}weight before each forward. Make it permanent "
                    "first, or use torch.nn.utils.parametrizations"
                )
    return None


def resize_output(heads: Sequence[nn.Module], old: int, new: int, model: nn.Module) -> None:
    """Give the heads' last linear layer with `old` rows `new` rows, initialised as the model does it.

    Raises:
        ConfigError: no linear layer of the heads has `old` rows.
    """
    outputs = [m for head in heads for m in head.modules() if isinstance(m, nn.Linear) and m.out_features == old]
    if not outputs:
        names = ", ".join(type(head).__name__ for head in heads)
        raise ConfigError(
            f"num_labels={new}: no linear layer of the head ({names}) has {old} outputs, so it is not "
            "known which one to resize. Resize the model's head before adding the adapter."
        )
    layer = outputs[-1]
    weight = layer.weight
    set_rows(layer, torch.empty(new, layer.in_features, dtype=weight.dtype, device=weight.device))
    for flagged in (layer, *layer._parameters.values()):
        if flagged is not None and hasattr(flagged, "_is_hf_initialized"):
            del flagged._is_hf_initialized
    initialise = getattr(model, "_init_weights", None)
    with torch.no_grad():
        layer.reset_parameters()
        if callable(initialise):
            initialise(layer)


def set_rows(layer: nn.Linear, weight: Tensor, bias: Tensor | None = None) -> None:
    """Replace a linear layer's parameters by ones with other rows; `out_features` follows."""
    layer.weight = nn.Parameter(weight)
    if layer.bias is not None:
        fresh = torch.empty(weight.shape[0], dtype=weight.dtype, device=weight.device) if bias is None else bias
        layer.bias = nn.Parameter(fresh)
    layer.out_features = weight.shape[0]


def adopt_rows(head: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Let linear layers of the head take another number of rows if that is what a file has for them.

    Only rows may differ, and where there is a bias it must have as many; anything else stays and is
    reported as mismatched.
    """
    for path, layer in head.named_modules():
        if not isinstance(layer, nn.Linear):
            continue
        prefix = f"{path}." if path else ""
        weight, bias = tensors.get(prefix + "weight"), tensors.get(prefix + "bias")
        if weight is None or weight.dim() != 2 or weight.shape == layer.weight.shape:
            continue
        fits = weight.shape[1] == layer.in_features and weight.shape[0] > 0
        if fits and (layer.bias is None or (bias is not None and bias.shape == weight.shape[:1])):
            own = layer.weight
            set_rows(layer, torch.empty(weight.shape, dtype=own.dtype, device=own.device))
