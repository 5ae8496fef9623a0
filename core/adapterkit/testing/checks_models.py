"""Checks of what people do to whole models: move, copy, pickle, compile, share and detach."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.testing.case import TARGETS, Case, NotApplicable, Subject, differ, expect, expect_close, expect_equal


def _moved(inputs: Tensor, dtype: torch.dtype) -> Tensor:
    return inputs.to(dtype) if inputs.is_floating_point() else inputs


def check_moves_to_dtype(case: Case) -> None:
    """`model.to(dtype)` moves every floating tensor of the adapter, and outputs have that dtype and stay near."""
    for subject in case.subjects():
        adapted = subject.train().out()
        for dtype in (torch.float64, torch.bfloat16):
            model = copy.deepcopy(subject.model).to(dtype)
            for key, tensor in ak.attach(model).state_dict("a").items():
                right = tensor.dtype == dtype or not tensor.is_floating_point()
                expect(right, f"On {subject}: expected {key!r} in {dtype}, found {tensor.dtype}.")
            with torch.no_grad():
                out = model(_moved(subject.inputs, dtype))
            expect(out.dtype == dtype, f"On {subject}: expected outputs in {dtype}, found {out.dtype}.")
            room = torch.bfloat16 if dtype is torch.bfloat16 else torch.float32
            expect_close(out.float(), adapted, f"The outputs after .to({dtype}) on {subject}", room)


@torch.no_grad()
def check_shared_tensors_are_one_copy(case: Case) -> None:
    """Every layer reads a shared tensor from the core's one copy in each forward, after `.to(dtype)` as before."""
    if case.method.shared is None:
        raise NotApplicable("the method has no shared tensors")
    probe = next(case.subjects()).probe
    for path in TARGETS:
        subject = Subject(case.config.replace(target_modules=(path,)), probe, torch.float32, "a")
        subject.shake()
        for dtype in (torch.float32, torch.float64):
            subject.model.to(dtype)
            subject.inputs = _moved(subject.inputs, dtype)
            before = subject.out()
            shared = subject.model.get_submodule("adapter_shared.a")
            tensors = [t for t in (*shared.parameters(), *shared.buffers()) if t.is_floating_point()]
            if not tensors:
                raise NotApplicable("what the layers share has no floating tensors")
            for tensor in tensors:
                tensor.mul_(2)
            acts = differ(before, subject.out())
            expect(acts, f"At {path!r} in {dtype}: expected a change of the shared tensors to act; it has a copy.")


def check_deepcopy_is_independent(case: Case) -> None:
    """A deep copy of the model gives the same outputs, and training it leaves the original as it was."""
    for subject in case.subjects(few=True):
        adapted = subject.train().out()
        original, tensors = subject.model, subject.tensors("a")
        subject.model = copy.deepcopy(original)
        subject.adapters = ak.attach(subject.model)
        expect_close(subject.out(), adapted, f"The deep copy's outputs on {subject}")
        subject.train(seed=1)
        expect_close(subject.out(original), adapted, f"The original's outputs after the copy was trained on {subject}")
        for key, tensor in ak.attach(original).state_dict("a").items():
            expect_equal(tensor, tensors[key], f"The original's {key!r} after the copy was trained on {subject}")


def check_pickles(case: Case) -> None:
    """The adapted model and the config can be pickled, and give the same outputs when they are back."""
    config = pickle.loads(pickle.dumps(case.given))
    expect(config == case.given, f"expected the config back from its pickle, found {config!r}.")
    for subject in case.subjects(few=True):
        adapted = subject.train().out()
        model = pickle.loads(pickle.dumps(subject.model))
        expect_close(subject.out(model), adapted, f"The unpickled model's outputs on {subject}")


def check_training_goes_on(case: Case) -> None:
    """A training that is stopped and goes on from `training_state` makes the step that it would have made.

    What a step or a forward remembers is in buffers (those that are in no file are not persistent).
    """
    for subject in case.subjects(few=True):
        _trained_step(subject.model, subject)
        state = {key: tensor.clone() for key, tensor in subject.adapters.training_state("a").items()}
        model, adapters = subject.fresh()
        adapters.add("a", case.config)
        adapters.load_training_state("a", state)
        for one in (subject.model, model):
            _trained_step(one, subject)
        expect_close(subject.out(model), subject.out(), f"The outputs after a step that goes on, on {subject}")


def _trained_step(model: Any, subject: Any) -> None:
    """One step of SGD, with all that a method may have a part in."""
    adapters = ak.attach(model)
    optimizer = torch.optim.SGD(list(adapters.parameters("a")), lr=0.1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        (model(subject.inputs).float().square().mean() + ak.penalty(model)).backward()
    optimizer.step()
    adapters.step()
    optimizer.zero_grad()


def check_reset_begins_again(case: Case) -> None:
    """An adapter that is made on the meta device and reset when the base has its weights is the one `add` makes."""
    for subject in case.subjects(few=True):
        _, adapters = subject.fresh()
        with torch.device("meta"):
            late = ak.attach(subject.probe.build(subject.dtype))
        for each in (late, adapters):
            torch.manual_seed(0)
            each.add("a", case.config)
        late.model.to_empty(device="cpu")
        late.model.load_state_dict(subject.before)
        late.reset("a")
        states = [each.training_state("a") for each in (late, adapters)]
        expect(states[0].keys() == states[1].keys(), f"On {subject}: expected the tensors of add after a reset.")
        for key, tensor in states[0].items():
            expect_equal(tensor, states[1][key], f"{key!r} after a reset on {subject}")


def check_compiles(case: Case) -> None:
    """`torch.compile(model, fullgraph=True)` takes the adapted model in training: the layer breaks no graph."""
    for subject in case.subjects(few=True):
        subject.train()
        expected = _step(subject, subject.model)
        with warnings.catch_warnings():  # torch's own imports
            warnings.simplefilter("ignore")
            torch.compiler.reset()
            found = _step(subject, torch.compile(subject.model, fullgraph=True, backend="eager"))
        for one, other in zip(expected, found, strict=True):
            expect_close(other, one, f"The compiled model's outputs and gradients on {subject}", torch.float32)


def _step(subject: Subject, model: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """The outputs, and the gradients of every parameter."""
    out = model(subject.inputs)
    return [out, *torch.autograd.grad((out**2).mean(), list(subject.adapters.parameters("a")))]


def check_two_adapters_of_one_method(case: Case) -> None:
    """Two adapters of the method on the same layers share no key and no tensor, and each is saved alone."""
    one, other = "up", "rest"  # modules of the model have these names, too
    subject = next(case.subjects(names=(one, other)))
    first, second = ({p.data_ptr() for p in subject.adapters.parameters(name)} for name in (one, other))
    expect(not first & second, f"expected parameters of their own; they share {len(first & second)}.")
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
        with TemporaryDirectory() as folder:
            subject.adapters.save(name, Path(folder) / "saved")
            model, adapters = subject.fresh()
            adapters.load(Path(folder) / "saved", name=name)
        expect_close(subject.out(model), outputs[name], f"The outputs of {name!r}, saved from beside the other")
    subject.adapters.remove(one)
    subject.adapters.activate(other)
    expect_close(subject.out(), outputs[other], f"The outputs of {other!r} after {one!r} was removed")


def check_detach_restores(case: Case) -> None:
    """`detach` leaves no trace: classes, attributes, hooks, `requires_grad` and every bit are the bare model's."""
    for subject in case.subjects(few=True):
        probe = subject.probe
        bare, model = probe.build(), probe.build()
        adapters = ak.attach(model)
        adapters.add("a", case.config)
        model(probe.inputs()).sum().backward()
        adapters.detach()
        expected, found = _traces(bare), _traces(model)
        for place in expected.keys() | found.keys():
            now, before = found.get(place), expected.get(place)
            expect(now == before, f"On {probe.name} layers: expected {place} as before, {before!r}; found {now!r}.")
        for key, tensor in model.state_dict().items():
            expect_equal(tensor, bare.state_dict()[key], f"{key!r} after detaching on {probe.name} layers")


def _traces(model: nn.Module) -> dict[str, Any]:
    """All that an adapter could leave behind: a name for the place, and what is there."""
    found: dict[str, Any] = {}
    for path, module in model.named_modules():
        found[f"the class of {path!r}"] = type(module)
        found[f"the attributes of {path!r}"] = sorted(module.__dict__)
        found |= {f"{kind} of {path!r}": list(v) for kind, v in module.__dict__.items() if kind.endswith("_hooks")}
    found |= {f"requires_grad of {name}": parameter.requires_grad for name, parameter in model.named_parameters()}
    return found
