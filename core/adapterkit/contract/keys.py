"""Key rules: which parameters are a method's, and what they are called in memory and in files.

Of adapter `a`, at the module with path `p`:

    part             in memory                    in a file (PEFT's format)
    adapter layer    p.adapters.a.<local>         base_model.model.p.<local>
    head             p.adapter_heads.a.<local>    base_model.model.p.<local>
    trained bias     p.adapter_biases.a.bias      base_model.model.p.bias
    shared tensor    adapter_shared.a.<name>      base_model.<name>

Where `p` has an adapter layer too, a head and a bias are in the file under `p.base_layer`. In a file without tensors of
adapter layers, such as PEFT's of prompts, a shared tensor is `<name>`.
"""

from __future__ import annotations

from collections.abc import Collection, Container, Mapping
from dataclasses import dataclass

from torch import Tensor

from adapterkit.errors import CheckpointError

LAYERS, HEADS, BIASES, SHARED = "adapters", "adapter_heads", "adapter_biases", "adapter_shared"
CONTAINERS = (LAYERS, HEADS, BIASES)

# Where a model keeps its `Adapters`.
ATTRIBUTE = "_adapterkit"

FILE_PREFIX = "base_model.model."
FILE_SHARED_PREFIX = "base_model."


@dataclass(frozen=True)
class KeyRule:
    """What a method's parameters are called.

    Args:
        prefix: every name inside an adapter layer, and every shared tensor's, begins with it (`lora_`); or a tuple.
        exempt: names, shared or local, that a file may lack; what the file lacks then is not missing.
    """

    prefix: str | tuple[str, ...]
    exempt: frozenset[str] = frozenset()

    def owns(self, local: str) -> bool:
        """Whether a name inside an adapter layer (`lora_A.weight`) is the method's."""
        return local.startswith(self.prefix)

    def split(self, key: str, layers: Collection[str] = ()) -> tuple[str, str] | None:
        """`(path, local)` of a tensor of an adapter layer, `None` for any other.

        A known layer's path comes first: a module may be called like the method's prefix. Else the last part that
        begins with the prefix begins the name in the layer.
        """
        parts = key.split(".")
        starts = [i for i in range(len(parts) - 1, 0, -1) if self.owns(parts[i])]
        i = next((i for i in starts if ".".join(parts[:i]) in layers), starts[0] if starts else 0)
        return (".".join(parts[:i]), ".".join(parts[i:])) if i else None

    def is_shared(self, key: str, layers: Collection[str] = ()) -> bool:
        """Whether a key is a shared tensor's, `vera_A`: it begins with the prefix, and not with the path of a layer."""
        split = self.split(key, layers)
        return self.owns(key) and (split is None or split[0] not in layers)

    def may_lack(self, key: str) -> bool:
        """Whether a file may lack this key, `<name>` or `<path>.<local>`."""
        return any(key == name or key.endswith("." + name) for name in self.exempt)


def part_name(name: str) -> str:
    """What an adapter called `name` is called as a module: torch's paths are split at dots, so `v1.0` is `v1·0`."""
    return name.replace(".", "·")


def split_memory_key(key: str, name: str) -> tuple[str, str, str] | None:
    """`(container, path, local)` of a full state dict's key if it is adapter `name`'s, else `None`.

    The key is read part by part, from the right: an adapter may be called like a module of the model.
    """
    name = part_name(name)
    if f".{name}." not in key:
        return None
    parts = key.split(".")
    for i in range(len(parts) - 3, -1, -1):
        if parts[i] in (*CONTAINERS, SHARED) and parts[i + 1] == name:
            return parts[i], ".".join(parts[:i]), ".".join(parts[i + 2 :])
    return None


def beside(path: str, layers: Container[str]) -> str:
    """Where a head's or a trained bias's tensors are in a file: behind the adapter layer, if there is one."""
    return f"{path}.base_layer" if path in layers else path


def file_key(path: str, local: str) -> str:
    """PEFT's key of `local` at module `path`; an empty path is the place of shared tensors."""
    return f"{FILE_PREFIX}{path}.{local}" if path else f"{FILE_SHARED_PREFIX}{local}"


def strip_file_prefix(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Keys without PEFT's `base_model.model.` (or, for shared tensors, `base_model.`), which is optional.

    Raises:
        CheckpointError: a tensor is there with the prefix and without.
    """
    prefixed = any(key.startswith(FILE_PREFIX) for key in tensors)
    stripped: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        short = key.removeprefix(FILE_PREFIX)
        if short == key and (prefixed or key.count(".") == 1):  # a module of the model may be called `base_model`
            short = key.removeprefix(FILE_SHARED_PREFIX)
        if short in stripped:
            raise CheckpointError(f"There are two tensors for {short!r}: with and without PEFT's prefix.")
        stripped[short] = tensor
    return stripped


# Names that wrappers put into the paths of the modules they wrap.
_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})


def unwrapped_key(key: str) -> str:
    """A path or key without the names that wrappers put into it."""
    return ".".join(part for part in key.split(".") if part not in _WRAPPERS)
