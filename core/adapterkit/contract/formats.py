"""Formats of other programs: what a plugin gives to read and write them, and how their keys name layers."""

from __future__ import annotations

import json
import math
import re
import typing
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from adapterkit.contract.config import AdapterConfig
from adapterkit.contract.field_types import misfit, readable
from adapterkit.contract.patterns import Names
from adapterkit.door import json_object
from adapterkit.errors import CheckpointError, PluginError, UnsupportedError, usage, warn
from adapterkit.kinds import LayerKind

# Parts of a pipeline as diffusers and ComfyUI name them, before a dot.
_DOTTED_GENERATORS = ("unet", "transformer", "transformer_2", "prior", "diffusion_model", "model.diffusion_model")
_ENCODERS = ("clip_l", "clip_g", "t5xxl", "t5", "qwen25_7b", "qwen3_4b", "gemma2_2b", "llama", "umt5xxl")
DOTTED = (
    *_DOTTED_GENERATORS,
    *("text_encoder", "text_encoder_2", "text_encoder_3", "text_encoder_4"),
    *(f"text_encoders.{name}{inner}" for name in _ENCODERS for inner in (".transformer", "")),
    *(f"{name}{inner}" for name in _ENCODERS[:4] for inner in (".transformer", "")),
)
# As kohya-ss's programs and LyCORIS name them, whatever the method, before the path with "_" for ".".
_FLAT_GENERATORS = ("lora_unet", "lora_prior_unet", "lora_transformer", "Hunyuan_video_I2V_lora")
FLAT = (
    *(*_FLAT_GENERATORS, "lycoris"),
    *("lora_te", "lora_te1", "lora_te2", "lora_te3", "lora_te4", "lora_prior_te"),
)
# The parts that generate images and videos.
GENERATORS = (*_DOTTED_GENERATORS, *_FLAT_GENERATORS)
# ComfyUI has other text encoders with every new model.
_ANY_ENCODER = r"text_encoders\.\w+(?:\.transformer)?"
_PART = re.compile(rf"({'|'.join((_ANY_ENCODER, *map(re.escape, (*DOTTED, *FLAT))))})\.|({'|'.join(FLAT)})_")
# transformers 5 has dropped this module from some text encoders and kept it in others.
OPTIONAL = "text_model"
# Where diffusers keeps the fields of PEFT's config, each under the part of the pipeline: "unet.lora_alpha".
HEADER = "lora_adapter_metadata"
# Tensors by key or by local name, and the kinds of a model's layers by path.
Tensors = Mapping[str, Tensor]
Kinds = Mapping[str, LayerKind]
# Numbers that another program keeps beside a layer's factors, and PEFT does not.
_EXTRA = frozenset({"alpha", "scalar"})


@dataclass(frozen=True)
class ForeignFile:
    """An adapter as another program's file has it.

    Attributes:
        tensors: for each layer's path its tensors by that program's names (`lora_down.weight`, `alpha`).
        metadata: what goes into the header.
    """

    tensors: Mapping[str, Tensors]
    metadata: Mapping[str, str] = field(default_factory=dict)


def component(name: str) -> str:
    """The part of a pipeline that a key or a module's name begins with: `"lora_te1"`, `"unet"`; `""`: none."""
    found = _PART.match(name)
    return found[1] or found[2] if found else ""


class LayerNames:
    """Finds the layer that another program's name stands for: the path, or a part of a pipeline and the path."""

    def __init__(self, layers: Iterable[str]) -> None:
        self._dotted = {path: [path] for path in layers}
        self._flat: dict[str, list[str]] = {}
        for path in layers:
            self._flat.setdefault(path.replace(".", "_"), []).append(path)

    def find(self, name: str) -> str | None:
        """The layer's path, or `None` if the model has none of that name.

        Raises:
            CheckpointError: several layers have that name when dots are written as underscores.
        """
        part = component(name)
        if name in self._dotted or not part:
            return name if name in self._dotted else None
        separator = name[len(part)]
        known = self._dotted if separator == "." else self._flat
        rest, optional = name[len(part) + 1 :], OPTIONAL + separator
        found = next((known[n] for n in (rest, rest.removeprefix(optional), optional + rest) if n in known), [None])
        if len(found) > 1:
            raise CheckpointError(
                f"{name!r} may be any of the layers {', '.join(map(repr, found))}: their names are the same with '_' "
                "for '.'. Rename the file's keys so that they begin with the layer's own path and a dot."
            )
        return found[0]


@dataclass(frozen=True)
class ForeignLayer:
    """What another program's file has for one layer.

    Attributes:
        path, kind: the layer of the model.
        tensors: the file's tensors for it, by the method's own local names.
        keys: the key in the file of each of them, for messages.
    """

    path: str
    kind: LayerKind
    tensors: Tensors
    keys: Mapping[str, str]

    def matrix(self, local: str) -> Tensor | None:
        """A factor, of two dimensions or more; `None` if the file lacks it.

        Raises:
            CheckpointError: it is not a floating matrix.
        """
        tensor = self.tensors.get(local)
        if tensor is not None and (tensor.dim() < 2 or not tensor.is_floating_point()):
            raise CheckpointError(
                f"{self.keys[local]!r} holds {tensor.dtype} of shape {tuple(tensor.shape)}; a factor is a floating "
                "matrix."
            )
        return tensor

    def wide(self, local: str) -> Tensor:
        """A factor that the file has, in float32 at least."""
        tensor = self.matrix(local)
        assert tensor is not None
        return tensor if tensor.dtype == torch.float64 else tensor.float()

    def number(self, local: str) -> float | None:
        """A tensor of one finite number, such as an alpha; `None` if the file lacks it.

        Raises:
            CheckpointError: it holds several numbers, none, or one that is not finite.
        """
        tensor = self.tensors.get(local)
        if tensor is None:
            return None
        if tensor.numel() != 1 or tensor.is_complex():
            raise CheckpointError(
                f"{self.keys[local]!r} has shape {tuple(tensor.shape)}; {local!r} is a single number."
            )
        number = float(tensor.item())
        if not math.isfinite(number):
            raise CheckpointError(f"{self.keys[local]!r} is {number}: the file is damaged, or its training diverged.")
        return number

    def scale(self, rank: int) -> float:
        """What the file's alpha scales the change by: `alpha / rank`; 1 without an alpha, or with one of 0."""
        return (self.number("alpha") or rank) / rank if rank else 1.0


class Format:
    """Other programs' files of a method: kohya-ss's, LyCORIS's, diffusers'. A hook `formats` returns such objects.

    A subclass says what the tensors are called there, which of their dimensions is the rank, and what they are in the
    method's own names and scaling. Finding the layers that the file's names stand for, and the ranks and alphas of the
    config, is done here.

    Attributes:
        config_type: the method's config; its layers' scaling is the property `scaling`.
        alpha: the field of the config for what a file calls alpha.
        namings: the names of the programs whose files can be written: `"kohya"`, `"lycoris"`, `"diffusers"`.
        names: what a local name in a file means: the method's own name, or `"alpha"` or `"scalar"`, which are known.
        factors: own names; a layer has at least one of them.
        ranks: own names of factors, and which dimension of each is the rank, for `rank`.
        scaled: own names of the factors that are multiplied by the file's scaling, where it is not the config's.
        rows: own names of the tensors that have a row for each output of the layer, and which dimension that is.
        unwritten: own names for which the files that are written have no name.
        refused: names of variants that the method does not implement, and what they are.
    """

    config_type: type[Any]
    alpha: str = "alpha"
    namings: tuple[str, ...] = ()
    names: Mapping[str, str] = {}
    factors: frozenset[str] = frozenset()
    ranks: Mapping[str, int] = {}
    scaled: frozenset[str] = frozenset()
    rows: Mapping[str, int] = {}
    unwritten: frozenset[str] = frozenset()
    refused: Mapping[str, str] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name, hint in typing.get_type_hints(Format).items():
            value = getattr(cls, name, None)
            if value is not None and misfit(value, hint) is not None:
                raise PluginError(
                    f"{cls.__name__}.{name} = {value!r} is a {type(value).__name__}; it must be {readable(hint)}."
                )
        for name in ("factors", "scaled", "unwritten"):  # an author may write a list
            setattr(cls, name, frozenset(getattr(cls, name)))

    def rank(self, tensors: Tensors) -> int:
        """The rank of a layer's tensors, which have the method's own names; by default as `ranks` says."""
        return next(tensors[local].shape[dim] for local, dim in self.ranks.items() if local in tensors)

    def split(self, tensors: Tensors, sizes: Sequence[int]) -> list[dict[str, Tensor]]:
        """The tensors of a fused layer for each of the layers whose outputs it stacks, such as q, k and v.

        By default the `rows` are cut, and the layers share everything else: `[B_q; B_k; B_v] A`.

        Args:
            tensors: by own names.
            sizes: the outputs of each layer, or numbers in the same proportions.

        Raises:
            UnsupportedError: the change cannot be split there.
        """
        found: list[dict[str, Tensor]] = [dict(tensors) for _ in sizes]
        if self.rows.keys().isdisjoint(tensors):
            raise UnsupportedError(f"{self.config_type.method!r} does not say how a fused layer is split.")
        for local, dim in self.rows.items():
            if local in tensors:
                rows, total = tensors[local].shape[dim] if tensors[local].dim() > dim else 0, sum(sizes)
                if not rows or any(rows * size % total for size in sizes):
                    raise UnsupportedError(
                        f"{local!r} has {rows} rows, which cannot be split as {':'.join(map(str, sizes))}: the change "
                        "of each layer has no tensors of its own. The program that wrote the file can merge it."
                    )
                parts = tensors[local].split([rows * size // total for size in sizes], dim)
                for own, part in zip(found, parts, strict=True):
                    own[local] = part
        return found

    def join(self, parts: Sequence[Tensors]) -> dict[str, Tensor]:
        """The tensors of the fused layer whose outputs these layers stack: the reverse of `split`.

        By default the `rows` are stacked, and everything else must be the same in all layers.

        Raises:
            UnsupportedError: no adapter of the method changes the fused layer so.
        """
        joined = dict(parts[0])
        for local, tensor in joined.items():
            values = [part[local] for part in parts if local in part]
            if local in self.rows and len(values) == len(parts):
                joined[local] = torch.cat(values, self.rows[local])
            elif len(values) < len(parts) or not all(value is tensor or torch.equal(value, tensor) for value in values):
                raise UnsupportedError(
                    f"{local!r} differs between layers that are one layer there. Convert the adapter to LoRA "
                    "(to='lora'), which can join any."
                )
        return joined

    def config(self, layers: Mapping[str, ForeignLayer], metadata: Mapping[str, str], **fields: Any) -> Any:
        """The config of a file that has these layers. The core sets `target_modules`.

        By default it has the layers' ranks and `fields`, and the other fields that diffusers wrote into the header. An
        alpha is the one beside the layer's tensors, else the header's, else the rank. Keys in PEFT's names with no
        alpha at all do not tell how they were scaled, and a warning says so.

        Args:
            metadata: the header of a safetensors file.

        Raises:
            CheckpointError: the header does not say which of its alphas these layers have, or has other ranks.
        """
        header = header_fields([key for layer in layers.values() for key in layer.keys.values()], metadata) or {}
        base = self.config_type.from_dict(header, where="the file's header") if header else None
        ranks = {path: self.rank(layer.tensors) for path, layer in layers.items()}
        told = {path: number for path, layer in layers.items() if (number := layer.number("alpha")) is not None}
        untold = {path: layer for path, layer in layers.items() if path not in told}
        if base is None:
            _warn_of_guess(untold.values(), metadata)
            other = {}
        else:
            other = {path: float(getattr(base.at(path), self.alpha)) for path in untold}
            wrong = next((path for path in untold if "r" in header and base.at(path).r != ranks[path]), None)
            if wrong is not None:
                raise CheckpointError(
                    f"The header's {HEADER!r} has rank {base.at(wrong).r} for {wrong!r}, and its tensors have rank "
                    f"{ranks[wrong]}. A program has resized them and kept the header, or it is another file's, so its "
                    "alpha is not theirs. Put the file into a folder as adapter_model.safetensors, beside an "
                    "adapter_config.json with the right r and lora_alpha."
                )
            _warn_of_two_scales(f"The header's {HEADER!r}", base, [layers[path] for path in told], ranks)
        alphas = {path: told.get(path) or float(ranks[path]) for path in layers} | other
        found = self.config_type.with_values({"r": ranks, self.alpha: alphas})
        values = {name: getattr(found, name) for name in ("r", self.alpha, *found.patterns)}
        return (base or found).replace(**values, **fields)

    def tensors(self, layer: ForeignLayer, config: Any) -> dict[str, Tensor]:
        """The layer's tensors by the method's own names, exact under this config, which is the layer's own.

        By default they are the file's. The factors named in `scaled` are multiplied by the file's scaling over the
        config's. The file's scaling is `alpha / rank`, where an alpha of 0 means the rank, times the scalar, which
        LyCORIS may have trained.
        """
        rank, scalar = self.rank(layer.tensors), layer.number("scalar")
        scale = 1.0 if scalar is None else scalar
        if "alpha" in layer.tensors:
            scale *= layer.scale(rank) / (_scaling(config, rank) or 1.0)
        values = {name: tensor for name, tensor in layer.tensors.items() if name not in _EXTRA}
        for local in self.factors & values.keys():
            layer.matrix(local)
            if local in self.scaled and scale != 1.0:
                values[local] = layer.wide(local) * scale
        return values

    def write(
        self, naming: str, config: Any, tensors: Mapping[str, Tensors], kinds: Kinds, component: str
    ) -> ForeignFile:
        """The reverse: an adapter as the files of `naming` have it. The core puts the layers' names before these keys.

        By default each tensor is what `written` gives and has the first of the `names` for it, and each layer has an
        alpha, `scaling * r`. An alpha of 0 would mean the rank there, so the factors in `scaled` are zeros instead.
        Diffusers has PEFT's names and shapes, and the config in the header.

        Args:
            tensors: for each layer's path its tensors, as the hook `to_file` gives them.
            component: the part of a pipeline that the model is, as keys name it: `"lora_unet"`, `"text_encoder"`.

        Raises:
            UnsupportedError: such a file cannot hold this adapter.
        """
        if naming == "diffusers":
            config_fields = {f"{component}.{name}": value for name, value in config.to_dict().items()}
            return ForeignFile(tensors, {HEADER: json.dumps(config_fields, sort_keys=True)})
        there = {own: own for own in self.factors} | {own: name for name, own in reversed(list(self.names.items()))}
        found = {}
        for path, held in tensors.items():
            unnamed = sorted(held.keys() - (there.keys() - self.unwritten))
            if unnamed:
                raise UnsupportedError(
                    f"naming={naming!r} has no name for {unnamed[0]!r} of {path!r}. Keep PEFT's format (naming='peft')."
                )
            rank = self.rank(held)
            alpha = _scaling(config.at(path), rank) * rank
            own = self.written(held, kinds[path])
            if not alpha:  # which would mean the rank there
                own, alpha = {n: torch.zeros_like(t) if n in self.scaled else t for n, t in own.items()}, float(rank)
            named = {there[local]: tensor for local, tensor in own.items()}
            found[path] = {**named, "alpha": torch.tensor(alpha, dtype=torch.float32, device="cpu")}
        return ForeignFile(found)

    def written(self, tensors: Tensors, kind: LayerKind) -> Tensors:
        """The tensors of one layer in the shapes that files have; by default as they are."""
        return tensors

    def readings(self, key: str) -> Iterable[tuple[str, str]]:
        """What a key may mean: pairs of a module's name and an own local name. The first that fits counts."""
        for ending, own in self._endings:
            if key.endswith(ending):
                return [(key.removesuffix(ending), own)]
        return ()

    @cached_property
    def _endings(self) -> list[tuple[str, str]]:
        known = {**{name: name for name in (*self.factors, *self.refused, *_EXTRA)}, **self.names}
        return sorted(((f".{there}", own) for there, own in known.items()), key=lambda pair: -len(pair[0]))

    def layers(self, tensors: Tensors, kinds: Kinds) -> dict[str, ForeignLayer]:
        """The layers of a model that a file has factors for, by path.

        Raises:
            CheckpointError: two keys are for one place.
            UnsupportedError: they are of a variant that the method does not implement.
        """
        names, keys = LayerNames(kinds), dict[str, dict[str, str]]()
        for key in tensors:
            for module, local in self.readings(key):
                path = names.find(module)
                if path is not None:
                    other = keys.setdefault(path, {}).setdefault(local, key)
                    if other != key:
                        raise CheckpointError(_two_keys(other, key, path))
                    break
        found = {}
        for path, own in keys.items():
            if self.factors.isdisjoint(own):
                continue
            for local in self.refused.keys() & own.keys():
                raise UnsupportedError(f"{own[local]!r}: this is {self.refused[local]}.")
            found[path] = ForeignLayer(path, kinds[path], {local: tensors[key] for local, key in own.items()}, own)
        return found

    def groups(self, tensors: Tensors) -> dict[str, dict[str, Tensor]]:
        """The tensors of each layer that has factors, by own names, as far as the keys tell without a model."""
        found: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            for module, local in list(self.readings(key))[:1]:
                found.setdefault(module, {})[local] = tensor
        return {module: group for module, group in found.items() if not self.factors.isdisjoint(group)}

    def read(
        self, tensors: Tensors, kinds: Kinds, metadata: Mapping[str, str], config: AdapterConfig | None = None
    ) -> tuple[AdapterConfig, Tensors] | None:
        """The config and the tensors of the adapter that a file holds; `None`: it holds nothing for these layers.

        Tensors of no layer keep their keys, so that they are reported.

        Args:
            config: the adapter's config, where it is known; the file's own counts otherwise.
        """
        layers = self.layers(tensors, kinds)
        if not layers:
            return None
        if config is None:
            chosen = {"target_modules": exactly(layers, kinds), "exclude_modules": None, "modules_to_save": None}
            config = self.config(layers, metadata).replace(**chosen, layers_to_transform=None, layers_pattern=None)
        else:  # in PEFT's names the config alone says the scale
            told = [layer for layer in layers.values() if "alpha" in layer.keys and _is_native(layer, self.factors)]
            ranks = {layer.path: self.rank(layer.tensors) for layer in told}
            _warn_of_two_scales("The config", config, told, ranks)
        read = dict(tensors)
        for path, layer in layers.items():
            if _is_native(layer, layer.keys) and _EXTRA.isdisjoint(layer.keys):
                continue
            for key in layer.keys.values():
                del read[key]
            read |= {f"{path}.{local}": tensor for local, tensor in self.tensors(layer, config.at(path)).items()}
        return config, read


def header_fields(keys: Collection[str], metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """The fields of PEFT's config that diffusers wrote into the header for these keys; `None`: it wrote none.

    The header has fields for each part of a pipeline, and the keys begin with their part. Keys of other programs may
    name the part otherwise, or not at all. They get the fields without a part, or those of the only part that fits.

    Raises:
        CheckpointError: it is not a JSON object, or several of its parts may be meant, or none.
    """
    if HEADER not in metadata:
        return None
    values = json_object(metadata[HEADER], f"The header's {HEADER!r}")
    if not values:
        return None
    heads = {name.partition(".")[0] for name in values if "." in name}
    parts = sorted({key.partition(".")[0] for key in keys} & heads)
    if not parts and all("." in name for name in values):
        own = {component(key) for key in keys}
        parts = sorted(head for head in heads if all(_may_be(part, head) for part in own))
        if len(parts) != 1:
            raise CheckpointError(
                f"The header's {HEADER!r} scales {', '.join(map(repr, sorted(heads)))}, and keys such as "
                f"{next(iter(keys), '')!r} do not say which of these they are for. Begin the keys with the part and a "
                "dot, or put the file into a folder as adapter_model.safetensors beside an adapter_config.json."
            )
    start = f"{parts[0]}." if parts else ""
    return {n.removeprefix(start): v for n, v in values.items() if (n.startswith(start) if start else "." not in n)}


def _may_be(part: str, head: str) -> bool:
    """Whether what a file calls `part` may be what diffusers calls `head`; `""` and `"lycoris"` may be anything."""
    generators = [name in GENERATORS for name in (part, head)]
    if part in ("", "lycoris") or any(generators):
        return part in ("", "lycoris") or all(generators)
    numbers = [re.fullmatch(r"(?:lora_te|text_encoder_?)(\d*)", name) for name in (part, head)]
    return None in numbers or len({found[1] or "1" for found in numbers if found}) == 1


def _is_native(layer: ForeignLayer, names: Collection[str]) -> bool:
    """Whether the keys of these tensors, as far as the layer has them, are PEFT's: its path and the own name."""
    return all(key == f"{layer.path}.{local}" for local, key in layer.keys.items() if local in names)


def _scaling(config: Any, rank: int) -> float:
    """What a layer's config scales its change by, where it has this rank."""
    return float((config if config.r == rank else config.replace(r=rank)).scaling)


def _warn_of_two_scales(source: str, config: Any, layers: Iterable[ForeignLayer], ranks: Mapping[str, int]) -> None:
    """Warn if a config and the alpha of a layer disagree about its scale; the alpha counts.

    Args:
        source: what messages call the config.
    """
    for layer in layers:
        rank = ranks[layer.path]
        told, own = _scaling(config.at(layer.path), rank) if rank else 1.0, layer.scale(rank)
        if not math.isclose(told, own, rel_tol=1e-2):
            warn(
                f"{source} scales {layer.path!r} by {told:.4g}, and {layer.keys['alpha']!r} by {own:.4g}. The alpha "
                "beside the tensors counts. If it is wrong, take the alphas out of the file."
            )
            return


def _warn_of_guess(layers: Collection[ForeignLayer], metadata: Mapping[str, str]) -> None:
    """Warn if the scale of these layers, which have no alpha, is not what their program means by that."""
    if not layers:
        return
    keys = (key for x in layers for local, key in x.keys.items() if key == f"{x.path}.{local}")
    bare = next((key for key in keys if component(key) in ("", "transformer")), None)  # GPT-2 has a `transformer`
    try:
        alpha, size = float(metadata.get("ss_network_alpha", "nan")), float(metadata.get("ss_network_dim", "nan"))
    except ValueError:
        alpha = size = math.nan
    if bare is not None:
        why = f"The file does not say how its layers are scaled: beside {bare!r} is no alpha, and there is no config."
    elif abs(alpha - size) > 0:
        why = f"The header says alpha {alpha:g} at rank {size:g}, and {len(layers)} layers have no alpha of their own."
    else:
        return
    warn(
        f"{why} They are taken as they are, as if alpha were the rank. If they were trained with another alpha, put "
        "the file into a folder as adapter_model.safetensors, beside an adapter_config.json with its "
        "peft_type, target_modules, r and lora_alpha."
    )


def exactly(paths: Collection[str], among: Iterable[str]) -> tuple[str, ...] | str:
    """`target_modules` that selects these paths alone: them, or an expression where one also ends another path."""
    names = Names(paths)
    if all(path in paths or names.match(path) is None for path in among):
        return tuple(paths)
    return "|".join(map(re.escape, paths))


@usage()
def empty_layer(outputs: int, inputs: int, *kernel: int, groups: int = 1) -> nn.Module:
    """A linear layer of these sizes on the meta device, or a convolution if there is a kernel: for the hook `sizes`."""
    convolution = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}.get(len(kernel))
    if convolution is None:
        return nn.Linear(inputs, outputs, bias=False, device="meta")
    return convolution(inputs, outputs, kernel, groups=groups, bias=False, device="meta")  # type: ignore[arg-type]


def _two_keys(first: str, second: str, path: str) -> str:
    advice = "One of them must go."
    if component(first) != component(second):
        advice = f"Say which part of the pipeline this model is, such as component={component(first)!r}."
    return f"Both {first!r} and {second!r} are for the layer {path!r}. {advice}"
