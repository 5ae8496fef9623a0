"""Configs: what a user writes, checked when it is made, and PEFT's `adapter_config.json`."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import re
import reprlib
import typing
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, ClassVar, Literal, Self

from adapterkit.contract.field_types import POSITIVE, bare, misfit, not_json, readable
from adapterkit.contract.patterns import PatternTable
from adapterkit.errors import (
    AdapterError,
    AdapterWarning,
    ConfigError,
    PluginError,
    UnknownNameError,
    UnsupportedError,
    nearest,
    usage,
    warn,
)
from adapterkit.results import in_html

Modules = str | Sequence[str] | None
TrainedBiases = Literal["none", "targets", "all"]

# These values say nothing, whatever the field is.
_NEUTRAL: tuple[object, ...] = (None, False, {}, [], "")

# Where an adapter comes from. Kept in silence.
_BOOKKEEPING = ("peft_type", "inference_mode", "peft_version", "auto_mapping")

# Options that a method may lack, at the values at which they change nothing; `...`: no value changes a trained adapter.
# A method refuses a file that has one of them at another value. It keeps every other field that it does not know, with
# a warning: the field may be of another program, or of a later version of PEFT.
OPTIONS: Mapping[str, object] = {
    **dict.fromkeys(("use_dora", "use_rslora", "use_qalora", "lora_bias", "ensure_weight_tying"), False),
    **dict.fromkeys(("kasa_config", "arrow_config", "use_bdlora")),
    **dict.fromkeys(("alora_invocation_tokens", "layer_replication", "target_parameters", "trainable_token_indices")),
    "enable_lora": None,  # before PEFT 0.3: A and B for some of the parts of a fused layer
    "fine_tune_type": "lora",  # mlx-lm
    **dict.fromkeys(("eva_config", "corda_config", "lora_ga_config", "loftq_config"), ...),
    **dict.fromkeys(("velora_config", "monteclora_config"), ...),
    **dict.fromkeys(("megatron_config", "megatron_core", "qalora_group_size", "runtime_config"), ...),
}

# The fields that scale the change in PEFT, by type of file. A method without them computes something else.
_SCALES = {
    **dict.fromkeys(("LORA", "ADALORA"), ("lora_alpha", "alpha_pattern")),
    **dict.fromkeys(("LOHA", "LOKR"), ("alpha", "alpha_pattern")),
}

# What `starts_as_identity` asks: PEFT calls this field so, or after the method (`init_lora_weights`).
_INITIAL = re.compile(r"init_(\w+_)?weights")


# How values are shown in the text of a config.
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 100

# PEFT's values of `task_type`.
_TASKS = ("CAUSAL_LM", "FEATURE_EXTRACTION", "QUESTION_ANS", "SEQ_2_SEQ_LM", "SEQ_CLS", "TOKEN_CLS")

# What other programs and papers call a field.
_SYNONYMS = {
    **dict.fromkeys(("rank", "dim", "lora_r", "lora_rank", "lora_dim", "network_dim"), "r"),
    **dict.fromkeys(("targets", "modules", "lora_target_modules", "target_layers"), "target_modules"),
    **dict.fromkeys(("dropout", "lora_drop"), "lora_dropout"),
    **dict.fromkeys(("heads", "trainable_modules"), "modules_to_save"),
    **dict.fromkeys(("layers", "layer"), "layers_to_transform"),
}


class _OwnFieldsFirst:
    """A config class's signature, for `help` and editors: the method's own fields, such as `r`, come first."""

    def __get__(self, config: object, cls: Any) -> inspect.Signature:
        try:
            hints = {name: bare(hint) for name, hint in field_hints(cls).items()}
        except PluginError:
            hints = {}
        keyword, own = inspect.Parameter.KEYWORD_ONLY, _own_first(cls)
        return inspect.Signature(
            [inspect.Parameter(f.name, keyword, default=_default(f), annotation=hints.get(f.name, f.type)) for f in own]
        )


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """Fields every method has. Names and meanings are PEFT's; a subclass adds its own and sets `method`.

    Args:
        target_modules: which layers: a list of exact paths or suffixes at a dot (`"q_proj"`,
            `"layers.0.mlp"`), a regular expression that must match the full path, `"all-linear"`, or
            `None` for the default of the model's `model_type`.
        exclude_modules: layers left out; a list or a regular expression, read as `target_modules` is.
        layers_to_transform: layer numbers to keep, negative ones counted from the end; or a mapping from
            a stack to its numbers, `{"encoder.layers": [-2, -1], "decoder.layers": "all"}`.
        layers_pattern: the stacks that `layers_to_transform` counts in, such as `"layers"`.
        modules_to_save: modules trained in full and kept with the adapter. `"auto"` takes the task
            head of transformers' classification, question-answering and multiple-choice models.
        bias: which biases of the base each adapter trains a copy of: `"none"`, `"<method>_only"` (`"lora_only"`:
            those of the adapted layers) or `"all"`.
        fan_in_fan_out: has no effect, because the layer kind knows its layout. Kept for files.
        task_type, base_model_name_or_path, revision: kept for the file; they change nothing.
        extra: fields of a file that this class does not have; they have no effect and are written back.

    Class attributes that a method sets:
        method: its name, which is the name of its entry point.
        peft_type: the type that its files name; the method's name in capitals if it is empty.
        marks: fields that make a file of that type this method's, `{"use_dora": True}`; `...` stands for any value
            that is not neutral. They are written to files.
        patterns: fields with a value for some layers, and the field that each overrides: `{"rank_pattern": "r"}`.
        not_implemented: fields of files that change what an adapter computes and that the method does not implement,
            with the values at which they change nothing; `...`: no value changes a trained adapter. For PEFT's fields
            that several methods have, such as `use_rslora`, the core knows them.
        default_targets: `target_modules` by `model_type`, where it differs from the table of all methods.
        not_in_files: fields that PEFT's config of the method lacks, so that files have them only where they are not at
            their defaults. A file without `exclude_modules` lists the layers that it leaves.

    Raises:
        ConfigError: a value of the wrong type or out of range.
        UnsupportedError: a field of PEFT's that this library does not implement.
        UnknownNameError: a field that does not exist.
    """

    method: ClassVar[str] = ""
    peft_type: ClassVar[str] = ""
    marks: ClassVar[Mapping[str, object]] = {}
    patterns: ClassVar[Mapping[str, str]] = {}
    not_implemented: ClassVar[Mapping[str, object]] = {}
    default_targets: ClassVar[Mapping[str, Sequence[str] | str]] = {}
    not_in_files: ClassVar[tuple[str, ...]] = ("bias", "fan_in_fan_out")

    target_modules: Modules = None
    exclude_modules: Modules = None
    layers_to_transform: int | Sequence[int] | Mapping[str, str | int | Sequence[int]] | None = None
    layers_pattern: str | Sequence[str] | None = None
    modules_to_save: str | Sequence[str] | None = "auto"
    bias: str = "none"
    fan_in_fan_out: bool = False
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        cls.__repr__ = AdapterConfig.__repr__  # type: ignore[method-assign]  # `dataclass` makes none where there is one

    def __repr__(self) -> str:
        """The fields that differ from their defaults: `LoraConfig(r=16, target_modules=('query',))`."""
        pairs = ((f, getattr(self, f.name)) for f in _own_first(type(self)))
        shown = (f"{f.name}={_SHORT.repr(value)}" for f, value in pairs if value != _default(f))
        return f"{type(self).__name__}({', '.join(shown)})"

    def _repr_html_(self) -> str:
        return in_html(str(self))

    def __new__(cls, *args: object, **fields: object) -> Self:
        """Refuse unknown fields with a helpful message, before `__init__` refuses them with Python's."""
        if args:
            raise ConfigError(f"{cls.__name__} takes its fields by name: {cls.__name__}(r=8), not {args!r}.")
        known = [f.name for f in _own_first(cls)]
        for name in fields.keys() - set(known):
            if name in _BOOKKEEPING:
                raise UnknownNameError(
                    f"{cls.__name__} has no field {name!r}: files get it by themselves. Leave it out."
                )
            if name in OPTIONS or name in cls.not_implemented:
                raise UnsupportedError(
                    f"{cls.__name__}: {name} = {fields[name]!r} is an option of PEFT that adapterkit does not "
                    "implement. Leave it out."
                )
            low = name.lower()
            close = [low, *nearest(low, known, 1), *difflib.get_close_matches(low, _SYNONYMS, n=1, cutoff=0.7)]
            meant = [own for own in (_SYNONYMS.get(near, near) for near in close) if own in known]
            hint = f" Did you mean {meant[0]!r}?" if meant else ""
            raise UnknownNameError(f"{cls.__name__} has no field {name!r}.{hint} Its fields: {', '.join(known)}.")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        names = [f.name for f in dataclasses.fields(self)]
        for name in names:
            object.__setattr__(self, name, _plain(getattr(self, name)))
        self._check(names)
        if self.layers_pattern and self.layers_to_transform is None:
            raise ConfigError("layers_pattern says where to count layers; it needs layers_to_transform beside it.")
        for name in ("target_modules", "exclude_modules"):
            if getattr(self, name) == "" or self.target_modules == ():
                raise ConfigError(f"{name} is empty; name at least one module, or leave it None.")
        cls: Any = type(self)
        biases = ("none", "all", f"{self.method}_only", f"{self.type_in_files().lower()}_only")
        if field_hints(cls)["bias"] is str and self.bias not in biases:
            raise ConfigError(f"bias = {self.bias!r} must be {' or '.join(map(repr, dict.fromkeys(biases)))}.")
        if task := _misspelt_task(self.task_type):
            listed = ", ".join(map(repr, _TASKS))
            raise ConfigError(f"task_type = {self.task_type!r}: did you mean {task!r}? PEFT knows {listed}.")
        for pattern, own in self.patterns.items():
            for value in dict.fromkeys((getattr(self, pattern) or {}).values()):
                try:
                    self._of_layer({own: value})
                except ConfigError as error:
                    raise ConfigError(f"{pattern}: {error}") from error

    def _check(self, names: Iterable[str]) -> None:
        """Raise `ConfigError` if one of these fields breaks its annotation, or the config breaks the method's rules."""
        cls: Any = type(self)
        hints = field_hints(cls)
        for name in names:
            value, hint = getattr(self, name), hints[name]
            fault = misfit(value, hint)
            if fault:
                raise ConfigError(f"{name} = {value!r}{fault}.")
            if fault is not None:
                raise ConfigError(
                    f"{cls.__name__}: {name} = {_SHORT.repr(value)} is a {type(value).__name__}; it must be "
                    f"{readable(hint)}."
                )
            for number in value.values() if isinstance(value, Mapping) else (value,):
                if isinstance(number, int | float) and abs(number) > _LARGEST:
                    raise ConfigError(f"{name} = {_SHORT.repr(number)} is too large: the limit is 2**64.")
        try:
            answer: Any = self.check()  # type: ignore[func-returns-value]
        except (AdapterError, AdapterWarning):
            raise
        except Exception as error:
            raise PluginError(
                f"{cls.__name__}.check raised {type(error).__name__}: {error}; it must raise ConfigError or return "
                "nothing."
            ) from error
        if answer is not None:
            raise PluginError(f"{cls.__name__}.check returned {answer!r}; it must raise ConfigError or return nothing.")

    def _of_layer(self, values: Mapping[str, Any]) -> Self:
        """The config of a layer with these values. Only they are checked: a file may list thousands of layers."""
        layer = object.__new__(type(self))
        held = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        for name, value in {**held, **{pattern: {} for pattern in self.patterns}, **values}.items():
            object.__setattr__(layer, name, value)
        layer._check(values)
        return layer

    @classmethod
    def type_in_files(cls) -> str:
        """The `peft_type` of this method's files."""
        return (cls.peft_type or cls.method).upper()

    @property
    def trained_biases(self) -> TrainedBiases:
        """Which biases of the base each adapter trains a copy of: `"none"`, `"targets"` or `"all"`."""
        return self.bias if self.bias in ("none", "all") else "targets"  # type: ignore[return-value]

    def at(self, path: str) -> Self:
        """The config of the layer at `path`: the fields that a pattern overrides there have the pattern's values."""
        if not any(getattr(self, pattern) for pattern in self.patterns):
            return self
        tables, made = self._at
        changes = {own: table.get(path, getattr(self, own)) for own, table in tables.items()}
        key = tuple(changes.values())
        if key not in made:
            made[key] = self._of_layer(changes)
        return made[key]

    @functools.cached_property
    def _at(self) -> tuple[dict[str, PatternTable], dict[tuple[Any, ...], Self]]:
        """The patterns of each field that they override, and the configs of layers: many have the same values."""
        given = {own: (getattr(self, pattern), pattern) for pattern, own in self.patterns.items()}
        return {own: PatternTable(table, pattern) for own, (table, pattern) in given.items() if table}, {}

    @property
    def starts_as_identity(self) -> bool:
        """Whether a new adapter of this config changes no output.

        By default it does not, unless a field `init_weights` or `init_<...>_weights` is `False`. A subclass may say
        something else, also as a class variable.
        """
        return not any(value is False for name, value in vars(self).items() if _INITIAL.fullmatch(name))

    def check(self) -> None:
        """A subclass checks its own fields here and raises `ConfigError`."""

    @classmethod
    def with_values(cls, values: Mapping[str, Mapping[str, Any]], **fields: Any) -> Self:
        """A config whose layers have these values: `{"r": {"encoder.0": 4, "encoder.1": 8}}`.

        The most frequent value of each field becomes the field's, and the others become patterns.
        """
        tables = {own: pattern for pattern, own in cls.patterns.items()}
        for own, by_path in values.items():
            fields[own] = Counter(by_path.values()).most_common(1)[0][0]
            paths: dict[Any, list[str]] = {}
            for path, value in by_path.items():
                paths.setdefault(value, []).append(re.escape(path))
            del paths[fields[own]]
            fields[tables[own]] = {f"^(?:{'|'.join(group)})": value for value, group in paths.items()}
        return cls(**fields)

    @usage("config.replace(r=16)")
    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed, checked again."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """The fields as `adapter_config.json` holds them, with `peft_type` and what `extra` kept."""
        fields = [(f, getattr(self, f.name)) for f in dataclasses.fields(self) if f.name != "extra"]
        own = {f.name: _jsonable(v) for f, v in fields if f.name not in self.not_in_files or v != _default(f)}
        marks = {name: value for name, value in self.marks.items() if value is not ...}
        fixed = {"peft_type": self.type_in_files(), "inference_mode": True}
        return dict(sorted({**_jsonable(self.extra), **own, **marks, **fixed}.items()))

    @classmethod
    def lacking(cls, values: Mapping[str, Any]) -> tuple[list[str], list[str]]:
        """The fields of an `adapter_config.json` that this class does not have, at values that say something.

        Returns:
            Those that change what the adapter computes, and those that neither this method nor the core knows.
        """
        own = {*(f.name for f in dataclasses.fields(cls)), *_BOOKKEEPING, *cls.marks} - {"extra"}
        neutral = {**OPTIONS, **dict.fromkeys(_SCALES.get(cls.type_in_files(), ())), **cls.not_implemented}
        lacking = [name for name, value in values.items() if name not in own and value not in _NEUTRAL]
        refused = [name for name in lacking if neutral.get(name, ...) not in (..., values[name])]
        return refused, [name for name in lacking if name not in neutral]

    @classmethod
    def is_marked(cls, values: Mapping[str, Any]) -> bool:
        """Whether an `adapter_config.json` has all of this method's `marks`."""
        held = {name: values.get(name) for name in cls.marks}
        return all(held[n] not in _NEUTRAL if mark is ... else held[n] == mark for n, mark in cls.marks.items())

    @classmethod
    @usage("LoraConfig.from_dict({'peft_type': 'LORA', 'r': 8})")
    def from_dict(
        cls, values: Mapping[str, Any], *, where: object = "adapter_config.json", trained: bool = True
    ) -> Self:
        """A config from the fields of an `adapter_config.json`.

        Fields that nobody knows are kept in `extra`, with a warning.

        Args:
            where: the file, for messages.
            trained: whether the adapter has its values already, so that fields for its start alone have no effect.

        Raises:
            UnsupportedError: a field that changes what the adapter computes, and that the method does not implement.
            ConfigError: a known field of the wrong type or value.
        """
        refused, unknown = cls.lacking(values)
        for name in refused:
            cure = "Leave it out, or choose a method that does."
            if trained:
                cure = "Install one that does, or use the program that wrote it, which can merge it into its base."
            raise UnsupportedError(
                f"{where}: {name} = {reprlib.repr(values[name])} changes what the adapter computes, and the method "
                f"{cls.method!r} does not implement it. {cure}"
            )
        if unknown:
            listed = ", ".join(f"{name} = {reprlib.repr(values[name])}" for name in unknown)
            version = values.get("peft_version")
            by = f" It was written with PEFT {version}." if isinstance(version, str) else ""
            warn(
                f"{where}: the method {cls.method!r} does not know {listed}.{by} The adapter is read without, and the "
                "fields are kept. If they change what it computes, its outputs differ here."
            )
        if task := _misspelt_task(values.get("task_type")):
            note = f"{where}: task_type = {values['task_type']!r} is read as {task!r}."
            warn(note)
            values = {**values, "task_type": task}
        known = {f.name for f in dataclasses.fields(cls)} - {"extra"}
        given = {name: value for name, value in values.items() if name in known and not cls._says_nothing(name, value)}
        fixed = {"peft_type", "inference_mode", *(name for name, mark in cls.marks.items() if mark is not ...)}
        extra = {name: value for name, value in values.items() if name not in known | fixed}
        try:
            config = cls(**given, extra=extra)
            config._check_ranks()
            return config
        except RecursionError as error:
            raise ConfigError(f"{where}: a value is nested too deeply.") from error
        except (ConfigError, UnsupportedError) as error:
            raise type(error)(f"{where}: {error}") from error

    def _check_ranks(self) -> None:
        """Raise `ConfigError` for a rank that no layer can have: a file of a few bytes must not ask for all memory."""
        cls: Any = type(self)
        ranks = [name for name, hint in field_hints(cls).items() if POSITIVE in getattr(hint, "__metadata__", ())]
        found = {name: [getattr(self, name)] for name in ranks}
        found |= {pattern: [*getattr(self, pattern).values()] for pattern, own in self.patterns.items() if own in ranks}
        for name, values in found.items():
            if max(values, default=0) > _LARGEST_RANK:
                raise ConfigError(f"{name} = {max(values)} is too large: a rank may be {_LARGEST_RANK:,}.")

    @classmethod
    def _says_nothing(cls, name: str, value: object) -> bool:
        """Whether a field of a file is null or empty where that means what its default does."""
        if name == "target_modules" or value not in (None, [], {}, ""):
            return False
        default = getattr(cls, name, None)  # a factory makes an empty mapping
        return default in (None, False, "none") or _INITIAL.fullmatch(name) is not None


# Not in the class: `dataclass` asks for the signature of a class without a docstring, as all are under `python -OO`.
AdapterConfig.__signature__ = _OwnFieldsFirst()  # type: ignore[attr-defined]


@functools.cache
def field_hints(cls: Any) -> Mapping[str, Any]:
    """The types of a config's fields. They are kept, because resolving them takes as long as the rest of a config."""
    try:
        return typing.get_type_hints(cls, include_extras=True)
    except (NameError, TypeError, AttributeError) as error:
        raise PluginError(
            f"The types of {cls.__name__}'s fields cannot be resolved: {error}. Import them for the run time too, not "
            "only under TYPE_CHECKING, and define them outside of functions."
        ) from error


def config_faults(config_type: type[AdapterConfig]) -> Iterator[str]:
    """What is wrong with a config's class, as the ends of sentences that begin with its name."""
    if not config_type.method:
        yield " has no `method`: write method = 'its name' in the class"
    cls: Any = config_type
    declared, hints = typing.get_type_hints(AdapterConfig), field_hints(cls)
    common, fields = ({f.name for f in dataclasses.fields(each)} for each in (AdapterConfig, config_type))
    for name in (fields - common) & {*dir(AdapterConfig), *declared}:
        yield (
            f".{name} is a field that hides an attribute of every config. Leave the annotation of a class attribute "
            "out, and give a field another name"
        )
    for name in declared.keys() - common:
        value = getattr(config_type, name)
        if misfit(value, declared[name]) is not None:
            yield f".{name} = {value!r} is a {type(value).__name__}; it must be {readable(declared[name])}"
    for name in _not_fields(config_type):
        yield (
            f".{name} is not a field of the config: the class needs @dataclass(frozen=True, kw_only=True), and the "
            "field an annotation"
        )
    for name in fields & {*config_type.marks, *config_type.not_implemented}:
        yield f".{name} is a field of the config, so it must not be in its marks or in not_implemented"
    for name in fields:
        found = not_json(hints[name])
        if found is not None:
            yield (
                f".{name} may be a {getattr(found, '__name__', found)}, which adapter_config.json cannot hold. It "
                "holds bool, int, float, str, None, and lists and mappings of these"
            )
    yield from _pattern_faults(config_type, hints)


def _pattern_faults(config_type: type[AdapterConfig], hints: Mapping[str, Any]) -> Iterator[str]:
    """Patterns that cannot hold values for layers."""
    for pattern, own in config_type.patterns.items():
        for name in {pattern, own} - config_type.__dataclass_fields__.keys():
            yield f".patterns names {name!r}, which is not a field"
        if misfit({"name": getattr(config_type, own, None)}, hints[pattern]) is not None:
            yield (
                f".{pattern} is {readable(hints[pattern])}; as a pattern of {own!r} it must be a mapping, such as "
                f"Mapping[str, {readable(hints[own])}] = field(default_factory=dict)"
            )


def _not_fields(config_type: type[AdapterConfig]) -> list[str]:
    """Public values and annotations of a config's class that are neither fields nor what the base class declares."""
    known = {*config_type.__dataclass_fields__, *dir(AdapterConfig)}
    found: dict[str, object] = {}
    for cls in config_type.__mro__[: config_type.__mro__.index(AdapterConfig)]:
        found |= vars(cls).get("__annotations__", {})
        found |= {n: value for n, value in vars(cls).items() if isinstance(value, bool | int | float | str | tuple)}
    return [name for name in found if name not in known and not name.startswith("_")]


def _misspelt_task(task: object) -> str | None:
    """The one of PEFT's tasks that a misspelt one means; `None` for PEFT's own, and for names unlike all of them."""
    if not isinstance(task, str) or task in _TASKS:
        return None
    return next(iter(difflib.get_close_matches(task.upper(), _TASKS, n=1, cutoff=0.75)), None)


def _own_first(cls: type[AdapterConfig]) -> list[dataclasses.Field[Any]]:
    """A config's fields: those that its method adds before those that every method has."""
    common = AdapterConfig.__dataclass_fields__
    return sorted(dataclasses.fields(cls), key=lambda f: f.name in common)


def _default(f: dataclasses.Field[Any]) -> Any:
    """A field's default; `inspect.Parameter.empty` if a method demands the field."""
    if f.default_factory is not dataclasses.MISSING:
        return f.default_factory()
    return inspect.Parameter.empty if f.default is dataclasses.MISSING else f.default


def _plain(value: Any) -> Any:
    """The value with tuples for sequences and sets, and Python's numbers for NumPy's.

    A config is immutable, and equals what its JSON gives back.
    """
    if isinstance(value, str):  # a file may list very many
        return value
    if type(value) not in (bool, int, float) and isinstance(value, Real):
        return int(value) if isinstance(value, Integral) else float(value)
    if isinstance(value, Set):
        return tuple(sorted(value, key=lambda v: v if isinstance(v, str) else repr(v)))
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, Sequence):
        return tuple(_plain(v) for v in value)
    return value


def _jsonable(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_jsonable(v) for v in value]
    if isinstance(value, Mapping):
        return {k: _jsonable(v) for k, v in value.items()}
    return value


# Seeds have 64 bits; and a product of two numbers in these bounds is still one of float32.
_LARGEST = 2**64
# Some programs write 100,000 for the rank of a whole matrix.
_LARGEST_RANK = 1_000_000
