"""Readers: modules that read the weights of layers below them in their forward, instead of calling these layers.

Torch's `MultiheadAttention` passes `out_proj.weight` to a function, Mamba's mixer passes `conv1d.weight` to a kernel,
and a fused loss takes `lm_head.weight`. They would ignore an adapter at such a layer. So while the forward of a
declared reader runs in this thread, but not the layer's own forward inside it, the layer's `weight` and `bias` include
everything that acts there, with gradients. Everywhere else they are the module's own parameters.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from adapterkit.contract import AdapterLayer, LowRankLayer, widened
from adapterkit.errors import ConfigError, UnsupportedError, usage
from adapterkit.forward.known_readers import known
from adapterkit.kinds import LayerKind
from adapterkit.tensors import offload

if TYPE_CHECKING:
    from adapterkit.forward.plan import Plan
    from adapterkit.model import BaseModules

# A path below a reader, split at the dots.
Path = tuple[str, ...]
# Attributes of an adapted module: what acts, and which paths below it each adapter lets it read; none if it is read.
ACTIVE, READS = "_adapter_active", "_adapter_reads"
_declared: dict[str, tuple[str, ...]] = {}


class _Running(threading.local):
    """The forwards that run in this thread, of readers and of layers that are read; the innermost is the last."""

    def __init__(self) -> None:
        self.stack: list[tuple[nn.Module, tuple[Path, ...]]] = []


running = _Running()


def plan_of(module: nn.Module | None) -> Plan | None:
    """What acts at the module in this thread; `None`: nothing."""
    active = None if module is None else module.__dict__.get(ACTIVE)
    found: Plan | None = None if active is None or active.state.idle else active.state.plan(module)
    return found


def paths_read(module: nn.Module) -> tuple[Path, ...]:
    """The paths below `module` that its forward reads, of layers with adapters.

    Raises:
        UnsupportedError: somebody's property, added later, hides the adapter.
    """
    found: Mapping[str, tuple[Path, ...]] = module.__dict__.get(READS, {})
    paths = tuple(path for paths in found.values() for path in paths)
    for path in paths if not torch.compiler.is_compiling() else ():
        child: Any = below(module, path)
        if not isinstance(getattr(type(child), "weight", None), Effective) and plan_of(child) is not None:
            raise UnsupportedError(
                f"A {type(module).__name__} reads the weight of its {'.'.join(path)!r} instead of calling it, and a "
                "parametrization (such as weight_norm) was put on it after the adapter, which hides the adapter. Put "
                "the parametrization on first, then add the adapter."
            )
    return paths


def begin(module: nn.Module, args: object) -> None:
    """Forward pre-hook of readers: the class's forward does not run if the instance has one, or if a hook reads."""
    if running.stack and running.stack[-1][0] is module:
        running.stack[-1] = module, paths_read(module)


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
                found: nn.Module | None = reader
                for name in path:
                    plan = None if found is reader else plan_of(found)
                    around = found if plan is None else plan.read()[0]
                    found = None if around is None else around._modules.get(name)
                return found
    return None


@usage()
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
    wanted = set(hosts.values())
    wanted |= {module for module, paths in modules.paths_of.items() if any(path.startswith(inside) for path in paths)}
    declared: dict[type, list[Path]] = {}
    found = {}
    for module in (modules.model, *modules.paths_of):
        cls = type(module)
        if cls not in declared:
            names = [name for c in cls.__mro__[:-2] for name in (c.__name__, f"{c.__module__}.{c.__qualname__}")]
            children = [child for name in names for child in (*known(name), *_declared.get(name, ()))]
            declared[cls] = [tuple(child.split(".")) for child in children]
        paths = declared[cls]
        # A loss that was patched into a model's forward reads the weight of its output layer.
        get = getattr(module, "get_output_embeddings", None)
        output = get() if callable(get) else None
        if output in wanted:
            paths = paths + [
                tuple(p.split(".")) for p, m in module.named_modules(remove_duplicate=False) if m is output
            ]
        paths = [path for path in dict.fromkeys(paths) if below(module, path) in wanted]
        if paths:
            found[module] = tuple(paths)
    return found


class Effective(property):
    """The `weight` or `bias` of a layer that is read. The parameter stays where it is."""


def effective(cls: type[nn.Module], name: str) -> Effective:
    """The property `name` for a subclass of `cls` for layers that are read."""
    inherited: Any = getattr(cls, name, None)  # such as a parametrization's

    def get(self: nn.Module) -> Any:
        read = reading(self) if running.stack else None
        if read is not None and read is not self:
            return getattr(read, name)
        plan = None if read is None else plan_of(self)
        if plan is not None:
            return changed(self, plan, name)
        if inherited is not None:
            return inherited.__get__(self, cls) if hasattr(inherited, "__get__") else inherited
        # As it is found if no class has a property of this name.
        return self.__dict__[name] if name in self.__dict__ else self.__getattr__(name)

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


def own(module: nn.Module, name: str) -> Any:
    """The weight or bias that the module's own forward finds, or `None`."""
    running.stack.append((module, ()))
    try:
        return getattr(module, name, None)
    finally:
        running.stack.pop()


@usage()
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
    plan = plan_of(module)
    return own(module, name) if plan is None else changed(module, plan, name)


def changed(module: nn.Module, plan: Plan, name: str) -> Tensor | None:
    """The weight or bias of the module with everything that acts there; see `effective_weight`."""
    place, layers, biases = plan.read()
    weight, bias, outer = own(place, "weight"), own(place, "bias"), own(module, name)
    asked: Tensor | None = weight if name == "weight" else bias
    if not layers and (name == "weight" or not biases):
        return asked if asked is None or outer is None else asked.to(outer.dtype)
    like = weight if asked is None else asked
    _check_in_memory(module, name, like, [layer for layer, _ in layers])
    work = torch.promote_types(like.dtype, torch.float32)
    device = "cpu" if like.is_meta else like.device.type  # the meta device has no autocast
    with torch.autocast(device, enabled=False):
        added = None if bias is None else bias.to(work)
        if name == "weight" or not all(layer.additive for layer, _ in layers):
            kind = layers[0][0].kind
            out = kind.canonical(weight).to(work)
            for layer, strength in layers:
                out, added = _merged(layer, strength, out, added)
        else:  # no matrix is made
            for layer, strength in layers:
                shift = layer.factors().folded(work).bias if isinstance(layer, LowRankLayer) else None
                if shift is not None:
                    added = shift * strength if added is None else added + shift * strength
        if name == "weight":
            laid_out: Tensor = kind.laid_out(out, weight).to(outer.dtype)
            return laid_out
        for trained, strength in biases:
            assert added is not None
            added = added + trained.shift(bias).to(work) * strength
        return None if added is None else added.to(like.dtype)


def with_layer(
    layer: AdapterLayer, strength: float, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """A layer's weight `(out, in)` and bias with `strength` times the change of one adapter layer."""
    changed, shifted = widened(layer, weight.dtype).merged(weight, bias)
    if strength != 1.0:
        changed = torch.lerp(weight, changed, strength)
        if shifted is not None:
            shifted = shifted * strength if bias is None else torch.lerp(bias, shifted, strength)
    return changed, shifted


def _merged(layer: AdapterLayer, strength: float, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """`with_layer`, checked that it is possible, and that it trains what trains."""
    why = "no merge rule"
    if type(layer).merged is not AdapterLayer.merged and type(layer.kind).read is LayerKind.read:
        found = with_layer(layer, strength, weight, bias)
        trains = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in layer.parameters())
        if torch.compiler.is_compiling() or not trains or torch._C._are_functorch_transforms_active():
            return found
        if any(tensor is not None and tensor.requires_grad for tensor in found):
            return found
        why = "a merge rule without gradients"
    raise UnsupportedError(
        f"The model reads the weight of a {layer.kind.name} instead of calling it, and the method {layer.method!r} has "
        f"{why} there, so the adapter cannot act. Leave this layer out with exclude_modules."
    )


def _check_in_memory(module: nn.Module, name: str, weight: Tensor, layers: Sequence[AdapterLayer]) -> None:
    if torch.compiler.is_compiling():
        return
    what = ""
    if type(weight) not in (nn.Parameter, Tensor, FakeTensor):
        what = f"is a {type(weight).__name__} (sharded or quantised)"
    elif layers and name == "weight" and not layers[0].kind.fits(weight):
        what = f"has the shape {tuple(weight.shape)} here (sharded by DeepSpeed's ZeRO-3, or replaced since)"
    elif weight.is_meta and (offload.is_hooked(module) or any(not p.is_meta for x in layers for p in x.parameters())):
        what = "is not in memory (meta device or offloaded)"
    if what:
        raise UnsupportedError(
            f"The model reads the {name} of a {type(module).__name__} instead of calling it, and that {name} {what}, "
            "so no adapter can be added to it. Leave this layer out with exclude_modules."
        )
