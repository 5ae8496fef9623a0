"""Readers: modules that read the weights of layers below them in their forward, instead of calling these layers.

Torch's `MultiheadAttention` passes `out_proj.weight` to a function, Mamba's mixer passes `conv1d.weight` to a kernel,
and a fused loss takes `lm_head.weight`. They would ignore an adapter at such a layer. So while the forward of a
declared reader runs in this thread, but not the layer's own forward inside it, the layer's `weight` and `bias` include
everything that acts there, with gradients. Everywhere else they are the module's own parameters.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from adapterkit.contract import AdapterLayer, LowRankLayer, widened
from adapterkit.errors import ConfigError, UnsupportedError
from adapterkit.forward.known_readers import READERS
from adapterkit.kinds import LayerKind

if TYPE_CHECKING:
    from adapterkit.forward.plan import Plan
    from adapterkit.model import BaseModules

# A path below a reader, split at the dots.
Path = tuple[str, ...]
# Attribute of a reader: the paths that it reads, by adapter. Attribute of a layer that is read: its adapters.
READS, READ = "_adapter_reads", "_adapter_read"
_ORDINARY = (nn.Parameter, Tensor)
_declared: dict[str, tuple[str, ...]] = {}


class _Running(threading.local):
    """The forwards that run in this thread, of readers and of layers that are read; the innermost is the last."""

    def __init__(self) -> None:
        self.stack: list[tuple[nn.Module, tuple[Path, ...]]] = []


running = _Running()


def reads(module: nn.Module) -> tuple[Path, ...]:
    """The paths below `module` that its forward reads, of layers with adapters.

    Raises:
        UnsupportedError: somebody's property, added later, hides the adapter.
    """
    found: Mapping[str, tuple[Path, ...]] = module.__dict__.get(READS, {})
    paths = tuple(path for paths in found.values() for path in paths)
    for path in paths if not torch.compiler.is_compiling() else ():
        child = below(module, path)
        active = None if child is None else child.__dict__.get("_adapter_active")
        if (
            active is not None
            and not active.state.idle
            and not isinstance(getattr(type(child), "weight", None), Effective)
        ):
            raise UnsupportedError(
                f"A {type(module).__name__} reads the weight of its {'.'.join(path)!r} instead of calling it, and a "
                "parametrization (such as weight_norm) was put on it after the adapter, which hides the adapter. Put "
                "the parametrization on first, then add the adapter."
            )
    return paths


@contextmanager
def inside(stack: Sequence[tuple[nn.Module, tuple[Path, ...]]]) -> Iterator[None]:
    """Let this thread run as if inside the forwards on `stack`, an earlier copy of `running.stack`."""
    before, running.stack = running.stack, list(stack)
    try:
        yield
    finally:
        running.stack = before


def begin(module: nn.Module, args: object) -> None:
    """Forward pre-hook of readers: the class's forward does not run if the instance has one, or if a hook reads."""
    if running.stack and running.stack[-1][0] is module:
        running.stack[-1] = module, reads(module)


def below(module: nn.Module, path: Path) -> nn.Module | None:
    """The module at `path` below `module`, or `None`."""
    found: nn.Module | None = module
    for name in path:
        found = None if found is None else found._modules.get(name)
    return found


def reading(module: nn.Module) -> nn.Module | None:
    """The module to read instead of `module` while its reader runs, but not its own forward inside; else `None`.

    It is the module itself, or its counterpart in the copy (`modules_to_save`) of a module around it.
    """
    for reader, paths in reversed(running.stack):
        if reader is module:
            return None
        for path in paths:
            if below(reader, path) is module:
                return _in_acting_heads(reader, path)
    return None


def _in_acting_heads(reader: nn.Module, path: Path) -> nn.Module | None:
    found: nn.Module | None = reader
    for name in path:
        active = None if found is None or found is reader else found.__dict__.get("_adapter_active")
        if active is not None and not active.state.idle:
            found = active.state.plan(found).stand_in() or found
        found = None if found is None else found._modules.get(name)
    return found


def declare_reader(reader: type[nn.Module] | str, *children: str) -> None:
    """Declare that the forward of a class of modules reads the weights of layers below it instead of calling them.

    Adapters that are added later act there: while the forward of such a module runs, `child.weight` and `child.bias`
    include everything that acts, with gradients. Subclasses are readers too. A further call adds children.

    Args:
        reader: the class, or its name: `"my_package.models.Mixer"` or only `"Mixer"`.
        children: paths of the layers below the reader: `"out_proj"`, `"blocks.0.fc"`.

    Raises:
        ConfigError: `reader` is not a class of modules or a name, or there is no child.
    """
    if isinstance(reader, type) and issubclass(reader, nn.Module):
        reader = f"{reader.__module__}.{reader.__qualname__}"
    if not isinstance(reader, str) or not reader:
        raise ConfigError(f"declare_reader needs a class of modules or its name, not {reader!r}.")
    if not children or not all(isinstance(child, str) and all(child.split(".")) for child in children):
        raise ConfigError(f"declare_reader needs the paths of the layers that {reader!r} reads, not {children!r}.")
    _declared[reader] = tuple(dict.fromkeys((*_declared.get(reader, ()), *children)))


def readers_of(
    modules: BaseModules, hosts: Mapping[str, nn.Module], heads: Iterable[str]
) -> dict[nn.Module, tuple[Path, ...]]:
    """The modules that read layers of an adapter, each with the paths of these layers below it.

    Args:
        hosts: the adapted layers, by path.
        heads: paths of modules that the adapter has copies of. Readers may read a layer inside one.
    """
    inside = tuple(f"{path}." for path in heads)
    wanted, declared, found = set(hosts.values()), {}, {}
    wanted |= {module for module, paths in modules.paths_of.items() if any(path.startswith(inside) for path in paths)}
    for module in (modules.model, *modules.paths_of):
        cls = type(module)
        if cls not in declared:
            declared[cls] = _declared_for(cls)
        paths = [*declared[cls], *_outputs(module, wanted)]
        paths = [path for path in dict.fromkeys(paths) if below(module, path) in wanted]
        if paths:
            found[module] = tuple(paths)
    return found


def _declared_for(cls: type[nn.Module]) -> list[Path]:
    names = [name for c in cls.__mro__[:-2] for name in (c.__name__, f"{c.__module__}.{c.__qualname__}")]
    children = [child for name in names for child in (*READERS.get(name, ()), *_declared.get(name, ()))]
    return [tuple(child.split(".")) for child in children]


def _outputs(model: nn.Module, wanted: set[nn.Module]) -> list[Path]:
    """Paths of the model's output layer. A loss that was patched into the forward reads its weight."""
    get = getattr(model, "get_output_embeddings", None)
    output = get() if callable(get) else None
    if output not in wanted:
        return []
    return [tuple(path.split(".")) for path, module in model.named_modules(remove_duplicate=False) if module is output]


class Effective(property):
    """The `weight` or `bias` of a layer that is read. The parameter stays where it is."""


def effective(cls: type[nn.Module], name: str) -> Effective:
    """The property `name` for a subclass of `cls` for layers that are read."""
    inherited: Any = getattr(cls, name, None)  # such as a parametrization's

    def get(self: nn.Module) -> Any:
        read = reading(self) if running.stack else None
        if read is not None and read is not self:
            return getattr(read, name)
        active = self.__dict__.get("_adapter_active")
        if read is not None and active is not None and not active.state.idle:
            return active.state.plan(self).parameter(name)
        return inherited.__get__(self, cls) if hasattr(inherited, "__get__") else _attribute(self, name)

    def put(self: nn.Module, value: Any) -> None:
        if hasattr(inherited, "__set__"):
            inherited.__set__(self, value)
        else:
            self.__dict__[name] = value

    def drop(self: nn.Module) -> None:
        if name not in self.__dict__:
            raise AttributeError(f"{cls.__name__!r} object has no attribute {name!r}")
        del self.__dict__[name]

    return Effective(get, put, drop)


def _attribute(module: nn.Module, name: str) -> Any:
    """What `nn.Module` finds if no class has a property of this name."""
    for held in (module._parameters, module.__dict__):
        if name in held:
            return held[name]
    return nn.Module.__getattr__(module, name)


def own(module: nn.Module, name: str) -> Any:
    """The weight or bias that the module's own forward finds, or `None`."""
    running.stack.append((module, ()))
    try:
        return getattr(module, name, None)
    finally:
        running.stack.pop()


def effective_weight(module: nn.Module, name: str = "weight") -> Tensor | None:
    """The weight with which a layer computes now: `W + dW` of all adapters that act there, or the acting copy's.

    For code outside the forward of a declared reader that uses a layer's weight instead of calling the layer, such as a
    loss that takes `lm_head.weight` from the model after the forward.

    Args:
        module: a layer of a model, adapted or not.
        name: `"weight"` or `"bias"`.

    Returns:
        A tensor with the shape and dtype of the layer's own parameter, and with gradients for what acts. If nothing
        acts, that parameter itself; if a copy (`modules_to_save`) acts, the copy's. The dropout of adapters is left
        out. `None`: there is no bias.

    Raises:
        UnsupportedError: the rows of the batch have different adapters, the layer is sharded, quantised or not in
            memory, or an adapter there has no change of the layer's own shape.
        ConfigError: `module` is not a module, or `name` is another one.
    """
    if not isinstance(module, nn.Module) or name not in ("weight", "bias"):
        raise ConfigError(f"effective_weight needs a module and 'weight' or 'bias', not {module!r} and {name!r}.")
    active = module.__dict__.get("_adapter_active")
    if active is None or active.state.idle:
        return own(module, name)  # type: ignore[no-any-return]
    return active.state.plan(module).parameter(name)  # type: ignore[no-any-return]


def changed(plan: Plan, name: str) -> Tensor | None:
    """The weight or bias of the plan's module with everything that acts there; see `effective_weight`."""
    module = plan.module if plan.head is None else plan.head
    weight, bias = own(module, "weight"), own(module, "bias")
    layers, shifts = plan.layers, plan.biases if name == "bias" else []
    asked: Tensor | None = weight if name == "weight" else bias
    if not (layers or shifts):
        outer = own(plan.module, name)
        return asked if asked is None or outer is None else asked.to(outer.dtype)
    like = weight if asked is None else asked
    _check_in_memory(plan.module, name, like, layers)
    work = torch.promote_types(like.dtype, torch.float32)
    asks_weight = name == "weight" or not all(layer.additive for layer in layers)
    device = "cpu" if like.is_meta else like.device.type  # the meta device has no autocast
    with torch.autocast(device, enabled=False):
        out = layers[0].kind.canonical(weight).to(work) if asks_weight else weight
        added = None if bias is None else bias.to(work)
        for layer in layers:
            if asks_weight:
                out, added = _merged(layer, out, added)
            elif isinstance(layer, LowRankLayer):
                shift = layer.factors().folded(work).bias
                if shift is not None:
                    added = shift if added is None else added + shift
        for bias_layer in shifts:
            assert added is not None
            added = added + bias_layer.shift(bias).to(work)
        if name == "weight":
            laid_out: Tensor = layers[0].kind.laid_out(out, weight).to(own(plan.module, "weight").dtype)
            return laid_out
        return None if added is None else added.to(like.dtype)


def _merged(layer: AdapterLayer, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    if type(layer).merged is AdapterLayer.merged or type(layer.kind).read is not LayerKind.read:
        raise _unreadable(layer, "no merge rule")
    found: tuple[Tensor, Tensor | None] = widened(layer, weight.dtype).merged(weight, bias)
    _check_gradients(layer, *found)
    return found


def _check_gradients(layer: AdapterLayer, *made: Tensor | None) -> None:
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
        return
    learns = any(parameter.requires_grad for parameter in layer.parameters())
    if learns and not any(tensor is not None and tensor.requires_grad for tensor in made):
        raise _unreadable(layer, "a merge rule without gradients")


def _unreadable(layer: AdapterLayer, why: str) -> UnsupportedError:
    return UnsupportedError(
        f"The model reads the weight of a {layer.kind.name} instead of calling it, and the method {layer.method!r} has "
        f"{why} there, so the adapter cannot act. Leave this layer out with exclude_modules."
    )


def _check_in_memory(module: nn.Module, name: str, weight: Tensor, layers: Sequence[AdapterLayer]) -> None:
    if torch.compiler.is_compiling():
        return
    what = ""
    if type(weight) not in _ORDINARY and not isinstance(weight, FakeTensor):
        what = f"is a {type(weight).__name__} (sharded or quantised)"
    elif layers and name == "weight" and weight.numel() != layers[0].kind.out_features * layers[0].kind.in_features:
        what = f"has the shape {tuple(weight.shape)} here (sharded by DeepSpeed's ZeRO-3, or replaced since)"
    elif weight.is_meta and not all(p.is_meta for layer in layers for p in layer.parameters()):
        what = "is not in memory (meta device or offloaded)"
    if what:
        raise UnsupportedError(
            f"The model reads the {name} of a {type(module).__name__} instead of calling it, and that {name} {what}, "
            "so no adapter can be added to it. Leave this layer out with exclude_modules."
        )
