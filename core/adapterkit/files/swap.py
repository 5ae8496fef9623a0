"""Overwriting an adapter in place with another one, in the parameters that it has."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from adapterkit.contract import AdapterConfig, AdapterLayer
from adapterkit.errors import CheckpointError
from adapterkit.files.match import Values
from adapterkit.model import Adapter
from adapterkit.tensors import gathered, module_slots, put, uninterrupted

# Fields that say where an adapter acts and where it is from, not what it does.
_PLACES = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "extra")
_ORIGIN = ("task_type", "base_model_name_or_path", "revision")


def swap_in(adapter: Adapter, other: Adapter, folder: Path, model: nn.Module) -> None:
    """Make `adapter` do what `other` does, which was loaded from `folder` for the same model.

    Raises:
        CheckpointError: it cannot. Nothing has changed then.
    """
    with uninterrupted():
        with gathered(model, adapter.modules(), writing=True):
            try:
                with torch.no_grad():
                    values = _values(adapter, other)
            except CheckpointError as error:
                raise CheckpointError(
                    f"{folder} cannot be swapped into adapter {adapter.name!r}: {error}. Nothing was changed. Load it "
                    "under another name instead (adapters.load)."
                ) from error
            put(values)
        # The config keeps the sizes, and so describes what a file of this adapter holds.
        adapter.config = adapter.config.replace(**{name: getattr(other.config, name) for name in _ORIGIN})
        adapter.labels = other.labels if adapter.heads else adapter.labels


def _values(adapter: Adapter, other: Adapter) -> Values:
    """What to write into `adapter`. Nothing is written yet.

    Raises:
        CheckpointError: `other` does not fit; the message goes on from "cannot be swapped into adapter: ".
    """
    if other.config.method != adapter.config.method:
        raise CheckpointError(f"it is of the method {other.config.method!r}, not {adapter.config.method!r}")
    _check_inside("it changes", other.layers, "the adapter does not", adapter.layers)
    _check_inside("it has a head at", other.heads, "the adapter has none there", adapter.heads)
    _check_inside("the adapter has a head at", adapter.heads, "the file has none there", other.heads)
    _check_inside("it trains the bias of", other.biases, "the adapter does not", adapter.biases)
    values = _of_shared(adapter, other)
    for path, layer in adapter.layers.items():
        values += _of_layer(path, layer, other.layers.get(path), _alike(adapter.config, other.config))
    for path, head in adapter.heads.items():
        given = {name: slot.tensor for name, slot in module_slots(other.heads[path])}
        values += _fitting(path, head, given)
    for path, bias in adapter.biases.items():
        found = other.biases[path].bias if path in other.biases else bias.base
        if found is None:  # on the meta device, where it has no value of its own
            found = adapter.hosts[path]._parameters["bias"]
        assert found is not None
        values += _fitting(path, bias, {"bias": found})
    return values


def _check_inside(what: str, paths: Collection[str], but: str, known: Collection[str]) -> None:
    outside = [path for path in paths if path not in known]
    if outside:
        more = f" and {len(outside) - 1} more" if len(outside) > 1 else ""
        raise CheckpointError(f"{what} {outside[0]!r}{more}, and {but}")


def _of_shared(adapter: Adapter, other: Adapter) -> Values:
    """What all layers share: what trains is taken over; what is fixed must be equal, for other adapters may use it."""
    theirs, ours = (
        {} if shared is None else {**dict(shared.named_parameters()), **dict(shared.named_buffers())}
        for shared in (other.shared, adapter.shared)
    )
    places = {} if adapter.shared is None else dict(module_slots(adapter.shared))
    values: Values = []
    for name, own in ours.items():
        found = theirs.get(name)
        fits = found is not None and found.shape == own.shape
        trains = isinstance(own, nn.Parameter)
        if found is None or not fits or not (trains or torch.equal(found.to(own), own)):
            raise CheckpointError(f"its {name!r}, which all layers share, is another (another key, rank or size)")
        if trains:
            values.append((places[name], found.detach()))
    return values


def _of_layer(path: str, layer: AdapterLayer, other: AdapterLayer | None, alike: bool) -> Values:
    if type(layer).adopt is AdapterLayer.adopt and other is not None and not alike:
        raise CheckpointError(
            f"its config differs from the adapter's, and the method does not say what that changes at {path!r} "
            "(AdapterLayer.adopt)"
        )
    try:
        given = layer.adopt(other)
    except CheckpointError as error:
        raise CheckpointError(f"at {path!r} {error}") from error
    return _fitting(path, layer, given)


def _fitting(path: str, module: nn.Module, given: Mapping[str, Tensor]) -> Values:
    places = dict(module_slots(module))
    for name, tensor in given.items():
        own = tuple(places[name].tensor.shape) if name in places else None
        if own != tuple(tensor.shape):
            raise CheckpointError(f"at {path!r} {name!r} is {tuple(tensor.shape)}, and the adapter's is {own}")
    return [(places[name], tensor.detach()) for name, tensor in given.items()]


def _alike(own: AdapterConfig, other: AdapterConfig) -> bool:
    """Whether two configs of a method differ in nothing but where they act and are from."""
    rest = {name: getattr(own, name) for name in (*_PLACES, *_ORIGIN)}
    return other.replace(**rest) == own
