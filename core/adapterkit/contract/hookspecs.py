"""The contract between adapterkit and adapter methods: every hook that a plugin can implement.

One plugin is one method. `ak.plugin(Config, Layer, prefix=...)` makes one that implements the three hooks marked
*required* from the classes. An author overrides a hook with a method of its name on a subclass of `ak.Plugin`, or
writes a module of `@hookimpl` functions. Every other hook has the default that its text gives.

A hook is called for exactly one method, never for all of them, and never from a `forward`. An exception raised in a
hook reaches the caller wrapped in a `PluginError` that names the package and the hook, unless it is an
`AdapterError`. The model is then as it was before the call.

An implementation may leave out arguments that it does not need (pluggy's rule). Its annotations are compared with the
ones here when it is registered. Shapes are `(out, in)` throughout.

Keys: an adapter layer's tensor is `<path>.<local>`, such as `encoder.layer.0.query.lora_A.weight`, and a shared tensor
is `<name>`, such as `vera_A`. PEFT's `base_model.model.` is not in them. Heads and trained biases belong to the core
and no hook sees them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor, nn

    from adapterkit.contract.combiners import Combiner
    from adapterkit.contract.config import AdapterConfig
    from adapterkit.contract.formats import Format
    from adapterkit.contract.keys import KeyRule
    from adapterkit.contract.layers import AdapterLayer, Shared, Target
    from adapterkit.kinds import Factors, LayerKind

PROJECT = "adapterkit"
METHODS_GROUP = "adapterkit.methods"
EXTENSIONS_GROUP = "adapterkit.extensions"
REQUIRED = ("config_type", "key_rule", "inject")

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec(firstresult=True)
def config_type() -> type[AdapterConfig]:  # type: ignore[empty-body]
    """*Required.* The dataclass that a user writes for this method.

    A subclass of `AdapterConfig`, frozen, whose `method` is the name of the entry point. It is called once, at
    registration.
    """


@hookspec(firstresult=True)
def key_rule(config: AdapterConfig) -> KeyRule:  # type: ignore[empty-body]
    """*Required.* The prefix of the method's keys, and the tensors that a file may lack.

    Every parameter and buffer of the method's layers, and every shared tensor, has a name that begins with the prefix.
    Two methods may have the same prefix: parameters live under their adapter, and a file names its method. It is
    called with a default config at registration, and with the adapter's own config when an adapter is saved or loaded.
    """


@hookspec(firstresult=True)
def targets(model: nn.Module, config: AdapterConfig) -> Sequence[str] | None:
    """The paths of the modules to adapt, in the order of the model.

    `None`, the default: the layers that `target_modules` and the fields beside it select, which `ak.select` lists. A
    method overrides this if it chooses by other rules, such as "a table and all modules that are tied to it". The list
    may be empty if the method has a `Shared.forward`.
    """


@hookspec(firstresult=True)
def inject(target: Target, config: AdapterConfig, shared: Shared | None) -> AdapterLayer | None:
    """*Required.* The adapter layer for one target: `Layer(target, config, shared)`.

    `shared` is what all layers of the adapter have in common: an instance of the class that the plugin has under the
    name `shared`, made before any layer, or `None` if it has no such class.
    `config` is the layer's own: its patterns are worked in, so that `config.r` is this layer's rank. The layer's
    parameters come from `target.new`. The target itself must not change: the core does the surgery. `None` says
    that the method does not support this layer kind, and becomes an error that names the layer. `setup` of the layer
    may raise `UnsupportedError` with a reason instead.
    """


@hookspec(firstresult=True)
def to_file(config: AdapterConfig, tensors: Mapping[str, Tensor]) -> tuple[AdapterConfig, Mapping[str, Tensor]] | None:
    """Save rule: the config and the tensors that a file holds for this config and these tensors.

    By default (`None`) both stay as they are. LoRA writes a PiSSA adapter as plain LoRA of twice the rank; AdaLoRA's
    `rank_pattern` follows from its tensors.
    """


@hookspec(firstresult=True)
def from_file(
    config: AdapterConfig, tensors: Mapping[str, Tensor]
) -> tuple[AdapterConfig, Mapping[str, Tensor]] | None:
    """The reverse of `to_file`: the config and the tensors of the adapter that a file holds.

    There is no model: inspecting, reporting and converting files use the result. `tensors` are all tensors of the file,
    and the hook returns those of others unchanged. By default (`None`) both stay as they are.
    """


@hookspec(firstresult=True)
def from_factors(
    factors: Mapping[str, Factors], kinds: Mapping[str, LayerKind]
) -> tuple[AdapterConfig, Mapping[str, Tensor]] | None:
    """Makes the method a possible result of `combine`, `convert` and `swap`: the adapter that changes weights so.

    `factors` has the change of the weight at each path, `dW = up @ down` with its scaling included, and `kinds` says
    what each layer is. The result has the keys that `to_file` gives. The core sets `target_modules` and `bias`. A
    change that the method cannot express raises `UnsupportedError`. `None`, the default: the method cannot be a result.
    """


@hookspec(firstresult=True)
def sizes(tensors: Mapping[str, Tensor]) -> tuple[int, int] | nn.Module | None:
    """The sizes `(out, in)` of one layer as the tensors of its adapter layer tell them, by their local names.

    With it an adapter is inspected, combined and converted by its files alone. The tensors are on the meta device. A
    size whose tensor is missing is 1. For a convolution or an embedding the result is such a module on the meta device.
    `None`, the default: the tensors do not tell the sizes (VeRA's layers cut shared matrices to their size), and users
    have to name the base.
    """


@hookspec(firstresult=True)
def formats() -> Sequence[Format] | None:
    """Other programs' files that hold adapters of this method: objects with `read` and `write`, see `ak.Format`.

    `None`, the default: there are none.
    """


@hookspec
def layer_kinds() -> Sequence[type[LayerKind]]:  # type: ignore[empty-body]
    """New layer kinds, asked before the built-in ones, latest registered first. For extensions."""


@hookspec
def combiners() -> Mapping[str, Combiner]:  # type: ignore[empty-body]
    """New ways to combine adapters: `adapterkit.Combiner` by name. For extensions."""


def names() -> list[str]:
    """The names of all hooks."""
    return [name for name, value in globals().items() if hasattr(value, f"{PROJECT}_spec")]
