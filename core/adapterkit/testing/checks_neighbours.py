"""Checks that adapters keep apart, and that nothing stays behind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.contract import AdapterConfig, AdapterLayer, KeyRule, Target, default_registry, hookimpl
from adapterkit.forward import Base
from adapterkit.testing.case import Case, Subject, differ, expect, expect_close, expect_equal

NAME = "adapterkit_testing_neighbour"


@dataclass(frozen=True, kw_only=True)
class NeighbourConfig(AdapterConfig):
    """The config of the second method."""

    method = NAME


class NeighbourLayer(AdapterLayer):
    """`base(x) + v`, v of shape `(out,)`."""

    def setup(self, target: Target, config: NeighbourConfig) -> None:
        """See `AdapterLayer.setup`."""
        self.neighbour_v = target.new(target.out_features)

    def forward(self, base: Base, x: Tensor) -> Tensor:
        """See `AdapterLayer.forward`."""
        out: Tensor = base(x) + self.kind.spread(self.neighbour_v)
        return out


class Neighbour:
    """The plugin."""

    @hookimpl
    def config_type(self) -> type[AdapterConfig]:
        """See the spec."""
        return NeighbourConfig

    @hookimpl
    def key_rule(self) -> KeyRule:
        """See the spec."""
        return KeyRule(prefix="neighbour_")

    @hookimpl
    def inject(self, target: Target, config: NeighbourConfig) -> AdapterLayer:
        """See the spec."""
        return NeighbourLayer(target, config)


@contextmanager
def neighbour() -> Iterator[None]:
    """The second method is registered for the length of a `with` block."""
    default_registry.register(Neighbour())
    try:
        yield
    finally:
        default_registry.unregister(NAME)


__all__ = ["NeighbourConfig", "neighbour"]


def check_two_adapters_of_one_method(case: Case) -> None:
    """Two adapters of the method on the same layers share no key and no tensor, and saving one is not saving both."""
    subject = next(case.subjects(names=("up", "rest")))  # modules of the model have these names, too
    _expect_apart(case, subject, "up", "rest")


def check_two_methods(case: Case) -> None:
    """An adapter of the method and one of another method, on the same layers, do not touch each other's keys."""
    with neighbour():
        subject = case.subject()
        subject.adapters.add("other", NeighbourConfig(target_modules=("up", "down")))
        _expect_apart(case, subject, "a", "other")


def _expect_apart(case: Case, subject: Subject, one: str, other: str) -> None:
    _expect_own_memory(subject, one, other)
    for name, left in ((one, other), (other, one)):
        kept = subject.tensors(left)
        subject.train(name, seed=len(name))
        for key, tensor in subject.tensors(left).items():
            expect_equal(tensor, kept[key], f"{key!r} of adapter {left!r} after {name!r} was trained")
    outputs = {}
    for name in (one, other):
        subject.adapters.activate(name)
        outputs[name] = subject.out()
        expect(differ(outputs[name], subject.plain), f"expected the trained adapter {name!r} to change the outputs.")
        with case.folder() as folder:
            subject.adapters.save(name, folder)
            model, adapters = subject.fresh()
            adapters.load(folder, name=name)
        expect_close(subject.out(model), outputs[name], f"The outputs of {name!r}, saved from beside the other")
    subject.adapters.remove(one)
    subject.adapters.activate(other)
    expect_close(subject.out(), outputs[other], f"The outputs of {other!r} after {one!r} was removed")


def _expect_own_memory(subject: Subject, one: str, other: str) -> None:
    first, second = (dict(subject.adapters.named_parameters(name)) for name in (one, other))
    shared = {p.data_ptr() for p in first.values()} & {p.data_ptr() for p in second.values()}
    expect(not shared, f"expected {one!r} and {other!r} to have parameters of their own; they share {len(shared)}.")
    keys = [k for k in subject.model.state_dict() if f".adapters.{one}." in k and f".adapters.{other}." in k]
    expect(not keys, f"expected every key to be one adapter's, found {keys}.")


def check_detach_restores(case: Case) -> None:
    """`detach` leaves no trace: classes, attributes, hooks, `requires_grad` and every bit are the bare model's."""
    for probe in [subject.probe for subject in case.subjects()]:
        model: nn.Module = probe.build()
        with torch.no_grad():
            plain, before = model(probe.inputs()), _traces(model)
        adapters = ak.attach(model)
        adapters.add("a", case.config)
        adapters.add("b", case.config, activate=False)
        model(probe.inputs()).sum().backward()
        model = adapters.detach()
        after = _traces(model)
        for place in before.keys() | after.keys():
            found, expected = after.get(place), before.get(place)
            same = torch.equal(found, expected) if isinstance(found, Tensor) and isinstance(expected, Tensor) else None
            expect(
                found == expected if same is None else same,
                f"On {probe.name} layers: expected {place} to be as before, {expected!r}; found {found!r}.",
            )
        with torch.no_grad():
            expect_close(model(probe.inputs()), plain, f"The outputs after detaching on {probe.name} layers")


def _traces(model: nn.Module) -> dict[str, Any]:
    """All that an adapter could leave behind: a name for the place, and what is there."""
    found: dict[str, Any] = {}
    for path, module in model.named_modules():
        where = path or "the model"
        found[f"the class of {where}"] = type(module)
        found[f"the attributes of {where}"] = sorted(module.__dict__)
        for kind, value in module.__dict__.items():
            if kind.endswith("_hooks"):
                found[f"{kind} of {where}"] = sorted(value)
        found[f"the modules below {where}"] = sorted(module._modules)
        for name, parameter in module._parameters.items():
            found[f"requires_grad of {where}.{name}"] = parameter is not None and parameter.requires_grad
            found[f"{where}.{name}"] = None if parameter is None else parameter.detach().clone()
    return found
