"""Parting tied weights of a transformers model, and making the model's files say so.

The files leave out all but one of several tied weights, and a flag in the config says that the others follow. When some
are parted, the flag is cleared, and the other weights for which it stood get memory of their own, because the next
`save_pretrained` would lose them otherwise. If a model computes with the flag, or its config cannot express the change,
the flag stays: the files hold everything that is parted, and transformers does not tie what its files hold apart.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from types import CodeType, FunctionType
from typing import Any

from torch import Tensor, nn

from adapterkit.errors import warn
from adapterkit.merging.places import own, put, put_copy, same
from adapterkit.model import Adapter, named_modules

FLAG = "tie_word_embeddings"
_DECLARED = "_tied_weights_keys"
_ALL = "all_tied_weights_keys"


@dataclass(frozen=True)
class Tie:
    """Two keys of the model's state dict that a module declares as tied.

    Attributes:
        declarer: that module.
        outer: the model around it; its config is written to files.
    """

    target: str
    source: str
    declarer: Any = field(compare=False)
    outer: Any = field(compare=False)

    def is_flagged_by(self, configs: Sequence[Any]) -> bool:
        """Whether the flag of one of these configs stands for this tie."""
        return any(self.declarer.config is config for config in configs)


@dataclass(frozen=True, eq=False)
class Parting:
    """What changes in a model, beside the weights, when some of its ties end.

    Attributes:
        parted: the ties that end.
        configs: the configs to clear the flag in. The flag stays for ties of other configs.
        freed: the other ties for which the cleared flags stood.
    """

    model: nn.Module
    parted: Sequence[Tie]
    configs: Sequence[Any]
    freed: Sequence[Tie]
    _undo: list[Callable[[], object]] = field(default_factory=list)

    @classmethod
    def of(cls, model: nn.Module, names: Collection[str] = (), heads: Iterable[Adapter] = ()) -> Parting:
        """Decide what to change, before anything is parted.

        Args:
            names: keys of the state dict that are about to get memory of their own.
            heads: adapters with heads that are about to replace modules of the model. Ties inside a head are kept, and
                so are ties between two heads that are tied themselves.
        """
        numbers = {path: number for adapter in heads for path, number in adapter.tie_numbers().items()}
        ties = _declared_ties(model)
        parted = [
            tie
            for tie in ties
            if tie.target in names
            or tie.source in names
            or tie_number(tie.target, numbers) != tie_number(tie.source, numbers)
        ]
        outers = {id(t.outer): t.outer for t in parted}.values()
        configs = [config for outer in outers for config in _configs_to_clear(outer, parted)]
        return cls(model, parted, configs, [t for t in ties if t.is_flagged_by(configs) and t not in parted])

    def apply(self) -> None:
        """Make the changes, after the weights were parted."""
        self._warn_of_shared_modules()
        for config in self.configs:
            self._undo.append(partial(setattr, config, FLAG, True))
            setattr(config, FLAG, False)
        modules = dict(named_modules(self.model))
        ended = (*self.parted, *self.freed)
        flagged = [tie for tie in ended if tie.is_flagged_by(self.configs)]
        self._separate(modules, [*(t.source for t in flagged), *(t.target for t in flagged)])
        self._separate(modules, [t.target for t in self.parted if t not in flagged])
        targets = {tie.target for tie in ended}
        for path, module in modules.items():
            prefix = f"{path}." if path else ""
            pairs, declared = getattr(module, _ALL, None), getattr(module, _DECLARED, None)
            if isinstance(declared, Mapping) and any(t.declarer is module for t in self.parted):
                declared = _declared_by(module)
                if not any(module.config is config for config in self.configs):  # transformers then ties by these again
                    self._leave_out(module, _DECLARED, declared, prefix, targets)
            if isinstance(pairs, Mapping) and any(prefix + name in targets for name in pairs):
                self._leave_out(module, _ALL, pairs, prefix, targets)

    def undo(self) -> None:
        """Undo `apply`."""
        while self._undo:
            self._undo[-1]()
            self._undo.pop()

    def _warn_of_shared_modules(self) -> None:
        """Warn if ties end between paths of one module, whose values a saved model then has under one path alone."""
        modules = dict(named_modules(self.model))
        for tie in (*self.parted, *self.freed) if self.configs else ():
            target, source = (name.rpartition(".")[0] for name in (tie.target, tie.source))
            if modules.get(target) is modules.get(source):
                warn(
                    f"{source!r} and {target!r} are one module since the vocabulary was resized. Now that ties end "
                    "there, save_pretrained writes it under one name alone, and from_pretrained gives the other random "
                    "values. Before you add adapters, save the resized model and load it again."
                )
                return

    def _separate(self, modules: Mapping[str, nn.Module], names: Sequence[str]) -> None:
        """Give memory of its own to each of these tensors that shares memory with an earlier one."""
        seen: list[Tensor] = []
        for name in dict.fromkeys(names):
            path, _, local = name.rpartition(".")
            held = _tensor_at(modules, name)
            if held is not None and any(same(held, other) for other in seen):
                self._undo.append(partial(put, modules[path], local, held))
                put_copy(modules[path], local, held)
            elif held is not None:
                seen.append(held)

    def _leave_out(
        self, module: nn.Module, name: str, pairs: Mapping[str, str], prefix: str, targets: Collection[str]
    ) -> None:
        """Set an attribute of the module to these pairs without the targets."""
        held = module.__dict__
        self._undo.append(
            partial(setattr, module, name, held[name]) if name in held else partial(delattr, module, name)
        )
        setattr(module, name, {k: v for k, v in pairs.items() if prefix + k not in targets})


def _declared_ties(model: nn.Module) -> list[Tie]:
    """The ties that the model, and the models inside it, declare and that hold now."""
    modules = dict(named_modules(model))
    found: dict[str, Tie] = {}
    outers: list[tuple[str, nn.Module]] = []
    for path, module in modules.items():  # a model repeats what the models inside it declare; the innermost counts
        if not hasattr(getattr(module, "config", None), "to_json_string"):
            continue
        prefix = f"{path}." if path else ""
        outer = next((outer for start, outer in outers if prefix.startswith(start)), None)
        if outer is None:
            outer = module
            outers.append((prefix, module))
        for target, source in _declared_by(module).items():
            found[prefix + target] = Tie(prefix + target, prefix + source, module, outer)
    pairs = [(tie, _tensor_at(modules, tie.target), _tensor_at(modules, tie.source)) for tie in found.values()]
    return [tie for tie, one, other in pairs if one is not None and other is not None and same(one, other)]


def _declared_by(module: Any) -> Mapping[str, str]:
    pairs = getattr(module, _ALL, None)
    if not isinstance(pairs, Mapping):
        return {}
    try:
        return {**pairs, **module.get_expanded_tied_weights_keys(all_submodels=False)}
    except (AttributeError, ValueError):  # its patterns may match keys of adapters too
        return pairs


def _tensor_at(modules: Mapping[str, nn.Module], name: str) -> Tensor | None:
    path, _, local = name.rpartition(".")
    return own(modules[path], local) if path in modules else None


def tie_number(name: str, heads: Mapping[str, int]) -> int | None:
    """The number (`Adapter.tie_numbers`) of the head that contains the tensor of this name, or `None`."""
    return next((number for head, number in heads.items() if name.startswith(f"{head}.")), None)


# Which flags can be cleared


def _configs_to_clear(outer: Any, parted: Sequence[Tie]) -> list[Any]:
    """The configs to clear the flag in, because these ties of `outer` have ended; empty if flags cannot say it."""
    declaring = {id(t.declarer.config): t.declarer.config for t in parted if t.outer is outer}
    if any(_reads_flag(type(module)) for module in outer.modules()):  # type: ignore[arg-type]
        return []
    with_nested = {**declaring, **{id(c): c for config in declaring.values() for _, c in nested(config)}}
    for wanted in (declaring, with_nested):
        configs = [config for config in wanted.values() if getattr(config, FLAG, False)]
        if len(configs) >= len(declaring) and _survive_files(outer.config, configs):
            return configs
    return []


def nested(config: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The config and those inside it, each with the attribute names that lead to it."""
    yield path, config
    for name, value in vars(config).items():
        if hasattr(value, "to_json_string"):
            yield from nested(value, (*path, name))


def _survive_files(config: Any, inner: Sequence[Any]) -> bool:
    """Whether the cleared flags of the configs `inner` are the same after `config` was written and read again."""
    for other in inner:
        setattr(other, FLAG, False)
    try:
        again = type(config).from_dict(json.loads(config.to_json_string()))
        flags = [{path: getattr(part, FLAG, None) for path, part in nested(whole)} for whole in (config, again)]
    except Exception:  # noqa: BLE001 - a stranger's config may raise anything
        return False
    finally:
        for other in inner:
            setattr(other, FLAG, True)
    return flags[0] == flags[1]


@lru_cache(maxsize=4096)
def _reads_flag(cls: type) -> bool:
    """Whether a method of the class reads the flag and may compute outputs with it."""

    def names(code: CodeType) -> bool:
        inner = (const for const in code.co_consts if isinstance(const, CodeType))
        return FLAG in code.co_names or FLAG in code.co_consts or any(map(names, inner))

    computes_nothing = ("init", "tie", "resize", "embeddings")
    for base in cls.__mro__:
        for name, value in vars(base).items():
            if isinstance(value, FunctionType) and not any(part in name for part in computes_nothing):
                function = inspect.unwrap(value)
                if isinstance(function, FunctionType) and names(function.__code__):
                    return True
    return False
