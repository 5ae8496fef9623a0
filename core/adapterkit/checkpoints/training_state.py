"""The state of an adapter in a training: everything with which the training goes on bit for bit.

A file of an adapter is not always such a state: PiSSA is written with twice the rank, VeRA may leave its projections
out, AdaLoRA its averages and the directions that are switched off.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from adapterkit.checkpoints.setting import decoded, digest, encoded, method_fields, other_config
from adapterkit.contract import SHARED, AdapterLayer, Shared, default_registry
from adapterkit.door import json_object
from adapterkit.errors import CheckpointError, StateError
from adapterkit.files import check_tensors
from adapterkit.model import Adapter, BaseModules, initial_shared, resized_tables, tables
from adapterkit.tensors import Slot, gathered, real_value, shape_of

# The keys of the number of `Adapters.step`s, of the config, and of the digests of tensors that a compact state leaves
# out, both as bytes of JSON. All other keys have a dot.
STEPS, CONFIG, MADE = "steps", "config", "made_again"


def training_state(adapter: Adapter, model: nn.Module, *, sharded: bool) -> dict[str, Tensor]:
    """The tensors of `Adapters.training_state`.

    Raises:
        PluginError: the method keeps tensors where no state can find them.
        StateError: `sharded` under DeepSpeed ZeRO-3, which keeps its shards to itself.
    """
    _check_nothing_is_hidden(adapter)
    adapter.has_values()
    tables = resized_tables(BaseModules(model))
    with gathered(model, () if sharded else (*adapter.modules(), *tables.values())):
        slots = {**adapter.slots(), **_table_slots(tables)}
        if any(shape_of(slot.tensor) != slot.tensor.shape for slot in slots.values()):
            raise StateError("sharded=True is not possible: DeepSpeed ZeRO-3 has no tensors that stand for its shards.")
        state = {
            key: slot.tensor.detach() if sharded else real_value(slot.owner, slot.name) for key, slot in slots.items()
        }
    return {**state, STEPS: torch.tensor(adapter.steps, device="cpu"), CONFIG: encoded(method_fields(adapter.config))}


def compact(adapter: Adapter, model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A training state with digests in place of the tensors that the config gives again, such as VeRA's projections."""
    shared = any(key.startswith(f"{SHARED}.") for key in state)
    made = initial_shared(adapter, model) if shared else {}
    digests = {key: digest({"": tensor}) for key, tensor in made.items() if key in state}
    digests = {key: each for key, each in digests.items() if digest({"": state[key]}) == each}
    rest = {key: tensor for key, tensor in state.items() if key not in digests}
    return {**rest, MADE: encoded(json.dumps(digests))} if digests else rest


def expanded(adapter: Adapter, model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The whole training state of one that `compact` gave.

    Raises:
        CheckpointError: this adapter's config gives other tensors.
    """
    if MADE not in state:
        return dict(state)
    digests = json_object(decoded(state[MADE]), f"The training state: {MADE}")
    made = initial_shared(adapter, model)
    wrong = [key for key, each in digests.items() if key not in made or digest({"": made[key]}) != each]
    if wrong:
        other = other_config(decoded(state[CONFIG]), adapter.config) if CONFIG in state else ""
        raise CheckpointError(
            f"The training state does not fit adapter {adapter.name!r} on this model: {other or f'{wrong[0]} differs'}."
            " Add the adapter with the config and the dtype that were saved."
        )
    rest = {key: tensor for key, tensor in state.items() if key != MADE}
    return {**rest, **{key: made[key] for key in digests}}


def load_training_state(adapter: Adapter, model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy a training state, compact or not, into an adapter, all or nothing.

    Raises:
        CheckpointError: it does not fit.
    """
    check_tensors(state)
    state = expanded(adapter, model, state)
    modules = BaseModules(model)
    # Whether a vocabulary was resized is judged by the base's config, which another machine may lack.
    resized = resized_tables(modules)
    given = {path: table for path, table in tables(modules).items() if f"{path}.weight" in state}
    with gathered(model, (*adapter.modules(), *{**resized, **given}.values()), writing=True):
        required = {**adapter.slots(), **_table_slots(resized)}
        slots = {**_table_slots(given), **required}
        _check_fits(adapter, {STEPS, CONFIG, *required}, slots, state)
        steps = int(state[STEPS])
        adapter.write([(slot, state[key]) for key, slot in slots.items()], model)
        adapter.steps = steps


def _check_fits(adapter: Adapter, required: set[str], slots: Mapping[str, Slot], state: Mapping[str, Tensor]) -> None:
    faults = [f"it lacks {key}" for key in required - state.keys()]
    faults += [f"nothing here has the key {key}" for key in state.keys() - slots.keys() - {STEPS, CONFIG}]
    faults += [
        f"{key} is {_shown(state[key])} in the state, and {_shown(slot.tensor)} here"
        for key, slot in slots.items()
        if key in state and _shown(state[key]) != _shown(slot.tensor)
    ]
    if STEPS in state and (state[STEPS].dim() or state[STEPS].is_floating_point()):
        faults.append(f"its number of steps is {_shown(state[STEPS])}")
    other = other_config(decoded(state[CONFIG]), adapter.config) if CONFIG in state else ""
    faults = [other] if other else faults  # another config is why the rest does not fit
    if faults:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise CheckpointError(
            f"The training state does not fit adapter {adapter.name!r}: {min(faults)}{more}. Nothing was changed. It "
            "fits an adapter that was added to the same model with the same config, dtype and label set. For the "
            "tensors of an adapter's file use load_state_dict."
        )


def _table_slots(found: Mapping[str, nn.Module]) -> dict[str, Slot]:
    """The embeddings of a model whose vocabulary was resized: their new rows are random, and no other file has them."""
    return {
        f"{path}.{name}": Slot(table, name, f"{path}.{name}")
        for path, table in found.items()
        for name, tensor in table._parameters.items()
        if tensor is not None
    }


def _shown(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(shape_of(tensor))}"


def _check_nothing_is_hidden(adapter: Adapter) -> None:
    """Raise `PluginError` if layers or shared tensors keep tensors that are neither parameters nor buffers.

    A `Shared` that replaces the model's call may leave tensors for the layers: these last for one forward only.
    """
    for module in adapter.modules():
        if not isinstance(module, AdapterLayer | Shared) or getattr(module, "replaces_call", False):
            continue
        own = module.plain_attributes() if isinstance(module, Shared) else vars(module)
        for name, value in own.items():
            if not name.startswith("_") and any(isinstance(leaf, Tensor) for leaf in tree_leaves(value)):
                raise default_registry.method_of(adapter.config).fault(
                    f"{type(module).__name__} keeps tensors in its attribute {name!r}, which no state of a training "
                    "holds. Make them buffers: self.register_buffer(name, tensor, persistent=False)"
                )
