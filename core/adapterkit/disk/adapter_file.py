"""An adapter as data: its files are sorted once, and its layers are built without a model. And how it is written."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adapterkit.combining import Changes, Source, check_given, exact_change, outputs_of, to_method
from adapterkit.contract import (
    AdapterConfig,
    AdapterLayer,
    Method,
    Rule,
    Target,
    beside,
    file_key,
    shared_tensors,
    strip_file_prefix,
)
from adapterkit.disk.checkpoint import WEIGHTS_FILES as MODEL_FILES
from adapterkit.disk.model import CONFIG, Base, skeleton
from adapterkit.door import real_path
from adapterkit.errors import AdapterError, CheckpointError, SaveError, StateError, UsageError
from adapterkit.files import (
    EVERYWHERE,
    WEIGHTS_FILES,
    MappedFiles,
    adapter_folder,
    file_config,
    file_tensors,
    local_path,
    read,
    refuse,
    same_values,
    write_folder,
    write_tensors,
)
from adapterkit.formats import CONFIG_FILE, PEFT, AdapterFiles, algorithms_in, shapes_of, translate
from adapterkit.forward import check_trained_dtype, trained_dtype
from adapterkit.kinds import LayerKind
from adapterkit.model import (
    ALL_LINEAR,
    BaseModules,
    Fit,
    LabelSet,
    LayerBuilder,
    heads_in_file,
    layer_tensors,
    sort_tensors,
)
from adapterkit.results import LoadReport, Mismatch
from adapterkit.tensors import module_slots

Tensors = Mapping[str, Tensor]
_CPU = torch.device("cpu")
_CLASSIFIERS = ("SEQ_CLS", "TOKEN_CLS")


@dataclass(kw_only=True)
class AdapterContent:
    """What an adapter's files hold, or are about to hold.

    Attributes:
        kinds: the layer kind of each changed layer, by path; empty without a base if the tensors do not show it.
        tensors: of layers, and shared ones, by key: what the method's hook `to_file` gets.
        heads: the tensors of modules that it holds in full, by path and name in the module.
        tables: the heads that are the base's embeddings with other values.
        biases: trained biases, by the path of their module.
        paths: of the model's modules, as far as they are known.
        metadata: for the header, beside the labels.
    """

    config: AdapterConfig
    method: Method
    kinds: Mapping[str, LayerKind]
    tensors: Tensors = field(default_factory=dict)
    heads: Mapping[str, Tensors] = field(default_factory=dict)
    tables: Collection[str] = ()
    biases: Tensors = field(default_factory=dict)
    labels: LabelSet | None = None
    paths: Collection[str] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    @torch.no_grad()
    def of(cls, changes: Changes, method: Method, dtype: torch.dtype, **fields: Any) -> AdapterContent:
        """The adapter of this method that makes these changes; its layers are of this dtype.

        Args:
            fields: of its config.
        """
        config, tensors = to_method(changes, method)
        builder = LayerBuilder(method, config)
        given = layer_tensors(tensors, builder.rule, changes.factors)
        targets = [Target(p, None, changes.kinds[p], dtype, _CPU, given.get(p, {})) for p in changes.factors]
        shared = builder.shared(targets, {})
        layers = {target.path: builder.layer(target, shared) for target in targets}
        check_given(tensors, layers, builder)
        own = {f"{path}.{local}": s.tensor for path, layer in layers.items() for local, s in module_slots(layer)}
        return AdapterContent(
            config=config.replace(**fields),
            method=method,
            kinds={path: changes.kinds[path] for path in layers},
            tensors=own | shared_tensors(shared),
            heads=changes.heads,
            tables=changes.tables,
            biases={path: bias.to(dtype if path in layers else bias.dtype) for path, bias in changes.biases.items()},
            labels=changes.labels,
        )

    def in_file(self) -> tuple[AdapterConfig, dict[str, Tensor]]:
        """The config, and all tensors by the keys of PEFT's format."""
        parts = [*self.heads.items(), *((path, {"bias": bias}) for path, bias in self.biases.items())]
        rest = {f"{beside(path, self.kinds)}.{local}": t for path, held in parts for local, t in held.items()}
        return file_tensors(self.method, self.config, self.tensors, rest)

    def write(self, place: Path, dtype: torch.dtype | None, release: Callable[[], None]) -> None:
        """Write its folder, tensor by tensor.

        Args:
            dtype: what all but the heads is written in; `None`: in its own.
            release: called after each tensor; frees the memory of what was mapped.
        """
        heads = {file_key(beside(path, self.kinds), local) for path, held in self.heads.items() for local in held}
        config, tensors = self.in_file()
        floating = [key for key, tensor in tensors.items() if key not in heads and tensor.is_floating_point()]
        dtypes = {} if dtype is None else dict.fromkeys(floating, dtype)
        config = file_config(config, self.kinds, [path for path in self.heads if path not in self.tables], self.paths)
        labels = self.labels.to_metadata() if self.labels is not None and self.heads else {}
        writer = partial(write_tensors, dtypes=dtypes, after=release)
        write_folder(place, config.to_dict(), tensors, {**labels, **self.metadata}, writer)


@dataclass(kw_only=True)
class AdapterFile(AdapterContent):
    """One adapter's files, sorted.

    Attributes:
        files: as they were read; in PEFT's names, if they had another program's. The tensors are mapped, so their
            values are read when they are used.
        layout: whose layout they had.
        layers: the tensors of each layer by path and name in the layer; `shared`: those that all layers use.
        unselected: layers that the file has tensors for and the config does not select.
        built: its layers, of mapped tensors; `refused`: those that need the base's weights, and why.
        report: what fits, and what does not.
        broken: layers with a tensor that is missing or does not fit.
    """

    name: str
    files: AdapterFiles
    layout: str
    base: Base | None
    mapped: MappedFiles
    heads: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    tables: set[str] = field(default_factory=set)
    biases: dict[str, Tensor] = field(default_factory=dict)
    layers: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    shared: dict[str, Tensor] = field(default_factory=dict)
    unselected: list[str] = field(default_factory=list)
    built: dict[str, AdapterLayer] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    report: LoadReport = field(default_factory=LoadReport)
    broken: set[str] = field(default_factory=set)

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
            base: the model, if the files do not tell the sizes of its layers.
            component: of a source for a whole pipeline, the part.
            keep_names: keep the names that another program's file has for its layers.

        Raises:
            CheckpointError: it is not an adapter, or it is damaged.
            MissingMethodError: no plugin provides its method.
        """
        mapped = MappedFiles()
        files = read(adapter_folder(source), mapped.read)
        modules = None if base is None else BaseModules(base.model)
        found = translate(files, modules, component=component, keep_names=keep_names, other_class=False)
        recorded = found.config.base_model_name_or_path
        if base is None and not found.layers and recorded and (Path(recorded) / CONFIG).is_file():
            base = Base(skeleton(recorded), Path(recorded))
            found = translate(files, BaseModules(base.model), component=component, other_class=False)
        method, config, tensors, kinds = found.method, found.config, dict(found.tensors), found.layers
        if base is not None and files.config is not None:
            splits = [method.key_rule(config).split(key) for key in shapes_of(tensors)]
            kinds = {path: base.kind(path, method) for path in dict.fromkeys(split[0] for split in splits if split)}
        if found.layout != PEFT:
            files = dataclasses.replace(files, config=config.to_dict(), tensors=tensors)
        opened = cls(
            name=name or files.folder.name,
            files=files,
            layout=found.layout,
            method=method,
            config=config,
            kinds={path: kinds[path] for path in sorted(kinds, key=natural)},
            base=base,
            mapped=mapped,
        )
        builder = LayerBuilder(method, config, cast=False)
        builder.fit.ignored += [key for key in tensors if key in found.passed]
        opened._sort({key: tensor for key, tensor in tensors.items() if key not in found.passed}, builder)
        opened._build(builder)
        opened.labels = opened._labels()
        places = [key.rpartition(".")[0].split(".") for key in strip_file_prefix(files.tensors)]
        places += [path.split(".") for path in kinds]
        opened.paths = {".".join(parts[:i]) for parts in places for i in range(1, len(parts) + 1)}
        return opened

    def _sort(self, tensors: Tensors, builder: LayerBuilder) -> None:
        """Sort its tensors by what they belong to."""
        rule, fit, has_shared = builder.rule, builder.fit, self.method.shared is not None
        own = (key for key in tensors if not (has_shared and rule.is_shared(key, self.kinds)))
        splits = [split for key in own if (split := rule.split(key, self.kinds)) is not None]
        layers = {path: path for path in (*self.kinds, *(path for path, _ in splits))}
        heads = {path: path for path in heads_in_file(tensors, self.config.modules_to_save)}
        found = sort_tensors(tensors, rule, layers, heads, {}, shared=has_shared)
        self.layers, self.heads, self.shared = found.layers, found.heads, found.shared
        fit.ignored += found.repeated
        fit.unexpected += [key for key, tensor in found.rest.items() if not self._sort_of_base(key, tensor, fit)]
        self.unselected = self._unselected([path for path in found.layers if path in self.kinds])
        # Where its layers are known, the base lacks the layers of other tensors.
        others = [path for path in found.layers if self.kinds and path not in self.kinds]
        fit.unexpected += [f"{path}.{local}" for path in (*others, *self.unselected) for local in found.layers[path]]

    def _unselected(self, paths: Sequence[str]) -> list[str]:
        """The layers among these that the config leaves out, as far as it tells without a model."""
        targets = self.config.target_modules
        if targets in (None, ALL_LINEAR) or "targets" in self.method.hooks or EVERYWHERE in self.files.metadata:
            return []
        named = Rule("target_modules", targets or ())
        excluded = Rule("exclude_modules", self.config.exclude_modules or ())
        return [path for path in paths if named.match(path) is None or excluded.match(path) is not None]

    def _sort_of_base(self, key: str, tensor: Tensor, fit: Fit) -> bool:
        """Sort a tensor of the base itself: a trained bias, or a table of embeddings. Returns whether it is one."""
        place, _, local = key.rpartition(".")
        host, trained = place.removesuffix(".base_layer"), self.config.trained_biases
        target = host in self.kinds
        if not place or not tensor.is_floating_point():
            return False
        if local == "bias" and target and trained != "none":
            self.biases[host] = tensor
        elif local == "bias" and not target and trained == "all" and tensor.dim() == 1:
            self.biases[place] = tensor
        elif local == "weight" and tensor.dim() == 2 and (not target or self.kinds[host].lookup or host != place):
            own = None if self.base is None else self.base.parameter(host, "weight")
            if own is not None and same_values(own, tensor):
                fit.ignored.append(key)
            else:
                self.heads[host] = {local: tensor}
                self.tables.add(host)
        else:
            return False
        return True

    def _build(self, builder: LayerBuilder) -> None:
        """Build its layers, and find out what fits."""
        fit, shared = builder.fit, None
        targets = [Target(p, None, k, torch.float32, _CPU, self.layers.get(p, {})) for p, k in self.kinds.items()]
        if targets:
            shared = builder.shared(targets, self.shared)
        for target in targets:
            try:
                self.built[target.path] = builder.layer(target, shared)
            except StateError as error:
                if self.base is None or self.base.parameter(target.path, "weight") is None:
                    self.refused[target.path] = f"{error} For files alone, give base=, its folder with the weights."
                    continue
                module = next(self.base.modules(target.path))
                layer = builder.layer(dataclasses.replace(target, module=module), shared)
                self.built[target.path] = layer
                self.layers[target.path] = {local: slot.tensor for local, slot in module_slots(layer)}
        inside = {f"{path}.{local}": t for path, held in self.layers.items() for local, t in held.items()}
        self.tensors = inside | (self.shared if shared is None else shared_tensors(shared))
        for path, bias in self.biases.items():
            size = (self.kinds[path].out_features,) if path in self.kinds else tuple(bias.shape)
            if tuple(bias.shape) != size:
                fit.mismatched.append(Mismatch(f"{beside(path, self.kinds)}.bias", tuple(bias.shape), size))
        if self.base is not None and self.config.trained_biases != "none":
            for path in (path for path in self.kinds if path not in self.biases):
                if not self.base.has_no_bias(path):
                    fit.missing.append(f"{path}.base_layer.bias")
        self.report = fit.report()
        wrong = (*self.report.missing, *(m.key for m in self.report.mismatched))
        self.broken = {split[0] for key in wrong if (split := builder.rule.split(key, self.kinds)) is not None}

    @property
    def notes(self) -> list[str]:
        """Remarks: which tensors are of other algorithms, and what its files do not tell."""
        untold = (
            f"the tensors of a {self.method.name!r} adapter do not tell the sizes of the layers that it changes. Give "
            "base=, the folder of the model that it was trained on, of which only config.json is read."
        )
        told = self.kinds or (self.method.replaces_call and not self.layers)
        others, _ = algorithms_in(self.report.unexpected)
        return [*others, *dict.fromkeys(self.refused.values()), *([] if told else [untold])]

    def check_told(self) -> None:
        """Raise `CheckpointError` if its files do not tell the sizes of its layers."""
        if not self.kinds and self.notes:
            raise CheckpointError(f"{self.files.folder}: {self.notes[-1]}")

    def check_fits(self) -> None:
        """Refuse what cannot be used.

        Raises:
            CheckpointError: a tensor is missing, unexpected or of another shape, or the sizes of layers are unknown.
            StateError: a layer needs the base's weights.
        """
        self.check_told()
        for path, head in self.heads.items():
            for local, tensor in head.items():
                if local.endswith(("weight", "bias")) and not tensor.is_floating_point():
                    raise CheckpointError(
                        f"'{path}.{local}' holds {tensor.dtype}, and floating numbers are needed: it is quantised, or "
                        "damaged."
                    )
        if self.unselected:
            raise CheckpointError(
                f"{self.files.folder} has tensors for {self.unselected[0]!r}, which its config does not select "
                "(target_modules, exclude_modules), so a model has no adapter there. Select the layer in the config, "
                "or take its tensors out of the file."
            )
        if not self.report.ok:
            refuse(self.report, self.name, str(self.files.folder))
        if self.refused:
            raise StateError(self.notes[0])

    def source(self, weight: float) -> Source:
        """The adapter as `combining` takes it."""

        def base_bias(path: str) -> Tensor:
            found = self.base_bias(path)
            assert found is not None
            return found

        def wide(tensors: Tensors) -> dict[str, Tensor]:
            return {k: t.to(trained_dtype(t.dtype)) if t.is_floating_point() else t for k, t in tensors.items()}

        return Source(
            name=self.name,
            weight=weight,
            config=self.config,
            kinds=self.kinds,
            heads={path: wide(head) for path, head in self.heads.items()},
            tables=self.tables,
            biases=wide(self.biases),
            labels=self.labels,
            change=lambda path, dtype: exact_change(self.method, self.built[path], self.name, path, dtype),
            base_bias=base_bias,
        )

    def base_bias(self, path: str) -> Tensor | None:
        """The base's bias at a path; `None` if it has none there.

        Raises:
            StateError: the files do not tell it.
        """
        held = None if self.base is None else self.base.parameter(path, "bias")
        if held is None and not (self.base is not None and self.base.has_no_bias(path)):
            raise StateError(
                f"The result trains biases, and the files of {self.name!r} do not tell the bias that the base has at "
                f"{path!r}. Give base=, the folder of the model with its weights."
            )
        return held

    def _labels(self) -> LabelSet | None:
        """The label set that the file holds; else the one that the rows of its heads tell."""
        layers: list[tuple[int, int | None]] = []
        for path, head in self.heads.items():
            for local, rows in outputs_of(head).items() if path not in self.tables else ():
                place = f"{path}.{local}".rstrip(".")
                found = () if self.base is None else self.base.modules(place)
                layers.append((rows, next((m.out_features for m in found if isinstance(m, nn.Linear)), None)))
        labels = LabelSet.from_metadata(self.files.metadata)
        if labels is not None or not layers:
            return labels if self.heads else None
        own = None if self.base is None else LabelSet.of(self.base.model)
        if own is not None:
            return LabelSet.of_rows(layers, own)
        return LabelSet.numbered(layers[-1][0]) if self.config.task_type in _CLASSIFIERS else None


def natural(path: str) -> list[tuple[int, str]]:
    """A sort key for paths that puts `layers.2` before `layers.10`."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in path.split(".")]


def names_of(places: Sequence[str | Path]) -> list[str]:
    """Names for adapters: the names of their folders if all differ, else the whole paths.

    Raises:
        ConfigError: an adapter is given twice.
    """
    full = [str(place) for place in places]
    if len(set(full)) < len(full):
        raise UsageError(f"An adapter is named twice: {', '.join(map(repr, full))}.")
    short = [Path(place).name for place in full]
    return short if len(set(short)) == len(short) and all(short) else full


def output_place(
    out: str | Path, inputs: Sequence[Path], dtype: object, *, overwrite: bool, file: bool = False
) -> Path:
    """The path of the output: a folder, or a file.

    Raises:
        UsageError: it is not a path, or it is an input; or adapters have no such dtype.
        SaveError: there is an adapter or a file already, which is not to be overwritten; or a model.
    """
    check_trained_dtype(dtype)
    place = local_path(out)
    try:
        if any(real_path(place) == real_path(path) for path in inputs):
            raise UsageError(f"{place} is an input; give the output another place.")
        _check_free(place, overwrite=overwrite, file=file)
    except (OSError, ValueError) as error:  # a name that is too long, or has a NUL character
        if isinstance(error, AdapterError):
            raise
        raise SaveError(f"{place} cannot be written: {error}.") from error
    return place


def _check_free(place: Path, *, overwrite: bool, file: bool) -> None:
    """Raise an error if something there must not be replaced."""
    if file and (place.suffix != ".safetensors" or place.is_dir()):
        raise UsageError(f"{place}: other programs' form is one file; give it a name that ends in .safetensors.")
    if place.is_file() and not file:
        raise SaveError(f"{place} is a file; the output is a folder.")
    model = next((name for name in (*MODEL_FILES, "pytorch_model.bin") if (place / name).exists()), None)
    if model is not None:
        raise SaveError(
            f"{place} is a model's folder: it holds {model}. transformers would load the model with the adapter. Give "
            "the adapter a folder of its own."
        )
    held = [place / name for name in (CONFIG_FILE, *WEIGHTS_FILES) if (place / name).exists()]
    held += [place] if place.is_file() else []
    if held and not overwrite:
        raise SaveError(f"{held[0]} exists already. Say overwrite=True to replace it, or choose another place.")
