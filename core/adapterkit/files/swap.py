"""Overwriting an adapter in place with another one, in the parameters that it has."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapterkit.contract import default_registry, twin
from adapterkit.errors import CheckpointError
from adapterkit.files.match import Values
from adapterkit.kinds import Factors
from adapterkit.model import Adapter, layer_tensors
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
    """What to write into `adapter`. An error's message goes on from "cannot be swapped into adapter: "."""
    if other.config.method != adapter.config.method:
        raise CheckpointError(f"it is of the method {other.config.method!r}, not {adapter.config.method!r}")
    parts: list[tuple[str, Collection[str], str, Collection[str]]] = [
        ("it changes", other.layers, "the adapter does not", adapter.layers),
        ("it has a head at", other.heads, "the adapter has none there", adapter.heads),
        ("the adapter has a head at", adapter.heads, "the file has none there", other.heads),
        ("it trains the bias of", other.biases, "the adapter does not", adapter.biases),
    ]
    for what, paths, but, known in parts:
        outside = [path for path in paths if path not in known]
        if outside:
            more = f" and {len(outside) - 1} more" if len(outside) > 1 else ""
            raise CheckpointError(f"{what} {outside[0]!r}{more}, and {but}")
    values = _of_shared(adapter, other) + _of_layers(adapter, other)
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


def _of_shared(adapter: Adapter, other: Adapter) -> Values:
    """What all layers share: what trains is taken over; what is fixed must be equal, for other adapters may use it."""
    if adapter.shared is None:
        return []
    theirs = (
        {} if other.shared is None else {**dict(other.shared.named_parameters()), **dict(other.shared.named_buffers())}
    )
    places, values = dict(module_slots(adapter.shared)), []
    for name, own in (*adapter.shared.named_parameters(), *adapter.shared.named_buffers()):
        found, trains = theirs.get(name), isinstance(own, nn.Parameter)
        if found is None or found.shape != own.shape or not (trains or torch.equal(found.to(own), own)):
            raise CheckpointError(f"its {name!r}, which all layers share, is another (another key, rank or size)")
        if trains:
            values.append((places[name], found.detach()))
    return values


def _of_layers(adapter: Adapter, other: Adapter) -> Values:
    """What makes each layer do what the other adapter's layer does.

    The hook `from_factors` makes it of the other's change. Where the method has no such hook, or a change has no
    low-rank form, it is the other's own tensors, which needs the same config and the same layers.
    """
    method, layers = default_registry.method_of(adapter.config), adapter.layers
    own = {path: method.factors(layer, scaled=False) for path, layer in layers.items()}
    theirs = {path: method.factors(layer, scaled=False) for path, layer in other.layers.items()}
    if "from_factors" not in method.hooks or any(found is None for found in (*own.values(), *theirs.values())):
        return _same_tensors(adapter, other)
    wanted = {path: _resized(path, found, theirs.get(path)) for path, found in own.items() if found is not None}
    _, tensors = method.from_factors(wanted, {path: layer.kind for path, layer in layers.items()})
    _, tensors = method.from_file(adapter.config, tensors)
    given = layer_tensors(tensors, method.key_rule(adapter.config), layers)
    values = [pair for path, layer in layers.items() for pair in _fitting(path, layer, given.get(path, {}))]
    new = {id(slot.tensor): tensor for slot, tensor in values}
    for path, layer in layers.items():
        made = method.factors(twin(layer, lambda tensor: new.get(id(tensor), tensor)), scaled=False)
        if made is None or _differ(made, wanted[path]):
            raise CheckpointError(f"at {path!r} the method's from_factors gives another change under this config")
    return values


def _resized(path: str, own: Factors, change: Factors | None) -> Factors:
    """A change as factors of the rank and the scaling of a layer with the factors `own`; `None`: no change."""
    bias = None if own.bias is None else torch.zeros_like(own.bias)
    if change is None:
        return Factors(torch.zeros_like(own.up), own.down, bias)
    more = own.rank - change.rank
    if more < 0:
        raise CheckpointError(f"at {path!r} its rank is {change.rank}, and the adapter has room for {own.rank}")
    if own.bias is None and change.bias is not None:
        raise CheckpointError(f"at {path!r} it changes the bias, and the adapter does not")
    if own.scale == 0 != change.scale:
        raise CheckpointError(f"at {path!r} the adapter's scaling is 0, so it can change nothing")
    ratio = 1.0 if change.scale == own.scale else change.scale / own.scale
    bias = bias if change.bias is None else change.bias * ratio
    return Factors(F.pad(change.up * ratio, (0, more)), F.pad(change.down, (0, 0, 0, more)), bias)


def _differ(made: Factors, wanted: Factors) -> bool:
    """Whether two changes of one scaling differ in their products with one vector. Of NaN nothing is known."""
    generator = torch.Generator().manual_seed(0)
    vector = torch.randn(wanted.down.shape[1], generator=generator, device="cpu").to(wanted.down)
    found, expected = (f.up @ (f.down.to(vector) @ vector) for f in (made, wanted))
    return bool(((found - expected).abs() > 2e-3 * expected.abs().max()).any())


def _same_tensors(adapter: Adapter, other: Adapter) -> Values:
    """The other adapter's own tensors in each layer."""
    rest = {name: getattr(adapter.config, name) for name in (*_PLACES, *_ORIGIN)}
    if other.config.replace(**rest) != adapter.config:
        raise CheckpointError(
            "its config differs from the adapter's, and the method does not say what that changes (hook from_factors)"
        )
    values: Values = []
    for path, layer in adapter.layers.items():
        if path not in other.layers:
            raise CheckpointError(
                f"at {path!r} the file has no tensors, and the method does not say which values leave the layer "
                "unchanged (hook from_factors)"
            )
        values += _fitting(path, layer, {name: slot.tensor for name, slot in module_slots(other.layers[path])})
    return values


def _fitting(path: str, module: nn.Module, given: Mapping[str, Tensor]) -> Values:
    places = dict(module_slots(module))
    for name, tensor in given.items():
        own = tuple(places[name].tensor.shape) if name in places else None
        if own != tuple(tensor.shape):
            raise CheckpointError(f"at {path!r} {name!r} is {tuple(tensor.shape)}, and the adapter's is {own}")
    return [(places[name], tensor.detach()) for name, tensor in given.items()]
