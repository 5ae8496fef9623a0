"""Which layers of a model a config adapts, and why: `ak.select`."""

from __future__ import annotations

import dis
import inspect
import re
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from adapterkit.contract import AdapterConfig, Pattern, PatternTable, Rule, default_registry
from adapterkit.errors import ConfigError, SelectionError, nearest, usage
from adapterkit.forward import ACTIVE, original_class
from adapterkit.kinds import AnyModule, LayerKind
from adapterkit.model import default_targets as defaults
from adapterkit.model.heads import head_paths, output_layers
from adapterkit.model.modules import BaseModules, inside
from adapterkit.results import Printed, columns, counted, grouped, in_lines

ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class Match:
    """One layer that a config adapts."""

    path: str
    module: nn.Module
    kind: LayerKind
    rule: str


@dataclass(frozen=True)
class Selection(Printed):
    """What a config adapts on a model, and why. `print` shows a table; paths that differ only in numbers share a row.

    Attributes:
        targets: the layers that get an adapter layer, in the order of the model.
        heads: paths of the modules that are trained in full with the adapter.
        skipped: `(path, reason)` of layers that a rule named, but that another rule or their place leaves out.
        unmatched: entries of the config that match nothing.
    """

    targets: tuple[Match, ...]
    heads: tuple[str, ...]
    skipped: tuple[tuple[str, str], ...]
    unmatched: tuple[str, ...]

    @property
    def paths(self) -> tuple[str, ...]:
        """Paths of the targets."""
        return tuple(m.path for m in self.targets)

    def __str__(self) -> str:
        layers = [(m.path, str(m.kind), m.rule) for m in self.targets]
        layers += [(path, "trained in full", "modules_to_save") for path in self.heads]
        heads = counted(len(self.heads), "module")
        lines = [f"{counted(len(self.targets), 'layer')} adapted, {heads} trained in full"]
        for title, rows in (
            ("", layers),
            ("left out:", self.skipped),
            ("matched nothing:", [(rule,) for rule in self.unmatched]),
        ):
            lines += [title] if title and rows else []
            lines += [f"  {line}" for line in columns(grouped(rows))]
        return in_lines(lines)


@usage()
def select(model: nn.Module, config: AdapterConfig) -> Selection:
    """What `config` adapts on `model`, and why. It changes nothing and works on the meta device.

    Args:
        model: any module; adapters that it has already are ignored.
        config: a method's config; only the fields about layers are read.

    Returns:
        The selection; it has at least one target.

    Raises:
        SelectionError: nothing matches, or a named layer cannot be adapted.
        ConfigError: a malformed rule.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"select needs a torch.nn.Module, not a {type(model).__name__}."
            + (" The model comes before the config." if isinstance(model, AdapterConfig) else "")
        )
    if not isinstance(config, AdapterConfig):
        raise ConfigError(f"select needs an adapter config such as LoraConfig(r=8), not a {type(config).__name__}.")
    return _by_rules(BaseModules(model), config)


def select_on(modules: BaseModules, config: AdapterConfig) -> Selection:
    """The layers that an adapter of this config changes: those that its method's hook `targets` names, or `select`'s.

    Raises:
        SelectionError: there are none, or one of them cannot be adapted.
    """
    method = default_registry.method_of(config)
    paths = method.targets(modules.model, config)
    if paths is None:
        return _by_rules(modules, config)
    _check_no_peft(modules)
    by, targets = f"the method {method.name!r}", []
    for path in paths:
        module = modules.model.get_submodule(path)
        targets.append(Match(path, module, _kind_of(module, path, by, config), by))
    if not targets and not method.replaces_call:
        raise SelectionError(f"{by} found no layer to adapt on this {type(modules.model).__name__}.")
    return Selection(tuple(targets), head_paths(modules, config.modules_to_save), (), ())


def _by_rules(modules: BaseModules, config: AdapterConfig) -> Selection:
    _check_no_peft(modules)
    heads, numbers = head_paths(modules, config.modules_to_save), LayerNumbers(config, modules.all_paths)
    exclude = Rule("exclude_modules", config.exclude_modules or ())
    named, unmatched = _named(modules, config)
    outputs = output_layers(modules.model) if config.target_modules == ALL_LINEAR else None
    targets: list[Match] = []
    skipped: list[tuple[str, str]] = []
    outside: dict[str, str] = {}
    for module, by in named.items():
        path, reason = modules.paths_of[module][0], _left_out(module, modules, heads, exclude, outputs)
        if reason is None:
            ignored = modules.why_ignored(module)
            if ignored is not None:
                raise SelectionError(f"{path!r}, taken by {by}, cannot be adapted: {ignored}. Leave it out.")
            match, reason = Match(path, module, _kind_of(module, path, by, config), by), numbers.refuse(path)
            if reason is None:
                targets.append(match)
                continue
            outside.setdefault(by, f"{by} ({path!r}: {reason})")
        skipped.append((path, reason))
    if not targets:
        raise SelectionError(_nothing(modules, config, skipped, numbers))
    unmatched += exclude.unused
    if config.target_modules is not None:  # a default names layers that only some models have
        unmatched += [entry for by, entry in outside.items() if by not in {match.rule for match in targets}]
    unmatched += numbers.unused
    for field in config.patterns:
        table: PatternTable = PatternTable(getattr(config, field) or {}, field)
        for match in targets:
            table.get(match.path, None)
        unmatched += table.unused
    return Selection(tuple(targets), heads, tuple(skipped), tuple(unmatched))


def _named(modules: BaseModules, config: AdapterConfig) -> tuple[dict[nn.Module, str], list[str]]:
    """The modules that `target_modules` names, each with the entry that does, and the entries that name none.

    Raises:
        SelectionError: the config has no `target_modules`, and there is no default for this model.
    """
    targets, why = config.target_modules, ""
    if targets == ALL_LINEAR:
        kinds = {module: default_registry.kind_of(module) for module in modules.paths_of}
        linear = [module for module, kind in kinds.items() if kind is not None and kind.all_linear]
        return dict.fromkeys(linear, f"target_modules {ALL_LINEAR!r}"), []
    if targets is None:
        model_type = getattr(getattr(modules.model, "config", None), "model_type", None)
        targets = config.default_targets.get(str(model_type), defaults.TARGETS.get(str(model_type)))
        why = f"the default for {model_type!r}: "
        if targets is None:
            model = type(modules.model).__name__
            where = f"model_type {model_type!r}" if model_type else f"{model}, which has no model_type"
            raise SelectionError(
                f"There is no default for target_modules on {where}. Name the layers to adapt, for example "
                f"target_modules={ALL_LINEAR!r} or a list of names such as {_example_names(modules.model)}."
            )
    rule, named = Rule("target_modules", targets), {}
    for module, paths in modules.paths_of.items():
        matched = list(filter(None, map(rule.match, paths)))  # all of them: each may use another entry
        if matched:
            named[module] = why + matched[0]
    return named, rule.unused


def _left_out(
    module: nn.Module, modules: BaseModules, heads: Sequence[str], exclude: Rule, outputs: Collection[nn.Module] | None
) -> str | None:
    """Why a module that `target_modules` names is no target, or `None`.

    Args:
        outputs: the model's output layers if `target_modules` is `"all-linear"`, else `None`. `"all-linear"` leaves
            out these, layers that nothing calls, and layers whose output is no tensor, such as routers.
    """
    paths = modules.paths_of[module]
    head = inside(paths[0], heads)
    excluded = list(filter(None, map(exclude.match, paths)))
    if head is not None:
        return f"modules_to_save trains {head!r} in full"
    if excluded or outputs is None:
        return next(iter(excluded), None)
    if module in outputs:
        return "the output head"
    cls = original_class(module)
    several = f"a {cls.__name__} returns several tensors" if _returns_a_tuple(cls.forward) else None
    return modules.why_ignored(module) or several


@cache
def _returns_a_tuple(function: Callable[..., Any]) -> bool:
    code = getattr(inspect.unwrap(function), "__code__", None)
    steps = [] if code is None else [step.opname for step in dis.get_instructions(code)]
    return ("BUILD_TUPLE", "RETURN_VALUE") in pairwise(steps)


def _check_no_peft(modules: BaseModules) -> None:
    """Raise `SelectionError` if the model has adapters of PEFT: their layers would look like the model's own."""
    peft: Any = sys.modules.get("peft.tuners.tuners_utils")
    for module, paths in modules.paths_of.items() if peft is not None else ():
        if isinstance(module, peft.BaseTunerLayer) and ACTIVE not in module.__dict__:
            raise SelectionError(
                f"The model has adapters of PEFT, such as at {paths[0]!r}. Take them off first: peft_model.unload() "
                "returns the bare model, peft_model.merge_and_unload() the model with them in its weights. After "
                "transformers' model.add_adapter, make the model again, as delete_adapter leaves PEFT's layers "
                "there. Then adapt that model; adapters.load reads the folders that PEFT writes."
            )


def _kind_of(module: nn.Module, path: str, by: str, config: AdapterConfig) -> LayerKind:
    """The layer kind of a module that the rule `by` names, for the method of `config`.

    Raises:
        SelectionError: it has none, so that no method can adapt it.
    """
    kind = default_registry.kind_of(module)
    if kind is None and default_registry.method_of(config).any_module:
        kind = AnyModule()
    if kind is not None:
        return kind
    what = f"{path!r}, taken by {by}, is a {original_class(module).__name__}, which cannot be adapted"
    weight: Any = getattr(module, "weight", None)
    if _is_quantised(module):
        how = f" ({weight.dtype})" if isinstance(weight, torch.Tensor) else ""
        raise SelectionError(f"{what}: its weight is quantised{how}, {_UNKNOWN_QUANTISATION}")
    kinds = ", ".join(kind.name for kind in default_registry.kinds())
    advice = "Leave it out with exclude_modules, or name the layers inside it."
    if getattr(module, "max_norm", None) is not None:
        advice = "An embedding with max_norm rewrites its own rows. " + advice
    elif nn.parameter.is_lazy(weight):
        advice = "It has no sizes yet: run the model once, then add the adapter. Or leave it out with exclude_modules."
    elif isinstance(weight, torch.Tensor) and weight.is_complex():
        advice = f"Its weight is complex ({weight.dtype}). " + advice
    raise SelectionError(f"{what} (layer kinds: {kinds}). {advice}")


_UNKNOWN_QUANTISATION = (
    "in a way that no installed extension knows. Adapt the model before it is quantised, or one that bitsandbytes, "
    "torchao or quanto quantised; or leave the layer out with exclude_modules."
)


def _is_quantised(module: nn.Module) -> bool:
    """Whether a layer without a kind holds packed numbers: those of torch.ao, HQQ, GPTQ, AWQ, compressed-tensors."""
    weight: Any = getattr(module, "weight", None)
    if isinstance(weight, torch.Tensor) and not nn.parameter.is_lazy(weight):
        return not (weight.is_floating_point() or weight.is_complex())
    packed = any(isinstance(getattr(module, name, None), torch.Tensor) for name in ("qweight", "W_q", "weight_packed"))
    return packed or (callable(weight) and not isinstance(weight, (nn.Module, torch.Tensor)))


def _example_names(model: nn.Module) -> list[str]:
    tails = [p.rpartition(".")[2] for p, m in model.named_modules() if isinstance(m, nn.Linear) and p]
    return list(dict.fromkeys(tails))[:4] or ["name"]


def _nothing(
    modules: BaseModules, config: AdapterConfig, skipped: Sequence[tuple[str, str]], numbers: LayerNumbers
) -> str:
    """Why there is no target."""
    wanted = config.target_modules
    if skipped:
        path, reason = skipped[0]
        reason += numbers.why_none(path for path, _ in skipped)
        return f"Every layer that {wanted!r} names is left out; {len(skipped)} in all, for example {path!r}: {reason}."
    every = default_registry.method_of(config).any_module
    adaptable = [p for m, paths in modules.paths_of.items() if every or default_registry.kind_of(m) for p in paths]
    if not adaptable or wanted == "all-linear":
        sort = "linear layer" if adaptable else "layer"
        what = f"{type(modules.model).__name__} has no {sort} that can be adapted"
        packed = next((paths[0] for module, paths in modules.paths_of.items() if _is_quantised(module)), None)
        return f"{what}." if packed is None else f"{what}: {packed!r}, for one, is quantised, {_UNKNOWN_QUANTISATION}"
    names = [wanted] if isinstance(wanted, str) else list(wanted or ())
    if isinstance(wanted, str):
        rule = Rule("target_modules", re.findall(r"[^\s,|()]+", wanted))
        if [path for path in adaptable if rule.match(path)] and not rule.unused:
            return (
                f"target_modules {wanted!r} is a regular expression, which must match the full path of a layer, and "
                f"matches none. Did you mean the list {[*rule.names.names]}, of ends of paths?"
            )
    if any(isinstance(name, str) and name.replace("_", "-").lower() == "all-linear" for name in names):
        return f"target_modules {wanted!r} matched no layer. Did you mean target_modules='all-linear', as text?"
    close = [c for n in names for c in nearest(n, adaptable)] or _example_names(modules.model)
    return (
        f"target_modules {wanted if isinstance(wanted, str) else names!r} matched none of the "
        f"{counted(len(adaptable), 'module' if every else 'layer')} that can be adapted. Nearest: "
        f"{', '.join(map(repr, dict.fromkeys(close)))}. A list takes exact paths or suffixes at a dot; a string is a "
        "regular expression for the full path."
    )


class LayerNumbers:
    """Selects by layer number. A stack is the path before a number: `encoder.layer` in `encoder.layer.3.mlp`.

    Without `layers_pattern` the first number in a path counts, in any stack. With it, or with a mapping, only the named
    stacks count, and layers outside of them are left out. Negative numbers count from the end of their stack.

    Args:
        config: its `layers_to_transform` and `layers_pattern` are read.
        paths: every module path of the model, which give the length of each stack.

    Attributes:
        unused: stacks and numbers that have kept no layer so far.
    """

    def __init__(self, config: AdapterConfig, paths: Iterable[str]) -> None:
        wanted, pattern = config.layers_to_transform, config.layers_pattern
        self._counts, self.unused = wanted is not None, list[str]()
        rows: list[tuple[str | None, str | int | Sequence[int]]] = []
        self._sizes: dict[str, int] = {}
        for stack, number in (found for path in paths for found in _numbers(path)):
            self._sizes[stack] = max(self._sizes.get(stack, 0), number + 1)
        if isinstance(wanted, Mapping):
            if pattern:
                raise ConfigError("layers_to_transform already names its stacks here; leave layers_pattern out.")
            rows = list(wanted.items())
        elif wanted is not None:
            rows = [(p, wanted) for p in ([pattern] if pattern is None or isinstance(pattern, str) else pattern)]
        # A name for messages, the stacks, and the numbers to keep there: `None` keeps all.
        self._rows: list[tuple[str, Pattern | None, Sequence[int] | None]] = []
        for name, numbers in rows:
            label = f"layers_to_transform {name!r}" if name else "layers_to_transform"
            if isinstance(numbers, str) and numbers != "all":
                raise ConfigError(f"{label}: {numbers!r} is neither 'all' nor a list of layer numbers.")
            listed = None if isinstance(numbers, str) else [numbers] if isinstance(numbers, int) else list(numbers)
            stacks = Pattern(rf"(?:.*\.)?(?:{name})", "layers_pattern") if name else None
            self._rows.append((label, stacks, listed))
            self.unused += [label] if listed is None else [f"{label} {number}" for number in listed]

    def refuse(self, path: str) -> str | None:
        """Why the layer at `path` is left out, or `None` if it is kept."""
        if not self._counts:
            return None
        for stack, number in _numbers(path):
            for label, stacks, listed in self._rows:
                if stacks is None or stacks.matches(stack):
                    either = (number, number - self._sizes[stack])
                    kept = [label] if listed is None else [f"{label} {n}" for n in listed if n in either]
                    self.unused = [entry for entry in self.unused if entry not in kept]
                    return None if kept else f"layers_to_transform leaves out layer {number} of {stack!r}"
        return "layers_to_transform: it is outside the stacks whose layers are counted"

    def why_none(self, paths: Iterable[str]) -> str:
        """Why not one of these layers is kept, if a stack that the model lacks, or a number, is the reason."""
        if not self._counts:
            return ""
        first = dict.fromkeys(found[0][0] for path in paths if (found := _numbers(path)))
        reasons = []
        for label, stacks, listed in self._rows:
            counted = [stack for stack in self._sizes if stacks.matches(stack)] if stacks is not None else [*first]
            if not counted:
                there = ", ".join(f"{stack!r} ({self._sizes[stack]} layers)" for stack in [*first][:3])
                reasons.append(f"{label}: no stack has that name; these layers are in {there or 'no stack'}")
            sizes = {stack: self._sizes[stack] for stack in counted}
            if sizes and listed and all(not -size <= n < size for n in listed for size in sizes.values()):
                there = ", ".join(f"{stack!r} has layers 0 to {size - 1}" for stack, size in [*sizes.items()][:3])
                reasons.append(f"{label} = {listed}: {there}")
        return "".join(f"; {reason}" for reason in reasons)


def _numbers(path: str) -> list[tuple[str, int]]:
    """Every `(stack, number)` in a path: `a.0.b.1` has `("a", 0)` and `("a.0.b", 1)`."""
    parts = path.split(".")
    return [(".".join(parts[:i]), int(p)) for i, p in enumerate(parts) if p.isdecimal()]
