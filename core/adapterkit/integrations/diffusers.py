"""diffusers: one adapter over all components of a pipeline, loaded, activated and merged together."""

from __future__ import annotations

import json
import tempfile
import threading
import weakref
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
import safetensors.torch
import torch
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from torch import nn

from adapterkit.adapters import Adapters, attach
from adapterkit.contract import DOTTED, component
from adapterkit.errors import CheckpointError, ConfigError, StateError, unknown, usage_of_methods
from adapterkit.files import adapter_folder, hub_error, hub_id, local_path, read
from adapterkit.formats import TOKENS, algorithms_in
from adapterkit.results import LoadReport

WEIGHTS = "pytorch_lora_weights.safetensors"
DENOISERS = ("unet", "transformer", "prior")
# The components of a pipeline that a part of another program's file may be for; the first that is there counts.
_COMPONENTS: Mapping[str, tuple[str, ...]] = {
    **{part: (part,) for part in DOTTED if not part.startswith("text_encoders.")},
    **{part: ("text_encoder",) for part in DOTTED if "clip_l" in part},
    **{part: ("text_encoder_2",) for part in DOTTED if "clip_g" in part},
    **{part: ("text_encoder_3", "text_encoder_2", "text_encoder") for part in DOTTED if "t5" in part},
    **{part: ("text_encoder_4",) for part in DOTTED if "llama" in part},
    **dict.fromkeys(("", "lycoris", "lora_unet", "unet", "transformer"), DENOISERS),
    **dict.fromkeys(("diffusion_model", "model.diffusion_model", "Hunyuan_video_I2V_lora"), DENOISERS),
    **dict.fromkeys(("lora_te", "lora_te1", "lora_prior_te"), ("text_encoder",)),
    **{f"lora_te{number}": (f"text_encoder_{number}",) for number in (2, 4)},
    "lora_te3": ("text_encoder_3", "text_encoder_2"),  # kohya-ss has T5 there, for Flux too
    **{f"lora_{part}": (part,) for part in ("transformer", "prior")},
    "lora_prior_unet": ("prior",),
}
# A strength for all components of the pipeline that have the adapter, or for each one that `activate` takes: a number,
# or numbers by block: {"unet": {"down_blocks": 0.7}}.
Strength = float | Mapping[str, float | Mapping[str, float | None]]


@usage_of_methods("adapters")
class PipelineAdapters(Mapping[str, Adapters]):
    """The adapters of a diffusers pipeline. `adapters["unet"]` are those of one component.

    An adapter has one name in all components that it changes. It takes the place of `load_lora_weights`,
    `set_adapters`, `fuse_lora` and `unfuse_lora`, for every method, and needs no PEFT. The pipeline's call takes
    `cross_attention_kwargs={"scale": 0.5}` (or `joint_attention_kwargs`) as with PEFT: it multiplies the strengths
    in the denoiser for that call.
    """

    def __init__(self, pipeline: Any) -> None:
        if not isinstance(getattr(pipeline, "components", None), Mapping):
            raise ConfigError(f"PipelineAdapters needs a pipeline of diffusers, not a {type(pipeline).__name__}.")
        self.pipeline = pipeline
        for module in (self[name].model for name in DENOISERS if name in self):
            if module not in _handles:
                scale = CallScale(pipeline)
                _handles[module] = [
                    module.register_forward_pre_hook(scale.begin, with_kwargs=True),
                    module.register_forward_hook(scale.end, always_call=True),
                ]

    def __getitem__(self, component: str) -> Adapters:
        if component not in tuple(self):
            raise unknown("component", component, tuple(self))
        return attach(self.pipeline.components[component])

    def __iter__(self) -> Iterator[str]:
        """The names of the components that are modules."""
        return (name for name, part in self.pipeline.components.items() if isinstance(part, nn.Module))

    def __len__(self) -> int:
        return len(tuple(iter(self)))

    def __contains__(self, component: object) -> bool:
        return component in tuple(self)

    @property
    def names(self) -> dict[str, tuple[str, ...]]:
        """All adapters, each with the components that have it."""
        found: dict[str, tuple[str, ...]] = {}
        for part, adapters in self.items():
            found |= {name: (*found.get(name, ()), part) for name in adapters.names}
        return found

    def load(
        self,
        source: str | Path,
        name: str,
        *,
        activate: bool = True,
        dtype: torch.dtype | str | None = None,
        weight_name: str | None = None,
        **hub: Any,
    ) -> dict[str, LoadReport]:
        """Add an adapter to every component that the file has keys for, or to none.

        The file may be of diffusers, PEFT, kohya-ss's programs, ComfyUI or LyCORIS, of any installed method. Layer
        names that only diffusers can translate are translated by the pipeline's own `lora_state_dict`.

        Args:
            source: a file, a folder, or a hub id.
            activate: make it the only active adapter of the pipeline.
            dtype: as in `Adapters.load`.
            weight_name: the file in the folder or repository; by default `pytorch_lora_weights.safetensors`.
            hub: `revision`, `subfolder`, `cache_dir`, `token`: where to look on the hub.

        Returns:
            A report for each component that has the adapter now.

        Raises:
            CheckpointError: damaged or foreign files, tensors that do not fit, or keys for no component.
            ConfigError: the name is taken.
        """
        if name in self.names:
            raise ConfigError(f"The pipeline has an adapter {name!r}. Remove it first, or take another name.")
        path = _file(source, weight_name or WEIGHTS, **hub)
        try:
            reports = self._load(path, name, dtype)
        except CheckpointError as error:
            with tempfile.TemporaryDirectory() as folder:
                translated = self._translated(path, Path(folder) / WEIGHTS)
                if translated is None:
                    raise
                try:
                    reports = self._load(translated, name, dtype)
                except CheckpointError:
                    raise error from None
        if activate:
            self.activate(name)
        return reports

    def activate(self, *names: str, strengths: Mapping[str, Strength] | None = None) -> None:
        """Make these the active adapters of all components. Without a name: none. They do not train.

        It may be called between any two calls of the pipeline, or in its `callback_on_step_end`: it writes and copies
        nothing.

        Args:
            strengths: what an adapter's change is multiplied by, `{"a": 0.7}`, or by component,
                `{"a": {"unet": 0.7, "text_encoder": {"layers.0": 0.2}}}`, by block if you like; 1 where none is given.

        Raises:
            UnknownNameError: no such adapter or component.
            ConfigError, UnsupportedError, StateError: as in `Adapters.activate`. Nothing has changed then.
        """
        known, strengths = self.names, strengths or {}
        for name in (*names, *strengths):
            if name not in known:
                raise unknown("adapter", name, known)
        for strength in strengths.values():
            for part in strength if isinstance(strength, Mapping) else ():
                _ = self[part]
        with self._all_or_nothing():
            for part, adapters in self.items():
                own = [name for name in names if name in adapters]
                scales = {name: _of(strengths[name], part) for name in strengths if name in adapters}
                if own or adapters.active:
                    adapters.activate(*own, trainable=False, strengths=scales)

    def merge(self, *names: str, safe: bool = False) -> None:
        """Merge adapters into the weights of all components, with the strengths with which they act now.

        Raises:
            StateError: something is merged; or as in `Adapters.merge`. Nothing has changed then.
        """
        for part, adapters in self.items():
            if adapters.merged:
                raise StateError(f"{adapters.merged[0]!r} is merged into {part!r}. Call unmerge() first.")
        for name in names:
            if name not in self.names:
                raise unknown("adapter", name, self.names)
        try:
            for adapters in self.values():
                own = [name for name in names if name in adapters]
                if own:
                    adapters.merge(*own, safe=safe)
        except BaseException:
            self.unmerge()
            raise

    def unmerge(self) -> None:
        """Restore the weights of all components, every bit as before the merge."""
        for adapters in self.values():
            if adapters.merged:
                adapters.unmerge()

    def remove(self, name: str) -> None:
        """Remove an adapter from all components."""
        if name not in self.names:
            raise unknown("adapter", name, self.names)
        for part in self.names[name]:
            self[part].remove(name)

    def detach(self) -> Any:
        """Remove every adapter and every trace of them. Returns the pipeline as it was."""
        for adapters in list(self.values()):
            for handle in _handles.pop(adapters.detach(), ()):
                handle.remove()
        return self.pipeline

    # Loading

    def _load(self, path: Path, name: str, dtype: torch.dtype | str | None) -> dict[str, LoadReport]:
        """Load what the file has for each component, or nothing."""
        keys = [key for key in read(path).tensors if not key.startswith(TOKENS)] if path.is_file() else []
        parts = {component(key) for key in keys} or {""}
        places: dict[str, str] = {}
        for part in sorted(parts):
            wanted = _COMPONENTS.get(part, ("text_encoder",) if part.startswith("text_encoders.") else ())
            place = next((place for place in wanted if place in self), None)
            if place is None:
                raise CheckpointError(f"{path}: this pipeline has no component for the keys of {part!r}.")
            if place in places:
                raise CheckpointError(f"{path}: both {places[place]!r} and {part!r} are for the component {place!r}.")
            places[place] = part
        reports = {}
        try:
            for place, part in places.items():
                reports[place] = self[place].load(path, name, activate=False, dtype=dtype, component=part or None)
        except BaseException:
            for place in reports:
                self[place].remove(name)
            raise
        return reports

    def _translated(self, path: Path, out: Path) -> Path | None:
        """The file in diffusers' own names, as `out`; `None`: diffusers does not know its names either."""
        translate: Any = getattr(self.pipeline, "lora_state_dict", None)
        if translate is None or path.is_dir():
            return None
        keys = [*read(path).tensors]
        if any("dora_scale" in key for key in keys) or algorithms_in(keys)[0]:
            return None  # diffusers would drop what DoRA adds, and differences of norms
        unet = self.pipeline.components.get("unet")
        how = {"return_lora_metadata": True, "return_alphas": True, "unet_config": getattr(unet, "config", None)}
        try:
            found, *alphas, metadata = translate(str(path), **how)
        except Exception:  # noqa: BLE001 - whatever it is: the file is none of diffusers'
            return None
        tensors = {key: tensor.clone(memory_format=torch.contiguous_format) for key, tensor in found.items()}
        for key, alpha in (alphas[0] or {} if alphas else {}).items():
            tensors[key.replace(".down.weight.alpha", ".alpha")] = torch.tensor(float(alpha))
        header = {} if not metadata else {"lora_adapter_metadata": json.dumps(metadata)}
        safetensors.torch.save_file(tensors, out, header)
        return out

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """If the block raises, every component has the adapters active that it had."""
        before = [(adapters, adapters.strengths, _trained(adapters)) for adapters in self.values()]
        try:
            yield
        except BaseException:
            for adapters, strengths, trained in before:
                adapters.activate(*strengths, trainable=trained, strengths=strengths)
            raise


def _file(source: str | Path, weight_name: str, **hub: Any) -> Path:
    """The file, or PEFT's folder, of an adapter given by a path or a hub id."""
    path, inside = local_path(source), str(hub.get("subfolder") or "")
    if path.is_dir() and not (path / inside / "adapter_config.json").is_file():
        return path / inside / weight_name
    if path.exists():
        return adapter_folder(path, **hub)
    repo = hub_id(source, "file")
    try:
        return Path(huggingface_hub.hf_hub_download(repo, weight_name, **hub))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        raise hub_error(repo, error) from error


def _trained(adapters: Adapters) -> list[str]:
    """The active adapters that train."""
    return [name for name in adapters.active if name in adapters.trainable]


def _of(strength: Strength, part: str) -> float | Mapping[str, float | None]:
    return strength.get(part, 1.0) if isinstance(strength, Mapping) else strength


def _times(scale: float, strength: float | Mapping[str, float | None]) -> float | dict[str, float | None]:
    if isinstance(strength, Mapping):
        return {path: None if each is None else scale * each for path, each in strength.items()}
    return scale * strength


# The hooks of `CallScale` at each denoiser.
_handles: weakref.WeakKeyDictionary[nn.Module, list[Any]] = weakref.WeakKeyDictionary()


class CallScale:
    """Hooks of a denoiser: `scale` among a call's attention arguments multiplies the strengths for that call."""

    def __init__(self, pipeline: Any = None) -> None:
        self.pipeline = None if pipeline is None else weakref.ref(pipeline)
        self.blocks: dict[int, AbstractContextManager[None]] = {}

    def __reduce__(self) -> tuple[type[CallScale], tuple[()]]:
        # A copy of the denoiser is in no pipeline yet.
        return CallScale, ()

    def begin(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        """Forward pre-hook: begin a block with these strengths.

        Raises:
            StateError: an adapter acts in a text encoder, which the scale does not reach.
        """
        name = next((key for key, value in kwargs.items() if isinstance(value, Mapping) and "scale" in value), None)
        adapters = attach(module)
        if name is None or not adapters.active:
            return None
        scale = kwargs[name]["scale"]
        pipeline = None if self.pipeline is None else self.pipeline()
        for place, part in {} if pipeline is None or scale == 1.0 else pipeline.components.items():
            if place.startswith("text_encoder") and isinstance(part, nn.Module) and attach(part).active:
                raise StateError(
                    f"{name}={{'scale': {scale}}} reaches the denoiser alone, and {attach(part).active[0]!r} acts in "
                    f"{place!r} too. Call PipelineAdapters.activate with strengths in place of it."
                )
        strengths = {adapter: _times(scale, strength) for adapter, strength in adapters.strengths.items()}
        block = adapters.activated(*strengths, trainable=_trained(adapters), strengths=strengths)
        block.__enter__()
        self.blocks[threading.get_ident()] = block
        return args, {**kwargs, name: {key: value for key, value in kwargs[name].items() if key != "scale"}}

    def end(self, *_: Any) -> None:
        """Forward hook, also after an error: end the block."""
        block = self.blocks.pop(threading.get_ident(), None)
        if block is not None:
            block.__exit__(None, None, None)
