"""Making a module of the model call its adapters, and undoing that.

The module stays the same object. Its class becomes a cached subclass with the same name, so `isinstance`, parameter
names, hooks and ties hold. What its adapters own is registered below it in containers. If `forward` was replaced on the
instance (accelerate's hooks), the instance's callable is wrapped instead, because a `forward` of the class would not be
called.
"""

from __future__ import annotations

import functools
import inspect
import types
import weakref
from abc import ABCMeta
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Self

from torch import nn
from torch.jit import ScriptModule

from adapterkit.contract import CONTAINERS, SHARED, Holder, part_name
from adapterkit.errors import StateError, warn
from adapterkit.forward.plan import INPUT, input_name, run
from adapterkit.forward.readers import ACTIVE, READS, Path, begin, below, effective, paths_read, running
from adapterkit.forward.state import Active

# The roles of an adapted class: it runs adapters; it is a reader or is read (see `readers`); where adapters replace the
# model's call, the keywords that they take; and what `Active.extra` says.
Roles = tuple[bool, bool, tuple[str, ...] | None, tuple[type, ...]]
_classes: weakref.WeakValueDictionary[tuple[type, Roles], type] = weakref.WeakValueDictionary()


class PerAdapter(Holder):
    """A container with one module per adapter. `ModuleDict` would refuse names such as `keys`.

    Attributes:
        path: the path of the module that it is registered at, for messages.
        active: what acts on the model.
    """

    path = ""
    active: Active

    def __init__(self) -> None:
        super().__init__()
        # Torch's TransformerEncoderLayer has a fast path that reads weights and never calls our forward. It is not
        # taken if a module below has a hook. This one does nothing.
        self._forward_pre_hooks[-1] = _no_hook

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute, also if an adapter has its name: `training`."""
        if isinstance(value, nn.Module):
            super().__setattr__(name, value)
        else:
            object.__setattr__(self, name, value)

    def forward(self, x: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Do nothing: a head may be an `nn.Sequential`, which calls all its children in turn."""
        return x

    def save(self, *args: Any, **kwargs: Any) -> None:
        """Refuse: a sentence-transformers model saves each of its children, and could not load this one.

        Raises:
            StateError: always.
        """
        raise StateError(
            "An adapter's shared tensors are a child of the model, and this model saves each child as a module. To "
            "save it, attach the adapters to the transformers model inside: model[0].auto_model."
        )

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Note that `to_empty` has taken the values of adapters, which a file may have brought before."""
        found = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if getattr(fn, "__qualname__", "").startswith("Module.to_empty."):
            for name, adapter in self.active.adapters.items():
                adapter.unset = adapter.unset or part_name(name) in self._modules
            for tensor in (*self.parameters(), *self.buffers()):
                tensor.__dict__["emptied"] = True  # `Adapter.has_values` asks
            for state in list(self.active.alive):
                state.plans.clear()
        return found

    def train(self, mode: bool = True) -> Self:
        """Warn once if the model is set to train while adapters are merged and none trains.

        Without it `backward` ends in an error of torch's that does not name the cause.
        """
        active = self.active
        unwarned = mode and active.merged and not active.warned
        if unwarned and not any(adapter.may_train() for adapter in active.adapters.values()):
            active.warned, names = True, ", ".join(map(repr, active.merged))
            warn(
                f"The model is set to train while {names} is merged into its weights, and no adapter trains. Call "
                "unmerge(), and activate what should train."
            )
        return super().train(mode)

    def __getitem__(self, name: str) -> nn.Module:
        module = self._modules[part_name(name)]
        assert module is not None
        return module


def _no_hook(module: nn.Module, args: object) -> None:
    return None


def calls_adapters(module: nn.Module) -> bool:
    """Whether the forward of an adapted module still runs its adapters: its class was not replaced since."""
    if hasattr(type(module), "_adapted_from"):
        return True
    return any(isinstance(module.__dict__.get(name), _WrappedForward) for name in ("forward", "_old_forward"))


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class the module had before it was adapted."""
    return getattr(type(module), "_adapted_from", type(module))


def install(module: nn.Module, path: str, container: str, name: str, part: nn.Module, active: Active) -> None:
    """Register `part` of adapter `name` at `module`, which runs it while `active` names the adapter."""
    if ACTIVE not in module.__dict__:
        module.__dict__[ACTIVE] = active
        if "forward" in module.__dict__:
            # Inside accelerate's hook, where the weights are on their device and the input has been moved.
            name_of = "_old_forward" if "_old_forward" in module.__dict__ else "forward"
            module.__dict__[name_of] = _WrappedForward(module, module.__dict__[name_of])
    parts = module._modules.get(container)
    if parts is None:
        parts = module._modules[container] = PerAdapter()
        parts.__dict__.update(path=path, active=active)
    assert isinstance(parts, PerAdapter)
    parts.training = module.training
    if part.training != module.training:
        part.train(module.training)
    parts._modules[part_name(name)] = part
    _settle(module)
    if container == SHARED:
        _sign(module)
    active.replan(module)


def uninstall(module: nn.Module, container: str, name: str) -> None:
    """Remove the part of adapter `name` if it is still there."""
    parts = module._modules.get(container)
    if isinstance(parts, PerAdapter):
        parts._modules.pop(part_name(name), None)
        if not parts._modules:
            del module._modules[container]
    if ACTIVE in module.__dict__:
        module.__dict__[ACTIVE].replan(module)
        _settle(module)
        if container == SHARED:
            _sign(module)


def derive(modules: Iterable[nn.Module], active: Active, extra: Callable[[nn.Module], tuple[type, ...]]) -> None:
    """Let these adapted modules, and those that are adapted later, be instances of more classes, see `Active.extra`."""
    active.extra = extra
    for module in modules:
        if "_adapted_from" in type(module).__dict__:
            _settle(module)


def own_forward(module: nn.Module) -> Callable[..., Any] | None:
    """The function of `(module, *inputs)` with which the module computes, without adapters and accelerate's hooks.

    `None`: somebody put a callable on the instance that is not a method of the module.
    """
    own = module.__dict__.get("forward")
    if getattr(getattr(own, "func", None), "__module__", "") == "accelerate.hooks":
        own = module.__dict__.get("_old_forward", own)
    if isinstance(own, _WrappedForward):
        own = own.original
    if own is not None and not (isinstance(own, types.MethodType) and own.__self__ is module):
        return None
    classes = [cls for cls in type(module).__mro__ if "forward" in cls.__dict__]
    if own is not None and own.__func__ not in [cls.__dict__["forward"] for cls in classes]:
        return own.__func__
    found: Callable[..., Any] = next(cls for cls in classes if "_adapted_from" not in cls.__dict__).__dict__["forward"]
    return found


def let_read(readers: Mapping[nn.Module, tuple[Path, ...]], name: str) -> None:
    """Make these modules readers of adapter `name`, each at these paths below it."""
    for reader, paths in readers.items():
        reader._forward_pre_hooks[-1] = begin
        reader.__dict__.setdefault(READS, {})[name] = paths
        for module in (reader, *filter(None, (below(reader, path) for path in paths))):
            module.__dict__.setdefault(READS, {}).setdefault(name, ())
            _settle(module)


def stop_reading(readers: Mapping[nn.Module, tuple[Path, ...]], name: str) -> None:
    """Undo `let_read`."""
    for reader, paths in readers.items():
        for module in (reader, *filter(None, (below(reader, path) for path in paths))):
            module.__dict__.get(READS, {}).pop(name, None)
            _settle(module)


def check_free(module: nn.Module, path: str, active: Active) -> None:
    """Raise `StateError` if `module` cannot be adapted by the holder of `active`."""
    owner = module.__dict__.get(ACTIVE)
    if owner is not None and owner is not active:
        raise StateError(
            f"{path!r} is already adapted through another model that shares it. "
            "Use the adapters of that model (ak.attach on it), or detach them first."
        )
    if isinstance(module, ScriptModule):
        raise StateError(
            f"{path!r} is scripted (torch.jit), so nothing can be added to it. Adapt the unscripted model."
        )
    if owner is None and "forward" not in module.__dict__:
        try:
            adapted_class(type(module))
        except Exception as error:
            raise StateError(
                f"{path!r} is a {type(module).__name__}, a class that cannot be extended ({type(error).__name__}: "
                f"{error}), so no adapter can be put there. Leave this layer out with exclude_modules."
            ) from error
    for container in CONTAINERS if owner is None else ():
        if hasattr(module, container):
            raise StateError(
                f"{path!r} has an attribute {container!r} of its own, which adapterkit would overwrite. "
                "Leave this layer out with exclude_modules."
            )


def check_free_root(model: nn.Module) -> None:
    """Raise `StateError` if `model` has an attribute of its own where shared tensors are registered."""
    if not isinstance(model._modules.get(SHARED), PerAdapter) and hasattr(model, SHARED):
        raise StateError(
            f"The model has an attribute {SHARED!r} of its own, which adapterkit would overwrite with the tensors that "
            "the layers of this adapter share. Rename it, or use a method without shared tensors."
        )


def strip(root: nn.Module) -> None:
    """Remove every adapter from `root` and all modules below it, to make a deep copy a bare module."""
    for module in list(root.modules()):
        module.__dict__.get(READS, {}).clear()
        for container in CONTAINERS if ACTIVE in module.__dict__ else ():
            module._modules.pop(container, None)
        _settle(module)


class _WrappedForward:
    """Replaces a `forward` that was set on the instance."""

    def __init__(self, module: nn.Module, original: Callable[..., Any]) -> None:
        self.module, self.original = module, original
        setattr(self, INPUT, input_name(original))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        running.stack.append((self.module, ()))
        try:
            return run(self.module, self.original, args, kwargs)
        finally:
            running.stack.pop()


def _settle(module: nn.Module) -> None:
    """Let the module's class, and forwards that were set on it, follow what adapters and readers have put there."""
    now, own = type(module), module.__dict__
    active: Active | None = own.get(ACTIVE)
    keywords = _call_keywords(module)
    containers = (*CONTAINERS, SHARED) if isinstance(module, nn.Sequential) else CONTAINERS
    if active is not None and keywords is None and not any(container in module._modules for container in containers):
        active = None
        del own[ACTIVE]
    if READS in own and not own[READS]:
        del own[READS]
        module._forward_pre_hooks.pop(-1, None)
    wrapped = {n: own[n] for n in ("forward", "_old_forward") if isinstance(own.get(n), _WrappedForward)}
    if active is None:
        own.update((name, forward.original) for name, forward in wrapped.items())
    # Somebody may have derived a class from ours since: that class stays, and ours is derived from it.
    base: type[nn.Module] = now.__dict__.get("_adapted_from", now)
    runs = active is not None and not wrapped and not hasattr(base, "_adapted_from")
    extra = () if active is None or active.extra is None else active.extra(module)
    roles: Roles = (runs, READS in own, keywords if runs else None, extra)
    if roles != now.__dict__.get("_roles", (False, False, None, ())):
        module.__class__ = new = adapted_class(base, *roles) if runs or READS in own else base
        for name in ("forward", "_old_forward"):
            method = own.get(name)
            if isinstance(method, types.MethodType) and method.__func__ is now.__dict__.get("forward"):
                # A hook that was added after the adapters holds our forward.
                own[name] = types.MethodType(new.forward, module)


def _call_keywords(module: nn.Module) -> tuple[str, ...] | None:
    """The keywords of each `Shared.forward` at the model; `None`: no adapter replaces its call."""
    shared: Any = module._modules.get(SHARED)
    parts: Any = shared._modules.values() if isinstance(shared, PerAdapter) else ()
    calls = [part for part in parts if part.replaces_call]
    found: dict[str, None] = {}
    for call in calls:
        _, *parameters = inspect.signature(call.forward).parameters.values()
        found |= dict.fromkeys(p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))
    return tuple(found) if calls else None


def _sign(module: nn.Module) -> None:
    """Let the signature of an accelerate hook at the model follow the adapters that replace the model's call."""
    forward, keywords = module.__dict__.get("forward"), _call_keywords(module)
    if forward is not None and not isinstance(forward, types.MethodType):
        vars(forward).pop("__signature__", None)
        if keywords is not None:
            own = inspect.signature(forward.original if isinstance(forward, _WrappedForward) else forward)
            forward.__signature__ = _with_keywords(own, keywords)


def adapted_class(
    cls: type[nn.Module],
    runs: bool = True,
    reads: bool = False,
    keywords: tuple[str, ...] | None = None,
    extra: tuple[type, ...] = (),
) -> type[nn.Module]:
    """The subclass of `cls`, of the same name, with these `Roles`. It is made once."""
    roles = (runs, reads, keywords, extra)
    found = _classes.get((cls, roles))
    if found is not None:
        return found

    @functools.wraps(cls.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return run(self, super(adapted, self).forward, args, kwargs)  # type: ignore[misc]

    def __reduce_ex__(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        # No module contains the subclass under its name, so copies and pickles make it again.
        reduced = super(adapted, self).__reduce_ex__(protocol)
        assert isinstance(reduced, tuple)
        return _new, (cls, *roles), *reduced[2:]

    body: dict[str, Any] = {"__reduce_ex__": __reduce_ex__, "_adapted_from": cls, "_roles": roles}
    body |= {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
    if runs:
        body |= {"forward": forward, INPUT: input_name(cls.forward)}
    if issubclass(cls, nn.Sequential):
        body |= {name: own for name, own in _SEQUENCE.items() if getattr(cls, name) is getattr(nn.Sequential, name)}
    if reads:
        body["forward"] = functools.wraps(cls.forward)(_entering(body.get("forward", cls.forward), paths_read))
        # Hooks run in it. `begin` is the last one before the forward.
        body["__call__"] = _entering(cls.__call__, lambda _: ())
        body |= {name: effective(cls, name) for name in ("weight", "bias")}
    if keywords is not None:
        body["forward"].__signature__ = _with_keywords(inspect.signature(cls.forward), keywords)
    abstract = [other for other in extra if isinstance(other, ABCMeta)]
    concrete = [other for other in extra if other not in abstract]
    adapted: type[nn.Module] = type(cls.__name__, (*concrete[:1], cls, *concrete[1:]), body)
    for other in abstract:
        other.register(adapted)
    _classes[cls, roles] = adapted
    return adapted


def _entering(call: Callable[..., Any], read: Callable[[nn.Module], tuple[Path, ...]]) -> Callable[..., Any]:
    """The method `call`, during which the module finds its own weight, and reads those at the paths `read(module)`."""

    def enter(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        running.stack.append((self, read(self)))
        try:
            return call(self, *args, **kwargs)
        finally:
            running.stack.pop()

    return enter


def _members(sequence: nn.Module) -> OrderedDict[str, Any]:
    return OrderedDict((name, m) for name, m in sequence._modules.items() if not isinstance(m, PerAdapter))


# Methods of an adapted `nn.Sequential`: they leave the containers out, so that `model[-1]` is its last layer.
_SEQUENCE: dict[str, Callable[..., Any]] = {
    "__len__": lambda self: len(_members(self)),
    "__iter__": lambda self: iter(_members(self).values()),
    "__getitem__": lambda self, index: nn.Sequential(_members(self))[index],
}


def _with_keywords(own: inspect.Signature, keywords: tuple[str, ...]) -> inspect.Signature:
    """A signature that has these keywords, too, with the default `None`."""
    kind = inspect.Parameter.KEYWORD_ONLY
    new = [inspect.Parameter(name, kind, default=None) for name in keywords if name not in own.parameters]
    return own.replace(parameters=sorted((*own.parameters.values(), *new), key=lambda parameter: parameter.kind))


def _new(cls: type[nn.Module], *roles: Any) -> nn.Module:
    adapted = adapted_class(cls, *roles)
    return adapted.__new__(adapted)
