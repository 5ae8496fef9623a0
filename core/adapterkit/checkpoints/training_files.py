"""A training's checkpoint of adapters alone: beside each adapter's file, what this file does not give back."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from adapterkit.checkpoints.setting import check_setting, decoded, other_config, sample, setting
from adapterkit.checkpoints.training_state import CONFIG, compact, expanded
from adapterkit.contract import FILE_PREFIX, default_registry
from adapterkit.errors import AdapterError, CheckpointError
from adapterkit.files import WEIGHTS_FILE, appearing, match_adapter, read_header, read_tensors, standing, write_tensors
from adapterkit.model import BaseModules, resized_tables
from adapterkit.results import LoadReport
from adapterkit.tensors import in_first_process, process_groups

if TYPE_CHECKING:
    from adapterkit.adapters import Adapters

# Holds those tensors of `Adapters.training_state` that are not in the adapter's file beside it, bit for bit.
STATE_FILE = "adapter_state.safetensors"
# Holds what a training changes in the base.
BASE_FILE = "base_state.safetensors"
# In the metadata of STATE_FILE: the adapter's name, how many tensors the whole state has, and how all adapters acted.
_NAME, _COUNT, _SETTING = "adapterkit.adapter", "adapterkit.tensors", "adapterkit.setting"
# There, too: a sample of the adapter's file beside.
_BESIDE = "adapterkit.beside"


def save_state(adapters: Adapters, name: str, folder: Path, held: Collection[str] | None = None) -> None:
    """Write to the folder what a training of this adapter needs beside the adapter's file there, if there is one.

    Args:
        held: all adapters that are saved with it; `None`: those that train.
    """
    adapter, state = adapters._adapters[name], adapters.training_state(name)
    acted = setting(adapters, held=adapters.trainable if held is None else held)

    def write() -> None:
        tensors = _file_beside(folder)
        held, _ = _given_back(adapters, name, tensors)
        short = compact(adapter, adapters.model, state)
        rest = {key: tensor for key, tensor in short.items() if not _same(tensor, held.get(key))}
        metadata = {_NAME: name, _COUNT: str(len(state)), _BESIDE: sample(tensors), _SETTING: acted}
        with appearing(folder / STATE_FILE) as fresh:
            write_tensors(rest, fresh, {"format": "pt", **metadata})

    in_first_process(process_groups(adapter.parameters()), write)


def save_training(adapters: Adapters, name: str, folder: Path, *, writes: bool) -> None:
    """Write an adapter to the folder, and beside it what its training needs.

    Args:
        writes: whether this process writes. Where the adapter is sharded, every process takes part and the first one
            writes.
    """
    if writes or process_groups(adapters.parameters(name)):
        adapters.save(name, folder)
        save_state(adapters, name, folder)


def load_state(adapters: Adapters, name: str, folder: Path, *, resumes: bool) -> bool:
    """Restore an adapter from the state that `save_state` wrote to this folder, under whatever name.

    Args:
        resumes: the training goes on from there, so all adapters must act as they did then, if it has its old name.

    Returns:
        Whether there is one.

    Raises:
        CheckpointError: it was saved with another config, or adapters act otherwise. Nothing has changed then.
    """
    if not (folder / STATE_FILE).is_file():
        return False
    metadata = read_header(folder / STATE_FILE).metadata
    if resumes and metadata.get(_NAME) == name and _SETTING in metadata:
        check_setting(adapters, metadata[_SETTING], folder)
    adapters.load_training_state(name, _whole_state(adapters, name, folder / STATE_FILE))
    return True


def load_states(adapters: Adapters, folder: Path, model: nn.Module | None = None, *, resumes: bool = True) -> bool:
    """Restore every adapter whose state `save_state` wrote to this folder or its subfolders, all or none.

    Args:
        model: restore in it what `save_base_state` wrote, too.
        resumes: the training goes on from there, so all adapters must act as they did then.

    Returns:
        Whether there is one.

    Raises:
        CheckpointError: an adapter that trains has no state there, the model lacks an adapter that has one, it was
            saved with another config, or adapters act that did not act then, or otherwise. Nothing has changed then.
    """
    files = [file for file in (folder / STATE_FILE, *sorted(folder.glob(f"*/{STATE_FILE}"))) if file.is_file()]
    headers = {file: read_header(file).metadata for file in files}
    saved = {metadata.get(_NAME, ""): file for file, metadata in headers.items()}
    _check_names(adapters, saved, folder)
    acted = next((metadata[_SETTING] for metadata in headers.values() if _SETTING in metadata), None)
    if resumes and acted is not None:
        check_setting(adapters, acted, folder)
    beside = _saved_base_state(adapters, model, folder) if files and model is not None else []
    restore(adapters, {name: _whole_state(adapters, name, file) for name, file in saved.items()})
    with torch.no_grad():
        for tensor, value in beside:
            tensor.copy_(value)
    return bool(files)


def restore(adapters: Adapters, states: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Load the training states of these adapters, all or none.

    Raises:
        CheckpointError: one of them does not fit. Nothing has changed then.
    """
    before = {name: {key: t.clone() for key, t in adapters.training_state(name).items()} for name in states}
    done: list[str] = []
    try:
        for name, state in states.items():
            adapters.load_training_state(name, state)
            done.append(name)
    except AdapterError:
        for name in done:
            adapters.load_training_state(name, before[name])
        raise


def save_base_state(adapters: Adapters, model: nn.Module, folder: Path) -> list[str]:
    """Write what a training changes in a model beside its adapters, if there is anything.

    Returns:
        The names of the parameters that train.
    """
    state = base_state(adapters, model)
    if state:
        with appearing(folder / BASE_FILE) as fresh:
            write_tensors(state, fresh, {"format": "pt"})
    return [key for key, tensor in state.items() if tensor.requires_grad]


def base_state(adapters: Adapters, model: nn.Module) -> dict[str, Tensor]:
    """Parameters that train and belong to no adapter, and what batch norms count."""
    own = {part for adapter in adapters._adapters.values() for part in (*adapter.modules(), *adapter.parameters())}
    found: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        counts = isinstance(module, nn.modules.batchnorm._BatchNorm) and module not in own
        held = {name: p for name, p in module._parameters.items() if p is not None and p.requires_grad and p not in own}
        held |= {name: b for name, b in module._buffers.items() if b is not None and counts}
        found |= {f"{path}.{name}".removeprefix("."): tensor for name, tensor in held.items()}
    return found


def _saved_base_state(adapters: Adapters, model: nn.Module, folder: Path) -> list[tuple[Tensor, Tensor]]:
    """What `save_base_state` wrote to the folder: the tensors of the model, each with its value.

    Raises:
        CheckpointError: the model does not train the same parameters.
    """
    saved = read_tensors(folder / BASE_FILE)[0] if (folder / BASE_FILE).is_file() else {}
    here = base_state(adapters, model)
    wrong = [key for key in saved.keys() | here.keys() if _shape(saved.get(key)) != _shape(here.get(key))]
    if wrong:
        raise CheckpointError(
            f"{folder} and the model differ in {min(wrong)!r}, which only one of them trains beside the adapters, or "
            "counts in a batch norm. Before you resume, let the same parameters require gradients as then."
        )
    return [(tensor, saved[key]) for key, tensor in here.items()]


def _check_names(adapters: Adapters, saved: Collection[str], folder: Path) -> None:
    unknown = [name for name in saved if name not in adapters]
    lacking = [name for name in adapters.trainable if name not in saved]
    if saved and (unknown or lacking):
        found, trained = (", ".join(map(repr, names)) or "none" for names in (saved, adapters.trainable))
        raise CheckpointError(
            f"{folder} holds the adapters {found}, and the model trains {trained}. Before you resume, add the saved "
            "adapters under the same names and with the same configs."
        )


def _whole_state(adapters: Adapters, name: str, file: Path) -> dict[str, Tensor]:
    """A training state from what `save_state` wrote and from the adapter's file beside it."""
    adapter, folder, (rest, metadata) = adapters._adapters[name], file.parent, read_tensors(file)
    tensors = _file_beside(folder)
    held, report = _given_back(adapters, name, tensors)
    state = expanded(adapter, adapters.model, {**held, **rest})
    other = other_config(decoded(rest[CONFIG]), adapter.config) if CONFIG in rest else ""
    faults = [other] if other else []
    if str(len(state)) != metadata.get(_COUNT):  # AdaLoRA's file has other shapes, and the state has all of it
        faults += map(str, report.mismatched)
        faults.append(f"it holds {metadata.get(_COUNT)} tensors, and {len(state)} of them have a place here")
    if faults:
        raise CheckpointError(
            f"{folder} was saved with another config than adapter {name!r} has on this model: {faults[0]}. Add the "
            "adapter with the config, the dtype and the label set that were saved."
        )
    if metadata.get(_BESIDE) not in (None, sample(tensors)):
        raise CheckpointError(
            f"{folder} holds {WEIGHTS_FILE} and {STATE_FILE} of two saves: the second was interrupted, or the adapter "
            "alone was written there. Resume from another checkpoint, or begin a new training with this adapter: "
            f"adapters.load(folder, {name!r}, trainable=True)."
        )
    return state


def _shape(tensor: Tensor | None) -> tuple[int, ...] | None:
    return None if tensor is None else tuple(tensor.shape)


def _file_beside(folder: Path) -> Mapping[str, Tensor]:
    """The tensors of the adapter's file in the folder, if there is one."""
    weights = standing(folder)[1]
    return {} if weights is None or WEIGHTS_FILE not in weights.name else read_tensors(weights)[0]


def _given_back(adapters: Adapters, name: str, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], LoadReport]:
    """What an adapter's file gives back, by the keys of a training state, and how that fits."""
    adapter = adapters._adapters[name]
    values, report = match_adapter(adapter, default_registry.method_of(adapter.config), adapters.model, tensors)
    keys = {(id(slot.owner), slot.name): key for key, slot in adapter.slots().items()}
    held = {keys.get((id(slot.owner), slot.name), ""): tensor for slot, tensor in values}
    embeddings = resized_tables(BaseModules(adapters.model)).items()
    beside = {
        f"{path}.{local}": tensors.get(f"{FILE_PREFIX}{path}.{local}")
        for path, table in embeddings
        for local in table._parameters
    }
    return {key: tensor for key, tensor in {**beside, **held}.items() if key and tensor is not None}, report


def _same(one: Tensor, other: Tensor | None) -> bool:
    """Whether two tensors have the same bits."""
    if other is None or one.dtype != other.dtype or one.shape != other.shape:
        return False
    one, other = (t.detach().cpu().contiguous().flatten().view(torch.uint8) for t in (one, other))
    return torch.equal(one, other)
