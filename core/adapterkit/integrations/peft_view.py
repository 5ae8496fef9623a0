"""An adapted model as a `peft.PeftModel`."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import peft
import torch
from peft import MODEL_TYPE_TO_PEFT_MODEL_MAPPING, PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys

from adapterkit.adapters import Adapters, attach
from adapterkit.checkpoints import STATE_FILE, load_state, save_state
from adapterkit.contract import BIASES, FILE_PREFIX, LAYERS, AdapterConfig, default_registry
from adapterkit.errors import AdapterWarning, StateError, UnsupportedError
from adapterkit.files import PICKLE_FILE, WEIGHTS_FILE, adapter_folder, file_places, match_adapter, read
from adapterkit.forward import derive
from adapterkit.integrations import peft_functions
from adapterkit.integrations.peft_layers import PeftClasses
from adapterkit.integrations.peft_names import VIEW, both, check_name, from_peft_config, own_key, peft_key, pefts_errors
from adapterkit.integrations.peft_tuner import Tuner
from adapterkit.model import BaseModules
from adapterkit.results import LoadReport
from adapterkit.tensors import process_groups, wrappers_of

# PEFT saves the adapter of this name in the folder itself, and others in subfolders.
_FIRST = "default"
# TRL adds an adapter of this name for its reference model, with the config of `_FIRST`.
_REFERENCE = "ref"
# What torch's older FSDP puts before the keys of the model that it wraps.
_FSDP = "_fsdp_wrapped_module."


class PeftView(PeftModel):
    """An adapted model as a `peft.PeftModel`. `as_peft` makes it.

    It shows the adapters that the model has, and holds nothing of its own: an adapter that is added, renamed or removed
    through `ak.attach(model)` is so here, and the other way. `base_model.model` is the adapted model itself. Names of
    parameters and buffers are PEFT's (see `peft_names`), in `named_parameters`, in state dicts and where one is asked
    for by name; names of modules are the model's.

    The constructor is PEFT's: it adds an adapter to a model.
    """

    _model_inside = "base_model"
    base_model: Tuner

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig,
        adapter_name: str = _FIRST,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
    ) -> None:
        adapters = attach(model)
        taken = adapter_name in adapters
        made, where = f"{adapter_name} again" if taken else adapter_name, (autocast_adapter_dtype, low_cpu_mem_usage)
        _add(adapters, made, peft_config, *where, activate=not taken)
        if taken:  # PEFT puts a new adapter in the place of one of this name
            warnings.warn(
                f"The model had an adapter {adapter_name!r} already. A new one is in its place now, and what it had "
                "learned is gone.",
                stacklevel=3,
            )
            adapters.remove(adapter_name)
            adapters.rename(made, adapter_name)
            adapters.activate(adapter_name)
        if peft_config.inference_mode:
            adapters.activate(adapter_name, trainable=False)
        self._show(adapters)
        self._added(adapter_name, peft_config)

    @classmethod
    def of(cls, adapters: Adapters) -> Self:
        """A view of these adapters."""
        view = cls.__new__(cls)
        view._show(adapters)
        return view

    def _show(self, adapters: Adapters) -> None:
        nn.Module.__init__(self)
        self.__class__ = _classes.get(adapters.config(adapters.names[0]).task_type or "", PeftView)
        self.base_model = Tuner(adapters)
        self.special_peft_forward_args = {"adapter_names"}
        self._is_prompt_learning = False
        hosts = (host for adapter in adapters._adapters.values() for host in adapter.hosts.values())
        derive(hosts, adapters._active, PeftClasses(adapters))
        nn.Module.register_state_dict_post_hook(self, _rename_written)
        nn.Module.register_load_state_dict_pre_hook(self, _rename_given)
        nn.Module.register_load_state_dict_post_hook(self, _rename_reported)
        checkpointing = ("is_activation_checkpointing", "is_gradient_checkpointing")  # transformers renamed it
        if next((getattr(adapters.model, name) for name in checkpointing if hasattr(adapters.model, name)), False):
            self.prepare_model_for_gradient_checkpointing(adapters.model)  # type: ignore[arg-type]

    @property
    def adapters(self) -> Adapters:
        """The adapters of the model."""
        return self.base_model.adapters

    def get_base_model(self) -> nn.Module:
        """The adapted model."""
        return self.base_model.model

    @property
    def peft_config(self) -> dict[str, PeftConfig]:
        """See `Tuner.peft_config`."""
        return self.base_model.peft_config

    @property
    def active_adapters(self) -> list[str]:
        """See `Tuner.active_adapters`."""
        return self.base_model.active_adapters

    @property
    def active_adapter(self) -> str:  # type: ignore[override]
        """The first of the adapters that act.

        Raises:
            StateError: the model has no adapters any more.
        """
        if not self.active_adapters:
            raise StateError("The view's model has no adapters any more. view.get_base_model() is the bare model.")
        return self.base_model.active_adapters[0]

    @property
    def _adapters_disabled(self) -> bool:  # type: ignore[override]
        return self.base_model.disabled

    @property
    def peft_type(self) -> Any:  # type: ignore[override]
        """The type of the active adapter's config."""
        return self.active_peft_config.peft_type

    # Calls

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's. `adapter_names` gives each row of the batch its own adapter, or none (`"__base__"`)."""
        with self._rows(kwargs):
            return self.base_model.model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's, with `adapter_names` as in `forward`."""
        model: Any = self.base_model.model
        with self._rows(kwargs):
            return model.generate(*args, **kwargs)

    @contextmanager
    def _rows(self, kwargs: dict[str, Any]) -> Iterator[None]:
        names = kwargs.pop("adapter_names", None)
        if names is None or self._adapters_disabled:
            yield
            return
        missing = sorted({*names} - {*self.adapters.names, "__base__"})
        if missing:
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(missing)}.")
        if self.adapters.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )
        with pefts_errors(), self.adapters.per_sample([None if name == "__base__" else name for name in names]):
            yield

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """The base model for a `with` block: `Adapters.disabled`. Nothing of the adapters requires gradients in it.

        Merged adapters are unmerged, as PEFT does it. Adapters that `set_adapter` names in the block act after it.
        Layers that were switched off alone (`layer.enable_adapters(False)`) are on afterwards, with a warning.
        """
        with self.base_model.disable_adapter():
            yield

    # Adapters

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: PeftConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Add an adapter, which does not act yet.

        TRL adds `"ref"` with the config of `"default"` and then copies the parameters whose name has `.default.` in
        it, which are not all of every method. So this one starts as a copy.
        """
        if adapter_name in self.adapters:
            raise ValueError(f"Adapter with name '{adapter_name}' already exists.")
        if adapter_name == _REFERENCE and peft_config is self.peft_config.get(_FIRST):
            self.adapters.copy(_FIRST, adapter_name)
            return
        config: Any
        for config in self.peft_config.values() if getattr(peft_config, "bias", "none") != "none" else ():
            if getattr(config, "bias", "none") != "none":
                raise ValueError(
                    f"{type(self.base_model).__name__} supports only 1 adapter with bias. When using multiple "
                    "adapters, set bias to 'none' for all adapters: PEFT has one name for the trained bias of a layer. "
                    "ak.attach(model).add(name, config) takes several."
                )
        _add(self.adapters, adapter_name, peft_config, autocast_adapter_dtype, low_cpu_mem_usage, activate=False)
        self._added(adapter_name, peft_config)

    def _added(self, name: str, config: PeftConfig) -> None:
        """Show `config` as the adapter's, and warn as PEFT does of what will not merge."""
        tuner, adapter = self.base_model, self.adapters._adapter(name)
        if hasattr(BaseTuner, "_check_tied_modules"):
            tuner._check_tied_modules(tuner.model, config)
        hosts = [adapter.hosts[path] for path in adapter.layers] if getattr(adapter.config, "lora_bias", False) else []
        without = [type(host).__name__ for host in hosts if getattr(host, "bias", None) is None]
        if without:
            warnings.warn(
                f"`lora_bias=True` was passed but the targeted layer of type {without[0]} has no bias. This means that "
                "merging LoRA weights won't be possible.",
                getattr(peft.utils.warning, "PeftWarning", UserWarning),
                stacklevel=4,
            )
        tuner.keep(name, config)

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """See `Tuner.set_adapter`."""
        self.base_model.set_adapter(adapter_name, inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """See `Tuner.delete_adapter`."""
        self.base_model.delete_adapter(adapter_name)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """See `Tuner.set_requires_grad`."""
        self.base_model.set_requires_grad(adapter_names, requires_grad)

    # Files

    def save_pretrained(
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        selected_adapters: Sequence[str] | None = None,
        save_embedding_layers: str | bool = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Write adapters with `Adapters.save`, and a model card: `"default"` to the folder, others to subfolders.

        Args:
            selected_adapters: `None`: all.
            safe_serialization: `False` writes `adapter_model.bin`.
            save_embedding_layers: `embeddings` of `Adapters.save`; `"auto"`: if the vocabulary was resized.
            path_initial_model_for_weight_conversion: not needed. A file of PiSSA or OLoRA is plain LoRA already.
            state_dict: take the tensors from this state dict of the view. `Trainer` passes it, also as `None`, and
                people do not: with `None` a training can go on from the folder bit for bit.
        """
        if Path(save_directory).is_file():
            raise ValueError(f"Provided path ({save_directory}) should be a directory, not a file")
        names = self.adapters.names if selected_adapters is None else selected_adapters
        if any(name not in self.adapters for name in names):
            raise ValueError(
                "You passed an invalid `selected_adapters` arguments, current supported adapter names are "
                f"{list(self.adapters.names)} - got {selected_adapters}."
            )
        source, training = kwargs.get("state_dict"), "state_dict" in kwargs
        if source is not None:
            source = {own_key(self.base_model.model, key): tensor for key, tensor in source.items()}
        if is_main_process:
            Path(save_directory).mkdir(parents=True, exist_ok=True)
            self.create_or_update_model_card(str(save_directory))
        embeddings = _embeddings(self.base_model.model, save_embedding_layers)
        for name in names:
            folder = Path(save_directory) / ("" if name == _FIRST else name)
            together = source is None and process_groups([*self.adapters.parameters(name)])
            if is_main_process or together:
                self.adapters.save(name, folder, source=source, embeddings=embeddings)
            if is_main_process and not safe_serialization:
                torch.save(read(folder).tensors, folder / PICKLE_FILE)
                (folder / WEIGHTS_FILE).unlink()
            if training and source is None and (is_main_process or together):
                save_state(self.adapters, name, folder, held=names)
            elif is_main_process:
                (folder / STATE_FILE).unlink(missing_ok=True)  # it was of what the folder held before

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        model: nn.Module,
        model_id: str | Path,
        adapter_name: str = _FIRST,
        is_trainable: bool = False,
        **kwargs: Any,
    ) -> Self:
        """Load an adapter from a folder or from the hub on a model, and return the view. See `load_adapter`."""
        adapters, config = attach(model), kwargs.get("config")
        _load_new(adapters, adapter_name, model_id, kwargs, activate=True, trainable=is_trainable)
        view = cls.of(adapters)
        if config is not None:
            view.base_model.keep(adapter_name, config)
        return view if is_trainable else view.eval()

    def load_adapter(  # type: ignore[override]
        self, model_id: str | Path, adapter_name: str, is_trainable: bool = False, **kwargs: Any
    ) -> _IncompatibleKeys:
        """Load an adapter from a folder or from the hub; if there is one of this name, load the tensors into it.

        From a checkpoint of `Trainer` such an adapter gets everything with which its training goes on bit for bit.

        Args:
            is_trainable: whether a new adapter trains. Without, the model goes to evaluation mode, as PEFT does it.
                With it, a checkpoint of `Trainer` must be of a training in which the adapters acted as they do now.

        Returns:
            The names of the tensors that the file lacks, and of those that belong to nothing, under PEFT's keys.

        Raises:
            RuntimeError: tensors of other shapes, unless `ignore_mismatched_sizes`.
        """
        if adapter_name in self.adapters:
            report = self._load_into(adapter_name, model_id, kwargs, resumes=is_trainable)
        else:
            report = _load_new(self.adapters, adapter_name, model_id, kwargs, activate=False, trainable=is_trainable)
        if not is_trainable:
            self.eval()
        return self._keys(adapter_name, report)

    def _load_into(self, name: str, source: str | Path, options: Mapping[str, Any], *, resumes: bool) -> LoadReport:
        """Load the tensors of a folder into an adapter; everything of its training if the folder has that."""
        adapters, adapter = self.adapters, self.adapters._adapter(name)
        folder = adapter_folder(source, **_on_hub(options))
        if load_state(adapters, name, folder, resumes=resumes):
            if len(adapters.active) > 1:
                warnings.warn(
                    "When Trainer resumes with a PEFT model, it lets only the first active adapter act and train, here "
                    f"{adapters.active[0]!r} of {', '.join(map(repr, adapters.active))}. To go on with all of them, "
                    "put adapterkit.integrations.transformers.AdapterTrainerMixin before the trainer class.",
                    AdapterWarning,
                    stacklevel=3,
                )
            return LoadReport()
        tensors, method = read(folder).tensors, default_registry.method_of(adapter.config)
        _check_sizes(match_adapter(adapter, method, adapters.model, tensors)[1], options)
        return adapters.load_state_dict(name, tensors, strict=False)

    def _keys(self, name: str, report: LoadReport) -> _IncompatibleKeys:
        model = self.base_model.model
        keys = {file: peft_key(model, memory) for file, memory, _ in file_places(self.adapters._adapter(name))}
        return _IncompatibleKeys([keys.get(key, key) for key in report.missing], list(report.unexpected))

    # Names

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """Every parameter under PEFT's name."""
        return self._renamed(super().named_parameters, *args, **kwargs)

    def named_buffers(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Tensor]]:
        """Every buffer under PEFT's name."""
        return self._renamed(super().named_buffers, *args, **kwargs)

    def _renamed(self, members: Any, prefix: str = "", *args: Any, **kwargs: Any) -> Iterator[tuple[str, Any]]:
        for key, member in members("", *args, **kwargs):
            name = peft_key(self.base_model.model, key.removeprefix(FILE_PREFIX))
            yield (f"{prefix}.{name}" if prefix else name), member

    def get_parameter(self, target: str) -> nn.Parameter:
        """The parameter that PEFT calls so."""
        key = own_key(self.base_model.model, target)
        path, _, name = key.rpartition(".")
        held = self.base_model.model.get_submodule(path)._parameters.get(name)  # the attribute may be a copy's
        return self.base_model.model.get_parameter(key) if held is None else held

    def get_buffer(self, target: str) -> Tensor:
        """The buffer that PEFT calls so."""
        return self.base_model.model.get_buffer(own_key(self.base_model.model, target))


def _embeddings(model: nn.Module, asked: str | bool) -> bool | None:
    """PEFT's `save_embedding_layers` as `embeddings` of `Adapters.save`."""
    if asked and asked != "auto" and not hasattr(model, "get_input_embeddings"):
        warnings.warn(
            "Could not identify embedding layer(s) because the model is not a 🤗 transformers model. The files hold "
            "the adapters alone.",
            stacklevel=3,
        )
    return None if asked == "auto" else bool(asked)


def _add(
    adapters: Adapters, name: str, config: Any, autocast_adapter_dtype: bool, low_cpu_mem_usage: bool, *, activate: bool
) -> None:
    """`Adapters.add` with PEFT's options. It warns in PEFT's words of what the config names in vain."""
    check_name(name)
    dtype, device = None if autocast_adapter_dtype else "model", "meta" if low_cpu_mem_usage else None
    with pefts_errors(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "These entries of the config matched nothing", AdapterWarning)
        report = adapters.add(
            name, _with_pefts_heads(from_peft_config(config), adapters), activate=activate, dtype=dtype, device=device
        )
    if not report.unmatched:
        return
    named = ("rank_pattern", "alpha_pattern", "exclude_modules")
    given = {field: list(getattr(config, field, None) or ()) for field in named}
    unused = {field: [key for key in keys if f"{field} {key!r}" in report.unmatched] for field, keys in given.items()}
    words = "".join(
        f"The following {field} keys did not match any targeted module and were ignored: {keys}. "
        for field, keys in unused.items()
        if field.endswith("_pattern") and keys
    )
    kind = _PatternWarning if words else AdapterWarning
    if given["exclude_modules"] and given["exclude_modules"] == unused["exclude_modules"]:
        words += f"You have passed exclude_modules={config.exclude_modules} but no modules were excluded. "
    listed = ", ".join(report.unmatched)
    warnings.warn(f"{words}These entries of the config matched nothing: {listed}.", kind, stacklevel=3)


def _with_pefts_heads(config: AdapterConfig, adapters: Adapters) -> AdapterConfig:
    """The config with every module in `modules_to_save` that PEFT trains: `"norm"` is `input_layernorm`, too."""
    given = config.modules_to_save
    if given is None or isinstance(given, str):
        return config
    paths = [path for path in BaseModules(adapters.model).all_paths if path.endswith(tuple(given))]
    more = [path for path in paths if not any(f".{path}".endswith(f".{entry}") for entry in given)]
    return config.replace(modules_to_save=[*given, *more]) if more else config


class _PatternWarning(AdapterWarning, RuntimeWarning):
    """PEFT's kind of warning for a pattern that matches nothing."""


def _load_new(
    adapters: Adapters, name: str, source: str | Path, options: Mapping[str, Any], *, activate: bool, trainable: bool
) -> LoadReport:
    """`Adapters.load` of what fits, by PEFT's rule: tensors may be missing, and none may have another shape."""
    if options.get("key_mapping"):
        raise UnsupportedError("key_mapping is an option of PEFT that adapterkit does not implement. Leave it out.")
    check_name(name)
    hub = _on_hub(options)
    dtype = None if options.get("autocast_adapter_dtype", True) else "model"
    report = adapters.load(source, name, activate=False, trainable=trainable, strict=False, dtype=dtype, **hub)
    try:
        _check_sizes(report, options)
    except RuntimeError:
        adapters.remove(name)
        raise
    if activate:
        adapters.activate(name, trainable=trainable)
    return report


def _on_hub(options: Mapping[str, Any]) -> dict[str, Any]:
    """Where to look on the hub, of PEFT's options for loading."""
    return {name: options[name] for name in ("revision", "subfolder", "cache_dir", "token") if name in options}


def _check_sizes(report: LoadReport, options: Mapping[str, Any]) -> None:
    if report.mismatched and not options.get("ignore_mismatched_sizes"):
        raise RuntimeError("\n".join(f"size mismatch for {mismatch}" for mismatch in report.mismatched))


def _rename_written(view: PeftView, state: MutableMapping[str, Any], prefix: str, _: Any) -> None:
    """Give a state dict that the view has written PEFT's keys, in their order.

    `FullyShardedDataParallel` around the view looks for the model's keys, so they are renamed after it has found them.
    """
    if not prefix.endswith(_FSDP):
        _rename(view, state, prefix)
        return
    for wrapper in wrappers_of(view):
        hooks = wrapper._state_dict_hooks
        if wrapper._modules.get(_FSDP[:-1]) is view and not any(
            isinstance(hook, _AfterFsdp) for hook in hooks.values()
        ):
            wrapper._register_state_dict_hook(_AfterFsdp(view))


class _AfterFsdp:
    """A hook on `FullyShardedDataParallel`'s state dict that renames the keys of the view inside."""

    def __init__(self, view: PeftView) -> None:
        self.view = view

    def __call__(self, module: nn.Module, state: MutableMapping[str, Any], prefix: str, _: Any) -> None:
        _rename(self.view, state, prefix)


def _rename(view: PeftView, state: MutableMapping[str, Any], prefix: str) -> None:
    for key in [key for key in state if key.startswith(prefix + FILE_PREFIX)]:
        name = peft_key(view.base_model.model, key.removeprefix(prefix + FILE_PREFIX))
        state[prefix + name] = state.pop(key)


def _rename_given(view: PeftView, state: MutableMapping[str, Any], prefix: str, *_: Any) -> None:
    """Give a state dict with PEFT's keys the model's keys, for `load_state_dict`. It may be of one adapter alone."""
    if view.adapters._state_dict_hooks is not None:
        view.adapters._state_dict_hooks.asks_for_all = False
    root, model = f"{prefix}base_model.", view.base_model.model
    renamed = {key: own_key(model, key.removeprefix(prefix)) for key in state if key.startswith(root)}
    own = {} if any(f".{BIASES}." in name for name in renamed.values()) else _trained_biases(view)
    shared = {key.partition(".")[2] for key in view.base_model.shared_keys()}
    for key, name in renamed.items():
        value = state.pop(key)
        if name.partition(f".{LAYERS}.")[2] not in shared:  # PEFT's layers list what they share, too
            state[prefix + FILE_PREFIX + own.get(name, name)] = value


def _trained_biases(view: PeftView) -> dict[str, str]:
    """The keys of biases that one adapter alone trains, by the base's, which is PEFT's key of such a bias in a file."""
    found: dict[str, list[str]] = {}
    for name, adapter in view.adapters._adapters.items():
        for path in adapter.biases:
            found.setdefault(f"{path}.bias", []).append(f"{path}.{BIASES}.{name}.bias")
    return {key: names[0] for key, names in found.items() if len(names) == 1}


def _rename_reported(view: PeftView, report: Any) -> None:
    """Give the keys that `load_state_dict` reports PEFT's names."""
    for keys in (report.missing_keys, report.unexpected_keys):
        for i, key in enumerate(keys):
            if key.startswith(FILE_PREFIX):
                keys[i] = peft_key(view.base_model.model, key.removeprefix(FILE_PREFIX))


def _of_task(task_class: type[PeftModel]) -> type[PeftView]:
    made: Any = both(PeftView, task_class, __name__)
    if hasattr(task_class, "prepare_inputs_for_generation"):
        made.prepare_inputs_for_generation = property(lambda view: view.base_model.prepare_inputs_for_generation)
    found: type[PeftView] = made
    return found


_classes = {task: _of_task(task_class) for task, task_class in MODEL_TYPE_TO_PEFT_MODEL_MAPPING.items()}
# `peft.get_peft_model` makes a view of a config from `as_peft(config)`.
MODEL_TYPE_TO_PEFT_MODEL_MAPPING[VIEW] = PeftView
peft_functions.answer(PeftView)
