"""What a method's author subclasses: the base classes of adapter layers, `Shared`, and the `Target` of a layer."""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from adapterkit.contract.field_types import Probability, misfit
from adapterkit.errors import PluginError, UnsupportedError, usage
from adapterkit.kinds import Factors, LayerKind, dense, no_weight
from adapterkit.tensors import gathered

if TYPE_CHECKING:
    from adapterkit.forward import Base


@dataclass(frozen=True)
class Target:
    """A layer to adapt.

    Attributes:
        path: its module path in the model, such as `"encoder.layer.0.attention.self.query"`.
        kind: what it is; has the sizes, and applies factors to inputs. A block or another module without a weight of
            `(out, in)` has the kind `Module`, which has no sizes; only methods with `any_module` get it.
        module: the layer itself; `None` where only an adapter's files are known.
        dtype, device: those of the adapter's new parameters.
        file: the tensors that a file, or a combination, has for this layer, by their local names, so that sizes may
            follow from them. `None` for a new adapter.
    """

    path: str
    module: nn.Module | None
    kind: LayerKind
    dtype: torch.dtype
    device: torch.device
    file: Mapping[str, Tensor] | None = None

    @property
    def out_features(self) -> int:
        """Rows of the canonical weight; a module without one raises `UnsupportedError`."""
        return self._sized.out_features

    @property
    def in_features(self) -> int:
        """Columns of the canonical weight; a module without one raises `UnsupportedError`."""
        return self._sized.in_features

    @property
    def _sized(self) -> LayerKind:
        if not self.kind.has_weight:
            raise no_weight(self.module)
        return self.kind

    def weight(self) -> Tensor:
        """The layer's weight as a float32 (or float64) copy of shape `(out, in)`, for data-dependent initialisation.

        Raises:
            UnsupportedError: it is quantised, and does not say which numbers it stands for; or there is no weight.
        """
        if self.module is None or not self.kind.has_weight:
            return torch.empty(self.out_features, self.in_features, device="meta")
        with gathered(self.module, self.module.modules()):
            held = self.kind.read(self.module)
            weight = dense(held)
            if weight is None:
                raise UnsupportedError(
                    f"The weight of {self.path!r} is a {type(held).__name__}, which does not give the numbers that it "
                    "stands for. Begin with others than the weight's own, or add the adapter before it is quantised."
                )
            return weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)

    def bias(self) -> Tensor | None:
        """The layer's bias as a float32 (or float64) copy of shape `(out,)`; `None` if it has none."""
        if not isinstance(getattr(self.module, "bias", None), Tensor):
            return None
        assert self.module is not None
        with gathered(self.module, self.module.modules()):
            bias: Any = self.module.bias
            found: Tensor = bias.detach().to(torch.promote_types(bias.dtype, torch.float32), copy=True)
            return found

    def new(self, *shape: int, init: float | Callable[[Tensor], object] = 0.0) -> nn.Parameter:
        """A new parameter of this shape, with the adapter's dtype and device.

        Args:
            init: the number that fills it, or a function that fills the tensor in place, such as `adapterkit.kaiming`.
                Where a file's values are about to come, and on the meta device, nothing is filled.
        """
        if self.file is not None:
            return nn.Parameter(torch.empty(shape, dtype=self.dtype, device="meta"))
        parameter = nn.Parameter(torch.empty(shape, dtype=self.dtype, device=self.device))
        if not parameter.is_meta:
            with torch.no_grad():
                made = init(parameter) if callable(init) else parameter.fill_(init)
            # Fake tensors have a storage, too, and no pointer to its data.
            if isinstance(made, Tensor) and made.untyped_storage()._cdata != parameter.untyped_storage()._cdata:
                raise PluginError("The init of target.new must fill its tensor in place: lambda p: p.copy_(values).")
        return parameter


class Holder(nn.Module):
    """A module that holds parameters, for keys such as `lora_A.weight`: `Holder(weight=...).weight`."""

    # For type checkers: the usual names. A holder has the parameters that `__init__` gets.
    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, **parameters: nn.Parameter | None) -> None:
        super().__init__()
        for name, parameter in parameters.items():
            self.register_parameter(name, parameter)

    def __repr__(self) -> str:
        """The shape of its weight, so that `print(model)` shows `(lora_A): (8, 768)`."""
        return super().__repr__() if self._modules else _shapes(self, but="weight")


def _shapes(module: nn.Module, but: str = "") -> str:
    """The shapes of a module's own tensors, each behind its name but for that of one."""
    own = {**module._parameters, **module._buffers}
    shapes = ((n, f"({', '.join(map(str, t.shape))})") for n, t in own.items() if t is not None)
    return ", ".join(shape if n == but else f"{n}: {shape}" for n, shape in shapes)


# The module of a layer's `dropout`.
INPUT_DROPOUT = "input_dropout"


@usage()
def kaiming(parameter: Tensor) -> None:
    """Fill a parameter in place as torch fills the weight of `nn.Linear`: uniform within `1 / sqrt(in)`."""
    nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))


class AdapterLayer(nn.Module):
    """One adapter at one target: its parameters and what they do to the layer. Defining `merged` is enough.

    A layer has `self.kind`, `self.config` (patterns worked in) and `self.shared`; an author writes no `__init__`. Its
    mathematics is a pure function of its parameters and buffers: `factors`, `change` and `merged` read tensors, change
    and keep nothing, and branch on no value. So the core may ask them with other values: in float32 for a merge, and
    again in a backward in place of keeping what they built.

    Parameters are float32 on a half-precision layer. What the core gives a layer has its parameters' dtype, and the
    core casts back what the layer returns.

    Attributes:
        dropout: probability of dropping each entry of the change's input, in training. It is that of an `nn.Dropout` in
            the layer, so that tools find it that switch off every dropout of a model.
        row_dropout: probability of leaving each row of the change out, in training; the others are divided by the
            share that is left, unless `row_dropout_rescales` is false.
        module_dropout: probability of leaving the whole change out, in each forward in training.
        any_module: of the class: the layer changes a module's call, so that any module can be a target, such as a block
            or an attention. `forward(base, *args, **kwargs)` gets what the module is called with and returns what the
            module returns, also a tuple. Nothing is cast, and the dropouts are the author's.
        up_factor: of the class: the names of the parameters that are B in `B A`, such as `("lora_B.weight",)`. LoRA+
            trains them with a larger learning rate.
        method: the name of the method that made it; set by the core.
        additive: of the class: the adapter adds a change to the weight that does not depend on the weight.

    Raises:
        PluginError: when a subclass is defined without a method that its base class needs.
    """

    kind: LayerKind
    config: Any
    shared: Any
    row_dropout: float = 0.0
    row_dropout_rescales: bool = True
    module_dropout: float = 0.0
    up_factor: ClassVar[tuple[str, ...]] = ()
    method: str = ""
    any_module: ClassVar[bool] = False
    additive: ClassVar[bool] = False

    # A subclass must define one of these.
    _needs: ClassVar[tuple[str, ...]] = ("merged", "forward")

    def __init__(self, target: Target, config: Any, shared: Any = None) -> None:
        super().__init__()
        # Shared tensors are the adapter's, not the layer's, so no registry of this module may list them.
        given = {"kind": target.kind, "config": config, "shared": shared}
        self.__dict__.update(given)
        self.setup(target, config)
        _check_made(self, given)
        if self.any_module and (self.dropout or self.row_dropout or self.module_dropout):
            raise PluginError(f"{type(self).__name__} has any_module, so its dropouts belong into its forward.")

    @property
    def dropout(self) -> float:
        """See the class."""
        drop: Any = self._modules.get(INPUT_DROPOUT)
        if drop is None or (self.training and not drop.training):
            return 0.0
        p: float = drop.p
        return p

    @dropout.setter
    def dropout(self, p: float) -> None:
        if p or INPUT_DROPOUT in self._modules:
            drop: Any = self._modules.setdefault(INPUT_DROPOUT, nn.Dropout())
            drop.p = p

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        base = next(c for c in cls.__mro__ if c.__module__ == __name__)
        if cls is base:
            return
        if "__init__" in vars(cls):
            raise PluginError(f"{cls.__name__} defines __init__; write setup(self, target, config) in its place.")
        _check_methods(cls, base, ("setup", "forward", "merged", *cls._needs))
        if misfit(cls.up_factor, tuple[str, ...]) is not None:
            raise PluginError(f"{cls.__name__}.up_factor = {cls.up_factor!r} must be a tuple of names of parameters.")
        if cls.any_module and (base is not AdapterLayer or cls.forward is base.forward):
            raise PluginError(
                f"{cls.__name__} has any_module, so it must be an AdapterLayer that defines forward(self, base, *args, "
                "**kwargs): a module has no weight to change."
            )
        if all(getattr(cls, name) is getattr(base, name) for name in cls._needs):
            raise PluginError(
                f"{cls.__name__} is a subclass of {base.__name__}, so it must define {' or '.join(cls._needs)}: see "
                f"adapterkit.{base.__name__}."
            )

    def extra_repr(self) -> str:
        """The shapes of its own tensors, for `print(model)`."""
        return _shapes(self)

    def setup(self, target: Target, config: Any) -> None:
        """Make the parameters and buffers, with `target.new(...)`. Called once: when an adapter is added or loaded."""

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The layer's weight `(out, in)` and bias `(out,)` with the adapter worked in; neither is changed in place.

        Raises:
            UnsupportedError: no change of the weight has the adapter's effect.
        """
        raise UnsupportedError(f"A {type(self).__name__} cannot be merged. Leave the adapter active.")

    def forward(self, base: Base, x: Tensor) -> Tensor:
        """The layer's output; by default what `merged` says. Override it to be faster, or where no weight can say it.

        With `dropout`, and by default: `base(x) + (merged(W) - W) dropout(x)`.
        """
        weight, bias = base.weight(), base.bias()
        changed, shifted = self.merged(weight, bias)
        if not (self.training and self.dropout):
            out: Tensor = base.with_weight(x, changed, shifted)
            return out
        shift = shifted if bias is None or shifted is None else shifted - bias
        dropped: Tensor = base(x) + self.kind.apply_weight(x, changed - weight, shift, self.dropout)
        return dropped

    @property
    def summed(self) -> bool:
        """Whether the core adds the change to the output by itself: it is additive and has no `forward` of its own."""
        return self.additive and type(self).forward is AdapterLayer.forward


class LowRankLayer(AdapterLayer):
    """A change of low rank: a subclass defines `factors`."""

    additive = True
    _needs = ("factors",)

    def factors(self) -> Factors:
        """The change: `dW = scale * up @ diag(mid) @ down`, in the shapes of files or as matrices."""
        raise NotImplementedError

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """See `AdapterLayer.merged`.

        Raises:
            UnsupportedError: the factors act across the groups of a convolution.
        """
        factors = self.factors().flat()
        if self.kind.is_ungrouped(factors.down):
            raise UnsupportedError(
                "The factors act across the groups of a convolution, so no weight of the layer's shape equals them. "
                "Leave the adapter active."
            )
        up, down, shift, *_ = factors.folded(weight.dtype)
        if shift is not None:
            bias = shift if bias is None else bias + shift
        return torch.addmm(weight, up, down), bias


class DenseLayer(AdapterLayer):
    """A change that is a whole matrix: a subclass defines `change`.

    With `rank` and `factors` the core chooses the cheapest of factors, `dW` and `W + dW` for each input.

    Attributes:
        rank: of the exact factors, if there are any that are worth it.
        few: `few(x)`, optional: `x dW^T` for `x (tokens, in)` with up to 4 tokens, without building a matrix.
        tile: `tile(rows, columns)`, optional: `dW[rows, columns]` of two slices, so that a merge never has the whole.
    """

    rank: int | None = None
    few: Any = None
    tile: Any = None

    additive = True
    _needs = ("change",)

    def change(self) -> Tensor:
        """The change `dW` `(out, in)`, scaling included."""
        raise NotImplementedError

    def factors(self) -> Factors:
        """Exact factors of `change()`, of rank `self.rank`; by default with an identity matrix."""
        change = self.change()
        one = torch.eye(min(change.shape), dtype=change.dtype, device=change.device)
        return Factors(one, change) if change.shape[0] <= change.shape[1] else Factors(change, one)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """See `AdapterLayer.merged`; a subclass may do it in one pass."""
        return weight + self.change().to(weight.dtype), bias


def twin(module: nn.Module, change: Callable[[Tensor], Tensor]) -> Any:
    """`module` with other tensors in the place of its parameters and buffers, for one computation.

    The module itself stays as it is, so that other threads may use it.
    """
    other = object.__new__(type(module))
    other.__dict__.update(module.__dict__)
    for registry in ("_parameters", "_buffers"):
        held = getattr(module, registry)
        other.__dict__[registry] = {name: t if t is None else change(t) for name, t in held.items()}
    other.__dict__["_modules"] = {n: m if m is None else twin(m, change) for n, m in module._modules.items()}
    return other


def widened(layer: AdapterLayer, dtype: torch.dtype) -> Any:
    """The layer with its parameters and floating buffers in `dtype` where they have less; itself if none has."""

    def narrow(tensor: Tensor) -> bool:
        return tensor.is_floating_point() and tensor.dtype.itemsize < dtype.itemsize

    if not any(map(narrow, (*layer.parameters(), *layer.buffers()))):
        return layer
    return twin(layer, lambda tensor: tensor.to(dtype) if narrow(tensor) else tensor)


def device_of(layer: AdapterLayer) -> torch.device:
    """The device of a layer's tensors, or of those that it shares; the CPU if there are none."""
    modules = (module for module in (layer, layer.shared) if isinstance(module, nn.Module))
    tensors = (tensor for module in modules for tensor in (*module.parameters(), *module.buffers()))
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


def without_values(layer: AdapterLayer) -> Any:
    """The layer on the meta device, with what it shares: its functions give shapes and compute nothing."""

    def empty(tensor: Tensor) -> Tensor:
        found = tensor.to("meta")
        return nn.Parameter(found, requires_grad=False) if isinstance(tensor, nn.Parameter) else found

    light = twin(layer, empty)
    if isinstance(layer.shared, nn.Module):
        light.__dict__["shared"] = twin(layer.shared, empty)
    return light


def _check_methods(cls: type, base: type, names: Iterable[str]) -> None:
    """Raise `PluginError` for a misspelt method of `cls`, and for one that cannot be called as that of `base`."""
    lacking = [name for name in names if getattr(cls, name) is getattr(base, name)]
    for name, value in vars(cls).items():
        if name in names:
            _check_signature(cls, base, name)
            continue
        own = inspect.isfunction(value) and not name.startswith("_") and not hasattr(base, name)
        for meant in difflib.get_close_matches(name, lacking, 1, cutoff=0.8) if own else ():
            raise PluginError(
                f"{cls.__name__}.{name}: nothing calls it. Is it meant to be {meant!r}, of {base.__name__}? If it "
                "is a helper, begin its name with an underscore."
            )


def _check_signature(cls: Any, base: type, name: str) -> None:
    """Raise `PluginError` if `cls` has something else than a method `name` that takes what the method of `base` takes.

    Where a call has any arguments, that of a model or of any module, the first one alone is known.
    """
    value, spec = vars(cls)[name], inspect.signature(getattr(base, name)).parameters
    whole = getattr(cls, "any_module", False) or any(p.kind is p.VAR_POSITIONAL for p in spec.values())
    given = [p for p in spec if p != "self"][: 1 if whole and name == "forward" else None]
    shown = f"def {name}(self, {', '.join(given)}{', ...' * whole})" if given else f"def {name}(self)"
    if not callable(value) or isinstance(value, type):
        raise PluginError(f"{cls.__name__}.{name} must be a method: {shown}.")
    signature = inspect.signature(value)
    takes = [p.name for p in signature.parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD][1:]
    moved = any(own in given and given.index(own) != n for n, own in enumerate(takes))
    try:
        (signature.bind_partial if whole else signature.bind)("self", *given)
    except TypeError:
        moved = True
    if moved:
        raise PluginError(f"{cls.__name__}.{name}{signature} does not take what it is called with: {shown}.")


def _check_made(module: nn.Module, given: Mapping[str, object]) -> None:
    """Raise `PluginError` for something that `setup` of a layer, or of what layers share, must not leave there.

    Args:
        given: the attributes that the module has from the library.
    """
    for fault in (*_wrong_attributes(module, given), *_wrong_tensors(module)):
        raise PluginError(f"{type(module).__name__}.setup {fault}.")


def _wrong_attributes(module: nn.Module, given: Mapping[str, object]) -> Iterator[str]:
    """Attributes that `setup` must not set, as the ends of sentences."""
    own, cls = vars(module), type(module)
    for name, value in given.items():
        if own.get(name, own) is not value:
            yield f"replaced self.{name}, which the library sets. Choose another name"
    for name in ("any_module", "up_factor", "additive"):
        if name in own:
            yield f"set self.{name}, which must be an attribute of the class"
    for name in (*module._parameters, *module._buffers, *module._modules):
        if hasattr(cls, name):
            number = " It must be a number" * ("dropout" in name)
            yield f"put a module or a tensor into self.{name}, but the class attribute {name} is what is read.{number}"
    for name in ("dropout", "row_dropout", "module_dropout"):
        value = getattr(module, name, 0.0)
        if value != 0.0 and misfit(value, Probability) is not None:
            yield f"set self.{name} = {value!r}; it must be a number from 0 to 1"


def _wrong_tensors(module: nn.Module) -> Iterator[str]:
    """Tensors that would not train, move or be saved as their author thinks, as the ends of sentences."""
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            yield (
                f"made a parameter {name!r} that does not require gradients. Every parameter trains; register a buffer "
                "for what does not"
            )
    for name in vars(module).keys() - _KEPT:  # torch's own registries are dictionaries of tensors
        if any(isinstance(leaf, Tensor) for leaf in tree_leaves(vars(module)[name])):
            yield (
                f"keeps tensors in self.{name}, which are not saved, moved or trained there. Make each a parameter or "
                "a buffer of its own, or use nn.ParameterList"
            )


# The attributes of every `Shared`, beside what `setup` makes.
_KEPT = {*vars(nn.Module()), "_made"}


class Shared(nn.Module):
    """What all layers of one adapter have in common: tensors, a part in the model's call, a term of the loss, a step.

    The layers have it as `self.shared` and read `self.shared.<name>` in each call, because `.to(...)` replaces tensors.
    It lives under `adapter_shared.<adapter>` at the model. A `Parameter` is trained and in the file. A persistent
    buffer is fixed and in the file, and a load sets it to the file's value. A buffer that is not persistent is made
    again by `setup` and is never in a file. Adapters whose shared tensors are all buffers, and equal, use one copy:
    change none in place.

    Attributes:
        replaces_call: the class defines `forward`, so it is the model's call while the adapter acts.
    """

    config: Any
    replaces_call: ClassVar[bool] = False

    def __init__(self, targets: Sequence[Target], config: Any, root: Target) -> None:
        super().__init__()
        self.__dict__["config"] = config
        self.setup(targets, config, root)
        if not self.replaces_call:
            _check_made(self, {"config": config})
        self.__dict__["_made"] = self.plain_attributes()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _check_methods(cls, Shared, ("setup", "forward", "penalty", "step"))
        cls.replaces_call = cls.forward is not Shared.forward

    def __getstate__(self) -> dict[str, Any]:
        # What a forward left for the layers belongs to that forward.
        own: dict[str, Any] = vars(self)
        if not self.replaces_call:
            return own
        made: dict[str, Any] = own["_made"]
        return {name: own[name] for name in own.keys() & _KEPT} | made

    def plain_attributes(self) -> dict[str, Any]:
        """What is neither a parameter, a buffer nor a module: what `setup` made, or what a forward has left."""
        return {name: value for name, value in vars(self).items() if name not in _KEPT}

    def setup(self, targets: Sequence[Target], config: Any, root: Target) -> None:
        """Make what is shared, before any layer. Called once: when an adapter is added, loaded or combined.

        Args:
            targets: every layer that the adapter will change, with sizes, paths and weights.
            root: the model. `root.new(...)` makes parameters; `root.dtype` is the widest dtype of the targets and
                `root.device` their device; `root.file` has the file's shared tensors, at load.
        """

    def forward(self, base: Any, *args: Any, **kwargs: Any) -> Any:
        """The model's call while the adapter acts, if a subclass defines this: for routers, prompts, task ids.

        The model's signature has its keywords, too. What it sets on itself is for the layers: it stays until the next
        forward, and copies and pickles have what `setup` made. So one model runs one forward at a time. Nothing is
        cast here. The adapter cannot be merged, combined, converted, or act in `per_sample`.

        Args:
            base: the model's own call, `base(*args, **kwargs)`, with the other adapters in it; of several such
                adapters the first active is the innermost. `base.module` is the model.
        """
        return base(*args, **kwargs)

    def penalty(self, layers: Mapping[str, AdapterLayer]) -> Tensor | float:
        """A term of the loss, which `ak.penalty(model)` gives. `layers` has the adapter's layers by path."""
        return 0.0

    def step(self, number: int, layers: Mapping[str, AdapterLayer]) -> None:
        """Called by `adapters.step()`: after `optimizer.step()` and before `zero_grad()`, so the gradients are there.

        Keep what it remembers in buffers of the layers, or of this module, that are not persistent: a checkpoint of a
        training holds these, and a file does not.

        Args:
            number: how many steps the adapter has made, this one included.
        """

    def equals(self, other: nn.Module) -> bool:
        """Whether both have nothing but buffers, with the same names, values, dtypes and devices."""
        if type(self) is not type(other) or any(True for part in (self, other) for _ in part.parameters()):
            return False
        ours, theirs = dict(self.named_buffers()), dict(other.named_buffers())
        return ours.keys() == theirs.keys() and all(
            not a.is_meta and a.device == theirs[n].device and a.dtype == theirs[n].dtype and torch.equal(a, theirs[n])
            for n, a in ours.items()
        )


def shared_tensors(shared: Shared | None) -> dict[str, Tensor]:
    """What a file holds of it: parameters and persistent buffers, by name."""
    return {} if shared is None else shared.state_dict(keep_vars=True)
