"""Parting tied weights of a transformers model, and making the model's files say so.

The files leave out all but one of several tied weights, and a flag in the config says that the others follow. When some
are parted, the flag is cleared, and the other weights for which it stood get memory of their own, because the next
`save_pretrained` would lose them otherwise. If a model computes with the flag, or its config cannot express the change,
the flag stays: the files hold everything that is parted, and transformers 5 and later leave parted weights alone.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from adapterkit.errors import UnsupportedError
from adapterkit.merging.obstacles import own, put
from adapterkit.merging.shared_memory import same
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
    _undo: list[Callable[[], None]] = field(default_factory=list)

    @classmethod
    def of(cls, model: nn.Module, names: Collection[str] = (), heads: Iterable[Adapter] = ()) -> Parting:
        """Decide what to change, before anything is parted.

        Args:
            names: keys of the state dict that are about to get memory of their own.
            heads: adapters with heads that are about to replace modules of the model. Ties inside a head are kept, and
                so are ties between two heads that are tied themselves.

        Raises:
            UnsupportedError: the model's files could not say what is parted.
        """
        numbers = {path: number for adapter in heads for path, number in adapter.tie_numbers().items()}
        ties = _declared_ties(model)
        parted = [
            tie
            for tie in ties
            if not {tie.target, tie.source}.isdisjoint(names)
            or tie_number(tie.target, numbers) != tie_number(tie.source, numbers)
        ]
        outers = {id(t.outer): t.outer for t in parted}.values()
        configs = [config for outer in outers for config in _configs_to_clear(outer, parted)]
        for tie in parted:
            if not _is_in(tie.declarer.config, configs) and not hasattr(tie.outer, _ALL):
                raise UnsupportedError(
                    f"{tie.target!r} and {tie.source!r} cannot be parted: a {type(tie.outer).__name__} computes with "
                    f"{FLAG} of its config, and transformers before version 5 ties by it. Merge with a later version."
                )
        freed = [tie for tie in ties if _is_in(tie.declarer.config, configs) and tie not in parted]
        return cls(model, parted, configs, freed)

    @torch.inference_mode(False)
    def apply(self) -> None:
        """Make the changes, after the weights were parted."""
        undo = self._undo
        for config in self.configs:
            undo.insert(0, partial(setattr, config, FLAG, True))
            setattr(config, FLAG, False)
        modules = dict(named_modules(self.model))
        ended = (*self.parted, *self.freed)
        targets = {tie.target for tie in ended}
        of_cleared = [t for t in ended if _is_in(t.declarer.config, self.configs)]
        others = [t.target for t in self.parted if t not in of_cleared]
        for names in ([*(t.source for t in of_cleared), *(t.target for t in of_cleared)], others):
            _separate(modules, names, undo)
        for path, module in modules.items():
            prefix = f"{path}." if path else ""
            pairs = getattr(module, _ALL, None)
            if isinstance(pairs, Mapping) and any(prefix + name in targets for name in pairs):
                _set(module, _ALL, {k: v for k, v in pairs.items() if prefix + k not in targets}, undo)
            if isinstance(getattr(module, _DECLARED, None), Mapping) and any(t.declarer is module for t in self.parted):
                declared = _declared_by(module, modules, prefix)
                if not _is_in(module.config, self.configs):  # where the flag stays, a later tying goes by these
                    _set(module, _DECLARED, {k: v for k, v in declared.items() if prefix + k not in targets}, undo)

    def undo(self) -> None:
        """Undo `apply`."""
        while self._undo:
            self._undo[0]()
            del self._undo[0]

    @contextmanager
    def applied(self) -> Iterator[None]:
        """`apply` for a block."""
        try:
            self.apply()
            yield
        finally:
            self.undo()


def _declared_ties(model: nn.Module) -> list[Tie]:
    """The ties that the model, and the models inside it, declare and that hold now."""
    modules = dict(named_modules(model))
    found = {}
    for path, module in modules.items():  # a model repeats what the models inside it declare; the innermost counts
        prefix = f"{path}." if path else ""
        if hasattr(module, "config"):
            for target, source in _declared_by(module, modules, prefix).items():
                found[prefix + target] = Tie(prefix + target, prefix + source, module, _outermost(modules, path))
    pairs = {key: (_find(modules, tie.target), _find(modules, tie.source)) for key, tie in found.items()}
    return [
        found[key] for key, (one, other) in pairs.items() if one is not None and other is not None and same(one, other)
    ]


def _declared_by(module: Any, modules: Mapping[str, nn.Module], prefix: str) -> Mapping[str, str]:
    pairs = getattr(module, _ALL, None)
    if isinstance(pairs, Mapping):
        try:
            return {**pairs, **module.get_expanded_tied_weights_keys(all_submodels=False)}
        except (AttributeError, ValueError):  # its patterns may match keys of adapters too
            return pairs
    names = getattr(module, _DECLARED, None)  # transformers before 5 lists names without their sources
    held = {f"{path}.{n}": t for path, m in modules.items() for n, t in m._parameters.items() if t is not None}
    return {
        name: other.removeprefix(prefix)
        for name in (names if isinstance(names, list | tuple) else ())
        for other, tensor in held.items()
        if other != prefix + name and other.startswith(prefix) and tensor is held.get(prefix + name)
    }


def _outermost(modules: Mapping[str, nn.Module], path: str) -> nn.Module:
    """The outermost model with a config around the module at `path`."""
    parts = path.split(".")
    around = (".".join(parts[:count]) for count in range(len(parts) + 1))
    return next(modules[p] for p in around if hasattr(getattr(modules.get(p), "config", None), "to_json_string"))


def _find(modules: Mapping[str, nn.Module], name: str) -> Tensor | None:
    path, _, local = name.rpartition(".")
    return own(modules[path], local) if path in modules else None


def tie_number(name: str, heads: Mapping[str, int]) -> int | None:
    """The number (`Adapter.tie_numbers`) of the head that contains the tensor of this name, or `None`."""
    return next((number for head, number in heads.items() if name.startswith(f"{head}.")), None)


def _is_in(config: Any, configs: Sequence[Any]) -> bool:
    return any(config is other for other in configs)


def _separate(modules: Mapping[str, nn.Module], names: Sequence[str], undo: list[Callable[[], None]]) -> None:
    """Give memory of its own to each of these tensors that shares memory with an earlier one."""
    seen: list[Tensor] = []
    for name in dict.fromkeys(names):
        path, _, local = name.rpartition(".")
        held = _find(modules, name)
        if held is None:
            continue
        if any(same(held, other) for other in seen):
            module, fresh = modules[path], held.detach().clone()
            is_parameter = isinstance(held, nn.Parameter)
            undo.insert(0, partial(put, module, local, held))
            put(module, local, nn.Parameter(fresh, held.requires_grad) if is_parameter else fresh)
        else:
            seen.append(held)


def _set(module: nn.Module, name: str, value: Any, undo: list[Callable[[], None]]) -> None:
    if name in module.__dict__:
        undo.insert(0, partial(module.__dict__.__setitem__, name, module.__dict__[name]))
    else:
        undo.insert(0, lambda: module.__dict__.pop(name, None))
    module.__dict__[name] = value


# Which flags can be cleared


def _configs_to_clear(outer: Any, parted: Sequence[Tie]) -> list[Any]:
    """The configs to clear the flag in, because these ties of `outer` have ended; empty if flags cannot say it."""
    declaring = {id(t.declarer.config): t.declarer.config for t in parted if t.outer is outer}
    if any(_reads_flag(type(module)) for module in outer.modules()):  # type: ignore[arg-type]
        return []
    with_nested = {**declaring, **{id(c): c for config in declaring.values() for _, c in nested(config)}}
    for wanted in (declaring, with_nested):
        configs = [config for config in wanted.values() if getattr(config, FLAG, False)]
        if len(configs) >= len(declaring) and _survives_files(outer.config, configs):
            return configs
    return []


def nested(config: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The config and those inside it, each with the attribute names that lead to it."""
    yield path, config
    for name, value in vars(config).items():
        if hasattr(value, "to_json_string"):
            yield from nested(value, (*path, name))


def _survives_files(config: Any, inner: Sequence[Any]) -> bool:
    """Whether `config`, written and read again, differs in exactly the flags of `inner` once these are cleared."""
    try:
        before, read_before = _written(config), _written(_read(config))
        for other in inner:
            setattr(other, FLAG, False)
        try:
            after, read_after = _written(config), _written(_read(config))
        finally:
            for other in inner:
                setattr(other, FLAG, True)
    except Exception:  # noqa: BLE001 - a stranger's config may raise anything
        return False
    changed = dict(_differences(before, after))
    cleared = [path for path, value in changed.items() if path[-1] == FLAG and value is False]
    return len(inner) <= len(cleared) == len(changed) and changed == dict(_differences(read_before, read_after))


def _written(config: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(config.to_json_string())
    return found


def _read(config: Any) -> Any:
    return type(config).from_dict(_written(config))


def _differences(one: Any, other: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(one, dict) and isinstance(other, dict):
        for key in one.keys() | other.keys():
            yield from _differences(one.get(key), other.get(key), (*path, key))
    elif one != other:
        yield path, other


@lru_cache(maxsize=4096)
def _reads_flag(cls: type) -> bool:
    """Whether a method of the class reads the flag and may compute outputs with it."""
    computes_nothing = ("init", "tie", "resize", "embeddings")
    functions = (
        inspect.unwrap(value)
        for base in cls.__mro__
        for name, value in vars(base).items()
        if isinstance(value, FunctionType) and not any(part in name for part in computes_nothing)
    )
    return any(isinstance(f, FunctionType) and _names_flag(f.__code__) for f in functions)


def _names_flag(code: CodeType) -> bool:
    inner = (const for const in code.co_consts if isinstance(const, CodeType))
    return FLAG in code.co_names or FLAG in code.co_consts or any(map(_names_flag, inner))
