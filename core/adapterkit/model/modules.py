"""The model's own modules, without what adapters added."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cached_property

import torch
from torch import Tensor, nn

from adapterkit.forward import PerAdapter
from adapterkit.kinds import LayerKind

# The name of a table in an encoder-decoder, and its name in the encoder and the decoder.
_GIVEN = {"shared": "embed_tokens", "word_embeddings": "word_embeddings", "patch_embed": "embed_patches"}


class BaseModules:
    """The modules of a model at one moment, without the root, each with all its paths.

    Making one walks the whole model, so a function that has one hands it on.

    Attributes:
        model: the root.
        paths_of: the paths of each module, in the order of the model. The first one is used as its name.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.paths_of: dict[nn.Module, list[str]] = {}
        for path, module in named_modules(model):
            if path:
                self.paths_of.setdefault(module, []).append(path)

    @property
    def all_paths(self) -> list[str]:
        """Every path of every module."""
        return [path for paths in self.paths_of.values() for path in paths]

    def why_ignored(self, module: nn.Module) -> str | None:
        """Why an adapter at this module would not act, because nothing calls it; `None` if it would act."""
        if module in self._unused_tables:
            return self._unused_tables[module]
        if getattr(type(module), "forward", None) is nn.Module.forward:  # scripted ones raise AttributeError
            return f"a {type(module).__name__} is a container, whose forward is never called"
        return None

    @cached_property
    def _unused_tables(self) -> dict[nn.Module, str]:
        """Tables of an encoder-decoder that only share their parameters with the tables that its stacks call."""
        unused: dict[nn.Module, str] = {}
        for model in (self.model, *self.paths_of):
            for name, inner in _GIVEN.items() if hasattr(type(model), "base_model_prefix") else ():
                table = model._modules.get(name)
                called = [t for stack in model.children() if (t := stack._modules.get(inner)) is not None]
                if table is not None and called and not any(t is table for t in called):
                    paths = " and ".join(repr(self.paths_of[t][0]) for t in called)
                    reason = f"the model neither calls nor reads it; it calls {paths}, which may be tied to it"
                    unused |= dict.fromkeys(table.modules(), reason)
        return unused


def named_modules(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Every module under each of its paths, with the root, without what adapters own."""
    left = [(path, module)]
    while left:  # no recursion, which models of hundreds of levels would not survive
        path, module = left.pop()
        yield path, module
        prefix = f"{path}." if path else ""
        for name, child in reversed(module._modules.items()):
            if child is not None and not isinstance(child, PerAdapter):
                left.append((prefix + name, child))


def computes_with(module: nn.Module, kind: LayerKind | None, model: nn.Module) -> tuple[nn.Module, Tensor]:
    """The weight whose dtype and device an adapter at this module follows, and the module that has it.

    Without a layer kind that has one, it is the first floating parameter inside, or else of the model.
    """
    if kind is not None and kind.has_weight:
        return module, module.weight  # type: ignore[return-value]
    held = ((m, p) for root in (module, model) for _, m in named_modules(root) for p in m._parameters.values())
    return next(((m, p) for m, p in held if p is not None and p.is_floating_point()), (model, torch.empty(0)))


def base_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Every parameter under each of its names, without those of adapters, also of adapters on a model inside."""
    for path, module in named_modules(model):
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield f"{path}.{name}" if path else name, parameter


def modules_below(modules: Iterable[nn.Module]) -> Iterator[nn.Module]:
    """These modules and those below them, in any order.

    A module in two places comes twice. That and the missing names make it five times as fast as `modules()`.
    """
    left = list(modules)
    while left:
        module = left.pop()
        yield module
        left += [child for child in module._modules.values() if child is not None]


def inside(path: str, outer: Iterable[str]) -> str | None:
    """The first of these paths that `path` is, or is inside."""
    return next((other for other in outer if path == other or path.startswith(f"{other}.")), None)


# Wrappers that only call the model inside, by class name, with the name of that model. Our own wrappers name it
# themselves, in `_model_inside`.
_WRAPPERS = {
    "OptimizedModule": "_orig_mod",
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "AveragedModel": "module",
    "DeepSpeedEngine": "module",
    "FullyShardedDataParallel": "_fsdp_wrapped_module",
}


def inner_model(model: nn.Module) -> nn.Module:
    """The model inside wrappers that only call it. Adapters belong to that model."""
    name = _WRAPPERS.get(type(model).__name__) or getattr(type(model), "_model_inside", None)
    inner = None if name is None else model._modules.get(name)
    return model if inner is None else inner_model(inner)
