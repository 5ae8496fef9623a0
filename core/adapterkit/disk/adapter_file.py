"""An adapter as data: its files sorted once, with layers that are built without a model; and how it is written."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from adapterkit.combining import Changes, Source, check_given, exact_change, outputs_of, to_method
from adapterkit.contract import (
    AdapterConfig,
    AdapterLayer,
    KeyRule,
    Method,
    Names,
    Shared,
    Target,
    beside,
    default_registry,
    file_key,
    shared_tensors,
    strip_file_prefix,
)
from adapterkit.disk.model import Base
from adapterkit.errors import CheckpointError, ConfigError, SaveError, StateError
from adapterkit.files import (
    CONFIG_FILE,
    PICKLE_FILE,
    WEIGHTS_FILE,
    AdapterFiles,
    FactorSpool,
    MappedFiles,
    adapter_folder,
    appearing,
    check_foreign,
    file_config,
    file_tensors,
    kinds_of,
    layers_of,
    local_path,
    named_layers,
    of_component,
    passed_over,
    read,
    recognise,
    refuse,
    shapes_of,
    write_folder,
    write_tensors,
)
from adapterkit.forward import trained_dtype
from adapterkit.kinds import Factors, LayerKind
from adapterkit.model import BaseModules, Fit, LabelSet, LayerBuilder, by_layer
from adapterkit.results import LoadReport, Mismatch
from adapterkit.tensors import module_slots

Tensors = Mapping[str, Tensor]
_CPU = torch.device("cpu")
_CLASSIFIERS = ("SEQ_CLS", "TOKEN_CLS")
# PEFT writes what a head was before it was trained under these too.
_SHADOWS = ("modules_to_save", "original_module")


@dataclass
class AdapterFile:
    """One adapter's files.

    Attributes:
        files: as they were read; the tensors are mapped, so their values are read when they are used.
        kinds: what each layer is that it changes; empty if its tensors do not tell and there is no base.
        layers: their tensors by path and name in the layer.
        heads: those of modules that it holds in full, in the same way.
        tables: the heads that are the base's embeddings with other values.
        biases: trained biases, by the path of their module; `shared`: tensors that all layers use, by name.
        unknown: keys that belong to nobody; `ignored`: keys of other models, and what the base has already.
        refused: layers that cannot be built from files alone, and why.
    """

    name: str
    files: AdapterFiles
    method: Method
    config: AdapterConfig
    kinds: dict[str, LayerKind]
    base: Base | None = None
    mapped: MappedFiles = field(default_factory=MappedFiles)
    layers: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    heads: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    tables: set[str] = field(default_factory=set)
    biases: dict[str, Tensor] = field(default_factory=dict)
    shared: dict[str, Tensor] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)

    @classmethod
    def open(
        cls,
        source: str | Path,
        base: Base | None = None,
        *,
        name: str = "",
        component: str | None = None,
        keep_names: bool = False,
    ) -> AdapterFile:
        """The adapter of a folder, a hub id or another program's file, as far as its files tell.

        Args:
            base: the model, for what they do not tell.
            component: of a source for a whole pipeline, the part.
            keep_names: call the layers of another program's file what that does.

        Raises:
            CheckpointError: it is no adapter, or damaged.
            UnknownNameError: no plugin provides its method.
        """
        mapped = MappedFiles()
        files = read(adapter_folder(source), mapped.read)
        passed: Collection[str] = ()
        if files.config is None:
            method, config, kinds, tensors, passed = _foreign(files, base, component, keep_names)
            files = dataclasses.replace(files, config=config.to_dict(), tensors=tensors)
        else:
            method = default_registry.claim(files.config, files.folder)
            config = method.config_type().from_dict({"modules_to_save": None, **files.config})
            tensors = strip_file_prefix(files.tensors)
            kinds = {} if base is not None else kinds_of(method.layers_in_file(shapes_of(tensors), config))
            if not kinds:
                base = base or Base.recorded(config)
                if base is not None:
                    kinds, config, tensors = _of_base(tensors, method, config, base)
            else:
                config, tensors = _native(tensors, method, config, kinds)
        kinds = {path: kinds[path] for path in sorted(kinds, key=natural)}
        opened = cls(name or files.folder.name, files, method, config, kinds, base, mapped)
        opened._sort(tensors, passed)
        return opened

    def _sort(self, tensors: Tensors, passed: Collection[str]) -> None:
        """Put every tensor under what it belongs to, by its key."""
        heads = _heads(tensors, self.config.modules_to_save)
        for key, tensor in tensors.items():
            split = self.rule.split(key, self.kinds)
            if self.method.shared is not None and self.rule.is_shared(key):
                self.shared[key] = tensor
            elif split is not None:
                self.layers.setdefault(split[0], {})[split[1]] = tensor
                if self.kinds and split[0] not in self.kinds:  # it looks like a layer's, and there is no such layer
                    (self.ignored if key in passed else self.unknown).append(key)
            elif key in heads:
                self._sort_into_head(heads[key], key, tensor)
            elif key in passed:
                self.ignored.append(key)
            else:
                self._sort_other(key, tensor)

    def _sort_into_head(self, head: str, key: str, tensor: Tensor) -> None:
        name = key.removeprefix(f"{beside(head, self.kinds)}.")
        if key[len(head) + 1 :].partition(".")[0] in _SHADOWS:
            self.ignored.append(key)
        elif name == key:
            self.unknown.append(key)
        else:
            self.heads.setdefault(head, {})[name] = tensor

    def _sort_other(self, key: str, tensor: Tensor) -> None:
        """A tensor of the base model itself: a trained bias, or a table of embeddings."""
        place, _, local = key.rpartition(".")
        host, trained = place.removesuffix(".base_layer"), self.config.trained_biases
        target = host in self.kinds
        table = local == "weight" and tensor.dim() == 2 and (not target or self.kinds[host].lookup)
        if not place or not tensor.is_floating_point():
            self.unknown.append(key)
        elif local == "bias" and target and host != place and trained != "none":
            self.biases[host] = tensor
        elif local == "bias" and not target and trained == "all" and tensor.dim() == 1:
            self.biases[place] = tensor
        elif table and _equals(None if self.base is None else self.base.parameter(host, "weight"), tensor):
            self.ignored.append(key)
        elif table:
            self.heads[host] = {local: tensor}
            self.tables.add(host)
        else:
            self.unknown.append(key)

    @cached_property
    def rule(self) -> KeyRule:
        """What its keys are called."""
        return self.method.key_rule(self.config)

    def check_told(self) -> None:
        """Raise `CheckpointError` if its files do not tell the sizes of its layers."""
        if not self.kinds:
            raise CheckpointError(
                f"{self.files.folder}: the tensors of a {self.method.name!r} adapter do not tell the sizes of the "
                "layers that it changes. Give base=, the folder of the model that it was trained on, of which only "
                "config.json is read."
            )

    def check_fits(self) -> None:
        """Refuse what cannot be used.

        Raises:
            CheckpointError: a tensor is missing, does not fit or is nobody's, or the sizes of layers are not told.
            StateError: a layer needs the base's weights.
        """
        self.check_told()
        for path, head in self.heads.items():
            names = [f"{place}.bias" if place else "bias" for place in outputs_of(head)]
            whole = next((name for name in names if name in head and not head[name].is_floating_point()), None)
            if whole is not None:
                raise CheckpointError(
                    f"'{path}.{whole}' holds {head[whole].dtype}, and floating numbers are needed: it is quantised, or "
                    "damaged."
                )
        if not self.report.ok:
            refuse(self.report, self.name, str(self.files.folder))
        if self.refused:
            raise StateError(next(iter(self.refused.values())))

    @cached_property
    def _built(self) -> tuple[dict[str, AdapterLayer], Shared | None, Fit]:
        """Its layers, of mapped tensors. Those that need the base's weights are in `refused`."""
        builder, shared, found = LayerBuilder(self.method, self.config, cast=False), None, {}
        held = {path: self.layers.get(path, {}) for path in self.kinds}
        targets = [Target(path, None, kind, torch.float32, _CPU, held[path]) for path, kind in self.kinds.items()]
        if targets:
            shared = builder.shared(targets, self.shared)
        for target in targets:
            try:
                found[target.path] = builder.layer(target, shared)
            except StateError as error:
                self.refused[target.path] = str(error)
        fit = builder.fit
        for path, bias in self.biases.items():
            size = (self.kinds[path].out_features,) if path in self.kinds else tuple(bias.shape)
            if tuple(bias.shape) != size:
                fit.mismatched.append(Mismatch(f"{beside(path, self.kinds)}.bias", tuple(bias.shape), size))
        if self.base is not None and self.config.trained_biases != "none":
            lacking = [path for path in self.kinds if path not in self.biases and self.base.has_bias(path)]
            fit.missing += [f"{path}.base_layer.bias" for path in lacking]
        fit.unexpected += self.unknown
        fit.ignored += self.ignored
        return found, shared, fit

    @property
    def built(self) -> dict[str, AdapterLayer]:
        """Its layers."""
        return self._built[0]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Those of its layers, and shared ones, by key: what the method's save rule is asked about."""
        shared = self._built[1]
        inside = {f"{path}.{local}": t for path, held in self.layers.items() for local, t in held.items()}
        return inside | (self.shared if shared is None else shared_tensors(shared))

    @cached_property
    def report(self) -> LoadReport:
        """What fits, and what does not."""
        return self._built[2].report(strip_file_prefix(self.files.tensors))

    @cached_property
    def broken(self) -> set[str]:
        """Layers with a tensor that is missing or does not fit."""
        wrong = (*self.report.missing, *(m.key for m in self.report.mismatched))
        return {split[0] for key in wrong if (split := self.rule.split(key, self.kinds)) is not None}

    def factors(self, path: str, dtype: torch.dtype = torch.float32) -> Factors | None:
        """The exact change of a layer, in this dtype at least; `None` if it has no such form."""
        return self.method.factors(self.built[path], dtype)

    def source(self, weight: float) -> Source:
        """The adapter as `combining` takes it."""

        def change(path: str, dtype: torch.dtype) -> Factors:
            return exact_change(self.method, self.built[path], self.name, path, dtype)

        def base_bias(path: str) -> Tensor:
            held = None if self.base is None else self.base.parameter(path, "bias")
            if held is None:
                raise StateError(
                    f"Adapter {self.name!r} trains the bias of {path!r}, and its files do not tell what that was "
                    "before. Give base=, the folder of the model with its weights, or weights that add up to 1."
                )
            return held

        wide = {
            path: {name: t.to(trained_dtype(t.dtype)) if t.is_floating_point() else t for name, t in head.items()}
            for path, head in self.heads.items()
        }
        biases = {path: bias.to(trained_dtype(bias.dtype)) for path, bias in self.biases.items()}
        own = (self.config, self.kinds, wide, self.tables, biases, self.labels)
        return Source(self.name, weight, *own, change, base_bias)

    @property
    def labels(self) -> LabelSet | None:
        """The label set in the file; else the base's, if that has as many classes; else numbered classes."""
        own = LabelSet.from_metadata(self.files.metadata)
        heads = [head for path, head in self.heads.items() if path not in self.tables]
        rows = [count for head in heads for count in outputs_of(head).values()]
        if own is not None or not rows:
            return own if self.heads else None
        base = None if self.base is None else LabelSet.of(self.base.model)
        if base is not None and len(base.id2label) in rows:
            return base
        return LabelSet.numbered(rows[-1]) if base is not None or self.config.task_type in _CLASSIFIERS else None

    @property
    def paths(self) -> set[str]:
        """Every module that its tensors speak of."""
        places = [key.rpartition(".")[0].split(".") for key in strip_file_prefix(self.files.tensors)]
        places += [path.split(".") for path in self.kinds]
        return {".".join(parts[:i]) for parts in places for i in range(1, len(parts) + 1)}


def _heads(keys: Iterable[str], wanted: str | Sequence[str] | None) -> dict[str, str]:
    """The head that each key is inside of: the outermost module that `modules_to_save` names.

    PEFT takes a module whose path is an entry, or merely ends like one.
    """
    names = Names(list(filter(None, [wanted] if isinstance(wanted, str) else wanted or ())))
    found: dict[str, str] = {}
    for key in keys if names.names else ():
        parts = key.split(".")
        paths = (".".join(parts[:i]) for i in range(1, len(parts)))
        head = next((path for path in paths if names.match(path) or path.endswith(names.names)), None)
        if head is not None:
            found[key] = head
    return found


def _equals(own: Tensor | None, tensor: Tensor) -> bool:
    if own is None or own.shape != tensor.shape:
        return False
    wide = torch.float32 if tensor.dtype.itemsize == 1 else tensor.dtype
    return torch.equal(own.to(tensor.dtype).to(wide), tensor.to(wide))


def _of_base(
    tensors: Tensors, method: Method, config: AdapterConfig, base: Base
) -> tuple[dict[str, LayerKind], AdapterConfig, dict[str, Tensor]]:
    """The base's layers that the keys name, and the config and the tensors as the method reads them.

    Where a method renames its keys in files, they are read with all layers of the base first.
    """
    rule, held = method.key_rule(config), dict(tensors)
    renamed = not any(rule.split(key) for key in shapes_of(tensors))
    if renamed:
        config, held = _native(tensors, method, config, layers_of(BaseModules(base.model)))
    splits = [rule.split(key) for key in shapes_of(held)]
    kinds = {path: base.kind(path) for path in dict.fromkeys(split[0] for split in splits if split)}
    return (kinds, config, held) if renamed else (kinds, *_native(held, method, config, kinds))


def _native(
    tensors: Tensors, method: Method, config: AdapterConfig, kinds: Mapping[str, LayerKind]
) -> tuple[AdapterConfig, dict[str, Tensor]]:
    """The config and the tensors as the method reads them."""
    own, read = method.read(tensors, kinds, {}, config) or (config, tensors)
    return own, dict(read)


def _foreign(
    files: AdapterFiles, base: Base | None, part: str | None, keep_names: bool
) -> tuple[Method, AdapterConfig, dict[str, LayerKind], dict[str, Tensor], set[str]]:
    """Another program's file as an adapter folder would hold it, and the keys that are for other models.

    Raises:
        CheckpointError: no method knows it, it is for several models, or its names do not tell the layers' paths.
    """
    check_foreign(files.tensors, files.folder)
    tensors = of_component(files.tensors, part)
    if base is None:
        layers = named_layers(tensors, files.folder, keep_names=keep_names)
    else:
        layers = layers_of(BaseModules(base.model))
    method, config, read = recognise(tensors, layers, files.metadata, files.folder)
    rule, found = method.key_rule(config), dict(read)
    splits = (rule.split(key, layers) for key in found)
    paths = dict.fromkeys(split[0] for split in splits if split and split[0] in layers)
    return method, config, {path: layers[path] for path in paths}, found, passed_over(tensors, found, layers)


def natural(path: str) -> list[tuple[int, str]]:
    """A key to sort paths by in which `layers.2` is before `layers.10`."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in path.split(".")]


def names_of(places: Sequence[str | Path]) -> list[str]:
    """What adapters are called by the places of their files: the folders' names, else the places in full.

    Raises:
        ConfigError: one stands twice.
    """
    full = [str(place) for place in places]
    if len(set(full)) < len(full):
        raise ConfigError(f"An adapter is named twice: {', '.join(map(repr, full))}.")
    short = [Path(place).name for place in full]
    return short if len(set(short)) == len(short) and all(short) else full


@dataclass(frozen=True)
class Result:
    """A new adapter, before it is written to files.

    Attributes:
        kinds: what each layer is that it changes, by path.
        tensors: those of the layers and shared ones, by key.
        heads: the tensors of each head; `tables` those that are embeddings.
        biases: trained biases, by the path of their module.
        paths: of the model's modules, as far as they are known.
        metadata: for the header, beside the labels.
    """

    config: AdapterConfig
    method: Method
    kinds: Mapping[str, LayerKind]
    tensors: Mapping[str, Tensor]
    heads: Mapping[str, Mapping[str, Tensor]]
    tables: Collection[str]
    biases: Mapping[str, Tensor]
    labels: LabelSet | None
    paths: Collection[str] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    @torch.no_grad()
    def of(cls, changes: Changes, method: Method, dtype: torch.dtype) -> Result:
        """The adapter of this method that makes these changes; its layers are of this dtype.

        Raises:
            UnsupportedError: the method cannot express some of the changes.
        """
        config, tensors = to_method(changes, method)
        builder, cpu = LayerBuilder(method, config), torch.device("cpu")
        given, _ = by_layer(tensors, builder.rule, {path: path for path in changes.factors})
        targets = [Target(p, None, changes.kinds[p], dtype, cpu, given.get(p, {})) for p in changes.factors]
        shared = builder.shared(targets, {})
        layers = {target.path: builder.layer(target, shared) for target in targets}
        check_given(tensors, layers, builder)
        own = {f"{path}.{local}": s.tensor for path, layer in layers.items() for local, s in module_slots(layer)}
        kinds = {path: changes.kinds[path] for path in layers}
        wide = {path: bias.to(dtype if path in layers else bias.dtype) for path, bias in changes.biases.items()}
        heads, tables, labels = changes.heads, changes.tables, changes.labels
        return cls(config, method, kinds, own | shared_tensors(shared), heads, tables, wide, labels)

    def in_file(self) -> tuple[AdapterConfig, dict[str, Tensor]]:
        """The config, and all tensors by the keys of PEFT's format."""
        parts = [*self.heads.items(), *((path, {"bias": bias}) for path, bias in self.biases.items())]
        rest = {f"{beside(path, self.kinds)}.{local}": t for path, held in parts for local, t in held.items()}
        return file_tensors(self.method, self.config, self.tensors, rest)

    def write(self, place: Path, dtype: torch.dtype | None, mapped: Sequence[MappedFiles | FactorSpool]) -> None:
        """Write its folder, tensor by tensor.

        Args:
            dtype: what all but the heads is written in; `None`: in its own.
            mapped: has its pages released after each tensor.

        Raises:
            SaveError: it cannot be written there; what was there is untouched.
        """
        heads = {file_key(beside(path, self.kinds), local) for path, held in self.heads.items() for local in held}

        def write(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
            floating = [key for key, tensor in tensors.items() if key not in heads and tensor.is_floating_point()]
            dtypes = {} if dtype is None else dict.fromkeys(floating, dtype)
            write_tensors(tensors, path, metadata, dtypes, lambda: _release(mapped))

        heads_alone = [path for path in self.heads if path not in self.tables]
        config, tensors = self.in_file()
        config = file_config(config, self.kinds, heads_alone, self.paths)
        labels = self.labels.to_metadata() if self.labels is not None and self.heads else {}
        write_folder(place, config.to_dict(), tensors, {**labels, **self.metadata}, write)


def write_file(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    place: Path,
    dtypes: Mapping[str, torch.dtype],
    mapped: Sequence[MappedFiles | FactorSpool],
) -> None:
    """A safetensors file that appears under its name when it is complete.

    Raises:
        SaveError: it cannot be written there; what was there is untouched.
    """
    try:
        place = place.resolve()
        with appearing(place) as fresh:
            write_tensors(tensors, fresh, {"format": "pt", **metadata}, dtypes, lambda: _release(mapped))
    except OSError as error:
        raise SaveError(f"{place} cannot be written: {error}. What was there before is untouched.") from error


def _release(mapped: Sequence[MappedFiles | FactorSpool]) -> None:
    for pages in mapped:
        pages.release()


def output_place(out: str | Path, inputs: Sequence[Path], *, overwrite: bool) -> Path:
    """The path of the output.

    Raises:
        ConfigError: it is no path, or one of the inputs.
        SaveError: there is an adapter or a file already, and it is not to be overwritten.
    """
    place = local_path(out)
    if any(place.resolve() == path.resolve() for path in inputs):
        raise ConfigError(f"{place} is an input; give the output another place.")
    held = [place / name for name in (CONFIG_FILE, WEIGHTS_FILE, PICKLE_FILE) if (place / name).exists()]
    held += [place] if place.is_file() else []
    if held and not overwrite:
        raise SaveError(f"{held[0]} exists already. Say overwrite=True to replace it, or choose another place.")
    return place


def file_place(out: str | Path, inputs: Sequence[Path], *, overwrite: bool) -> Path:
    """As `output_place`, for a single file.

    Raises:
        ConfigError, SaveError: as there, or its name does not end in `.safetensors`.
    """
    place = output_place(out, inputs, overwrite=overwrite)
    if place.suffix != ".safetensors" or place.is_dir():
        raise ConfigError(f"{place}: other programs' form is one file; give it a name that ends in .safetensors.")
    return place


def check_dtype(dtype: object) -> None:
    """Raise `ConfigError` unless it is a floating dtype or `None`."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ConfigError(f"dtype = {dtype!r} must be a floating torch.dtype or None.")
