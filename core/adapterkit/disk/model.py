"""Models of folders: a skeleton from the config alone, a model with its files mapped, the base of adapters in files."""

from __future__ import annotations

import json
import logging
import re
import tempfile
import threading
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adapterkit.contract import Method, default_registry
from adapterkit.disk.checkpoint import PIPELINE, Checkpoint, PlainModel, match_names, read_object, weights_in
from adapterkit.door import check_may_open, own_file, read_small
from adapterkit.errors import AdapterError, AdapterWarning, CheckpointError, UnsupportedError, UsageError, plain, usage
from adapterkit.files import (
    Entry,
    MappedFiles,
    hub_error,
    hub_id,
    hub_is_unreachable,
    local_path,
)
from adapterkit.formats import (
    AdapterFiles,
    Translation,
    advice_on_names,
    layers_of,
    translate,
)
from adapterkit.kinds import AnyModule, LayerKind
from adapterkit.model import BaseModules, base_parameters, named_modules, tables
from adapterkit.results import in_groups

CONFIG = "config.json"
# By PEFT's `task_type`, transformers' tables from a config's class to the model's.
_TASKS = {
    "SEQ_CLS": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
    "TOKEN_CLS": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING",
    "QUESTION_ANS": "MODEL_FOR_QUESTION_ANSWERING_MAPPING",
    "CAUSAL_LM": "MODEL_FOR_CAUSAL_LM_MAPPING",
    "SEQ_2_SEQ_LM": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
    "FEATURE_EXTRACTION": "MODEL_MAPPING",
}
# What `save_pretrained` of transformers' tokenizers writes.
_TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model"),
    *("vocab.json", "vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model"),
    *("chat_template.jinja", "chat_template.json"),
)
# Keys of a config, at any depth, that name code, or models and files elsewhere. None of them changes the skeleton.
_CODE = ("auto_map", "_name_or_path", "name_or_path", "checkpoint_path", "custom_generate", "custom_pipelines")
# A name of an architecture of timm, which may ask the hub or a file for others.
_NAME = re.compile(r"[\w.-]+")
# The largest counts of what a model makes modules or names for, by keys of a config, and the largest other number.
_MOST = {
    re.compile(r"(num|n)_(\w+_)?(layers?|blocks?|stages?)|(\w+_)?(layers|depths?)"): 1 << 12,
    re.compile(r"(num|n)_(\w+_)?experts?"): 1 << 16,
    re.compile(r"(num|n)_(\w+_)?labels?"): 1 << 20,
}
_LARGEST = 1 << 40
_OFFLINE = threading.RLock()
_FLOATING = ("F16", "BF16", "F32", "F64")


@usage()
def skeleton(model: str | Path, *, architecture: str | None = None) -> nn.Module:
    """The model of a folder or of a hub id, on the meta device: every module, shape and tie, and no values.

    It is built by transformers from `config.json` alone, as the class that its `architectures` name (or by
    `AutoModel`, if they name none), in the config's dtype and in eval mode. Seconds for any size.
    `ak.select(ak.skeleton(folder), config)` tells what a config would adapt.

    The model of a folder of diffusers, or of safetensors files without a config, is told from the names and shapes of
    its tensors: it has linear layers, convolutions and embeddings, but no forward. A single file that holds a whole
    pipeline under its original names (`"model.diffusion_model."`) stands for the diffusion model in it.

    Args:
        architecture: the class to build, in place of the config's.

    Raises:
        CheckpointError: there is no config, or none that transformers can make a model of; or it is a whole pipeline.
        UsageError: transformers has no such class.
        UnsupportedError: the model's code is not in transformers but beside its weights. Such code is not run here:
            build the model yourself, under `torch.device("meta")`.
    """
    path = check_may_open(local_path(model))
    folder = path.parent if path.is_file() else path
    if folder.is_dir() and (name := _plain_name(folder)) is not None:
        if not any((folder / file).is_file() for file in (CONFIG, PIPELINE)) and weights_in(path) is None:
            found = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
            raise CheckpointError(f"{folder} is not a model: it has no {CONFIG}. It holds {found}.")
        if architecture is not None:
            raise CheckpointError(f"{path} is not a model of transformers, so it has no class {architecture!r}.")
        return PlainModel.of(Checkpoint.open(path), name)
    where = str(folder) if folder.is_dir() else hub_id(model, "model folder")
    config = _config(where)
    import transformers

    given = config.architectures if architecture is None else [architecture]
    named = [str(name) for name in given] if isinstance(given, list) else []
    classes = (getattr(transformers, name, None) for name in named)
    cls: Any = next((c for c in classes if isinstance(c, type) and issubclass(c, transformers.PreTrainedModel)), None)
    if architecture is not None and cls is None:
        raise UsageError(f"transformers has no model of the class {architecture!r}.")
    config.architectures = named
    build = transformers.AutoModel.from_config if cls is None else cls._from_config
    what = f"transformers cannot build {', '.join(named) or 'a model'} from the config of {where}"
    with _as_checkpoint_error(what), _contained(), torch.device("meta"):
        built: nn.Module = build(config)
    return built.eval()


def _plain_name(folder: Path) -> str | None:
    """A name for the model of a folder without a config of transformers; `None` if there is such a config."""
    if not (folder / CONFIG).is_file():
        return "Model"
    config: dict[str, Any] = {}
    with suppress(CheckpointError):  # `_config` tells of it
        config = read_object(folder / CONFIG)
    return str(config["_class_name"]) if "_class_name" in config and "model_type" not in config else None


@contextmanager
def _as_checkpoint_error(what: str) -> Iterator[None]:
    """A config's values may make transformers and its models raise anything."""
    try:
        yield
    except AdapterError:
        raise
    except Exception as error:
        why = str(error).partition("\n")[0]
        raise CheckpointError(f"{what}: {type(error).__name__}: {why}") from error


def _config(where: str) -> Any:
    """The config of a model. Nothing of it makes transformers run code or fetch."""
    from transformers import AutoConfig, PretrainedConfig

    with (
        _as_checkpoint_error(f"There is no config of a model for {where!r}"),
        tempfile.TemporaryDirectory() as temporary,
    ):
        try:
            raw, _ = PretrainedConfig.get_config_dict(
                where, local_files_only=not Path(where).is_dir() and hub_is_unreachable()
            )
        except OSError as error:
            if Path(where).is_dir():
                raise
            raise hub_error(where, error) from error
        _make_harmless(raw, where)
        folder = Path(temporary, Path(where).name or "model")
        folder.mkdir()
        (folder / CONFIG).write_text(json.dumps(raw), encoding="utf-8")
        with _contained():  # a backbone may be named by the config, or by its class
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        config._name_or_path = where
        return config


def _parts(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Every value in a config, at any depth, with the key that it or its list has."""
    yield key, value
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _parts(name, inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _parts(key, inner)


def _make_harmless(config: Any, where: str) -> None:
    """Refuse models that are code or on the hub, and absurd sizes. Remove names of code that are not needed."""
    from transformers import CONFIG_MAPPING

    for key, value in _parts("", config):
        if isinstance(value, dict):
            if "auto_map" in value and value.get("model_type") not in CONFIG_MAPPING:
                raise UnsupportedError(
                    f"{where}: the model is code beside its weights ({value['auto_map']}), which is not run here. "
                    'Build it yourself under torch.device("meta").'
                )
            for name in [name for name in value if name in _CODE or name.endswith("_implementation")]:
                del value[name]
        if key in ("backbone", "architecture") and isinstance(value, str) and not _NAME.fullmatch(value):
            raise UnsupportedError(
                f"{where}: its config names {value!r} as its {key}, which is elsewhere and is not fetched here. Build "
                'the model yourself under torch.device("meta").'
            )
        if isinstance(value, int):
            most = next((most for keys, most in _MOST.items() if keys.fullmatch(key)), _LARGEST)
            if abs(value) > most:
                shown = value if value.bit_length() < 100 else f"2**{value.bit_length() - 1}"
                raise CheckpointError(f"{where}: {key} = {shown} in its config; the limit here is {most:,}.")


class _OfflineIn:
    """A flag that is true in one thread, and in the others what it was."""

    def __init__(self, thread: int, before: object) -> None:
        self.thread, self.before = thread, before

    def __bool__(self) -> bool:
        return threading.get_ident() == self.thread or bool(self.before)


class _PlainText(logging.Filter):
    """Makes what is logged plain: it quotes configs, whose text a terminal might obey."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = plain(record.getMessage()), ()
        return True


@contextmanager
def _contained() -> Iterator[None]:
    """Let transformers ask the hub for nothing in this block, in this thread, and log plain text.

    Other threads may fetch meanwhile.
    """
    from huggingface_hub import constants
    from transformers.utils.logging import get_logger

    with _OFFLINE, ExitStack() as stack:
        for handler in get_logger("transformers").handlers:
            filtering = _PlainText()
            handler.addFilter(filtering)
            stack.callback(handler.removeFilter, filtering)
        before: Any = constants.HF_HUB_OFFLINE
        flag: Any = _OfflineIn(threading.get_ident(), before)
        constants.HF_HUB_OFFLINE = flag
        try:
            yield
        finally:
            constants.HF_HUB_OFFLINE = before


def skeleton_for(
    base: Path, adapters: Sequence[AdapterFiles], architecture: str | None
) -> tuple[nn.Module, str | None]:
    """The skeleton that adapters are for, and its class if that is not the one that the base's config names.

    A base is often stored without its task's head, and its config then names the bare model. The adapters' task then
    says the class.

    Raises:
        CheckpointError: the config's class lacks modules of the adapters, and their task does not tell which has them.
    """
    if architecture is not None:
        return skeleton(base, architecture=architecture), architecture
    built: Any = skeleton(base)
    wanted = {name for files in adapters for name in _outer_modules(files, built)}
    lacking = sorted(wanted.difference(name for name, _ in built.named_children()))
    if not lacking:
        return built, None
    import transformers

    if isinstance(built, PlainModel):
        advice = advice_on_names(layers_of(BaseModules(built))) or "Is it another model?"
        raise CheckpointError(f"{base} has no {', '.join(map(repr, lacking))}, as the adapters have. {advice}")
    tasks = {str(files.config.get("task_type")) for files in adapters if files.config is not None}
    table = getattr(transformers, _TASKS.get(next(iter(tasks)), "") if len(tasks) == 1 else "", {})
    if type(built.config) in table:
        found = table[type(built.config)]
        name = (found[0] if isinstance(found, tuple) else found).__name__
        model = skeleton(base, architecture=name)
        if wanted <= {name for name, _ in model.named_children()}:
            return model, name
    own = {name for files in adapters for name in _outer_modules(files, built, other_class=True)}
    if own <= {name for name, _ in built.named_children()}:  # its layers are here, and no head is missing
        return built, None
    raise CheckpointError(
        f"The config of {base} names {type(built).__name__}, which has no {', '.join(map(repr, lacking))}, as the "
        "adapters have. If they are for this model with a task's head, say its class: "
        "architecture='...ForSequenceClassification', for example."
    )


def _outer_modules(files: AdapterFiles, model: nn.Module, *, other_class: bool = False) -> set[str]:
    """The first parts of the paths in an adapter's files, by the names that this model may have for them.

    Args:
        other_class: also take names that only the model with another head, or none, has.
    """
    if files.config is None:  # what another program's file names is seen when it is loaded
        return set()
    found = _as_named_by(model, files, other_class=other_class)
    rule = found.method.key_rule(found.config)
    return {key.partition(".")[0] for key in found.tensors if "." in key and not rule.is_shared(key)}


def _as_named_by(model: nn.Module, files: AdapterFiles, *, other_class: bool = False) -> Translation:
    """An adapter with the names that its model has for modules, also for modules that this one lacks."""
    with warnings.catch_warnings():  # which loading gives too
        warnings.simplefilter("ignore", AdapterWarning)
        return translate(files, BaseModules(model), other_class=other_class)


class MappedModel:
    """A model on the meta device whose parameters and buffers are replaced by tensors mapped from a checkpoint's files.

    Tied weights stay tied, unless the files hold them apart with other values. Whatever the checkpoint lacks, or holds
    in another shape or quantised, stays on the meta device: it may be of the model without its task's head, or with
    another one. Values are read when they are used; `release` frees the memory that they take.

    Attributes:
        in_file: the name in the files of each key. fused: those of keys that transformers fuses; see `match_names`.
        parameters: every parameter by each of its keys, and `keys` the reverse.
    """

    def __init__(self, model: nn.Module, checkpoint: Checkpoint) -> None:
        self.model, self.checkpoint = model, checkpoint
        self.in_file, self.fused = match_names(model, checkpoint.entries)
        self._files = MappedFiles()
        for tied in in_groups(base_parameters(model), lambda item: item[1]):
            self._fill(tied[0][1], [key for key, _ in tied])
        for path, module in named_modules(model):
            for name, buffer in module._buffers.items():
                entry = checkpoint.entries.get(self.in_file.get(f"{path}.{name}", ""))
                if buffer is not None and entry is not None and entry.shape == tuple(buffer.shape):
                    module._buffers[name] = self._files.tensor(entry)
        self.parameters = dict(base_parameters(model))
        groups = in_groups(self.parameters.items(), lambda item: item[1])
        self.keys = {tied[0][1]: [key for key, _ in tied] for tied in groups}
        self.release()

    def _fill(self, parameter: nn.Parameter, keys: Sequence[str]) -> None:
        """Put the values of a parameter in its place, and its own values in each place that has others in the files."""
        first = None
        for key in sorted(keys, key=lambda key: key not in self.in_file):
            entry = self.checkpoint.entries.get(self.in_file.get(key, ""))
            held = None if entry is None or not _fits(entry, parameter) else self._files.tensor(entry)
            if held is not None and (first is None or not torch.equal(held, first)):
                own = nn.Parameter(held, requires_grad=parameter.requires_grad)
                first = own if first is None else first
            else:
                own = parameter if first is None else first
            path, _, name = key.rpartition(".")
            self.model.get_submodule(path)._parameters[name] = own

    def held_as(self, key: str) -> str:
        """The name in the files of the model's parameter `key`, or of what it is tied to.

        Raises:
            UnsupportedError: it is made of other tensors when the model is loaded.
            CheckpointError: there is none, or it is not plain floating numbers of the model's shape.
        """
        parameter, folder = self.parameters[key], self.checkpoint.folder
        name = next((self.in_file[k] for k in (key, *self.keys[parameter]) if k in self.in_file), None)
        if name is None and key in self.fused:
            parts = self.fused[key]
            raise UnsupportedError(
                f"{key!r} is not a tensor of {folder}: transformers makes it from {len(parts)} others when it loads, "
                f"such as {parts[0]!r}. Load the model, and do this in memory."
            )
        if name is None:
            raise CheckpointError(
                f"{folder} has no tensor for {key!r} of a {type(self.model).__name__}. Is it another model?"
            )
        entry = self.checkpoint.entries[name]
        if not _fits(entry, parameter):
            raise CheckpointError(
                f"{folder}: {name!r} is {entry.dtype} of shape {entry.shape}, and {tuple(parameter.shape)} in plain "
                "floating numbers is needed: it is quantised, or does not go with the config."
            )
        return name

    def module(self, path: str) -> nn.Module:
        """A module in which every parameter has a value."""
        module = self.model.get_submodule(path)
        for name, _ in module.named_parameters():
            self.held_as(f"{path}.{name}")
        return module

    def release(self) -> None:
        """Free the memory of all values; what is used again is read again."""
        self._files.release()


def _fits(entry: Entry, parameter: Tensor) -> bool:
    return entry.dtype in _FLOATING and entry.shape == tuple(parameter.shape)


@dataclass(frozen=True)
class Vocabulary:
    """The rows that a model's embeddings have now, because the files of adapters hold embeddings of that size.

    Attributes:
        owner: the adapter whose files have embeddings of that size.
        resized: the model's keys with another number of rows than before.
    """

    rows: int
    owner: str
    resized: Collection[str]

    @classmethod
    def resize(cls, model: nn.Module, adapters: Mapping[str, AdapterFiles]) -> Vocabulary | None:
        """Resize a model on the meta device to the embeddings in these adapters' files; `None` if it has their size.

        Raises:
            UnsupportedError: two adapters have vocabularies of other sizes.
        """
        places = tables(BaseModules(model), tied=True) if hasattr(model, "resize_token_embeddings") else {}
        found: dict[int, str] = {}
        for name, files in adapters.items():
            held = _as_named_by(model, files).tensors if places and files.config is not None else {}
            for path, table in places.items():
                own: Any = table.weight
                given = held.get(f"{path}.weight", held.get(f"{path}.base_layer.weight"))
                if given is not None and given.dim() == 2 and given.shape != own.shape:
                    found.setdefault(given.shape[0], name)
        if not found:
            return None
        (rows, owner), *others = found.items()
        if others:
            raise UnsupportedError(
                f"{owner!r} holds embeddings of {rows:,} rows and {others[0][1]!r} of {others[0][0]:,}, and a model "
                "has one vocabulary. Merge one of them."
            )
        before = {key: tensor.shape for key, tensor in model.state_dict(keep_vars=True).items()}
        resizing: Any = model
        resizing.resize_token_embeddings(rows, mean_resizing=False)
        after = model.state_dict(keep_vars=True)
        return cls(rows, owner, [key for key, tensor in after.items() if before.get(key) != tensor.shape])

    def rest(self, base: MappedModel, values: Collection[str]) -> dict[str, Tensor]:
        """What was resized and is not among the adapters' values: BART's bias of the logits, zero for new tokens.

        Raises:
            UnsupportedError: there is something else, whose new rows are not known.
        """
        found = {}
        for key in self.resized:
            if key.endswith("final_logits_bias") and key in base.in_file:
                held = base.checkpoint.tensor(base.in_file[key])[..., : self.rows]
                found[key] = nn.functional.pad(held, (0, self.rows - held.shape[-1]))
            elif key not in values:
                raise UnsupportedError(
                    f"{self.owner!r} was trained with a vocabulary of {self.rows:,} tokens, and its files do not hold "
                    f"the new rows of {key!r}, which is resized with it. Load the model, call "
                    f"model.resize_token_embeddings({self.rows}), and merge in memory."
                )
        return found


def tokenizer_in(folder: Path) -> dict[str, bytes]:
    """The files of a tokenizer in a folder, by name; nothing if there is none."""
    if not own_file(folder / _TOKENIZER[1], folder):
        return {}
    return {name: read_small(folder / name) for name in _TOKENIZER if own_file(folder / name, folder)}


@dataclass
class Base:
    """A base model.

    Attributes:
        model: its modules, on the meta device or not. It may be the model without its task's head, or with another.
        folder: where its weights are that are not read yet.
    """

    model: nn.Module
    folder: Path | None = None

    @classmethod
    def of(cls, given: str | Path | nn.Module | None) -> Base | None:
        """What `base=` means: a model, or a folder or hub id of one."""
        if given is None or isinstance(given, nn.Module):
            return None if given is None else cls(given)
        return cls(skeleton(given), local_path(given))

    def modules(self, path: str) -> Iterator[nn.Module]:
        """The modules of this path, with and without the base model's prefix."""
        prefix = f"{getattr(self.model, 'base_model_prefix', '')}."
        for candidate in (path, path.removeprefix(prefix), prefix + path):
            with suppress(AttributeError):
                yield self.model.get_submodule(candidate)

    def kind(self, path: str, method: Method) -> LayerKind:
        """What a layer is, for an adapter of this method."""
        found = next(filter(None, map(default_registry.kind_of, self.modules(path))), None)
        if found is None and method.any_module and next(self.modules(path), None) is not None:
            return AnyModule()
        if found is None:
            raise CheckpointError(
                f"The adapter changes {path!r}, and {type(self.model).__name__}, given as its base, has no such layer."
            )
        return found

    def has_no_bias(self, path: str) -> bool:
        """Whether the modules of this path have no bias, with or without values."""
        return all(module._parameters.get("bias") is None for module in self.modules(path))

    def parameter(self, path: str, name: str) -> Tensor | None:
        """A parameter of a module, if its values are known: of a model in memory, or, mapped, in a folder's weights."""
        if self.folder is not None and weights_in(self.folder) is not None:
            MappedModel(self.model, Checkpoint.open(self.folder))
            self.folder = None
        found = (module._parameters.get(name) for module in self.modules(path))
        own = next((parameter for parameter in found if parameter is not None), None)
        return None if own is None or own.is_meta else own.detach()
