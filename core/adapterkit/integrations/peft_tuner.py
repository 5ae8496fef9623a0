"""What a view of PEFT calls its tuner: `PeftModel.base_model`."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PEFT_TYPE_TO_TUNER_MAPPING, PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from adapterkit.adapters import Adapters, attach
from adapterkit.contract import FILE_PREFIX, LAYERS, SHARED, AdapterConfig, AdapterLayer, MajoritySign
from adapterkit.errors import StateError, UnsupportedError, unknown
from adapterkit.files import file_config
from adapterkit.forward import PerAdapter, Strength, strength_at
from adapterkit.integrations.peft_combining import combine
from adapterkit.integrations.peft_containers import by_adapter
from adapterkit.integrations.peft_layers import LayerView, beside, let_wait, waiting_strength
from adapterkit.integrations.peft_names import MethodConfig, both, peft_key, pefts_errors, prefix_of, to_peft
from adapterkit.model import BaseModules


class _Configs(dict[str, PeftConfig]):
    def __missing__(self, name: str) -> PeftConfig:
        advice = f"Rename the one that you mean: adapters.rename(old, {name!r})."
        raise unknown("adapter", name, self, advice)


class Tuner(BaseTuner):
    """`PeftModel.base_model`: what PEFT asks its tuner, answered by the adapters.

    Attributes:
        model: the adapted model.
    """

    _model_inside = "model"
    model: nn.Module

    def __init__(self, adapters: Adapters) -> None:
        nn.Module.__init__(self)
        self.__class__ = _class_of(adapters)
        self.model = adapters.model
        self._configs: dict[str, tuple[AdapterConfig, PeftConfig]] = {}
        self._shown = _Configs()
        self._waiting: dict[str, Strength] | None = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            shared = self.shared()
            return shared[name] if name in shared else getattr(self.model, name)

    def shared(self) -> dict[str, nn.Module]:
        """What layers of an adapter share, which PEFT keeps here: `vera_A["default"]`."""
        shared = self.model._modules.get(SHARED)
        return {} if shared is None else by_adapter(shared._modules.items())  # type: ignore[arg-type]

    def shared_keys(self) -> list[str]:
        """The keys of what layers share in the model's state dict: `adapter_shared.default.vera_A`."""
        shared = self.model._modules.get(SHARED)
        return [] if shared is None else list(shared.state_dict(prefix=f"{SHARED}."))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's."""
        return self.model(*args, **kwargs)

    @property
    def adapters(self) -> Adapters:
        """The adapters of the model."""
        return attach(self.model)

    # Configs and names

    @property
    def peft_config(self) -> dict[str, PeftConfig]:  # type: ignore[override]
        """A config of PEFT's class for each adapter, with the layers that it has. The same object as long as it holds.

        A change of it changes nothing here.
        """
        self._configs = {name: self._config(name) for name in self.adapters.names}
        for name in [name for name in self._shown if name not in self._configs]:
            del self._shown[name]
        self._shown.update((name, made) for name, (_, made) in self._configs.items())
        return self._shown

    def _config(self, name: str) -> tuple[AdapterConfig, PeftConfig]:
        adapter = self.adapters._adapter(name)
        own, made = self._configs.get(name, (None, None))
        if own is adapter.config and made is not None:
            return own, made
        heads = [path for path in adapter.heads if path not in adapter.tables]
        base = getattr(self.model, "name_or_path", None) or None
        paths = BaseModules(self.model).all_paths
        config = file_config(adapter.config, adapter.layers, heads, paths, base)
        return adapter.config, to_peft(config, trains=name in self.adapters.trainable)

    @property
    def targeted_module_names(self) -> list[str]:  # type: ignore[override]
        """The paths of all adapted layers."""
        return list(dict.fromkeys(path for name in self.adapters.names for path in self.adapters.layers(name)))

    def keep(self, name: str, config: PeftConfig) -> None:
        """Let this object, with which an adapter was made, be its config, as PEFT does it.

        But not a `MethodConfig`, and not one that is another adapter's already.
        """
        if isinstance(config, MethodConfig) or any(config is made for _, made in self._configs.values()):
            return
        own, made = self._config(name)
        for field in ("target_modules", "modules_to_save"):
            if getattr(config, field, None) in (None, "all-linear"):
                setattr(config, field, getattr(made, field, None))
        config.inference_mode = made.inference_mode
        self._configs[name] = own, config

    @property
    def active_adapters(self) -> list[str]:
        """The adapters that act, or would if they were not disabled or merged."""
        adapters = self.adapters
        own = (self.disabled and self._waiting) or adapters._active.default.names or adapters.merged
        return [name for name in own if name in adapters] or [*adapters.names[:1]]

    @property
    def active_adapter(self) -> str | list[str]:  # type: ignore[override]
        """The adapter that acts; a list if several do."""
        names = self.active_adapters
        return names[0] if len(names) == 1 else names

    @property
    def prefix(self) -> str:  # type: ignore[override]
        """What the names of the active adapter's parameters begin with."""
        return prefix_of(self.adapters.config(self.active_adapters[0]))

    def children(self) -> Iterator[nn.Module]:
        """The model alone."""
        yield self.model

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """The model, what its layers share, and its parameters once more, under the names that they have on the view.

        Tools walk children for names, and look for them among those of `PeftModel.named_parameters`: `Trainer` for
        weight decay, which has none in `nn.LayerNorm`, and `torch.distributed.checkpoint`.
        """
        yield "model", self.model
        yield from self.shared().items()
        others, norms = nn.Module(), nn.LayerNorm(1, elementwise_affine=False)
        for path, module in self.model.named_modules():
            names = (norms if isinstance(module, nn.LayerNorm) else others)._parameters
            for local, parameter in module._parameters.items():
                name = peft_key(self.model, f"{path}.{local}" if path else local)
                names[name.removeprefix(FILE_PREFIX)] = parameter
        yield "model", others
        yield "model", norms

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """Every module, and beside each adapted one what PEFT has there, such as `lora_A` (see `peft_layers`).

        What holds adapters here is not among them if it has no parameters itself. Containers of parameters come last:
        the parameters belong to modules that come before.
        """
        last = list[tuple[str, nn.Module]]()
        for name, module in super().named_modules(memo, prefix, remove_duplicate):
            if not isinstance(module, PerAdapter | AdapterLayer) or module._parameters or module._buffers:
                yield name, module
            for local, part in beside(module):
                if part._parameters or part._buffers:
                    last.append((f"{name}.{local}", part))
                else:
                    yield f"{name}.{local}" if local else name, part
        yield from last if remove_duplicate else ()

    # Which adapters act

    @property
    def disabled(self) -> bool:
        """Whether no adapter acts in this thread because PEFT's calls have disabled them all."""
        return self._waiting is not None and not self.adapters.active

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Let these adapters act, and train unless `inference_mode`. They keep the strengths that they have or had.

        Merged adapters are unmerged first, with a warning. While the adapters are disabled, these wait until they are
        enabled. Under `torch.no_grad`, adapters whose gradients no engine would average act without training.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else [*adapter_name]
        for name in names:
            if name not in self.adapters:
                raise ValueError(f"Adapter {name} not found.")
        if len({*names}) < len(names):
            raise ValueError(f"set_adapter({names}) names an adapter twice.")
        now = self._acting()
        strengths = {name: _on(now[name]) if name in now else self._strength_of_waiting(name) for name in names}
        if self.disabled:
            self._waiting = strengths
        else:
            self._activate(strengths, trains=not inference_mode)
        for name in now.keys() - {*names}:
            for path, layer in self.adapters.layers(name).items():
                let_wait(layer, 1.0 if (number := strength_at(now[name], path)) is None else number)

    def _acting(self) -> dict[str, Strength]:
        """The strengths of the adapters that act, or would if they were not disabled."""
        if self._waiting is None or not self.disabled:
            return self.adapters.strengths
        return {name: strength for name, strength in self._waiting.items() if name in self.adapters}

    def _activate(self, strengths: Mapping[str, Strength], *, trains: bool) -> None:
        if self.adapters.merged:
            warnings.warn("Adapter cannot be set when the model is merged. Unmerging the model first.", stacklevel=4)
            self.adapters.unmerge()
        with pefts_errors():
            try:
                self.adapters.activate(*strengths, trainable=trains, strengths=strengths)
            except StateError:
                # TRL's reference adapter acts in turn with the one that trains, and DDP and DeepSpeed do not know it.
                if torch.is_grad_enabled():
                    raise
                self.adapters.activate(*strengths, trainable=False, strengths=strengths)

    def _strength_of_waiting(self, name: str) -> Strength:
        """The strengths of an adapter that does not act: those that it had, or that were set at its layers."""
        return {path: waiting_strength(layer) for path, layer in self.adapters.layers(name).items()}

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """`PeftView.disable_adapter`."""
        if self.disabled:
            yield
            return
        self._unmerge()
        off = [layer for layer in self.switched() if layer.disable_adapters]
        if off:
            warnings.warn(
                "The model contains some adapter layers that are enabled and others that are disabled. This is most "
                "likely unintentional. After exiting the disable_adapter context, all adapters will be enabled",
                stacklevel=5,
            )
        before = self._waiting = self.adapters.strengths
        trained = [p for name in self.adapters.trainable for p in self.adapters.parameters(name) if p.requires_grad]
        try:
            with self.adapters.disabled():
                for parameter in trained:
                    parameter.requires_grad_(False)
                yield
        finally:
            chosen, self._waiting = self._waiting, None
            for parameter in trained:
                parameter.requires_grad_(True)
            if chosen is not None and chosen != before:  # `set_adapter` in the block
                self._activate(chosen, trains=True)
        for layer in off:
            layer.enable_adapters(True)

    def disable_adapter_layers(self) -> None:
        """Let no adapter act, until `enable_adapter_layers`. What is merged is unmerged, as PEFT does it."""
        self._unmerge()
        if not self.disabled:
            self._waiting = {name: self.adapters.strengths.get(name, 1.0) for name in self.active_adapters}
            self.adapters.activate()

    def enable_adapter_layers(self) -> None:
        """Let the adapters act again that acted before `disable_adapter_layers`, or that were set since."""
        if self.disabled:
            strengths, self._waiting = self._acting(), None
            self._activate({name: _on(strength) for name, strength in strengths.items()}, trains=True)

    def _unmerge(self) -> None:
        if self.adapters.merged:
            self.adapters.unmerge()

    def switched(self) -> list[LayerView]:
        """The layers of adapters that do not act with the same strength everywhere."""
        strengths = self.adapters.strengths
        paths = dict.fromkeys(
            path for strength in strengths.values() if isinstance(strength, Mapping) for path in strength
        )
        modules = map(self.model.get_submodule, paths)
        return [LayerView(module) for module in modules if LAYERS in module._modules]

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Whether the parameters of these adapters require gradients."""
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            for parameter in self.adapters.parameters(name):
                parameter.requires_grad_(requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter. If it was the active one, the first that is left becomes active."""
        if adapter_name not in self.adapters:
            raise ValueError(f"Adapter {adapter_name} does not exist")
        if adapter_name in self.adapters.merged:
            raise ValueError(
                f"Cannot delete adapter(s) ['{adapter_name}'] while they are merged. Please unmerge them first."
            )
        was_active = adapter_name in self.active_adapters
        self.adapters.remove(adapter_name)
        self._shown.pop(adapter_name, None)
        if was_active and self.adapters.names and not self.adapters.active:
            first = self.adapters.names[0]
            warnings.warn(
                f"Adapter {adapter_name} was active which is now deleted. Setting active adapter to {first}.",
                stacklevel=3,
            )
            self.set_adapter(first)

    # Merging

    def merge_adapter(self, adapter_names: Sequence[str] | None = None, safe_merge: bool = False) -> None:
        """Add those that are not merged yet to the weights: `Adapters.merge`. A tied weight gets one of its own.

        Raises:
            ValueError: with `safe_merge`, values that are not finite.
            StateError: the adapters are disabled.
        """
        if self.disabled:
            raise StateError(
                "The adapters are disabled, and merged they would act. Call enable_adapter_layers() first, or merge "
                "outside of the block of disable_adapter()."
            )
        names = self._not_merged(adapter_names)
        if names:
            with pefts_errors():
                self.adapters.merge(*names, safe=safe_merge, untie=True)

    def unmerge_adapter(self) -> None:
        """Restore the weights: `Adapters.unmerge`."""
        if not self.adapters.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=3)
        self._unmerge()

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: Sequence[str] | None = None
    ) -> nn.Module:
        """Merge adapters as `merge_adapter` does, and return the bare model: `Adapters.merge_and_detach`."""
        names = self._not_merged(adapter_names)
        if not names:
            self.adapters.activate()  # else the active ones, which nobody named, would be merged
        with pefts_errors():
            return self.adapters.merge_and_detach(*names, safe=safe_merge, untie=True)

    def _not_merged(self, names: Sequence[str] | None) -> list[str]:
        """Those of these adapters that are not merged yet, with PEFT's warnings. `None`: of the active ones."""
        if isinstance(names, str):
            raise TypeError(f"adapter_names should be a list of strings, got {names!r}.")
        merged = self.adapters.merged
        wanted = [name for name in (self.active_adapters if names is None else names) if name not in merged]
        if merged and wanted:
            warnings.warn(
                f"Already following adapters were merged {','.join(merged)}. "
                f"You are now additionally merging {','.join(wanted)}.",
                stacklevel=4,
            )
        elif not wanted:
            warnings.warn("All adapters are already merged, nothing to do.", stacklevel=4)
        return wanted

    def unload(self) -> nn.Module:
        """Return the bare model: `Adapters.detach`."""
        return self.adapters.detach()

    def add_weighted_adapter(  # noqa: PLR0913, PLR0917 - PEFT's own arguments
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = True,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: MajoritySign = "total",
    ) -> None:
        """Add an adapter that combines others: `Adapters.combine` (see `peft_combining.combine`).

        `svd_full_matrices` and `svd_driver` have no effect: they say how PEFT calls `torch.linalg.svd`.
        """
        if svd_clamp is not None:
            raise ValueError("svd_clamp is an option of PEFT that adapterkit does not implement. Leave it out.")
        combine(
            self.adapters,
            adapters,
            weights,
            adapter_name,
            combination_type,
            svd_rank=svd_rank,
            density=density,
            majority_sign_method=majority_sign_method,
        )

    def inject_adapter(self, *_: Any, **__: Any) -> None:
        """Refuse: PEFT would put its own layers into the model.

        Raises:
            UnsupportedError: always.
        """
        raise UnsupportedError("Call add_adapter of the view, or ak.attach(model).add(name, config).")

    def _create_and_replace(self, *_: Any, **__: Any) -> None:
        self.inject_adapter()


def _on(strength: Strength) -> Strength:
    """The strength, with 1 where the adapter is off."""
    if not isinstance(strength, Mapping):
        return strength
    return {path: 1.0 if number is None else number for path, number in strength.items()}


def _class_of(adapters: Adapters) -> type[Tuner]:
    """The class of the tuner, which is PEFT's class for the first adapter's type, too, if PEFT has one."""
    return _classes.get(adapters.config(adapters.names[0]).to_dict()["peft_type"], Tuner)


_classes: dict[str, type[Tuner]] = {
    kind.value: both(Tuner, tuner_class, __name__)
    for kind, tuner_class in PEFT_TYPE_TO_TUNER_MAPPING.items()
    if issubclass(tuner_class, BaseTuner)
}
