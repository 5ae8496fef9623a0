"""What acts at a module now, and the module's forward with it.

This runs in every forward of every adapted module, so it is lean: what acts at a module (`Plan`) is decided once for
each state (`state.State`), at the module's first forward in it.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from adapterkit.contract import BIASES, HEADS, LAYERS, SHARED, DenseLayer, Shared, part_name
from adapterkit.errors import PluginError, SelectionError, StateError, UnsupportedError
from adapterkit.forward import readers
from adapterkit.forward.arithmetic import add, drops_rows, kept_rows, with_weight
from adapterkit.forward.heads import BiasLayer, callable_head
from adapterkit.forward.readers import ACTIVE
from adapterkit.forward.tensor_parallel import mesh_of, run_split
from adapterkit.kinds import LayerKind, dense, plus
from adapterkit.tensors import offload

if TYPE_CHECKING:
    from adapterkit.forward.state import Active, State

INPUT = "_adapted_input"


class Plan:
    """What acts at one module in one state.

    Attributes:
        head, call_head: the acting head that replaces the module, if there is one, and the function to call for it.
        calls: what changes the module's call with all its arguments, the innermost first: the adapter layers up to the
            last one with `any_module`, each with its strength, and at the model itself each `Shared` that replaces its
            call.
        layers: the other adapter layers that act, which run around those; the innermost first, each with its strength.
        wrapping: how many of these, from the first on, run around the forward; the rest only add to its output.
        biases: the trained biases that act, each with its strength.
        only_layer: the layer that acts alone, if it is a `DenseLayer`: it may compute with `W + dW` in one product.
        kinds: the layer kind of each acting adapter layer.
        checked: whether the module is checked before each forward; see `is_checked`.
        mesh: the processes between which tensor parallelism splits the module, or `None`.
    """

    def __init__(self, module: nn.Module, state: State) -> None:
        names = state.names
        self.module, self.head = module, None
        self.constants: list[nn.Module] = []
        for head, _, owner in state.parts(module, HEADS, state.heads):
            # The head replaces the module for all adapters, so what the others change in the module does not act.
            self.head, names = head, tuple(n for n in state.names if n == owner)
            self.call_head = callable_head(head, module)
        layers = [(layer, strength) for layer, strength, _ in state.parts(module, LAYERS, names)]
        # One past the last layer that changes the whole call.
        calls = max([0, *(i for i, (layer, _) in enumerate(layers, 1) if layer.any_module)])
        self.calls: list[tuple[Any, float]] = layers[:calls]
        self.layers = layers[calls:]
        self.biases = [(bias, strength) for bias, strength, _ in state.parts(module, BIASES, names)]
        self.kinds = [layer.kind for layer, _ in layers]
        self.checked = is_checked(module, self.kinds)
        self.mesh = mesh_of(module)
        self.wrapping = max([0, *(i for i, (layer, _) in enumerate(self.layers, 1) if not layer.summed)])
        # Under torch.compile the compiler chooses the form.
        one_sum = len(self.layers) == 1 and not self.wrapping and not torch.compiler.is_compiling()
        layer, strength = self.layers[0] if one_sum else (None, 1.0)
        self.only_layer = layer if strength == 1.0 and isinstance(layer, DenseLayer) else None

    def run(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """`original(*args, **kwargs)`, which is the module's own forward, with all that acts."""
        if self.head is not None:
            original = self.call_head
        if "_hf_hook" in self.module.__dict__:
            if self.head is not None:
                offload.check_gradients(self.head)
            with offload.fetched(*(part for part, _ in (*self.calls, *self.layers, *self.biases))):
                return self._run(original, args, kwargs)
        return self._run(original, args, kwargs)

    def read(self) -> tuple[nn.Module, list[tuple[Any, float]], list[tuple[BiasLayer, float]]]:
        """What a reader of weights finds: the module or the head that replaces it, and the layers and biases there."""
        place = self.module if self.head is None else self.head
        return place, [*self.calls, *self.layers], self.biases

    def _run(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """See `run`; the adapter's parameters are on their device."""
        if self.calls:
            original = Call(self.module, original, self.calls, self.constants)
        if not (self.layers or self.biases) or not (args or kwargs):
            return original(*args, **kwargs)
        one_argument = len(args) == 1 and not kwargs
        base, x = (original, args[0]) if one_argument else of_input(self.module, original, args, kwargs)
        return self.changed(base, x) if self.mesh is None else run_split(self, self.mesh, base, x)

    def changed(self, base: Callable[[Tensor], Any], x: Tensor) -> Any:
        """`base(x)` with the adapter layers and trained biases; a sum is rounded to its dtype once."""
        out = None if self.only_layer is None else with_weight(self.only_layer, self.module, base, x)
        if out is not None:
            dtype = out.dtype
        else:
            wrapping = self.wrapping
            out = run_layers(self.module, self.layers[:wrapping], base, x) if wrapping else base(x)
            if wrapping < len(self.layers) or self.biases:
                out = summable(self.module, out)
            elif wrapping:
                return out
            dtype = out.dtype
            for layer, strength in self.layers[wrapping:]:
                out = add(layer, out, x, strength)
        for bias, strength in self.biases:
            out = plus(out, bias.change(self.module.bias, out), strength)
        return out if out.dtype == dtype else out.to(dtype)


class CallPlan(Plan):
    """The plan of the model itself, where adapters share tensors and may replace its call."""

    def __init__(self, module: nn.Module, state: State) -> None:
        super().__init__(module, state)
        shared = [*parts_of(module._modules[SHARED], state.names)]
        self.calls += [(part, 1.0) for part, _ in shared if part.replaces_call]
        self.constants = [part for part, name in shared if name in state.constants]

    def run(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """See `Plan.run`."""
        if not self.calls or torch.compiler.is_compiling():
            return super().run(original, args, kwargs)
        active: Active = self.module.__dict__[ACTIVE]
        before, here = active.caller, threading.get_ident()
        if before not in (None, here) or "_is_replica" in self.module.__dict__:
            raise StateError(
                f"{type(self.calls[-1][0]).__name__}.forward keeps what the layers need on itself, so the model runs "
                "one forward at a time, and another thread is in one. Run one after the other, or give each thread a "
                "copy of the model; in place of DataParallel take DistributedDataParallel."
            )
        active.caller = here
        try:
            return super().run(original, args, kwargs)
        finally:
            active.caller = before


class Call:
    """What one adapter wraps at `module`: the module's call together with the adapters that act nearer to it.

    Args:
        original: the module's own call.
        inner: those adapters' layers, or `Shared`s, the innermost first, each with its strength.
        constants: the `Shared`s whose parameters get no gradients.
    """

    def __init__(
        self,
        module: nn.Module,
        original: Callable[..., Any],
        inner: Sequence[tuple[Any, float]],
        constants: Sequence[nn.Module],
    ) -> None:
        self.module, self._original, self._inner, self._constants = module, original, inner, constants

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the module returns."""
        if not self._inner:
            return self._original(*args, **kwargs)
        *inner, (part, strength) = self._inner
        base = Call(self.module, self._original, inner, self._constants)
        if isinstance(part, Shared) and part in self._constants and torch.is_grad_enabled():
            # The layers read what it leaves on itself, so it cannot be a twin.
            values = {name: parameter.detach() for name, parameter in part.named_parameters()}
            return returned(part, functional_call(part, values, (base, *args), kwargs))
        if isinstance(part, Shared) or part.any_module:
            return returned(part, part(base, *args, **kwargs))
        call, x = of_input(self.module, base, args, kwargs)
        return run_layers(self.module, [(part, strength)], call, x)


def returned(part: Any, out: Any) -> Any:
    """The output of a method's forward. `None` means that its `return` is missing, which is refused."""
    if out is None:
        raise PluginError(f"{type(part).__name__}.forward returned None; it must return the output.")
    return out


def run_layers(module: nn.Module, layers: Sequence[tuple[Any, float]], call: Callable[[Tensor], Any], x: Tensor) -> Any:
    """The output of `module` with these layers, the innermost first, around `call`, its own forward."""
    if not layers:
        return call(x)
    *inner, (layer, strength) = layers
    if layer.summed:
        out = summable(module, run_layers(module, inner, call, x))
        return add(layer, out, x, strength).to(out.dtype)
    base = Base(module, layer, inner, call, x)
    out = returned(layer, layer(base, base.to_adapter_dtype(x)))
    if drops_rows(layer) or strength != 1.0:
        plain = base(x)
        kept = layer.kind.spread(kept_rows(layer, plain)) if drops_rows(layer) else 1.0
        out = plain + (out - plain) * (kept * strength)
    return base.to_layer_dtype(out)


class Base:
    """What one adapter wraps: a layer of the model together with the adapters that act nearer to it.

    It takes and returns tensors in the dtype of the adapter's parameters.
    """

    def __init__(
        self,
        module: nn.Module,
        layer: Any,
        inner: Sequence[tuple[Any, float]],
        call: Callable[[Tensor], Any],
        x: Tensor,
    ) -> None:
        self.module, self.kind, self._inner, self._call = module, layer.kind, inner, call
        self._given = x.dtype if isinstance(x, Tensor) and x.is_floating_point() else None
        self._out: torch.dtype | None = None
        self._dtype = next((p.dtype for p in layer.parameters() if p.is_floating_point()), None)

    def __call__(self, x: Tensor) -> Any:
        """The layer's output for this input."""
        if self._given is not None and x.dtype != self._given and x.is_floating_point():
            x = x.to(self._given)
        out = run_layers(self.module, self._inner, self._call, x)
        if not isinstance(out, Tensor):
            return out
        self._out = out.dtype
        return self.to_adapter_dtype(out)

    def weight(self) -> Tensor:
        """Its weight `(out, in)`, as a merge would see it."""
        return self._weight_and_bias()[0]

    def bias(self) -> Tensor | None:
        """Its bias `(out,)`, as a merge would see it; `None` if it has none."""
        return self._weight_and_bias()[1]

    def with_weight(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """The output for `x` if the layer had this weight and bias, whatever kind of layer it is."""
        # A compiler does not follow a method to its function.
        if not torch.compiler.is_compiling() and self.kind.computes_plainly(self._call, self.module):
            found: Tensor = self.kind.apply_weight(x, weight, bias)
            return found
        own, shift = self._weight_and_bias()
        change = bias if bias is None or shift is None else bias - shift
        added: Tensor = self(x) + self.kind.apply_weight(x, weight - own, change)
        return added

    def to_adapter_dtype(self, value: Tensor) -> Tensor:
        """A tensor in the dtype of the adapter's parameters."""
        floating = isinstance(value, Tensor) and value.is_floating_point() and self._dtype is not None
        return value.to(self._dtype) if floating else value

    def to_layer_dtype(self, out: Any) -> Any:
        """The adapter's output in the dtype that the layer's own would have."""
        if not isinstance(out, Tensor):
            return out
        dtype = self._out
        if dtype is None and (out.is_meta or not torch.is_autocast_enabled(out.device.type)):
            dtype = self._given or self.module.weight.dtype  # type: ignore[assignment]
        return out if dtype is None else out.to(dtype)

    def _weight_and_bias(self) -> tuple[Tensor, Tensor | None]:
        found: list[Any] = []
        for name in ("weight", "bias"):
            value = readers.own(self.module, name)
            if value is not None and value.is_meta and offload.is_hooked(self.module):
                value = offload.real_value(self.module, name)
            numbers = None if value is None else dense(value)
            if value is not None and not value.is_floating_point():
                numbers = self.kind.read(self.module)
            elif value is not None and numbers is None:
                raise UnsupportedError(
                    f"The {name} of a {type(self.module).__name__} is a {type(value).__name__}, which does not give "
                    "its values, and an adapter there needs them. Leave this layer out with exclude_modules."
                )
            found.append(self.to_adapter_dtype(numbers))  # type: ignore[arg-type]
        weight, bias = self.kind.canonical(found[0]), found[1]
        for layer, strength in self._inner:
            weight, bias = readers.with_layer(layer, strength, weight, bias)
        return weight, bias


def run(module: nn.Module, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`original(*args, **kwargs)` with what acts at `module` in this thread: heads, biases and adapter layers."""
    active: Active | None = module.__dict__.get(ACTIVE)
    if active is None:  # our class, kept by a wrapper's class
        return original(*args, **kwargs)
    state: State = active.here.thread.state
    if state.idle:
        return original(*args, **kwargs)
    plan = state.plan(module)
    if plan.checked:
        check_unchanged(module, state)
    try:
        return plan.run(original, args, kwargs)
    except (IndexError, RuntimeError) as error:
        check_unchanged(module, state)
        if not all(kind.computes_plainly(original, module) for kind in plan.kinds):
            error.add_note(
                "An adapter acts in this layer, whose class has a forward of its own. If its output is not one row of "
                "out_features for each row of the input, leave the layer out with exclude_modules."
            )
        raise


def is_checked(module: nn.Module, kinds: Iterable[LayerKind]) -> bool:
    """Whether a forward of the module would go wrong silently after a change; elsewhere torch raises an error.

    On a GPU a missing row of an embedding aborts the process. A convolution with another stride gives other numbers.
    The change of a layer with one output would be added to every output of a larger one.
    """
    noticed = any(type(kind).changed is not LayerKind.changed or kind.out_features == 1 for kind in kinds)
    return noticed or isinstance(module, nn.Embedding)


def check_unchanged(module: nn.Module, state: State) -> None:
    """Raise `StateError` if the module changed since an active adapter was added, so that this does not fit it."""
    active: Active = module.__dict__[ACTIVE]
    for container, names in ((LAYERS, state.names), (HEADS, state.heads)):
        slots: Any = module._modules.get(container)
        for _, name in parts_of(slots, names):
            what = active.adapters[name].does_not_fit(slots.path)
            if what is not None:
                raise StateError(
                    f"{slots.path!r} has {what} since adapter {name!r} was added, which was made for the old one. "
                    f"Set it back, or add the adapter again: adapters.save({name!r}, folder) keeps what was trained, "
                    f"adapters.remove({name!r}) takes it away."
                )


def summable(module: nn.Module, out: Any) -> Tensor:
    """The module's output, to which a change is added.

    Raises:
        SelectionError: it is not a tensor.
    """
    if not isinstance(out, Tensor):
        raise SelectionError(
            f"A {type(module).__name__} is adapted that returns a {type(out).__name__}, and an adapter "
            "can only be added to a tensor. Leave this layer out with exclude_modules."
        )
    return out


def of_input(
    module: nn.Module, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Callable[[Any], Any], Any]:
    """`original` as a function of its input alone, and the input: the first argument, or the forward's first parameter.

    Raises:
        UnsupportedError: the forward does not say what its input is called, and there are several tensors.
    """
    if args:
        return lambda x: original(x, *args[1:], **kwargs), args[0]
    # Either was put on the module itself, before or after the adapters (accelerate's hooks).
    places = (module.__dict__.get("forward"), module.__dict__.get("_old_forward"), type(module))
    name: str = next(filter(None, [getattr(place, INPUT, None) for place in places]), "")
    if name not in kwargs:
        tensors = [key for key, value in kwargs.items() if isinstance(value, Tensor)] or list(kwargs)[:1]
        if len(tensors) > 1:
            raise UnsupportedError(
                f"A {type(module).__name__} is called with several tensors by keyword ({', '.join(tensors)}), and its "
                "forward does not say which is its input. Give the input first, without a keyword."
            )
        name = tensors[0]
    others = {key: value for key, value in kwargs.items() if key != name}
    return lambda x: original(**{name: x}, **others), kwargs[name]


def input_name(forward: Callable[..., Any]) -> str | None:
    """What a module's forward calls its input; `None` if it does not say."""
    try:
        parameters = list(inspect.signature(forward).parameters.values())
    except (TypeError, ValueError):
        return None
    first = next((p for p in parameters if p.name != "self"), None)
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return first.name if first is not None and first.kind in named else None


def parts_of(slots: nn.Module | None, names: tuple[str, ...]) -> Iterator[tuple[Any, str]]:
    """What these adapters have in one container of a module, each with its adapter's name."""
    if slots is not None:
        for name in names:
            part = slots._modules.get(part_name(name))
            if part is not None:
                yield part, name
