"""Checks of what a method says of itself, and of what happens when it is added and trained."""

from __future__ import annotations

import json

import torch

from adapterkit.contract import check_hooks, default_registry
from adapterkit.errors import PluginError
from adapterkit.testing.case import Broken, Case, NotApplicable, expect, expect_close, expect_equal
from adapterkit.testing.probes import TARGETS


def check_annotations_match_specs(case: Case) -> None:
    """The names, arguments and annotations of every hook agree with the specs."""
    try:
        check_hooks(case.method.plugin, f"The method {case.method.name!r}")
    except PluginError as error:
        raise Broken(str(error)) from error


def check_config_survives_json(case: Case) -> None:
    """A config written to JSON is taken for this method's, and read back it is the same config."""
    for config in (case.given, case.config):
        written = json.loads(json.dumps(config.to_dict()))
        read = type(config).from_dict(written)
        expect(read == config, f"expected {config!r} to come back, found {read!r}.")
        owner = default_registry.claim(written, "the JSON").name
        expect(owner == case.method.name, f"expected the JSON to be taken for {case.method.name!r}'s, not {owner!r}'s.")


def check_identity_at_initialisation(case: Case) -> None:
    """A new adapter changes no output, if its config says so (`starts_as_identity`)."""
    if not case.given.starts_as_identity:
        raise NotApplicable("the config says that a new adapter changes outputs (starts_as_identity)")
    for dtype in (torch.float32, torch.bfloat16):
        for subject in case.subjects(dtype):
            expect_close(subject.out(), subject.plain, f"The outputs with a new adapter on {subject}")


def check_only_prefixed_parameters_train(case: Case) -> None:
    """What trains are the parameters of the layers and shared ones, and every one's name begins with the key prefix."""
    prefix = case.method.key_rule(case.config).prefix
    for subject in case.subjects(faults=True):
        owned = {
            f"{path}.adapters.a.{name}"
            for path in TARGETS
            for name, _ in subject.layer(path).named_parameters()
            if name.startswith(prefix)
        }
        shared = subject.model._modules.get("adapter_shared")
        for name, _ in () if shared is None else shared.named_parameters():
            owned |= {f"adapter_shared.{name}"} if name.removeprefix("a.").startswith(prefix) else set()
        # Trained biases are the core's own, by `AdapterConfig.trained_biases`.
        training = {n for n, p in subject.model.named_parameters() if p.requires_grad and ".adapter_biases." not in n}
        expect(bool(owned), f"On {subject}: expected parameters that begin with {prefix!r}, found none.")
        expect(
            training == owned,
            f"On {subject}: expected exactly the parameters that begin with {prefix!r} to train; {sorted(training)} "
            f"do, and {sorted(owned)} should.",
        )


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


def check_every_claimed_layer_kind(case: Case) -> None:
    """On every layer kind that `inject` does not refuse, outputs keep shape and dtype, and all parameters learn."""
    for dtype in (torch.float32, torch.bfloat16):
        for subject in case.subjects(dtype, faults=True):
            out = subject.out()
            expect(out.shape == subject.plain.shape, f"On {subject}: the adapter changed the outputs' shape.")
            expect(
                out.dtype == dtype, f"On {subject}: expected outputs in {dtype}, the model's own; found {out.dtype}."
            )
            before = [p.detach().clone() for p in subject.adapters.parameters("a")]
            subject.train()
            for (name, parameter), old in zip(subject.adapters.named_parameters("a"), before, strict=True):
                moved = not torch.equal(parameter, old)
                expect(moved, f"On {subject}: expected {name!r} to change in training; it has no gradient.")
                finite = bool(torch.isfinite(parameter).all())
                expect(finite, f"On {subject}: expected {name!r} finite after training; it is not.")
