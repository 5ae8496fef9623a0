"""What a training's numbers depend on beside tensors: configs, which adapters act, how strongly, in which order.

Without it a resumed training gives other numbers, and no error.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from adapterkit.contract import AdapterConfig, default_registry
from adapterkit.errors import AdapterError, CheckpointError, warn
from adapterkit.files import adapter_tensors
from adapterkit.model import base_parameters
from adapterkit.tensors import has_fsdp1

if TYPE_CHECKING:
    from adapterkit.adapters import Adapters

# The length of text in a tensor is a multiple of this: torch.distributed.checkpoint reads into tensors of equal shapes.
_BLOCK = 256


def setting(adapters: Adapters, held: Collection[str]) -> str:
    """How the adapters act and train now, as JSON for `check_setting`.

    Args:
        held: the adapters whose values the checkpoint holds. The values of others that act are in it as a digest.
    """
    trains = adapters.trainable
    acting = [
        {"name": name, "strength": strength, "values": None if name in held else _in_file(adapters, name)}
        for name, strength in adapters.strengths.items()
    ]
    found = {
        "trains": trains,
        "acting": acting,
        "heads": adapters._active.state.heads,
        "merged": adapters.merged,
        "parameters": {name: _parameters(adapters, name) for name in trains},
        "configs": {name: method_fields(adapters.config(name)) for name in held},
        "base": _base(adapters, trains),
    }
    return json.dumps(found)


def check_setting(adapters: Adapters, saved: str, where: object, *, base: bool = True) -> None:
    """Check that the adapters act and train as they did when `setting` was called.

    Args:
        where: what holds the saved setting, to begin a message.
        base: check the base, too: what is loaded does not hold it.

    Raises:
        CheckpointError: they do not. Where only the base is another, a warning says so.
    """
    try:
        then: Any = json.loads(saved)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is damaged: how the adapters acted is no JSON.") from error
    try:
        _compare(adapters, then, where, base=base)
    except AdapterError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError) as error:  # any JSON may be there
        raise CheckpointError(f"{where} is damaged: how the adapters acted is not what `setting` gives.") from error


def _compare(adapters: Adapters, then: Any, where: object, *, base: bool) -> None:
    """See `check_setting`."""
    for name, fields in then["configs"].items():
        other = other_config(fields, adapters.config(name)) if name in adapters else ""
        if other:
            raise CheckpointError(
                f"{where} does not fit adapter {name!r}: {other}. Before you resume, add the adapter with the config "
                "that was saved."
            )
    now = json.loads(setting(adapters, held=adapters.names))
    if any(_acts(then, part) != _acts(now, part) for part in ("trains", "heads", "acting", "merged")):
        raise CheckpointError(
            f"{where} is of a training in which {_shown(then)}, and here {_shown(now)}. Training on would give other "
            "numbers, and an optimizer may mix up its averages. Before you resume, add the adapters in the same order "
            f"and let them act as then: {_calls(then, now)}."
        )
    for name, parameters in then["parameters"].items():
        if parameters != now["parameters"][name]:
            raise CheckpointError(
                f"{where} is of a training in which adapter {name!r} had {parameters['shown']}, and here it has "
                f"{now['parameters'][name]['shown']}. Before you resume, add the adapter with the config and the dtype "
                "that were saved, and let the same parameters require gradients as then."
            )
    for each in then["acting"]:
        name, values = each["name"], each["values"]
        if values is not None and values != _in_file(adapters, name):
            raise CheckpointError(
                f"{where} is of a training in which adapter {name!r} acted with other values, or another config, than "
                f"here. It did not train, so the checkpoint does not hold it. Before you resume, load {name!r} from "
                "the file that was loaded then; if it was trained before that, save it and load that file."
            )
    if base:
        _warn_of_other_base(then["base"], now["base"], where)


def _warn_of_other_base(then: Mapping[str, str], now: Mapping[str, str], where: object) -> None:
    """Warn if the same frozen parameters have other values than then."""
    if then["names"] != now["names"] or not (then["values"] and now["values"]) or then["values"] == now["values"]:
        return
    what = "with other weights than this one has"
    if then["dtypes"] != now["dtypes"]:
        what = f"whose weights are {then['dtypes']}, and here they are {now['dtypes']}"
    warn(f"{where} is of a training on a base {what}. The adapters go on from there, with other numbers.")


def method_fields(config: AdapterConfig) -> str:
    """What a config says beyond its choice of layers, such as `lora_alpha`, as JSON. No tensor shows it."""
    common = {f.name for f in dataclasses.fields(AdapterConfig)}
    own = {name: value for name, value in config.to_dict().items() if name not in common}
    return json.dumps({"method": config.method, **own}, default=str)


def other_config(saved: str, config: AdapterConfig) -> str:
    """What differs from the config that `method_fields` gave, to follow `it ...`; empty: nothing."""
    own: dict[str, Any] = json.loads(method_fields(config))
    try:
        theirs: Any = json.loads(saved)
    except ValueError:
        theirs = None
    if not isinstance(theirs, dict):
        return "its config is no JSON"
    for name in ("method", *sorted(theirs.keys() | own.keys())):
        if theirs.get(name) != own.get(name):
            return f"it was saved with {name} = {theirs.get(name)!r}, and here it is {own.get(name)!r}"
    return ""


def encoded(text: str, block: int = _BLOCK) -> Tensor:
    """Text as a tensor of bytes, filled up with spaces to a multiple of `block`."""
    held = text.encode()
    return torch.tensor(list(held.ljust(-(-len(held) // block) * block)), dtype=torch.uint8, device="cpu")


def decoded(tensor: Tensor) -> str:
    """The text of `encoded`; empty: the tensor is none."""
    try:
        return bytes(tensor.float().round().to(torch.uint8).tolist()).decode().rstrip()
    except (TypeError, ValueError):
        return ""


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the names, dtypes, shapes and bits of these tensors."""
    digest = hashlib.sha256()
    for key, tensor in sorted(tensors.items()):
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _in_file(adapters: Adapters, name: str) -> str:
    """A digest of what the adapter's file has. It stays the same when the adapter is saved and loaded again."""
    adapter = adapters._adapters[name]
    with adapters._gathered([adapter]):
        config, tensors = adapter_tensors(adapter, default_registry.method_of(adapter.config))
        return digest({**tensors, "config": encoded(method_fields(config))})


def sample(tensors: Mapping[str, Tensor]) -> str:
    """A short digest of the first numbers of each tensor, which tells two states of a training apart."""
    groups: dict[tuple[torch.device, torch.dtype], list[str]] = {}
    for key, tensor in tensors.items():
        groups.setdefault((tensor.device, tensor.dtype), []).append(key)
    first: dict[str, bytes] = {}
    for keys in groups.values():
        parts = [_first_numbers(tensors[key]) for key in keys]
        read = torch.cat(parts).cpu().view(torch.uint8).numpy().data  # one copy: one for each tensor takes long
        for key, part in zip(keys, parts, strict=True):
            first[key], read = bytes(read[: part.nbytes]), read[part.nbytes :]
    return short_hash(repr([(key, t.dtype, *t.shape, first[key]) for key, t in sorted(tensors.items())]))


def _first_numbers(tensor: Tensor) -> Tensor:
    """At most 16 numbers of the first row."""
    count = min(16, *tensor.shape[-1:], tensor.numel())
    return tensor.as_strided((count,), (tensor.stride(-1) if tensor.dim() else 1,))


def _parameters(adapters: Adapters, name: str) -> dict[str, str]:
    """An adapter's parameters in words, such as how many are frozen, and a hash of the frozen ones' names."""
    adapter = adapters._adapters[name]
    parameters = adapter.parameters()
    every = all(p.requires_grad for p in parameters)  # as nearly always: names take longer
    frozen = [] if every else [key for key, p in adapter.named_parameters() if not p.requires_grad]
    shown = f"{len(parameters)} parameters, {len(frozen) or 'none'} of them frozen"
    shown += f" (such as {frozen[0]!r})" if frozen else ""
    shown += f", and the dtype {', '.join(sorted({str(p.dtype) for p in parameters}))}"
    return {"shown": shown, "frozen": short_hash(repr(frozen))}


def short_hash(text: str) -> str:
    """Enough of the SHA-256 of a text to tell it from others."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _base(adapters: Adapters, trains: Sequence[str]) -> dict[str, str]:
    """What the adapters are trained on: the dtypes of the base's frozen parameters, and a little of each one's values.

    Parameters that are sharded or offloaded are left out, and those that an adapter has its own copy of. Merged
    adapters are seen in the weights.
    """
    own = [adapters._adapters[name] for name in (*trains, *adapters.merged)]
    heads = tuple(f"{path}." for each in own for path in each.heads)
    base = base_parameters(adapters.model)
    frozen = {key: p.detach() for key, p in base if _is_plain_and_frozen(p) and not key.startswith(heads)}
    try:
        values = "" if has_fsdp1(adapters.model) else sample(frozen)
    except RuntimeError:  # inside a transform of torch.func no tensor gives its numbers
        values = ""
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in frozen.values()})
    return {"names": short_hash(repr([*frozen])), "dtypes": ", ".join(dtypes), "values": values}


def _is_plain_and_frozen(parameter: nn.Parameter) -> bool:
    """Whether a parameter of the base does not train, and is a plain tensor in this process's memory."""
    if parameter.requires_grad or parameter.is_meta or type(parameter) is not nn.Parameter:
        return False
    return parameter.layout is torch.strided and not parameter.is_conj()


def _acts(found: Mapping[str, Any], part: str) -> list[Any]:
    """A part of a setting, without the values of adapters."""
    return [(each["name"], each["strength"]) for each in found[part]] if part == "acting" else found.get(part, [])


def _shown(found: Mapping[str, Any]) -> str:
    """How adapters act and train, in words."""
    acting = ", ".join(
        f"{name!r}" + f" (strength {'by layer' if isinstance(strength, Mapping) else strength})" * (strength != 1)
        for name, strength in _acts(found, "acting")
    )
    trains, heads, merged = (", ".join(map(repr, _acts(found, part))) for part in ("trains", "heads", "merged"))
    shown = f"{acting or 'nothing'} acted and {trains or 'nothing'} trained" + f" with the head of {heads}" * bool(
        heads
    )
    return shown + f" with {merged} merged" * bool(merged)


def _calls(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The calls that let adapters act as they did then."""
    calls, merged = [], _acts(then, "merged")
    if merged != _acts(now, "merged"):
        calls += ["adapters.unmerge()"] * bool(_acts(now, "merged"))
        calls += [f"adapters.merge({', '.join(map(repr, merged))})"] * bool(merged)
    names = [each["name"] for each in then["acting"]]
    strengths = {each["name"]: each["strength"] for each in then["acting"] if each["strength"] != 1}
    options = [repr(name) for name in names]
    options += [f"trainable={then['trains']!r}"] if {*names} != {*then["trains"]} else []
    options += [f"heads={then['heads'][-1]!r}"] if then["heads"] and then["heads"] != now["heads"] else []
    options += [f"strengths={strengths!r}"] if strengths else []
    return ", ".join([*calls, f"adapters.activate({', '.join(options)})"])
