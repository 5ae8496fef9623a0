"""`attach`, and `Adapters`: all adapters of one model and everything a user does with them."""

from __future__ import annotations

import copy
import dataclasses
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from adapterkit.checkpoints import StateDictHooks, hook_saving, load_training_state, training_state, unhook_saving
from adapterkit.combining import (
    Choices,
    Source,
    Space,
    build_result,
    check_sources,
    config_to_extract,
    extracted,
    mix,
    module_of,
    same_layer,
)
from adapterkit.contract import (
    ATTRIBUTE,
    AdapterConfig,
    AdapterLayer,
    MajoritySign,
    Shared,
    default_registry,
    twin,
)
from adapterkit.errors import ConfigError, StateError, UsageError, unknown, usage, usage_of_methods, warn
from adapterkit.files import (
    adapter_folder,
    adapter_tensors,
    load_adapter,
    local_path,
    match_adapter,
    read,
    refuse,
    save_adapter,
    swap_in,
    warn_of_misfit,
)
from adapterkit.formats import AdapterFiles
from adapterkit.forward import State, Strength, check_trained_dtype
from adapterkit.merging import Merged, Parting, merging, take_heads
from adapterkit.migration import METHODS, advice
from adapterkit.model import (
    AdaptedModel,
    Adapter,
    BaseModules,
    LabelSet,
    LayerBuilder,
    acting_heads,
    build_adapter,
    checked_strengths,
    completed,
    copy_head,
    initial_values,
    inner_model,
    parameter_groups,
    resize_new_head,
    resized_tables,
    select,
    select_on,
    tables,
    training_among,
)
from adapterkit.results import AddReport, CombineReport, LoadReport, Status, SwapReport, in_html
from adapterkit.rows import Batch, Rows, RowState
from adapterkit.tensors import (
    check_averaged,
    check_can_grow,
    default_modes,
    full,
    gathered,
    has_fsdp1,
    is_sharded,
    refuse_fsdp1,
    reshard,
    size_of,
    uninterrupted,
    watch_wrappers,
)
from adapterkit.view import AdapterView

if TYPE_CHECKING:
    from adapterkit.report import Report

_NO_MODEL = {
    "str": " Load the model first; ak.extract_files and others take folders.",
    "Adapters": " These are adapters already, and adapters.model is their model.",
}
_KEEPS_REPLACEMENT = "What is there now stays as it is."


@usage("adapters = ak.attach(model); adapters.add('mood', ak.LoraConfig(r=8))")
def attach(model: nn.Module) -> Adapters:
    """The adapters of a model, always the same object. The call itself changes nothing.

    For a model that is wrapped by `torch.compile`, `DistributedDataParallel` or DeepSpeed's engine, these are the
    adapters of the model inside; for torch's `AveragedModel`, those of its copy. Attach to the whole model and not to a
    model inside it: `save_pretrained` and `from_pretrained` of the outer model would not know of the adapters.

    Raises:
        ConfigError: not a module, or a model that PEFT has adapted.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"attach needs a torch.nn.Module, not a {type(model).__name__}." + _NO_MODEL.get(type(model).__name__, "")
        )
    watch_wrappers()
    model = inner_model(model)
    peft: Any = sys.modules.get("peft")
    if peft is not None and isinstance(model, (peft.PeftModel, peft.PeftMixedModel)):
        raise ConfigError(
            "This model is a PeftModel, which adapts its layers itself. ak.from_peft(model) takes its adapters over; "
            "model.unload() gives the base model without them."
        )
    found = model.__dict__.get(ATTRIBUTE)
    if found is None:
        found = Adapters(model)
    assert isinstance(found, Adapters)
    return found


@usage()
def penalty(model: nn.Module) -> Tensor:
    """The terms of the loss that the active adapters add: `loss = loss + ak.penalty(model)`. Zero if none adds any."""
    adapters = attach(model)
    total = torch.zeros((), device=next((p.device for p in adapters.model.parameters() if not p.is_meta), None))
    for adapter in map(adapters._adapter, adapters.active):
        if adapter.shared is not None:
            shared, layers = adapter.shared, adapter.layers
            if type(shared).penalty is not Shared.penalty and any(map(is_sharded, adapter.parameters())):
                shared, layers = twin(shared, full), {path: twin(layer, full) for path, layer in layers.items()}
            total = total + shared.penalty(layers)
            adapter.penalised = True
    return total


@usage_of_methods("adapters")
class Adapters:
    """The adapters of one model. `attach` makes it.

    `adapters["mood"]` is one of them. A call that raises has changed nothing.
    """

    # What there is

    def __init__(self, model: nn.Module) -> None:
        if not isinstance(model, nn.Module) or ATTRIBUTE in model.__dict__ or inner_model(model) is not model:
            raise UsageError("ak.attach(model) gives the adapters of a model; do not make them yourself.")
        self._model = AdaptedModel(model)
        self._adapters, self._active = self._model.adapters, self._model.active
        self._merged = Merged()
        self._state_dict_hooks: StateDictHooks | None = None
        model.__dict__[ATTRIBUTE] = self

    @property
    def model(self) -> nn.Module:
        """The adapted model."""
        return self._attached_model.model

    @property
    def names(self) -> tuple[str, ...]:
        """All adapters, in the order in which they were added."""
        return tuple(self._adapters)

    @property
    def active(self) -> tuple[str, ...]:
        """The adapters that act now; the first is the innermost."""
        return self._active.state.names

    @property
    def strengths(self) -> dict[str, Strength]:
        """What the change of each active adapter is multiplied by; see `activate`."""
        return {name: copy.copy(self._active.state.strengths.get(name, 1.0)) for name in self.active}

    @property
    def merged(self) -> tuple[str, ...]:
        """The merged adapters, in the order in which they were merged."""
        return self._merged.names

    @property
    def trainable(self) -> tuple[str, ...]:
        """The adapters of which a parameter requires a gradient now, whoever set it, in the order of `names`."""
        return tuple(name for name, adapter in self._adapters.items() if adapter.trains())

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name in self._adapters

    def __len__(self) -> int:
        return len(self._adapters)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __getitem__(self, name: str) -> AdapterView:
        """One adapter: its config, layers, heads and parameters; `save`, `merge`."""
        self._adapter(name)
        return AdapterView(self, name)

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            one = f" One adapter is adapters[{name!r}]." if name in self.__dict__.get("_adapters", ()) else ""
            raise AttributeError(f"'Adapters' object has no attribute {name!r}.{advice(name, METHODS) or one}")

    def __repr__(self) -> str:
        if not self._model.attached:
            return "<Adapters, detached>"
        return f"<Adapters of {type(self.model).__name__}: {', '.join(map(repr, self.names)) or 'none'}>"

    def _repr_html_(self) -> str:
        return self.status()._repr_html_() if self._model.attached else in_html(repr(self))

    def config(self, name: str) -> AdapterConfig:
        """The config of an adapter."""
        return self._adapter(name).config

    @usage("adapters.parameters('mood')")
    def parameters(self, name: str) -> Iterator[nn.Parameter]:
        """The parameters of an adapter: of its layers, its heads and its biases, and those that its layers share."""
        return (parameter for _, parameter in self.named_parameters(name))

    def layers(self, name: str) -> Mapping[str, AdapterLayer]:
        """The adapter layers of an adapter, by the paths of their targets. To be read, not to be changed."""
        return MappingProxyType(self._adapter(name).layers)

    def heads(self, name: str) -> Mapping[str, nn.Module]:
        """An adapter's own copies of modules, by the paths of the modules that they replace. To be read only."""
        return MappingProxyType(self._adapter(name).heads)

    def step(self) -> None:
        """Let the active adapters that train make their step: after `optimizer.step()` and before `zero_grad()`.

        AdaLoRA moves its ranks here. For most methods nothing happens.

        Raises:
            StateError: the method needs the gradients, and they are gone.
        """
        for adapter in map(self._adapter, self.active):
            if not adapter.trains():
                continue
            if adapter.shared is not None and type(adapter.shared).step is not Shared.step:
                with self._gathered([adapter], writing=True, gradients=True):
                    self._make_step(adapter, adapter.shared)
            adapter.steps += 1

    def named_parameters(self, name: str) -> Iterator[tuple[str, nn.Parameter]]:
        """`parameters` with names: `<module path>.<parameter>`, or `<parameter>` if the layers share it."""
        adapter = self._adapter(name)
        reshard(self.model)  # after a forward FSDP2 leaves copies in place, which an optimizer must not get
        return adapter.named_parameters()

    def parameter_groups(
        self, options: Mapping[str, Mapping[str, Any]] | None = None, *, lora_plus_ratio: float | None = None
    ) -> list[dict[str, Any]]:
        """Groups for an optimizer, with every parameter that trains in exactly one of them.

        `torch.optim.AdamW(adapters.parameter_groups({"a": {"lr": 1e-3}, "b": {"lr": 1e-4}}))`.

        Args:
            options: of the groups of an adapter, such as `lr` and `weight_decay`. Adapters that train and are not named
                have groups too, with the optimizer's own options.
            lora_plus_ratio: LoRA+ (Hayou et al. 2024, arXiv 2402.12354): a layer's up factor B has a group of its own,
                `"<adapter>.up"`, with `lr` times this ratio. Heads, biases and all else have the plain `lr`.

        Raises:
            UnknownNameError: no such adapter.
            StateError: an adapter that does not train is named, or none trains.
            ConfigError: malformed options, or a ratio where the options have no `lr`.
            UnsupportedError: a ratio, and a method whose layers name no up factor (LoHa, VeRA).
        """
        options, trainable = {} if options is None else options, self.trainable
        if not isinstance(options, Mapping):
            raise ConfigError("options must be those of each adapter's group: parameter_groups({'a': {'lr': 1e-4}}).")
        if not trainable:
            first = f"{self.merged[0]!r} is merged; call unmerge()" if self.merged else "Call activate"
            raise StateError(f"No adapter trains, so there is nothing for an optimizer. {first} first.")
        for name in options:
            if self._adapter(name).name not in trainable:
                raise StateError(f"Adapter {name!r} does not train. Call activate first, with all that should train.")
        reshard(self.model)
        return parameter_groups([self._adapters[name] for name in trainable], options, lora_plus_ratio)

    def status(self) -> Status:
        """A table of the adapters; `print` shows it.

        `active` is what acts in this thread, `trainable` how many parameters require gradients if not all do. Notes
        name modules that were replaced since, where the adapter does not act any more, and layers that nothing called
        or read since the adapter was activated (compiled forwards are not seen).
        """
        reshard(self.model)
        sharded = has_fsdp1(self.model)
        part = ("FullyShardedDataParallel: the parameters are those of this process",) if sharded else ()
        rows, paths_now = [], BaseModules(self.model).paths_of
        for name, adapter in self._adapters.items():
            changed = [f"{path!r} {what} since" for path, what in adapter.changed(paths_now).items()]
            strength = self.strengths.get(name, 1.0)
            what = "other strengths at each layer" if isinstance(strength, Mapping) else f"a strength of {strength:g}"
            scaled = [f"acts with {what}"] if strength != 1.0 else []
            notes = (*part, *scaled, *changed, *self._model.never_ran(adapter))
            rows.append(adapter.status(active=name in self.active, merged=name in self.merged, notes=notes))
        trained = sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)
        return Status(tuple(rows), trained, self._model.size)

    # Adding

    @usage("adapters.add('mood', ak.LoraConfig(r=8))")
    @default_modes()
    def add(
        self,
        name: str,
        config: AdapterConfig,
        *,
        num_labels: int | None = None,
        id2label: Mapping[int, str] | None = None,
        activate: bool = True,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
    ) -> AddReport:
        """Add a new adapter. The first `add` freezes the base model; `detach` restores its `requires_grad` flags.

        Random initial values follow from one number, drawn from torch's global generator, and the path of each layer.
        So after `torch.manual_seed` a layer has the same ones in every process, whatever else is adapted or sharded.

        Args:
            name: any text. A dot in it is `·` in the names of parameters.
            config: the method, the layers and the sizes.
            num_labels, id2label: the label set of the adapter's own head; its output layer gets that many rows.
                `None`: the model's own label set.
            activate: make it the only active adapter, and trainable.
            dtype: of its layers. `None`: the model's, but float32 for a half-precision model; `"model"`: the model's
                own, for its heads and biases too.
            device: `"meta"` makes no values, for `load_state_dict` or `load_training_state` to bring them. `None`:
                where each layer computes.

        Raises:
            ConfigError: the name is taken or not allowed, or the config, the dtype or the device is malformed.
            SelectionError: the config selects nothing here, or a layer that cannot be adapted.
            PluginError: the method's plugin failed.
        """
        self._check_new_name(name)
        check_trained_dtype(dtype, "model")
        meta = None if device is None else torch.device("meta")
        if device not in (None, "meta", meta):
            raise ConfigError(f"device = {device!r} must be 'meta' or None: an adapter is where its layers compute.")
        method = default_registry.method_of(config)
        labels = LabelSet.chosen(num_labels, id2label)
        modules = BaseModules(self.model)
        selection = select_on(modules, config)
        builder = LayerBuilder(method, config)
        adapter, notes = build_adapter(modules, name, builder, selection, self._active, dtype=dtype, device=meta)
        notes += self._model.notes(adapter, modules)
        heads, base = [*adapter.heads.values()], self._model.labels
        adapter.labels = resize_new_head(heads, labels, base, self.model, adapter.seed)
        if selection.unmatched:
            listed = ", ".join(selection.unmatched)
            warn(f"These entries of the config matched nothing: {listed}.")
        self._install(adapter, activate=activate, trainable=activate)
        parameters = size_of(adapter.parameters())
        sizes = (parameters, self._model.size)
        return AddReport(name, selection.paths, tuple(adapter.heads), *sizes, selection.unmatched, tuple(notes))

    @default_modes()
    def reset(self, name: str) -> None:
        """Give an adapter the initial values of `add` again, made for the weights that the base has now.

        A model that is built on the meta device gets its adapters there, then memory (`to_empty`), the base's weights,
        and last this. The random numbers are those that `add` would have drawn. The number of steps is 0 again.

        Raises:
            StateError: it is merged, the base has no weights yet, or the adapter has other sizes than its config says.
        """
        adapter = self._adapter(name)
        self._model.check_not_merged([name])
        self._model.check_unchanged("reset", [name])
        self._check_biases_begin(adapter)
        with self._model.writing(adapter), uninterrupted():
            values = initial_values(adapter, self.model)
            with self._gathered([adapter], writing=True):
                adapter.write(values, self.model)
            adapter.steps = 0

    @default_modes()
    def copy(self, source: str, target: str) -> None:
        """Add an independent copy of an adapter under another name. The copy is not active."""
        adapter = self._adapter(source)
        self._check_new_name(target)
        self._attached_model.check_unchanged("copy", [source])
        shared_with_model = {id(module): module for module in (*adapter.hosts.values(), *adapter.readers)}
        with self._gathered([adapter]):
            duplicate = copy.deepcopy(adapter, shared_with_model)
        duplicate.name = target
        duplicate.trains_for_now, duplicate.trained_before = [], []
        self._install(duplicate)

    @uninterrupted()
    def rename(self, old: str, new: str) -> None:
        """Give an adapter another name."""
        adapter = self._adapter(old)
        self._model.check_not_merged([old])
        self._model.check_not_per_sample("rename")
        self._check_new_name(new, grows=False)
        self._model.check_unchanged("rename", [old])
        self._model.rename(adapter, new)

    @uninterrupted()
    def remove(self, name: str) -> None:
        """Remove an adapter with its layers, head and biases. It is not active any more."""
        adapter = self._adapter(name)
        self._model.check_not_merged([name])
        self._model.check_not_per_sample("remove")
        self._model.remove(adapter)

    # Which adapters act

    @usage("adapters.activate('mood'), or adapters.activate('mood', 'topic', heads='mood')")
    def activate(
        self,
        *names: str,
        trainable: bool | Collection[str] = True,
        heads: str | None = None,
        strengths: Mapping[str, Strength] | None = None,
    ) -> None:
        """Make these the active adapters, with their heads and label sets. Without a name: none.

        This holds in every thread that is not in a block (`activated`, `disabled`, `per_sample`); in a block it holds
        there alone. A switch costs the same for any number of layers, unless `requires_grad` changes. A graph keeps the
        adapters with which it was made, also where gradient checkpointing computes again. So parameters that a graph
        holds keep requiring gradients until the first switch after the graph is freed.

        Args:
            trainable: whether their parameters require gradients, or the names of those that train: with
                `activate("a", "b", trainable=["b"])`, `b` trains on top of a frozen `a`. No other adapter trains.
            heads: the adapter that provides the head, if several have their own copy of one module.
            strengths: what an adapter's change of weights and biases is multiplied by, `{"a": 0.7}`; 1 for the others.
                Any finite number: 0 is without effect, and a negative one subtracts. Or numbers for some layers or
                blocks by their paths, `{"a": {"encoder.layer.0": 0.5}}`, where `None` switches them off. A head has no
                strength. It is not part of the adapter: `save` and `combine` do not know it.

        Raises:
            UnknownNameError: no such adapter.
            ConfigError: a name twice, two heads for one module and no choice, or a strength that is not a number.
            UnsupportedError: a strength of an adapter that is not additive, so that its change has no multiple.
            StateError: an adapter is merged, or its modules were replaced since (with `trainable=False` the first
                forward raises this), or DDP, FSDP or DeepSpeed around the model do not know its parameters and it
                should train.
        """
        adapters, block = [self._adapter(name) for name in names], self._active.in_block
        self._model.activate(self._attached_model.state("activate", adapters, heads, strengths, trainable, block=block))

    @contextmanager
    def activated(
        self,
        *names: str,
        trainable: bool | Collection[str] = True,
        heads: str | None = None,
        strengths: Mapping[str, Strength] | None = None,
    ) -> Iterator[None]:
        """`activate` for a `with` block, in this thread. Afterwards the adapters act as before.

        Threads that are started in the block, and tasks that are given to a `ThreadPoolExecutor` in it, act like the
        block; other threads do not. Tasks of one asyncio loop share a thread, and so its blocks. A `backward` may come
        after the block: what its graph holds keeps requiring gradients. Adapters that do not train act as constants.
        """
        adapters = [self._adapter(name) for name in names]
        state = self._attached_model.state("activated", adapters, heads, strengths, trainable, block=True)
        with self._model.block(state):
            yield

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The base model, without heads and with its own label set, for a `with` block in this thread.

        Raises:
            StateError: an adapter is merged.
        """
        if self.merged:
            listed = ", ".join(map(repr, self.merged))
            raise StateError(f"There is no bare model while {listed} is merged. Call unmerge() first.")
        with self._attached_model.block(State()):
            yield

    @contextmanager
    def per_sample(
        self,
        names: Sequence[str | None],
        *,
        trainable: bool | Collection[str] = False,
        batch_first: bool = False,
        strengths: Mapping[str, Strength] | None = None,
    ) -> Iterator[None]:
        """A different adapter, or none, for each row of a batch, for a `with` block in this thread.

        Equal to running each row alone with its adapter, with its head and trained biases; rows of `None` get the bare
        model, and merged adapters act on all rows. With adapters that have factors (`LowRankLayer`, LoHa) the cost does
        not depend on the number of adapters; with others the adapted layers run on the rows of one adapter after
        another. A batch may hold each row several times in a row, as `generate` does for beams.

        Args:
            names: an adapter or `None` for each row.
            trainable: whether their parameters require gradients, or the names of those that train; the others act as
                constants.
            batch_first: vouch that the first dimension of every adapted layer's input is the batch, each row's
                entries together; else this is proven for each layer (see `adapterkit.rows.batch.Batch`), or refused.
            strengths: as in `activate`.

        Raises:
            UnknownNameError: no such adapter.
            UnsupportedError: an adapter has a part in the model's own call (`Shared.forward`).
            ConfigError: no rows; in a forward: a batch of another size, or heads with outputs of different shapes.
            StateError: an adapter is merged; in the block or in a forward: rows that cannot be told apart.
        """
        if isinstance(names, str) or not isinstance(names, Sequence) or not names:
            raise ConfigError(f"per_sample needs an adapter's name or None for each row of the batch, not {names!r}.")
        rows = Rows([None if name is None else self._adapter(name).name for name in names], trusted=batch_first)
        self._model.check_not_merged(rows.adapters)
        for name in rows.adapters:
            method = default_registry.method_of(self._adapters[name].config)
            method.check_no_call(f"Adapter {name!r} cannot act in per_sample")
        scales = checked_strengths("per_sample", [self._adapters[name] for name in rows.adapters], strengths)
        entries = self._attached_model.entries()
        if not (batch_first or rows.uniform):
            entries.check({name: self._adapters[name].layers for name in rows.adapters})
        self._model.check_unchanged("per_sample", rows.adapters)
        merged = tuple(n for n in self._active.state.heads if n in self.merged)
        heads = merged + tuple(name for name in rows.adapters if self._adapters[name].heads)
        trains = training_among(rows.adapters, trainable)
        state = RowState(rows, Batch(entries), heads, merged, trains=trains, strengths=scales)
        with self._model.block(state):
            yield

    # Tensors and files

    def state_dict(self, name: str, source: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """An adapter's tensors under the keys that they have in a file.

        Args:
            source: take the tensors from this full state dict of the adapted model, such as FSDP provides.

        Raises:
            CheckpointError: `source` lacks some of them.
        """
        adapter = self._adapter(name)
        self._check_heads_not_merged(name)
        self._warn_if_changed(name)
        with self._gathered([adapter] if source is None else []):
            return adapter_tensors(adapter, default_registry.method_of(adapter.config), source)[1]

    @default_modes()
    def load_state_dict(self, name: str, tensors: Mapping[str, Tensor], *, strict: bool = True) -> LoadReport:
        """Copy tensors into an existing adapter. One that was made on the meta device gets initial values for the rest.

        Args:
            tensors: with the keys of a file, PEFT's or another program's, or a full state dict of an adapted model.
            strict: raise if a tensor is missing, unexpected or mismatched; else warn, and load what fits.

        Raises:
            CheckpointError: with `strict`, if something does not fit. Nothing has changed then.
        """
        adapter = self._adapter(name)
        self._model.check_not_merged([name])
        self._model.check_unchanged("load_state_dict", [name])
        with self._model.writing(adapter), self._gathered([adapter], writing=True):
            values, report = match_adapter(adapter, default_registry.method_of(adapter.config), self.model, tensors)
            if not report.ok:
                if strict:
                    refuse(report, name, "The state dict", self.model, adapter.layers, has_strict=True)
                warn_of_misfit(f"The state dict, loaded into adapter {name!r}", report)
            adapter.write(completed(adapter, self.model, values), self.model)
        return report

    @usage("adapters.save('mood', 'out/mood')")
    def save(
        self,
        name: str,
        folder: str | Path,
        *,
        source: Mapping[str, Tensor] | None = None,
        embeddings: bool | None = None,
    ) -> Path:
        """Write an adapter to a folder in PEFT's format. If that fails, the folder is as it was.

        A warning says if some of its layers never ran since it was activated, so that nothing was trained there, or if
        it trains with a strength, which no file holds.

        Args:
            source: take the tensors from this full state dict, as in `state_dict`.
            embeddings: whether the file holds the model's input and output embeddings, for `load` and for PEFT.
                `None`: if the vocabulary was resized, judged by the base's config if that is on this machine, or else
                by the traces of `resize_token_embeddings` on the model.

        Returns:
            The folder.

        Raises:
            SaveError: the folder cannot be written.
            StateError: a part of what the file must hold is merged now.
        """
        path = local_path(folder)
        adapter = self._adapter(name)
        self._check_heads_not_merged(name)
        self._warn_if_changed(name)
        if embeddings is not False:
            wanted = tables if embeddings else resized_tables
            self._check_tables_not_merged("The file", wanted(BaseModules(self.model), adapter.heads))
        save_adapter(adapter, self.model, path, source, embeddings=embeddings)
        for note in self._model.notes_for_file(adapter):
            warn(f"Adapter {name!r}: {note}.")
        return path

    def training_state(self, name: str, *, sharded: bool = False) -> dict[str, Tensor]:
        """Everything of an adapter with which its training goes on bit for bit, for `load_training_state`.

        That is what a file has, and what a file leaves out or changes: the factors of PiSSA, VeRA's projections,
        buffers that are not persistent (AdaLoRA's averages), the number of `step`s, the config. The embeddings are in
        it if the vocabulary was resized. Keys do not hold the adapter's name. Tensors are those in use, not copies, as
        in torch's `state_dict`.

        Args:
            sharded: give FSDP2's `DTensor`s as they are, for `torch.distributed.checkpoint`; else whole tensors.

        Raises:
            StateError: an adapter is merged into a head or an embedding that belongs to the state.
            PluginError: the method keeps tensors that are neither parameters nor buffers.
        """
        adapter = self._adapter(name)
        self._check_heads_not_merged(name)
        self._check_tables_not_merged("The training state", resized_tables(BaseModules(self.model)))
        self._warn_if_changed(name)
        return training_state(adapter, self.model, sharded=sharded)

    @default_modes()
    def load_training_state(self, name: str, state: Mapping[str, Tensor]) -> None:
        """Copy what `training_state` gave into an adapter of the same config on the same model.

        Every bit is as it was. What trains and which adapters act stays as it is here.

        Raises:
            CheckpointError: another config, or other keys, shapes or dtypes than the adapter has. Nothing has changed.
            StateError: the adapter is merged.
        """
        adapter = self._adapter(name)
        self._model.check_not_merged([name])
        self._check_tables_not_merged("The training state", resized_tables(BaseModules(self.model)))
        self._model.check_unchanged("load_training_state", [name])
        with self._model.writing(adapter), uninterrupted():
            load_training_state(adapter, self.model, state)

    @usage("adapters.load('out/mood'), or adapters.load('out/mood', 'name')")
    @default_modes()
    def load(  # noqa: PLR0913 - the last four are the hub's
        self,
        source: str | Path,
        name: str | None = None,
        *,
        activate: bool = True,
        trainable: bool = False,
        strict: bool = True,
        dtype: torch.dtype | str | None = None,
        component: str | None = None,
        revision: str | None = None,
        subfolder: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
    ) -> LoadReport:
        """Add an adapter from a folder, from a repository on the hub, or from another program's file.

        Args:
            source: a folder with `adapter_config.json` and the weights, or a hub id such as `"user/name"`; or a file
                of kohya-ss's programs, LyCORIS or diffusers, if an installed method knows its keys.
            name: its name here. `None`: the last part of the source: the folder's name, the file's without its ending.
            activate: make it the only active adapter.
            trainable: whether its parameters require gradients, to train it further. With `activate=False` they do so
                until other adapters are activated.
            strict: raise if a tensor is missing, unexpected or mismatched; else warn, and load what fits.
            dtype: of its layers. `None`: the model's, but float32 for a half-precision model; `"model"`: the
                model's own, for its heads and biases too; `"file"`: the file's, but not float8.
            component: which part of a whole pipeline's file this model is, as its keys begin: `"unet"`, `"lora_te1"`.
                Needed only if several parts fit.
            revision, subfolder, cache_dir, token: where to look on the hub.

        Raises:
            CheckpointError: damaged or foreign files, or tensors that do not fit.
            MissingMethodError: no installed plugin provides its method.
        """
        name = local_path(subfolder or source).name.removesuffix(".safetensors") if name is None else name
        self._check_new_name(name)
        check_trained_dtype(dtype, "model", "file")
        files = read(adapter_folder(source, revision=revision, subfolder=subfolder, cache_dir=cache_dir, token=token))
        adapter, report = load_adapter(
            self.model, name, files, self._active, strict=strict, has_strict=True, dtype=dtype, component=component
        )
        self._install(adapter, activate=activate, trainable=trainable)
        return dataclasses.replace(report, adapter=adapter.status(active=name in self.active, merged=False))

    @usage("adapters.swap('mood', 'out/mood')")
    @default_modes()
    def swap(
        self,
        name: str,
        source: str | Path,
        *,
        component: str | None = None,
        revision: str | None = None,
        subfolder: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
    ) -> SwapReport:
        """Overwrite an adapter in place with the adapter from a folder, the hub or a file.

        Its parameters keep their memory and their shapes, so a compiled model is not compiled again. Lower ranks are
        padded with zeros, which get no gradient; another scaling is folded into the up factor, exactly if the ratio is
        a power of two. To have room for all files up to a rank, add an adapter of that rank and swap into it. Layers
        that the file lacks change nothing afterwards. Heads, trained biases and the label set come from the file. The
        adapter's config keeps its own sizes; a file of it gives the new outputs.

        Args:
            source, component, revision, subfolder, cache_dir, token: as in `load`.

        Raises:
            CheckpointError: a damaged file, or one that does not fit this adapter: another method, a larger rank,
                layers or heads that the adapter lacks, or other shared tensors. Nothing has changed then.
            StateError: the adapter is merged or offloaded.
        """
        self._adapter(name)
        files = read(adapter_folder(source, revision=revision, subfolder=subfolder, cache_dir=cache_dir, token=token))
        return self._swap(name, files, component)

    def _swap(self, name: str, files: AdapterFiles, component: str | None = None) -> SwapReport:
        adapter = self._adapter(name)
        self._model.check_not_merged([name])
        self._model.check_unchanged("swap", [name])
        adapter.has_values()
        refuse_fsdp1(self.model)
        other, report = load_adapter(
            self.model, name, files, self._active, strict=True, dtype=None, component=component
        )
        with uninterrupted():
            swap_in(adapter, other, files.folder, self.model)
            if adapter.labels is not None and self._model.labels_of == name:
                adapter.labels.apply(self.model)
        cleared = tuple(path for path in adapter.layers if path not in other.layers)
        return SwapReport(name, tuple(other.layers), cleared, tuple(adapter.heads), report.ignored)

    # Merging

    @usage("adapters.merge(), or adapters.merge('mood', 'topic', heads='mood')")
    def merge(
        self,
        *names: str,
        safe: bool = False,
        keep_base: bool = True,
        untie: bool = False,
        heads: str | None = None,
        strengths: Mapping[str, Strength] | None = None,
    ) -> None:
        """Add adapters to the weights: `W + sum of dW_i`, computed in float32 (float64 for float64), rounded once.

        Additive adapters are added in place from their factors. Others follow in the given order, each by its
        method's merge rule.

        Args:
            names: the adapters; without one, those that act now.
            safe: check for values that are not finite, and change nothing if there is one.
            keep_base: keep the replaced weights, so that `unmerge`, or a merge that fails, restores every bit.
                `False` saves that memory. Then Ctrl-C waits until the merge is complete, and after an error in the
                middle, such as full memory, the added values are subtracted again; the message says so.
            untie: give a target a weight of its own if its weight is tied to another module. The files of a
                transformers model then hold both, and the flag in its config is cleared. Models that compute with that
                flag (T5, Switch Transformers) keep it; only transformers 5 and later read their files right.
            heads: the adapter that provides the head, if two have their own copy of one module. `None`: the head that
                acts now, if all of these adapters are active.
            strengths: what an adapter's change is multiplied by, as in `activate`. `None`: that with which it acts now.

        Raises:
            StateError: already merged, modules that were replaced since, weights that are tied or not in memory, or
                values that are not finite.
            UnsupportedError: an adapter that cannot be merged.
        """
        self._attached_model.check_not_per_sample("merge")
        names = names or self.active
        adapters = [self._adapter(name) for name in names]
        if not names or len(set(names)) < len(names):
            raise ConfigError(f"merge{names!r} needs active adapters, or each name once. Merged: {self.merged}.")
        self._model.check_not_merged(names)
        self._model.check_unchanged("merge", names)
        if keep_base:
            self._check_not_edited("merge")
        for adapter in adapters:
            adapter.has_values()
        rest = [self._adapters[n] for n in self.active if n not in names]
        if heads is None and set(names) <= set(self.active) and self._active.state.heads:
            heads = self._active.state.heads[-1]  # chosen when they were activated
        acting = acting_heads([*map(self._adapter, self.merged), *adapters, *rest], heads)
        refuse_fsdp1(self.model)
        reshard(self.model)  # FSDP2 leaves copies in place, and a merge into these would be lost
        before, go_back = self._merged, self._model.return_point()
        acting_with = {name: strength for name, strength in self.strengths.items() if name in names}
        scales = checked_strengths("merge", adapters, acting_with if strengths is None else strengths)
        how = {"untie": untie, "safe": safe, "keep_base": keep_base}
        with uninterrupted() as stop:
            try:
                with merging(self.model, before, adapters, **how, strengths=scales, stop=stop) as merged:
                    self._merged = merged
                    self._model.set_merged(adapters, merged.names, acting)
            except BaseException:
                self._merged = before
                go_back()
                raise

    @usage("adapters.unmerge(), which restores all")
    def unmerge(self) -> None:
        """Restore the weights, every bit as before the first merge.

        The adapters that were active when they were merged are active again, in their old order and before those that
        were activated since, and they train if they trained then. Writes to `weight.data` since the merge are lost,
        because torch does not count them.

        Raises:
            StateError: nothing is merged, the base was not kept, or a merged module was replaced or edited since.
        """
        self._check_can_unmerge()
        _, changed = self._model.what_changed(self.merged)
        if changed:
            raise StateError(
                f"unmerge is refused: {changed} The weights that were merged into are gone there. merge_and_detach() "
                "keeps the model as it is now, and detach() restores the weights that are left."
            )
        self._check_not_edited("unmerge")
        self._unmerge()

    def merge_and_detach(
        self, *names: str, safe: bool = False, untie: bool = False, heads: str | None = None
    ) -> nn.Module:
        """Merge these adapters (without names: the active ones) for good, and remove all others.

        Their heads become the model's own modules, and their label set that of its config.

        Returns:
            The plain model, without a trace of adapters.
        """
        wanted = names or self.active
        self._attached_model.check_not_per_sample("merge_and_detach")
        if not wanted and not self.merged:
            raise ConfigError(f"merge_and_detach() has nothing to merge: no adapter is active. There is {self.names}.")
        self._model.check_unchanged("merge_and_detach", [n for n in wanted if n in self and n not in self.merged])
        for name in self.merged:
            self._warn_if_changed(name, _KEEPS_REPLACEMENT)
        go_back, merged = self._model.return_point(), self.merged
        with uninterrupted():
            try:
                if names:  # from now on only these act, so that no head of another one is in the way
                    kept = [n for n in self.active if n in names]
                    chosen = heads or next(reversed(self._active.state.heads), None)
                    scales = {name: self.strengths[name] for name in kept}
                    head = chosen if chosen in kept else None
                    self.activate(*kept, trainable=False, heads=head, strengths=scales)
                if wanted:
                    self.merge(*wanted, safe=safe, keep_base=False, untie=untie, heads=heads)
            except BaseException:
                if self.merged == merged:
                    go_back()
                raise
            acting = [self._adapters[name] for name in self._active.state.heads]
            parting = Parting.of(self.model, heads=acting)
            self._model.labels_of = None  # the label set that the config has now becomes its own
            self._merged, self._active.merged = Merged(), ()
            take_heads(acting, self.model)
            parting.apply()
            return self.detach()

    def detach(self) -> nn.Module:
        """Remove every adapter and every trace of them: classes, parameters, hooks, `requires_grad` flags, labels.

        Merged adapters are unmerged first.

        Returns:
            The model as it was before `attach`. This object is of no use afterwards.

        Raises:
            StateError: something was merged with `keep_base=False`; `merge_and_detach` keeps that instead.
        """
        self._attached_model.check_not_per_sample("detach")
        if self.merged:
            self._check_can_unmerge()
            for name in self.merged:
                self._warn_if_changed(name, _KEEPS_REPLACEMENT)
            for key in self._merged.give_up_lost():
                warn(f"{key!r} is computed from other tensors since it was merged into. {_KEEPS_REPLACEMENT}")
            edited = self._merged.edited
            if edited:
                warn(f"{edited[0]!r} was edited while it was merged. The edit is lost, because the base is restored.")
            self._unmerge()
        with uninterrupted():
            model = self.model
            for name in self.names:
                self.remove(name)
            self._model.restore()
            if self._state_dict_hooks is not None:
                unhook_saving(model, self._state_dict_hooks)
            del model.__dict__[ATTRIBUTE]
            return model

    # Combining

    @usage("adapters.combine('both', {'mood': 0.7, 'topic': 0.3})")
    @default_modes()
    def combine(  # noqa: PLR0913 - three independent choices and what they need
        self,
        name: str,
        sources: Mapping[str, float],
        *,
        method: str = "linear",
        space: Space = "delta",
        rank: int | None = None,
        energy: float | None = None,
        to: str = "lora",
        heads: str | None = None,
        density: float | None = None,
        majority_sign_method: MajoritySign = "total",
        seed: int | None = None,
        isotropize: bool = False,
        same_base: bool = True,
    ) -> CombineReport:
        """Add an adapter that combines others. It is not activated.

        With `method="linear"` in delta space the result is exactly `sum of w_i dW_i`, whatever the ranks and the
        (additive) methods of the sources. A target of only some sources is combined from those.

        Args:
            name: the name of the new adapter.
            sources: the adapters and their weights; negative ones subtract.
            method: `"linear"`, `"ties"`, `"dare_linear"`, `"dare_ties"`, `"magnitude_prune"`, `"tsv"`, or one
                of an extension.
            space: `"delta"` combines dW itself; `"core"` its coordinates in the common subspace of the sources (small
                matrices only); `"factors"` A and B separately, as PEFT does.
            rank, energy: truncate to this rank, or to this share of the squared singular values (best approximation). A
                layer that is too small for the rank gets its largest one. Neither: exact, and ranks add up.
            to: the method of the result. It needs the hook `from_factors`.
            heads: the head of the result: an adapter's name, `"average"`, `"concat"` or `"drop"`.
            density, majority_sign_method, seed: for the methods that prune, elect signs or draw random numbers.
            isotropize: set all singular values of the result to their mean.
            same_base: `False`: refuse adapters whose configs name different base models. They are on one model here.

        Raises:
            ConfigError: invalid arguments, heads without a choice, or adapters of different bases.
            UnknownNameError: no such adapter, method or space.
            UnsupportedError: the change of an adapter has no low-rank form.
            StateError: values of an adapter or of the result are not finite.
        """
        self._check_new_name(name)
        check_sources(sources)
        adapters = [self._adapter(source) for source in sources]
        self._model.check_unchanged("combine", list(sources))
        choices = Choices(
            method=method,
            space=space,
            rank=rank,
            energy=energy,
            to=to,
            heads=heads,
            density=density,
            majority_sign_method=majority_sign_method,
            seed=seed,
            isotropize=isotropize,
            same_base=same_base,
        )
        changed = {path for adapter in adapters for path in adapter.layers}
        order = [path for path in BaseModules(self.model).all_paths if path in changed]
        with self._gathered(adapters):
            given = [Source.of(adapter, float(sources[adapter.name])) for adapter in adapters]
            changes, report = mix(name, given, choices, order)
            adapter = build_result(name, changes, default_registry.method(to), self.model, self._active)
        self._install(adapter)
        return report

    @usage("adapters.convert('mood', to='lora', name='mood-lora')")
    def convert(
        self, source: str, *, to: str, name: str, rank: int | None = None, energy: float | None = None
    ) -> CombineReport:
        """Add a copy of an adapter in another method's form. It is exact unless `rank` or `energy` truncates it.

        LoHa becomes LoRA of rank `r * r`, and VeRA becomes LoRA of its own rank, for programs that serve only LoRA.

        Raises:
            UnsupportedError: the source has no low-rank form.
            UsageError: the method `to` cannot be a result.
        """
        heads = source if self._adapter(source).heads else None
        return self.combine(name, {source: 1.0}, to=to, rank=rank, energy=energy, heads=heads)

    # Looking

    def report(self, *names: str, out: str | Path | None = None, title: str | None = None) -> Report:
        """A page about adapters: which layers they change most, which rank is enough, what can be merged.

        A notebook shows it, `print` gives its verdicts, and `save(path)` or `out=` writes one self-contained HTML file.
        It makes no dense matrix. Sizes are relative to the base's weights if these are in memory. Without names: all.

        Raises:
            ConfigError: there are no adapters, or one is named twice.
            StateError: values that are not finite, or on the meta device.
            SaveError: the file cannot be written.
        """
        from adapterkit.report import Report, live_sources

        names = names or self.names
        adapters = [self._adapter(name) for name in names]
        for name in names:
            self._warn_if_changed(name, "The report shows what was trained there, beside the base as it was.")
        with self._gathered(adapters):
            report = Report.of(live_sources(adapters, self._merged), title)
        if out is not None:
            report.save(out)
        return report

    # What the calls above have in common

    @property
    def _attached_model(self) -> AdaptedModel:
        if not self._model.attached:
            raise StateError("These adapters were detached; call ak.attach(model) for new ones.")
        return self._model

    def _adapter(self, name: str) -> Adapter:
        _ = self._attached_model
        if not isinstance(name, str) or name not in self._adapters:
            several = isinstance(name, list | tuple | set | dict)
            hint = "Give each name by itself, not in one argument." if several else ""
            raise unknown("adapter", name, self._adapters, hint)
        self._model.keep_labels()
        return self._adapters[name]

    def _install(self, adapter: Adapter, *, activate: bool = False, trainable: bool = False) -> None:
        """Put a new adapter on the model and let it act, or change nothing."""
        if activate and trainable:
            check_averaged(self.model, adapter)
        self._check_biases_begin(adapter)
        with uninterrupted():
            self._model.install(adapter)
            if self._state_dict_hooks is None:
                self._state_dict_hooks = hook_saving(self.model)
            try:
                if activate:
                    self.activate(adapter.name, trainable=trainable)
                elif trainable:
                    adapter.train(for_now=False)
            except BaseException:
                self.remove(adapter.name)
                raise

    def _make_step(self, adapter: Adapter, shared: Shared) -> None:
        try:
            shared.step(adapter.steps + 1, adapter.layers)
        except TypeError as error:
            if any(parameter.grad is not None for parameter in adapter.parameters()):
                raise
            raise StateError(
                f"The step of the method {adapter.config.method!r} failed, and there are no gradients ({error}). Call "
                "adapters.step() before zero_grad(). DeepSpeed keeps gradients to itself: train this adapter with DDP "
                "or FSDP2."
            ) from error

    def _gathered(
        self, adapters: Iterable[Adapter], *, writing: bool = False, gradients: bool = False
    ) -> AbstractContextManager[None]:
        """The whole values of everything that these adapters own; see `gathered`. To read them, they must be set."""
        adapters = list(adapters)
        for adapter in () if writing else adapters:
            adapter.has_values()
        modules = (module for adapter in adapters for module in adapter.modules())
        return gathered(self.model, modules, writing=writing, gradients=gradients)

    def _unmerge(self) -> None:
        names = self.merged
        with uninterrupted():
            try:
                self._merged.give_back()
            except Exception as error:
                raise StateError(
                    f"Not every weight could be restored ({type(error).__name__}: {error}). Call unmerge() again: all "
                    "kept weights are still there."
                ) from error
            self._merged = Merged()
            self._model.set_unmerged([self._adapters[name] for name in names])

    def _check_new_name(self, name: str, *, grows: bool = True) -> None:
        self._attached_model.check_new_name(name)
        if grows:
            check_can_grow(self.model, name)

    def _check_biases_begin(self, adapter: Adapter) -> None:
        if adapter.biases and self.merged:
            raise StateError(
                f"Adapter {adapter.name!r} trains biases, which start from the base's, but other adapters are merged "
                "into those now. Call unmerge() first."
            )

    def _check_heads_not_merged(self, name: str) -> None:
        if name in self._merged.heads:
            raise StateError(
                f"A part of adapter {name!r} is merged into its own copy of a module, and its file must hold that copy "
                "without it. Call unmerge() first."
            )

    def _check_tables_not_merged(self, what: str, found: Mapping[str, nn.Module]) -> None:
        for place, table in found.items():
            if any(kept.module is table for kept in self._merged.kept):
                raise StateError(
                    f"{what} must hold {place!r}, because the vocabulary was resized, but an adapter is merged into it."
                    " Call unmerge() first."
                )

    def _check_can_unmerge(self) -> None:
        self._model.check_not_per_sample("unmerge")
        if not self.merged:
            raise StateError("Nothing is merged.")
        if not self._merged.keeps_base:
            raise StateError(
                f"{', '.join(map(repr, self.merged))} cannot be unmerged: with keep_base=False the base is gone. "
                "Load the base model again."
            )

    def _check_not_edited(self, call: str) -> None:
        edited = self._merged.edited
        if edited:
            raise StateError(
                f"{call} is refused: {edited[0]!r} was edited while {', '.join(map(repr, self.merged))} was merged (by "
                "an optimizer, load_state_dict or an assignment?), and unmerge() would lose the edit. "
                "merge_and_detach() keeps the model as it is now; detach() restores the base all the same."
            )

    def _warn_if_changed(self, name: str, advice: str = "The file holds what was trained there before that.") -> None:
        _, changed = self._attached_model.what_changed([name])
        if changed:
            warn(f"{changed} {advice}")


@usage()
@default_modes()
@torch.no_grad()
def extract(  # noqa: PLR0913 - two models, a size, and the selection fields
    base: nn.Module,
    tuned: nn.Module,
    *,
    name: str = "extracted",
    rank: int | None = None,
    energy: float | None = None,
    target_modules: str | Sequence[str] = "all-linear",
    exclude_modules: str | Sequence[str] | None = None,
    modules_to_save: str | Sequence[str] | None = "auto",
    to: str = "lora",
) -> CombineReport:
    """Add to `base` the low-rank adapter that is closest to `tuned`, a full fine-tune of it.

    Each target gets the best approximation of `W_tuned - W_base` in the Frobenius norm. If both sides of the weight are
    longer than 1,024 and a rank is given, randomised subspace iteration finds it (Halko et al. 2011, arXiv 0909.4061).
    The report states the error of each target, measured on the full difference. Trained biases go into the adapter if
    its method has them. Save it with `ak.attach(base).save(name, folder)`.

    Args:
        base, tuned: two models of one architecture, both in memory.
        rank, energy: the size; give one of them. See `Adapters.combine`.
        target_modules, exclude_modules: which layers.
        modules_to_save: modules to copy from `tuned` in full, such as its task head.
        to: the method of the result.

    Raises:
        SelectionError: nothing is selected, or the models do not match.
        ConfigError: neither or both sizes, or the name is taken.
        StateError: weights that are not in memory or not finite, or a base with something merged into it.
        UnsupportedError: a layer computes something else than the plain product with its weight.
    """
    adapters = attach(base)
    if not isinstance(tuned, nn.Module):
        raise UsageError(f"extract needs two models, not a {type(tuned).__name__}; ak.extract_files takes folders.")
    adapters._check_new_name(name)
    if adapters.merged:
        listed = ", ".join(map(repr, adapters.merged))
        raise StateError(f"The base's weights have {listed} merged into them. Call unmerge() first.")
    config = config_to_extract(rank, energy, to, target_modules, exclude_modules, modules_to_save)
    selection = select(base, config)
    heads = {path: copy_head(module_of(tuned, path), path) for path in selection.heads}
    changes, report = extracted(
        name, selection, lambda match: (match.module, same_layer(tuned, match)), rank, energy, to, heads, tuned
    )
    adapters._install(build_result(name, changes, default_registry.method(to), base, adapters._active))
    return report
