"""The contract between adapterkit and adapter methods: every hook a plugin can implement.

One plugin is one method. The hooks marked *required* must be there; the others have the default that
their text gives. Every hook is called for exactly one method, never for all of them, and never from a
`forward`. An exception raised in a hook reaches the caller wrapped in a `PluginError` that names the
package and the hook, unless it is an `AdapterError`; the model is then as it was before the call.

A hook implementation may leave out arguments it does not need (pluggy's rule), and its annotations are
compared with the ones here when it is registered. Shapes are `(out, in)` throughout.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor, nn

    from adapterkit.contract.combiners import Combiner
    from adapterkit.contract.config import AdapterConfig
    from adapterkit.contract.foreign import ForeignFile
    from adapterkit.contract.keys import KeyRule
    from adapterkit.contract.layers import AdapterLayer
    from adapterkit.contract.target import Target
    from adapterkit.kinds import Factors, LayerKind

PROJECT = "adapterkit"
METHODS_GROUP = "adapterkit.methods"
EXTENSIONS_GROUP = "adapterkit.extensions"
# What a method needs to be the result of `combine` and `convert`.
RESULT_HOOKS = ("config_from_ranks", "from_factors")
REQUIRED = ("config_type", "key_rule", "inject")

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec(firstresult=True)
def config_type() -> type[AdapterConfig]:  # type: ignore[empty-body]
    """*Required.* The dataclass a user writes for this method.

    A subclass of `AdapterConfig`, frozen, whose `method` equals the name of the entry point. It is
    called once, at registration.
    """


@hookspec(firstresult=True)
def key_rule(config: AdapterConfig) -> KeyRule:  # type: ignore[empty-body]
    """*Required.* The key prefix of the method's parameters, its shared tensors, and what files may lack.

    Called with a default config at registration, and with the adapter's own config on every save and load: what is
    exempt may depend on it. Two methods may have the same prefix: parameters live under their adapter, and a file
    names its method.
    """


@hookspec(firstresult=True)
def prepare(targets: Sequence[Target], config: AdapterConfig) -> Mapping[str, Tensor] | None:
    """Tensors that all targets of one adapter share, made once, before any layer.

    The core owns the one copy, registers it with the model so that `.to(...)` moves it, and hands it to
    `inject` as `shared`. An `nn.Parameter` trains, as those of the layers do, and is its adapter's own. Any other
    tensor is fixed: adapters whose tensors are equal have one copy, so a method must never change it in place.
    The names must be the `shared` names of the key rule. `None`, the default, and an empty mapping mean that there
    are none. When an adapter is loaded, `prepare` is called as well and the file's tensors replace what it returned.
    """


@hookspec(firstresult=True)
def inject(target: Target, config: AdapterConfig, shared: Mapping[str, Tensor]) -> AdapterLayer | None:
    """*Required.* The adapter layer for one target.

    Its parameters begin with the rule's prefix, have `target.dtype` and `target.device`, and hold
    their initial values, unless `target.load` is true: then a file's values are about to be assigned
    and they may be left empty. Must not change the target: the core does the surgery.
    `shared` is a live view: read a shared tensor from it in each `forward`, because `.to(...)` replaces it.
    `None` says that the method does not support this layer kind; the core turns it into an error that
    names the layer.
    """


@hookspec(firstresult=True)
def factors(layer: AdapterLayer) -> Factors | None:
    """Merge rule of an additive method: the exact low-rank form `dW = up @ down`, scaling included.

    The result has shapes `up (out, r)`, `down (r, in)`, `bias (out,)` or `None`. `None`, the default,
    says that there is no such form; then `merge` is asked.
    """


@hookspec(firstresult=True)
def merge(layer: AdapterLayer, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None] | None:
    """Merge rule of any other method: the weight and bias after the adapter is worked in.

    Pure: `weight`, canonical `(out, in)` in float32, and `bias` `(out,)` are not changed. The bias comes back as
    a tensor of its shape, or as `None` where the layer has none: a merge cannot give it one. `None` in place of the
    pair says that this layer cannot be merged; without this hook no layer of the method can.
    """


@hookspec(firstresult=True)
def to_file(config: AdapterConfig, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor] | None:
    """Save rule: which tensors go to a file, and under which names.

    Keys are `<path>.<local>` for adapter layers and `<name>` for shared tensors, without PEFT's
    `base_model.model.`. Heads and biases are the core's and are not here. `None`, the default: all as they are.
    """


@hookspec(firstresult=True)
def file_config(config: AdapterConfig) -> AdapterConfig | None:
    """Save rule: the config that describes what `to_file` wrote, where that is not `config` itself.

    LoRA writes PiSSA and OLoRA adapters as plain LoRA of twice the rank. `None`, the default: as it is.
    """


@hookspec(firstresult=True)
def from_file(
    config: AdapterConfig, tensors: Mapping[str, Tensor], layers: Mapping[str, LayerKind]
) -> Mapping[str, Tensor] | None:
    """The reverse of `to_file`, and the door for other programs' formats.

    Gets every tensor of the file, PEFT's prefix removed where it was there. What is for a layer of the model comes
    back under `<path>.<local>`; what is not keeps its key, so that it is reported: as ignored if nothing of
    its part of a pipeline (`unet.`, `lora_te_`) was for this model, else as unexpected.
    `layers` is every layer of the model that can hold an adapter, by its path; `ForeignLayers` finds the layer
    that another program's name stands for. `None`, the default: all as they are.
    """


@hookspec(firstresult=True)
def foreign_config(
    tensors: Mapping[str, Tensor], layers: Mapping[str, LayerKind], metadata: Mapping[str, str]
) -> AdapterConfig | None:
    """The config that a bare file of tensors, from another program, amounts to on a model with these layers.

    Every installed method is asked, and exactly one must answer. `target_modules` must be exactly the layers
    that the file has tensors of, and the ranks and scalings those of the file; `from_file` then gets this config.
    `metadata` is the header of a safetensors file. `None`, the default: the file holds nothing of this method,
    or nothing that this model has a layer for.
    """


@hookspec(firstresult=True)
def to_foreign(
    naming: str,
    config: AdapterConfig,
    tensors: Mapping[str, Mapping[str, Tensor]],
    layers: Mapping[str, LayerKind],
    component: str,
) -> ForeignFile | None:
    """The reverse of `foreign_config` and `from_file`: the adapter as another program's files have it.

    `naming` is `"kohya"`, `"lycoris"` or `"diffusers"`; `component` the part of a pipeline that the model is, as keys
    name it (`"lora_unet"`, `"text_encoder"`). `tensors` has for each layer's path what `to_file` gave, by its name
    there, `layers` its kind, and `config` is what `file_config` gave. What comes back has the other program's names in
    place of those; the core puts the layers' names before them. What such a file cannot hold is an `UnsupportedError`.
    `None`, the default: that program does not know the method.
    """


@hookspec(firstresult=True)
def layers_in_file(tensors: Mapping[str, Tensor], config: AdapterConfig | None) -> Mapping[str, nn.Module] | None:
    """The layers that a file's tensors are for, as far as the tensors themselves tell.

    With it an adapter is inspected, combined and converted by its files alone. For each layer's path a module of the
    right kind and sizes on the meta device, such as `nn.Linear(in, out, device="meta")`; a size that follows from a
    tensor which is not there is 1, so that the tensor is reported as missing. Of what a linear layer and
    a convolution may both have, a linear layer: methods see the same `(out, in)`.
    `tensors` are on the meta device: shapes and dtypes, no values; PEFT's prefix is removed. `config` is `None` for
    a file of another program, whose modules keep the names that they have there. `None`, the default: the tensors do
    not tell, because they are cut to size by the layer (VeRA's are); then users have to name the base.
    """


@hookspec(firstresult=True)
def from_factors(target: Target, config: AdapterConfig, factors: Factors) -> Mapping[str, Tensor] | None:
    """Lets a method be the result of `combine` and `convert`: the parameters of a layer with this `dW`.

    `None`, the default, says that the method cannot represent these factors.
    """


@hookspec(firstresult=True)
def config_from_ranks(ranks: Mapping[str, int], bias: bool, trained_biases: str) -> AdapterConfig | None:
    """The config of a combined or converted adapter, for which `from_factors` then gives the parameters.

    `ranks` has the rank of the change at each path; `bias` says whether the changes have biases; `trained_biases`
    is what `AdapterConfig.trained_biases` is to be. The core sets `target_modules`. `None`, the default, says that
    the method cannot be a result.
    """


@hookspec
def layer_kinds() -> Sequence[type[LayerKind]]:  # type: ignore[empty-body]
    """New layer kinds, asked before the built-in ones, latest registered first. For extensions."""


@hookspec
def combiners() -> Mapping[str, Combiner]:  # type: ignore[empty-body]
    """New ways to combine adapters: `adapterkit.contract.combiners.Combiner` by name. For extensions."""
