"""Files of other programs: which part of a pipeline a key is of, which layer it names, and whose method it is."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TypeVar

from torch import Tensor

from adapterkit.contract.patterns import Names
from adapterkit.errors import CheckpointError
from adapterkit.kinds import LayerKind

T = TypeVar("T")
Readings = Callable[[str], Iterable[tuple[str, str]]]

# Parts of a pipeline as diffusers and ComfyUI name them, before a dot.
DOTTED = (
    *("unet", "transformer", "transformer_2", "prior", "diffusion_model"),
    *("text_encoder", "text_encoder_2", "text_encoder_3", "text_encoder_4"),
)
# As kohya-ss's programs and LyCORIS name them, whatever the method, before the path with "_" for ".".
FLAT = ("lora_unet", "lora_prior_unet", "lora_transformer", "lora_te", "lora_te1", "lora_te2", "lora_te3", "lycoris")
# transformers 5 has dropped this module from some text encoders and kept it in others.
OPTIONAL = "text_model"


@dataclass(frozen=True)
class ForeignFile:
    """An adapter as another program's file has it.

    Attributes:
        tensors: for each layer's path its tensors by that program's names (`lora_down.weight`, `alpha`).
        metadata: what goes into the header.
    """

    tensors: Mapping[str, Mapping[str, Tensor]]
    metadata: Mapping[str, str] = field(default_factory=dict)


def component(name: str) -> str:
    """The part of a pipeline that a key or a module's name begins with: `"lora_te1"`, `"unet"`; `""`: none."""
    return _component(name.partition(".")[0])


@lru_cache(maxsize=4096)  # few of a file's keys begin in another way than others
def _component(head: str) -> str:
    if head in DOTTED:
        return head
    return next((part for part in FLAT if head.startswith(part + "_")), "")


class LayerNames:
    """Finds the layer that another program's name stands for: the path, or a part of a pipeline and the path."""

    def __init__(self, layers: Iterable[str]) -> None:
        self._flat: dict[str, list[str]] = {}
        self._paths = frozenset(layers)
        for path in layers:
            self._flat.setdefault(path.replace(".", "_"), []).append(path)

    def find(self, name: str) -> str | None:
        """The layer's path, or `None` if the model has none of that name.

        Raises:
            CheckpointError: several layers have that name when dots are written as underscores.
        """
        if name in self._paths:
            return name
        part = component(name)
        rest = name[len(part) + 1 :]
        if part in DOTTED:
            return next((path for path in _variants(rest, ".") if path in self._paths), None)
        found = next((self._flat[n] for n in _variants(rest, "_") if part and n in self._flat), [None])
        if len(found) > 1:
            raise CheckpointError(
                f"{name!r} may be any of the layers {', '.join(map(repr, found))}: their names are the same with '_' "
                "for '.'. Rename the file's keys so that they begin with the layer's own path and a dot."
            )
        return found[0]


def _variants(name: str, separator: str) -> tuple[str, ...]:
    prefix = OPTIONAL + separator
    return (name, name.removeprefix(prefix), prefix + name)


@dataclass(frozen=True)
class ForeignLayers:
    """Those tensors of a file that are a method's, by layer of the model and by the method's own names.

    Attributes:
        tensors: the file's.
        kinds: the model's layers by path.
        keys: for each layer's path, the key in the file of each local name: `{"conv_in": {"alpha": "..."}}`.
    """

    tensors: Mapping[str, Tensor]
    kinds: Mapping[str, LayerKind]
    keys: Mapping[str, Mapping[str, str]]

    @classmethod
    def read(cls, tensors: Mapping[str, Tensor], layers: Mapping[str, LayerKind], readings: Readings) -> ForeignLayers:
        """Sort a file's tensors.

        Args:
            readings: what a key may mean to the method: pairs of a module's name and a local name, of which the
                first whose module is on the model counts.

        Raises:
            CheckpointError: two keys are for one place.
        """
        names = LayerNames(layers)
        keys: dict[str, dict[str, str]] = {}
        for key in tensors:
            for module, local in readings(key):
                path = names.find(module)
                if path is None:
                    continue
                other = keys.setdefault(path, {}).setdefault(local, key)
                if other != key:
                    raise CheckpointError(_two_keys(other, key, path))
                break
        return cls(tensors, layers, keys)

    @staticmethod
    def are_native(keys: Iterable[str], layers: Collection[str], names: Collection[str]) -> bool:
        """Whether every key is the path of a layer with one of these names, so that there is nothing to sort."""
        suffixes = tuple(f".{name}" for name in names)
        for key in keys:
            suffix = next((s for s in suffixes if key.endswith(s)), "")
            if not suffix or key.removesuffix(suffix) not in layers:
                return False
        return True

    def keep(self, wanted: Callable[[Mapping[str, str]], bool]) -> ForeignLayers:
        """Without the layers whose local names are not wanted, such as a lone `alpha`."""
        kept = {path: keys for path, keys in self.keys.items() if wanted(keys)}
        return ForeignLayers(self.tensors, self.kinds, kept)

    @property
    def rest(self) -> dict[str, Tensor]:
        """The tensors that belong to no layer here, under their own keys."""
        used = {key for keys in self.keys.values() for key in keys.values()}
        return {key: tensor for key, tensor in self.tensors.items() if key not in used}

    def is_native(self, path: str) -> bool:
        """Whether all that a layer has stands under its own path already."""
        return all(key == f"{path}.{local}" for local, key in self.keys[path].items())

    def matrix(self, path: str, local: str) -> Tensor | None:
        """A factor, of two dimensions or more; `None` if the file lacks it.

        Raises:
            CheckpointError: it is no such thing.
        """
        key = self.keys[path].get(local)
        if key is None:
            return None
        tensor = self.tensors[key]
        if tensor.dim() < 2 or not tensor.is_floating_point():
            raise CheckpointError(
                f"{key!r} holds {tensor.dtype} of shape {tuple(tensor.shape)}; a factor is a floating matrix."
            )
        return tensor

    def number(self, path: str, local: str) -> float | None:
        """A tensor of one number, such as an alpha; `None` if the file lacks it.

        Raises:
            CheckpointError: it holds several, or none.
        """
        key = self.keys[path].get(local)
        if key is None:
            return None
        tensor = self.tensors[key]
        if tensor.numel() != 1 or tensor.is_complex():
            raise CheckpointError(f"{key!r} has shape {tuple(tensor.shape)}; {local!r} is a single number.")
        return float(tensor.item())

    @property
    def target_modules(self) -> tuple[str, ...] | str:
        """What selects exactly these layers: their paths, or an expression where a path also ends another one."""
        return exactly(self.keys, self.kinds)


def exactly(paths: Collection[str], among: Iterable[str]) -> tuple[str, ...] | str:
    """`target_modules` that selects these paths alone: them, or an expression where one also ends another path."""
    names = Names(paths)
    if all(path in paths or names.match(path) is None for path in among):
        return tuple(paths)
    return "|".join(map(re.escape, paths))


def with_patterns(values: Mapping[str, T]) -> tuple[T, dict[str, T]]:
    """Values by path as a config has them: the most frequent one, and a pattern for each of the others."""
    default = Counter(values.values()).most_common(1)[0][0]
    groups: dict[T, list[str]] = {}
    for path, value in values.items():
        if value != default:
            groups.setdefault(value, []).append(re.escape(path))
    return default, {f"^(?:{'|'.join(paths)})": value for value, paths in groups.items()}


def _two_keys(first: str, second: str, path: str) -> str:
    advice = "One of them must go."
    if component(first) != component(second):
        advice = f"Say which part of the pipeline this model is, such as component={component(first)!r}."
    return f"Both {first!r} and {second!r} are for the layer {path!r}. {advice}"
