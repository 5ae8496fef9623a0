"""Which layers of a model a config adapts, and why: `ak.select`."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from adapterkit.contract import AdapterConfig, Pattern, PatternTable, Rule, default_registry
from adapterkit.errors import ConfigError, SelectionError, nearest
from adapterkit.forward import original_class
from adapterkit.kinds import LayerKind
from adapterkit.model import default_targets as defaults
from adapterkit.model.heads import head_paths, output_layers
from adapterkit.model.modules import BaseModules, Uncalled
from adapterkit.results import Shown, Table

ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class Match:
    """One layer that a config adapts."""

    path: str
    module: nn.Module
    kind: LayerKind
    rule: str


@dataclass(frozen=True)
class Selection(Shown):
    """What a config adapts on a model, and why. `print` shows a table.

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
        width = max((len(m.path) for m in self.targets), default=0)
        lines = [self._sentence()]
        lines += [f"  {m.path:<{width}}  {_describe(m.kind)}  by {m.rule}" for m in self.targets]
        lines += [f"  {path:<{width}}  trained in full" for path in self.heads]
        for title, rows in (
            ("left out:", [f"  {path}: {reason}" for path, reason in self.skipped]),
            ("matched nothing:", [f"  {rule}" for rule in self.unmatched]),
        ):
            lines += [title, *rows] if rows else []
        return "\n".join(lines)

    def _sentence(self) -> str:
        return f"{len(self.targets)} layers adapted, {len(self.heads)} modules trained in full"

    def _shown(self) -> tuple[str, list[Table]]:
        rows = [(m.path, _describe(m.kind), m.rule) for m in self.targets]
        rows += [(path, "", "trained in full") for path in self.heads]
        return self._sentence(), [
            Table(("layer", "kind", "by"), rows),
            Table(("layer", "reason"), self.skipped, "left out"),
            Table(("entry",), [(rule,) for rule in self.unmatched], "matched nothing"),
        ]


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
        raise ConfigError(f"select needs a torch.nn.Module, not a {type(model).__name__}.")
    if not isinstance(config, AdapterConfig):
        raise ConfigError(f"select needs an adapter config such as LoraConfig(r=8), not a {type(config).__name__}.")
    return _selected(BaseModules(model), config)


def select_on(modules: BaseModules, config: AdapterConfig) -> Selection:
    """The layers that an adapter of this config changes: those that its method's hook `targets` names, or `select`'s.

    Raises:
        SelectionError: there are none, or one of them cannot be adapted.
    """
    method = default_registry.method_of(config)
    paths = method.targets(modules.model, config)
    if paths is None:
        return _selected(modules, config)
    _check_no_peft(modules)
    by, targets = f"the method {method.name!r}", []
    for path in paths:
        module = modules.model.get_submodule(path)
        kind = default_registry.kind_of(module)
        if kind is None:
            raise SelectionError(_unsupported(path, module, by))
        targets.append(Match(path, module, kind, by))
    if not targets:
        raise SelectionError(f"{by} found no layer to adapt on this {type(modules.model).__name__}.")
    return Selection(tuple(targets), head_paths(modules, config.modules_to_save), (), ())


def _selected(modules: BaseModules, config: AdapterConfig) -> Selection:
    _check_no_peft(modules)
    heads = head_paths(modules, config.modules_to_save)
    found, skipped, unmatched = _candidates(modules, config, heads)
    layers = LayerFilter(config, modules.all_paths)
    targets = []
    lost: dict[str, str] = {}
    for match in found:
        reason = layers.refuse(match.path)
        if reason:
            skipped.append((match.path, reason))
            lost.setdefault(match.rule, f"{match.rule} ({match.path!r}: {reason})")
        else:
            targets.append(match)
    if not targets:
        raise SelectionError(_nothing(modules, config, skipped, unmatched))
    if config.target_modules is not None:  # a default names layers that only some models have
        unmatched += [entry for rule, entry in lost.items() if rule not in {match.rule for match in targets}]
    unmatched += layers.unused + _unused_patterns(config, targets)
    return Selection(tuple(targets), heads, tuple(skipped), tuple(unmatched))


def _check_no_peft(modules: BaseModules) -> None:
    """Raise `SelectionError` if the model has adapters of PEFT: their layers would look like the model's own."""
    peft: Any = sys.modules.get("peft.tuners.tuners_utils")
    for module, paths in modules.paths_of.items() if peft is not None else ():
        if isinstance(module, peft.BaseTunerLayer):
            raise SelectionError(
                f"The model has adapters of PEFT, such as at {paths[0]!r}. Take them off first: peft_model.unload() "
                "returns the bare model, peft_model.merge_and_unload() the model with them in its weights, and "
                "model.delete_adapter(name) removes what transformers' model.add_adapter added. Then adapt that model; "
                "adapters.load reads the folders that PEFT writes."
            )


def _candidates(
    modules: BaseModules, config: AdapterConfig, heads: Sequence[str]
) -> tuple[list[Match], list[tuple[str, str]], list[str]]:
    """The layers that only `layers_to_transform` may still leave out, those left out, and entries without a match."""
    rule, why = _target_rule(modules.model, config)
    exclude = Rule("exclude_modules", config.exclude_modules) if config.exclude_modules else None
    uncalled = Uncalled(modules)
    outputs = output_layers(modules.model)
    matches: list[Match] = []
    skipped: list[tuple[str, str]] = []
    for module, paths in modules.paths_of.items():
        path = paths[0]
        kind = default_registry.kind_of(module) if rule is None else None
        if rule is None:
            by = why if kind is not None and kind.all_linear else None
        else:
            matched = [rule.match(path) for path in paths]  # all of them: each may use another entry
            by = next((why + entry for entry in matched if entry), None)
        if by is None:
            continue
        reason = _left_out(path, paths, heads, exclude)
        uncalled_reason = uncalled.reason(path, module)
        if reason is None and rule is None:
            reason = "the output head" if module in outputs else uncalled_reason
        if reason is not None:
            skipped.append((path, reason))
            continue
        if uncalled_reason is not None:
            raise SelectionError(f"{path!r}, taken by {by}, cannot be adapted: {uncalled_reason}. Leave it out.")
        kind = kind or default_registry.kind_of(module)
        if kind is None:
            raise SelectionError(_unsupported(path, module, by))
        matches.append(Match(path, module, kind, by))
    unused = rule.unused if rule else []
    return matches, skipped, unused + (exclude.unused if exclude else [])


def _target_rule(model: nn.Module, config: AdapterConfig) -> tuple[Rule | None, str]:
    """The rule of `target_modules`, or `None` for every linear layer, and a prefix for the name of the rule."""
    targets, why = config.target_modules, ""
    if targets == ALL_LINEAR:
        return None, f"target_modules {ALL_LINEAR!r}"
    if targets is None:
        model_type = getattr(getattr(model, "config", None), "model_type", None)
        targets = config.default_targets.get(str(model_type), defaults.TARGETS.get(str(model_type)))
        why = f"the default for {model_type!r}: "
        if targets is None:
            kind = f"model_type {model_type!r}" if model_type else f"{type(model).__name__}, which has no model_type"
            raise SelectionError(
                f"There is no default for target_modules on {kind}. Name the layers to adapt, for example "
                f"target_modules={ALL_LINEAR!r} or a list of names such as {_example_names(model)}."
            )
    return Rule("target_modules", targets), why


def _left_out(path: str, paths: Sequence[str], heads: Sequence[str], exclude: Rule | None) -> str | None:
    for head in heads:
        if path == head or path.startswith(head + "."):
            return f"modules_to_save trains {head!r} in full"
    if exclude is not None:
        return next((rule for rule in map(exclude.match, paths) if rule), None)
    return None


def _unused_patterns(config: AdapterConfig, targets: Sequence[Match]) -> list[str]:
    unused = []
    for field in config.patterns:
        table: PatternTable = PatternTable(getattr(config, field) or {}, field)
        for match in targets:
            table.get(match.path, None)
        unused += table.unused
    return unused


def _describe(kind: LayerKind) -> str:
    return f"{kind.name}({kind.in_features} -> {kind.out_features})"


def _unsupported(path: str, module: nn.Module, by: str) -> str:
    kinds = ", ".join(kind.name for kind in default_registry.kinds())
    advice = "Leave it out with exclude_modules, or name the layers inside it."
    weight: Any = getattr(module, "weight", None)
    if getattr(module, "max_norm", None) is not None:
        advice = "An embedding with max_norm rewrites its own rows. " + advice
    elif nn.parameter.is_lazy(weight):
        advice = "It has no sizes yet: run the model once, then add the adapter. Or leave it out with exclude_modules."
    elif isinstance(weight, torch.Tensor) and weight.is_complex():
        advice = f"Its weight is complex ({weight.dtype}). " + advice
    elif isinstance(weight, torch.Tensor) and not weight.is_floating_point():
        advice = f"Its weight is quantised ({weight.dtype}); no installed extension knows that kind. " + advice
    return (
        f"{path!r}, taken by {by}, is a {original_class(module).__name__}, which cannot be adapted "
        f"(layer kinds: {kinds}). {advice}"
    )


def _example_names(model: nn.Module) -> list[str]:
    tails = [p.rpartition(".")[2] for p, m in model.named_modules() if isinstance(m, nn.Linear) and p]
    return list(dict.fromkeys(tails))[:4] or ["name"]


def _nothing(
    modules: BaseModules, config: AdapterConfig, skipped: Sequence[tuple[str, str]], unmatched: Sequence[str]
) -> str:
    if skipped:
        path, reason = skipped[0]
        return (
            f"Every layer that {config.target_modules!r} names is left out; {len(skipped)} in all, "
            f"for example {path!r}: {reason}."
        )
    adaptable = [p for m, paths in modules.paths_of.items() if default_registry.kind_of(m) for p in paths]
    if not adaptable:
        return f"{type(modules.model).__name__} has no layer that can be adapted."
    wanted = config.target_modules
    names = [wanted] if isinstance(wanted, str) else list(wanted or ())
    shown = wanted if isinstance(wanted, str) else names
    close = [c for n in names for c in nearest(n, adaptable)] or _example_names(modules.model)
    return (
        f"target_modules {shown!r} matched none of the {len(adaptable)} layers that can be adapted. "
        f"Nearest: {', '.join(map(repr, dict.fromkeys(close)))}. A list takes exact paths or suffixes at a dot; "
        "a string is a regular expression for the full path."
    )


class LayerFilter:
    """Selects by layer number. A stack is the path before a number: `encoder.layer` in `encoder.layer.3.mlp`.

    Without `layers_pattern` the first number in a path counts, in any stack. With it, or with a mapping, only the named
    stacks count, and layers outside of them are left out. Negative numbers count from the end of their stack.

    Args:
        config: its `layers_to_transform` and `layers_pattern` are read.
        paths: every module path of the model, which give the length of each stack.
    """

    def __init__(self, config: AdapterConfig, paths: Iterable[str]) -> None:
        wanted = config.layers_to_transform
        self._counts = wanted is not None
        if not self._counts:
            self._rules: list[_StackRule] = []
            return
        self._sizes = _stack_sizes(paths)
        if isinstance(wanted, Mapping):
            if config.layers_pattern:
                raise ConfigError("layers_to_transform already names its stacks here; leave layers_pattern out.")
            self._rules = [_StackRule(stack, numbers) for stack, numbers in wanted.items()]
        else:
            listed = config.layers_pattern
            patterns: Sequence[str | None] = [listed] if listed is None or isinstance(listed, str) else listed
            self._rules = [_StackRule(p, wanted) for p in patterns]

    def refuse(self, path: str) -> str | None:
        """Why the layer at `path` is left out, or `None` if it is kept."""
        if not self._counts:
            return None
        for stack, number in _numbers(path):
            for rule in self._rules:
                if rule.names(stack):
                    if rule.keeps(number, self._sizes[stack]):
                        return None
                    return f"layers_to_transform leaves out layer {number} of {stack!r}"
        return "layers_to_transform: it is outside the stacks whose layers are counted"

    @property
    def unused(self) -> list[str]:
        """Stacks and numbers that have kept no layer so far."""
        return [message for rule in self._rules for message in rule.unused()]


class _StackRule:
    """A pattern for stacks (or every stack) and the layer numbers to keep there."""

    def __init__(self, pattern: str | None, numbers: str | int | Sequence[int] | object) -> None:
        self.label = f"layers_to_transform {pattern!r}" if pattern else "layers_to_transform"
        self.pattern = Pattern(rf"(?:.*\.)?(?:{pattern})", "layers_pattern") if pattern else None
        self.everything = numbers == "all"
        if isinstance(numbers, str) and not self.everything:
            raise ConfigError(f"{self.label}: {numbers!r} is neither 'all' nor a list of layer numbers.")
        listed = [numbers] if isinstance(numbers, int) else numbers
        self.numbers: list[int] = [] if self.everything else list(listed)  # type: ignore[call-overload]
        self.used: set[int] = set()
        self.matched = False

    def names(self, stack: str) -> bool:
        return self.pattern is None or self.pattern.matches(stack)

    def keeps(self, number: int, size: int) -> bool:
        wanted = {number, number - size} & set(self.numbers)
        self.used |= wanted
        kept = self.everything or bool(wanted)
        self.matched |= kept
        return kept

    def unused(self) -> list[str]:
        if self.everything:
            return [] if self.matched else [self.label]
        return [f"{self.label} {n}" for n in self.numbers if n not in self.used]


def _numbers(path: str) -> list[tuple[str, int]]:
    """Every `(stack, number)` in a path: `a.0.b.1` has `("a", 0)` and `("a.0.b", 1)`."""
    parts = path.split(".")
    return [(".".join(parts[:i]), int(p)) for i, p in enumerate(parts) if p.isdecimal()]


def _stack_sizes(paths: Iterable[str]) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for path in paths:
        for stack, number in _numbers(path):
            sizes[stack] = max(sizes.get(stack, 0), number + 1)
    return sizes
