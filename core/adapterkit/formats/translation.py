"""The one way from an adapter's files, whoever wrote them, to a method, its config, and tensors in PEFT's names."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from adapterkit.contract import (
    DISABLE_VARIABLE,
    FLAT,
    AdapterConfig,
    KeyRule,
    Method,
    component,
    default_registry,
    strip_file_prefix,
)
from adapterkit.errors import AdapterError, CheckpointError, PluginError, UnsupportedError, warn
from adapterkit.formats.algorithms import algorithms_in
from adapterkit.formats.earlier_names import EARLIER, in_todays_names, selecting, todays_paths, with_todays_names
from adapterkit.formats.layouts import (
    CONFIG_FILE,
    AdapterFiles,
    kinds_of,
    layers_in_file,
    layers_of,
    program_of,
    shapes_of,
)
from adapterkit.formats.mlx import from_mlx
from adapterkit.formats.names import advice_on_names, in_diffusers_names
from adapterkit.formats.refused import TOKENS, check_program, is_full_model, warn_of_weights_beside
from adapterkit.formats.wrapped import unwrapped
from adapterkit.kinds import LayerKind
from adapterkit.model import BaseModules, layer_tensors, with_heads

# With this field PEFT trains an adapter of a layer whose weight is tied to a target's as well, with the same values.
# The file has the tensors of both, and only one of them need be a target.
_TIED = "ensure_weight_tying"


@dataclass(frozen=True)
class Translation:
    """An adapter in PEFT's names, whoever wrote its files.

    Attributes:
        tensors: by their keys in PEFT's format without its prefix; what no layer has keeps its key.
        layers: the layers that the tensors are for, as far as the files or the model tell. Of a PEFT folder on a model:
            all layers of the model.
        passed: keys for other models of a pipeline.
        layout: the program whose layout the files have, and what else they are: `"kohya-ss, SDXL in SGM names"`.
    """

    method: Method
    config: AdapterConfig
    tensors: Mapping[str, Tensor]
    layers: Mapping[str, LayerKind]
    passed: frozenset[str]
    layout: str


def translate(
    files: AdapterFiles,
    modules: BaseModules | None,
    *,
    component: str | None = None,
    keep_names: bool = False,
    other_class: bool = True,
) -> Translation:
    """An adapter as PEFT would have written it.

    Args:
        modules: those of the model; `None`: there is no model, and the tensors tell what they can.
        component: of a file for a whole pipeline, the part to take.
        keep_names: without a model, keep the names that another program's file has for its layers.
        other_class: on a model with another head than the adapter's, or none, name the layers as this model does.

    Raises:
        CheckpointError: it is not an adapter, or not one that this model has layers for.
        UnknownNameError: no plugin provides its method.
        UnsupportedError: no method implements a field or a variant that it has.
    """
    model_layers, moved = None if modules is None else layers_of(modules), dict[str, str]()
    program = program_of(files)
    files = from_mlx(unwrapped(files, model_layers), model_layers)
    check_program(files)
    tokens = [key for key in files.tensors if key.startswith(TOKENS)]
    held = strip_file_prefix({key: tensor for key, tensor in files.tensors.items() if key not in tokens})
    chosen = of_component(held, component)
    files = dataclasses.replace(files, tensors=chosen)
    if modules is not None or not keep_names:
        files, moved = _with_paths(files, modules, model_layers, other_class=other_class)
    else:  # the names stay, and tell whose they are
        with suppress(CheckpointError, UnsupportedError):
            files = dataclasses.replace(files, programs=in_diffusers_names(files, None).programs)
    own = files.tensors
    if files.config is None:
        layers = named_layers(own, files.folder, keep_names=keep_names) if model_layers is None else model_layers
        method, config, read = recognise(own, layers, files.metadata, files.folder)
        adapted = {path: layers[path] for path in layer_tensors(read, method.key_rule(config), layers)}
    else:
        fields = {**files.config, _TIED: False} if _TIED in files.config else files.config
        method, config = default_registry.read_config(fields, files.folder)
        layers = adapted = (
            kinds_of(method.layers_in_file(shapes_of(own), config)) if model_layers is None else model_layers
        )
        config = _of_these_layers(config, method.key_rule(config), files, modules, layers, moved)
        config, read = (method.read(own, layers, {}, config) if layers else None) or (config, own)
        config = with_heads(config, method.key_rule(config), read)
    passed = keys_of_other_parts(own, read, layers) if files.config is None else set()
    _warn_of_the_rest(files, tokens, passed)
    passed |= held.keys() - chosen.keys()
    layout = ", ".join(filter(None, (program, *files.programs)))
    return Translation(method, config, read, adapted, frozenset({*passed, *tokens}), layout)


def _of_these_layers(
    config: AdapterConfig,
    rule: KeyRule,
    files: AdapterFiles,
    modules: BaseModules | None,
    known: Mapping[str, LayerKind],
    moved: Mapping[str, str],
) -> AdapterConfig:
    """A folder's config that selects the layers that its tensors are for, where their names or ties tell more."""
    if modules is not None:
        config = with_todays_names(config, rule, files.tensors, moved, modules, known)
    if files.config is not None and files.config.get(_TIED):
        config = selecting(config, layer_tensors(files.tensors, rule, known), modules, known)
    return config


def in_names_of(tensors: Mapping[str, Tensor], modules: BaseModules) -> dict[str, Tensor]:
    """A state dict of an adapter, whatever layout it has, by the paths of the model and without PEFT's prefix.

    Raises:
        CheckpointError, UnsupportedError: it is known, and not for this model, or it cannot be read.
    """
    files, layers = AdapterFiles(Path("The state dict"), None, dict(tensors), {}), layers_of(modules)
    files = from_mlx(unwrapped(files, layers), layers)
    files = dataclasses.replace(files, tensors=strip_file_prefix(files.tensors))
    return _with_paths(files, modules, layers, other_class=True)[0].tensors


def _with_paths(
    files: AdapterFiles, modules: BaseModules | None, layers: Mapping[str, LayerKind] | None, *, other_class: bool
) -> tuple[AdapterFiles, dict[str, str]]:
    """The tensors by today's paths of the model, and those of the paths that another transformers called otherwise."""
    files = in_diffusers_names(files, layers)
    moved = {} if modules is None else todays_paths(modules, files.tensors, other_class=other_class)
    return (files.read_as(EARLIER, in_todays_names(files.tensors, moved)) if moved else files), moved


def _warn_of_the_rest(files: AdapterFiles, tokens: Sequence[str], passed: Iterable[str]) -> None:
    """Warn of what the file, or its folder, has beside the adapter for this model."""
    parts = Counter(component(key) for key in passed)
    if tokens:
        warn(
            f"{files.folder} also has a textual inversion, the embeddings of new tokens, such as {tokens[0]!r}. It is "
            "not part of the adapter and is left out; a pipeline of diffusers takes it with load_textual_inversion."
        )
    if parts:
        listed = ", ".join(f"{part!r} ({count} tensors)" for part, count in sorted(parts.items()))
        warn(
            f"{files.folder} also is for other models of a pipeline, which this model is not: {listed}. They are left "
            "out. Choose a part (component) to read it without this warning."
        )
    if files.config is not None and files.folder.is_dir():
        warn_of_weights_beside(files.folder, (path.name for path in files.folder.iterdir()))


def named_layers(tensors: Mapping[str, Tensor], file: Path, *, keep_names: bool) -> dict[str, LayerKind]:
    """The layers of another program's file, of any method, from its keys alone.

    Args:
        keep_names: call each layer what the file does; else by its path, without the part of a pipeline.

    Raises:
        CheckpointError: the file is for several models, or its names do not tell the layers' paths.
    """
    found = layers_in_file(tensors)
    if keep_names:
        return found
    parts = {component(name) for name in found}
    if len(parts) > 1:
        listed = ", ".join(map(repr, sorted(parts - {""})))
        raise CheckpointError(f"{file} is for several models of a pipeline: {listed}. Say component=.")
    flat = next((name for name in found if name.startswith(tuple(f"{part}_" for part in FLAT))), None)
    if flat is not None:
        raise CheckpointError(
            f"{file}: its names, such as {flat!r}, have '_' for '.', so the layers' paths cannot be told from "
            "them. Give base=, the model that it is for."
        )
    return {name.removeprefix(f"{component(name)}.") if component(name) else name: k for name, k in found.items()}


def of_component(tensors: Mapping[str, Tensor], part: str | None) -> dict[str, Tensor]:
    """The tensors of one part of a pipeline; all of them for `None`.

    Raises:
        CheckpointError: there are none.
    """
    kept = {key: tensor for key, tensor in tensors.items() if part is None or component(key) == part}
    if tensors and not kept:
        held = sorted({component(key) for key in tensors} - {""})
        raise CheckpointError(
            f"The file holds nothing of component {part!r}. Its components: {', '.join(map(repr, held)) or 'none'}."
        )
    return kept


def keys_of_other_parts(
    tensors: Mapping[str, Tensor], read: Mapping[str, Tensor], layers: Mapping[str, LayerKind]
) -> set[str]:
    """The keys of pipeline parts for which the method found no layer on this model."""
    own = {path.partition(".")[0] for path in layers}  # GPT-2 has a module called `transformer`
    parts = {key: component(key) for key in tensors}
    found = {part for key, part in parts.items() if key not in read}
    other = set(parts.values()) - found - own - {""}
    return {key for key, part in parts.items() if part in other}


def recognise(
    tensors: Mapping[str, Tensor], layers: Mapping[str, LayerKind], metadata: Mapping[str, str], file: Path
) -> tuple[Method, AdapterConfig, Mapping[str, Tensor]]:
    """The method of a file that has no config, and its config and tensors in PEFT's format. Asks every method.

    Raises:
        CheckpointError: none of them knows it, or several do.
    """
    found: list[tuple[Method, AdapterConfig, Mapping[str, Tensor]]] = []
    asked, broken, refused = [], [], []
    for name in default_registry.methods():
        try:
            method = default_registry.method(name)
            read = method.read(tensors, layers, metadata)
        except PluginError as error:
            broken.append(str(error))
        except AdapterError as error:
            refused.append((name, error))
        else:
            asked.append(name)
            found += [] if read is None else [(method, *read)]
    if len(found) + len(refused) > 1:  # some may merely say that the file is theirs
        found = [(m, c, own) for m, c, own in found if layer_tensors(own, m.key_rule(c), layers)]
    if refused and not found:
        raise refused[0][1]
    if len(found) == 1:
        for fault in broken:
            warn(f"{file}: a method could not be asked about it. {fault}")
        return found[0]
    names, algorithms = [method.name for method, *_ in found], algorithms_in(tensors, tensors)[0]
    if not names and not algorithms and is_full_model(tensors):
        raise CheckpointError(
            f"{file} holds whole weights, such as {next(iter(tensors))!r}, and no adapter: it is a fine-tuned model, "
            "or part of one. ak.extract_files(base, tuned) makes an adapter of the difference to its base."
        )
    raise CheckpointError(_not_recognised(names, algorithms, asked, broken, tensors, layers, file))


def _not_recognised(
    names: Sequence[str],
    algorithms: Sequence[str],
    asked: Sequence[str],
    broken: Sequence[str],
    tensors: Iterable[str],
    layers: Iterable[str],
    file: Path,
) -> str:
    what = f"{file} has no {CONFIG_FILE}, and no method finds layers of its own in it that this model has."
    if names:
        what = (
            f"{file} holds layers of several methods: {', '.join(names)}. Split it into one file for each. Where "
            f"one of them takes a file that is another's, switch it off: {DISABLE_VARIABLE}={names[-1]}."
        )
    elif algorithms:
        what = f"{file} holds no adapter of an installed method: {'; '.join(algorithms)}."
    lines = [
        what,
        f"Methods asked: {', '.join(asked) or 'none'}.",
        f"Keys in the file: {', '.join(map(repr, list(tensors)[:3])) or 'none'}.",
        f"Layers of the model: {', '.join(map(repr, list(layers)[:3])) or 'none'}.",
        *filter(None, [advice_on_names(layers)]),
        *(f"Not asked: {fault}" for fault in broken),
    ]
    return " ".join(lines)
