"""What an adapted model's own `state_dict` and `load_state_dict` do with a training of its adapters."""

from __future__ import annotations

import functools
import sys
from collections.abc import Collection, Mapping, MutableMapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from adapterkit.checkpoints.setting import check_setting, decoded, encoded, setting, short_hash
from adapterkit.contract import ATTRIBUTE, CONTAINERS, SHARED
from adapterkit.errors import CheckpointError, warn
from adapterkit.files import file_places
from adapterkit.model import BaseModules, base_parameters, resized_keys
from adapterkit.tensors import has_fsdp1, is_sharded, shape_of

if TYPE_CHECKING:
    from adapterkit.adapters import Adapters

# Where PEFT keeps an adapted layer, the original of a module that it trains in full, and the trained copy.
_PEFT_BASE, _PEFT_HEAD = ("base_layer", "original_module"), "modules_to_save"

# The key of how the adapters acted, in the `model.safetensors` that `save_pretrained` writes.
SETTING_IN_FILE = "adapterkit.setting"
# The block of `encoded` that holds most settings, so that the tensor seldom changes its shape.
_LENGTH = 4096
# The functions, by module and name, that write a training and keep only the tensors of a state dict.
_SAVERS = {("accelerate.accelerator", "save_state"), ("transformers.trainer", "_save_checkpoint")}
_DCP = "torch.distributed.checkpoint"


class _Digests(set[str]):
    """Digests of settings. Copies of a model have them in common."""

    def __deepcopy__(self, memo: object) -> _Digests:
        return self


class StateDictHooks:
    """Hooks on the model's `state_dict` and `load_state_dict`, through which tools save and restore a training.

    While adapters train, a state dict says how they act and what their configs are, so that a training resumes with the
    same. `torch.save` keeps that in the state dict's metadata. Sharded models, and tools that keep only tensors, get a
    tensor with the key ATTRIBUTE: torch's functions for distributed checkpoints look every key up in the model, which
    has this attribute. Any other state dict has the keys that others expect.

    Attributes:
        asks_for_all: whether the next state dict must restore every adapter that trains. `PeftView` asks for none.
    """

    asks_for_all = True

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self._partial = False
        self._prefix = ""
        self._given: set[str] = set()
        self._given_before = _Digests()  # what this model itself has given is not checked
        self._reads_own = False
        self._handles = (
            root.register_state_dict_post_hook(functools.partial(self._written)),  # torch marks what it is given
            root.register_load_state_dict_pre_hook(self._before),
            root.register_load_state_dict_post_hook(self._after),
        )

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    def _written(
        self, module: nn.Module, state: MutableMapping[str, Any], prefix: str, metadata: dict[str, Any]
    ) -> None:
        """Say in a state dict how the adapters act, if any trains."""
        adapters: Adapters = self.root.__dict__[ATTRIBUTE]
        if self._reads_own or not _trains(adapters):
            return
        text = metadata[ATTRIBUTE] = setting(adapters, held=adapters.names)
        self._given_before.add(short_hash(text))
        sharded = has_fsdp1(self.root) or any(is_sharded(p) for _, p in base_parameters(self.root))
        if sharded or _keeps_tensors_alone():
            state[prefix + ATTRIBUTE] = encoded(text, _LENGTH).float()  # averages of state dicts are of floats

    def _before(
        self, module: nn.Module, state: MutableMapping[str, Any], prefix: str, metadata: Mapping[str, Any], *others: Any
    ) -> None:
        """Refuse a state dict that does not restore every adapter that trains; one of the base alone only warns."""
        adapters: Adapters = self.root.__dict__[ATTRIBUTE]
        acted = self._setting_in(state, prefix, metadata)
        keys = {name: set(adapter.state_dict_keys()) for name, adapter in adapters._adapters.items()}
        known: set[str] = set().union(*keys.values())
        own = self._tensors()
        base = own.keys() - known
        _from_peft(adapters, own, base, state, prefix)
        unset = {key for name, adapter in adapters._adapters.items() if adapter.unset for key in keys[name]}
        _leave_out_own(state, prefix, {key: own[key] for key in unset})
        self._given = given = {key.removeprefix(prefix) for key in state if key.startswith(prefix)}
        foreign = sorted(key for key in given - known - base if {*CONTAINERS, SHARED} & set(key.split(".")))
        # New rows of a vocabulary are random, so a resized vocabulary is saved with the adapters.
        tables = resized_keys(BaseModules(self.root))
        frozen = {key for key in base - tables if isinstance(own[key], nn.Parameter) and not own[key].requires_grad}
        partial = not given.isdisjoint(known | set(foreign)) and given.isdisjoint(frozen)
        self._prefix, self._partial = prefix, partial
        lacking = [
            name
            for name, adapter in adapters._adapters.items()
            if not (given & keys[name] or adapter.unset)
            and any(p.requires_grad and not p.is_meta for p in adapter.parameters())
        ]
        if not self.asks_for_all:
            self.asks_for_all, lacking = True, []
        if (partial and (foreign or lacking)) or (foreign and lacking):
            what = (
                f"holds tensors of adapters that the model lacks, such as {foreign[0]!r}" if foreign else "lacks them"
            )
            raise CheckpointError(
                f"The model trains {', '.join(map(repr, lacking)) or 'none of these'}, and the state dict {what}. The "
                f"model has {', '.join(map(repr, adapters.names))}. Before you resume, add the saved adapters under "
                "the same names and with the same configs; or load one from its folder: "
                "adapters.load(folder, name, trainable=True)."
            )
        _check_shapes(adapters, own, state, prefix)
        if acted is not None:
            check_setting(adapters, acted, "The state dict", base=partial)
        if lacking and given and not given & known:
            warn(
                f"The state dict holds no adapters: {', '.join(map(repr, lacking))} stays as it is. To resume a "
                "training, load the adapter that was saved with it."
            )

    def _tensors(self) -> dict[str, Any]:
        """The model's state dict, which does not count as one that was given to somebody."""
        self._reads_own = True
        try:
            return self.root.state_dict(keep_vars=True)
        finally:
            self._reads_own = False

    def _setting_in(self, state: MutableMapping[str, Any], prefix: str, metadata: Mapping[str, Any]) -> str | None:
        """How the adapters acted in the training that wrote a state dict; `None`: none did, or this model itself.

        Where no adapter trains, only the file that `save_pretrained` wrote for a training counts.
        """
        file, held = (state.pop(prefix + key, None) for key in (SETTING_IN_FILE, ATTRIBUTE))
        adapters: Adapters = self.root.__dict__[ATTRIBUTE]
        if file is not None or not _trains(adapters):
            return None if file is None else decoded(file)
        # torch.distributed.checkpoint reads the tensor into a state dict of this model, with its metadata.
        said = metadata.get(ATTRIBUTE)
        text = said if held is None else decoded(held)
        is_own = text == said and isinstance(said, str) and short_hash(said) in self._given_before
        return text if isinstance(text, str) and not is_own else None

    def _after(self, module: nn.Module, result: Any) -> None:
        """Remove from the missing keys those that need not be there.

        If no frozen parameter was given, the base stays as it is; adapters without values get them by `Adapters.reset`.
        """
        adapters: Adapters = self.root.__dict__[ATTRIBUTE]
        missed: set[str] = set()
        passed: set[str] = set()
        for adapter in adapters._adapters.values():
            keys = set(adapter.state_dict_keys())
            (passed if adapter.unset and not keys & self._given else missed).update(keys)
        result.missing_keys[:] = [
            key
            for key in result.missing_keys
            if not key.startswith(self._prefix)
            or (own := key.removeprefix(self._prefix)) in missed
            or not (self._partial or own in passed)
        ]


def _trains(adapters: Adapters) -> bool:
    """Whether adapters may be in training. In a block of `disabled`, such as for a reference model, none is."""
    return bool(adapters.active and adapters.trainable)


def _keeps_tensors_alone() -> bool:
    """Whether a tool that keeps only the tensors of a state dict writes or reads a training in this thread now."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        frame = frame.f_back
        module = str(frame.f_globals.get("__name__"))
        if (module, frame.f_code.co_name) in _SAVERS or module.startswith(_DCP):
            return True
    return False


def _leave_out_own(state: MutableMapping[str, Any], prefix: str, own: Mapping[str, Tensor]) -> None:
    """Leave out these tensors of the model where the state dict has the very same, shards included.

    torch's `set_model_state_dict` passes on what the model has where it was given nothing.
    """
    for key, mine in own.items():
        pair: list[Any] = [getattr(tensor, "_local_tensor", tensor) for tensor in (mine, state.get(prefix + key))]
        if pair[1] is not None and 0 != pair[0].data_ptr() == pair[1].data_ptr():
            del state[prefix + key]


def _check_shapes(adapters: Adapters, own: Mapping[str, Any], state: Mapping[str, Any], prefix: str) -> None:
    """Raise `CheckpointError` if an adapter was saved with other shapes than it has here."""
    for name, adapter in adapters._adapters.items():
        for key in adapter.state_dict_keys():
            mine, theirs = own.get(key), state.get(prefix + key)
            if not isinstance(mine, Tensor) or not isinstance(theirs, Tensor) or mine.shape == theirs.shape:
                continue  # ZeRO-3 has empty tensors in both, and restores the values itself
            if shape_of(mine) != shape_of(theirs):
                raise CheckpointError(
                    f"Adapter {name!r} was saved with another config than the model's has: {key!r} is "
                    f"{tuple(shape_of(theirs))} in the state dict, and {tuple(shape_of(mine))} here (such as "
                    "another rank). Add it with the config that was saved, or load it from its folder: "
                    f"adapters.load(folder, {name!r}, trainable=True)."
                )


def _from_peft(
    adapters: Adapters,
    mine: Mapping[str, Tensor],
    base: Collection[str],
    state: MutableMapping[str, Any],
    prefix: str,
) -> None:
    """If a state dict is from a model that PEFT adapted, give it this model's keys. `base` has those of the base.

    sentence-transformers restores a checkpoint like that: it builds the model from the folder, to which PEFT adds the
    adapter, and passes its state dict on.
    """
    given = [key.removeprefix(prefix) for key in state if key.startswith(prefix)]
    if not any(name in key.split(".") and key not in base for key in given for name in _PEFT_BASE):
        return
    if len(adapters.active) != 1:
        raise CheckpointError(
            f"The state dict is from a model that PEFT adapted once, but here {', '.join(map(repr, adapters.active))} "
            "act. Activate only the adapter that it belongs to."
        )
    adapter = adapters._adapters[adapters.active[0]]
    # Adapters with shared tensors never come this way: transformers adds none of them.
    places = {file: memory for file, memory, _ in file_places(adapter)}
    for key in given:
        value, parts = state.pop(prefix + key), key.split(".")
        plain = ".".join(part for part in parts if part not in _PEFT_BASE)
        if key in places:  # a trained bias, which PEFT writes in place of the base's
            state[prefix + places[key]], state[prefix + plain] = value, mine[plain]
        elif plain in base:
            state[prefix + plain] = value
        else:  # the adapter's name is somewhere in the key
            names = [".".join(parts[:i] + parts[i + 1 + (part == _PEFT_HEAD) :]) for i, part in enumerate(parts)]
            state[prefix + next((places[name] for name in names if name in places), key)] = value
