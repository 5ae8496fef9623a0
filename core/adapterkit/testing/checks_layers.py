"""Checks of a config and of what one layer does: parameters, mathematics, training."""

from __future__ import annotations

import copy
import json
from typing import Any

import torch
from torch import Tensor

import adapterkit as ak
from adapterkit.contract import AdapterConfig, AdapterLayer, default_registry, device_of, without_values
from adapterkit.errors import ConfigError, UnsupportedError
from adapterkit.testing.case import (
    PROBES,
    TARGETS,
    TOLERANCES,
    Broken,
    Case,
    NotApplicable,
    Subject,
    changed_fields,
    expect,
    expect_close,
    expect_equal,
)


def check_config_survives_json(case: Case) -> None:
    """A config written to JSON is taken for this method's, and read back it is the same config."""
    for config in (case.given, case.config):
        written = json.loads(json.dumps(config.to_dict()))
        read = type(config).from_dict(written)
        expect(read == config, f"expected {config!r} to come back, found {read!r}.")
        owner = default_registry.claim(written, "the JSON").name
        expect(owner == case.method.name, f"expected the JSON to be taken for {case.method.name!r}'s, not {owner!r}'s.")


def check_parameters(case: Case) -> None:
    """Each layer has parameters of its own, which train with the shared ones, and no others; all have target.dtype."""
    kept: list[torch.nn.Parameter] = []
    for subject in case.subjects(*TOLERANCES):
        # Trained biases are the core's own, by `AdapterConfig.trained_biases`.
        training = {n for n, p in subject.model.named_parameters() if p.requires_grad and ".adapter_biases." not in n}
        tensors = dict(subject.model.named_parameters(remove_duplicate=False)) | dict(subject.model.named_buffers())
        own = {n for n in tensors if ".adapters.a." in n or n.startswith("adapter_shared.a.")}
        parameters = {n: t for n in sorted(own) if isinstance(t := tensors[n], torch.nn.Parameter)}
        expect(bool(parameters), f"On {subject}: expected parameters, found none. `setup` makes them.")
        for name, parameter in parameters.items():
            new = not any(parameter is other for other in kept)
            expect(new, f"On {subject}: expected a new parameter {name!r}; another layer has the same one.")
            kept.append(parameter)
        expect(
            training == parameters.keys(),
            f"On {subject}: expected exactly {sorted(parameters)} to train; {sorted(training)} do.",
        )
        dtype = torch.promote_types(subject.dtype, torch.float32)
        for name in own:
            found = tensors[name].dtype
            right = found == dtype or not found.is_floating_point
            expect(right, f"On {subject}: expected {name!r} in {dtype}, found {found}; `target.dtype` tells it.")
        for layer in map(subject.layer, TARGETS):
            has_up = not layer.up_factor or any(name in layer.up_factor for name, _ in layer.named_parameters())
            expect(has_up, f"On {subject}: expected a parameter that up_factor = {layer.up_factor!r} names; none is.")


def check_mathematics_is_pure(case: Case) -> None:
    """`factors`, `change`, `merged` and `forward` change and keep nothing, and branch on no value."""
    if case.method.replaces_call:
        raise NotApplicable("its layers compute with what Shared.forward leaves")
    for subject in case.subjects():
        subject.shake()
        for path in TARGETS:
            layer = subject.layer(path).train()  # the core applies dropouts itself
            fresh = copy.deepcopy(layer)
            names = [name for name in ("factors", "change") if hasattr(layer, name)]
            names += ["merged"] * (type(layer).merged is not AdapterLayer.merged)
            for name in names:
                where = f"{type(layer).__name__}.{name} on {subject}"
                try:
                    _expect_pure(layer, copy.deepcopy(fresh), name, where)
                    _expect_no_values_read(layer, name, where)
                except UnsupportedError:  # `merged` may say that it cannot
                    continue
            layer.eval().register_forward_pre_hook(_watch)
        expect(isinstance(subject.out(), Tensor), f"On {subject}: expected `forward` to return a tensor.")


@torch.no_grad()
def _asked(layer: Any, name: str) -> Any:
    """What a function of a layer gives, without a graph."""
    if name != "merged":
        return getattr(layer, name)()
    device = device_of(layer)
    weight = torch.ones(layer.kind.out_features, layer.kind.in_features, device=device)
    bias = None if layer.kind.lookup else torch.ones(layer.kind.out_features, device=device)
    kept = weight.clone()
    found = layer.merged(weight, bias)
    if device.type != "meta":
        expect_equal(weight, kept, f"The weight that {type(layer).__name__}.merged was given")
        expect(bias is None or bool((bias == 1).all()), f"{type(layer).__name__}.merged changed the bias in place.")
    return found


@torch.no_grad()
def _tensors(found: Any) -> list[Tensor]:
    """The tensors in an answer, copied."""
    return [t.clone() for t in ((found,) if isinstance(found, Tensor) else found or ()) if isinstance(t, Tensor)]


def _expect_pure(layer: Any, fresh: Any, name: str, where: str) -> None:
    """`fresh` is an equal layer, of which no function was called yet."""
    before = {key: tensor.clone() for key, tensor in layer.state_dict().items()}
    first, second = _tensors(_asked(layer, name)), _tensors(_asked(layer, name))
    for one, other in zip(first, second, strict=True):
        expect_equal(other, one, f"{where}, asked a second time")
    for key, tensor in layer.state_dict().items():
        expect_equal(tensor, before[key], f"{where} changed {key!r}: its value afterwards")
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(1.5)
    fresh.load_state_dict(layer.state_dict())
    for found, expected in zip(_tensors(_asked(layer, name)), _tensors(_asked(fresh, name)), strict=True):
        expect_equal(found, expected, f"{where}, asked again with other parameters (was something kept?)")


def _expect_no_values_read(layer: Any, name: str, where: str) -> None:
    """On the meta device tensors have shapes and no values."""
    try:
        _asked(without_values(layer), name)
    except (RuntimeError, NotImplementedError) as error:
        raise Broken(f"{where}: expected shapes alone to be enough; it reads values: {error}") from error


class _Watched:
    """`base` for one forward of a layer; what it gives must stay as it is."""

    def __init__(self, base: Any) -> None:
        self.base, self.given = base, []  # type: ignore[var-annotated]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.base, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        out = self.base(*args, **kwargs)
        self.given += [(t, t.clone()) for t in (out if isinstance(out, tuple) else (out,))]
        return out


def _watch(layer: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Have a layer's forward called with a base that is watched."""
    watched, kept = _Watched(args[0]), args[1].clone()

    def judge(module: Any, _: Any, out: Any) -> None:
        handle.remove()
        one = out[0] if module.any_module and isinstance(out, tuple) else out
        expect(isinstance(one, Tensor), f"{type(module).__name__}.forward: expected a tensor, found {out!r}.")
        for what, now, was in [("the input", args[1], kept), *(("what base gave", *pair) for pair in watched.given)]:
            expect_equal(now, was, f"{type(module).__name__}.forward changed {what} in place: its value afterwards")

    handle = layer.register_forward_hook(judge)
    return (watched, *args[1:])


def check_every_claimed_layer_kind(case: Case) -> None:
    """On every layer kind that `inject` does not refuse, outputs keep shape and dtype, and all parameters learn."""
    for subject in case.subjects(torch.float32, torch.bfloat16):
        out, what = subject.out(), f"The outputs on {subject}"
        expect(out.shape == subject.plain.shape, f"{what}: expected the bare model's shape, found {tuple(out.shape)}.")
        expect(out.dtype == subject.dtype, f"{what}: expected the model's own dtype, found {out.dtype}.")
        before = [p.detach().clone() for p in subject.adapters.parameters("a")]
        subject.train()
        for (name, parameter), old in zip(subject.adapters.named_parameters("a"), before, strict=True):
            moved = not torch.equal(parameter, old)
            expect(moved, f"On {subject}: expected {name!r} to change in training; it has no gradient.")
            finite = bool(torch.isfinite(parameter).all())
            expect(finite, f"On {subject}: expected {name!r} finite after training; it is not.")


def check_given_fields_act(case: Case) -> None:
    """Each field that the config sets away from its default changes parameters, outputs or training on some layer."""
    inherited = AdapterConfig.__dataclass_fields__
    names = [name for name in changed_fields(case.given) if name not in inherited]
    if not names:
        raise NotApplicable("the config has its fields at their defaults")
    plain = type(case.given)()
    for name in names:
        try:
            other = case.config.replace(**{name: getattr(plain, name)})
        except ConfigError:
            continue  # the fields depend on each other
        acts = any(_differ(_history(case.config, probe), _history(other, probe)) for probe in PROBES)
        here, default = getattr(case.given, name), getattr(plain, name)
        expect(acts, f"{name} = {here!r} gives what the default, {default!r}, gives. Does the layer use it?")


Record = dict[str, Tensor | str]


def _history(config: AdapterConfig, probe: Any) -> Record:
    """What an adapter is made of, what it gives, and what ten steps of training make of it."""
    torch.manual_seed(0)
    record: Record = {}
    try:
        subject = Subject(config, probe, torch.float32, "a")
        record |= {f"new {key}": tensor for key, tensor in subject.tensors("a").items()}
        record["out"] = subject.shake().out()
        subject.model.train()
        optimizer = torch.optim.SGD(list(subject.adapters.parameters("a")), lr=0.1)
        for _ in range(10):
            (subject.loss() + ak.penalty(subject.model)).backward()
            optimizer.step()
            subject.adapters.step()
            optimizer.zero_grad()
        record |= subject.tensors("a")
    except Exception as error:  # noqa: BLE001 - a method that is wrong may raise anything
        record["error"] = repr(error)
    record["random numbers drawn"] = torch.get_rng_state()
    return record


def _differ(one: Record, other: Record) -> bool:
    def same(a: Tensor | str | None, b: Tensor | str | None) -> bool:
        return torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a is b or a == b

    return any(not same(one.get(key), other.get(key)) for key in one.keys() | other.keys())


def check_identity_at_initialisation(case: Case) -> None:
    """A new adapter changes no output, if its config says so (`starts_as_identity`)."""
    if not case.given.starts_as_identity:
        raise NotApplicable("the config says that a new adapter changes outputs (starts_as_identity)")
    for subject in case.subjects(torch.float32, torch.bfloat16):
        expect_close(subject.out(), subject.plain, f"The outputs with a new adapter on {subject}")


def check_base_is_untouched(case: Case) -> None:
    """Adding an adapter and training it change nothing in the base, which gets no gradient."""
    for subject in case.subjects():
        parameters = dict(subject.model.named_parameters())
        subject.model.train()
        subject.train(steps=2)
        subject.loss().backward()
        after = subject.model.state_dict()
        for key, value in subject.before.items():
            expect(key in after, f"On {subject}: expected the base's {key!r} under its name; it is not there.")
            expect_equal(after[key], value, f"The base's {key!r} after training on {subject}")
            gradient = parameters[key].grad if key in parameters else None
            expect(gradient is None, f"On {subject}: expected no gradient for the base's {key!r}; it has one.")
