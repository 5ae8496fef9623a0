"""Checks of what people do to whole models: move, copy, pickle, compile."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

import adapterkit as ak
from adapterkit.testing.case import Case, NotApplicable, Subject, differ, expect, expect_close, expect_equal
from adapterkit.testing.probes import TARGETS


def check_moves_to_dtype(case: Case) -> None:
    """`model.to(dtype)` moves every tensor of the adapter, and outputs have that dtype and stay near."""
    for subject in case.subjects():
        adapted = subject.train().out()
        for dtype in (torch.float64, torch.bfloat16):
            model = copy.deepcopy(subject.model).to(dtype)
            for key, tensor in ak.attach(model).state_dict("a").items():
                expect(tensor.dtype == dtype, f"On {subject}: expected {key!r} in {dtype}, found {tensor.dtype}.")
            inputs = subject.inputs.to(dtype) if subject.inputs.is_floating_point() else subject.inputs
            with torch.no_grad():
                out = model(inputs)
            expect(out.dtype == dtype, f"On {subject}: expected outputs in {dtype}, found {out.dtype}.")
            room = torch.bfloat16 if dtype is torch.bfloat16 else torch.float32
            expect_close(out.float(), adapted, f"The outputs after .to({dtype}) on {subject}", room)


def check_shared_tensors_are_one_copy(case: Case) -> None:
    """Every layer reads a shared tensor from the core's one copy in each forward, after `.to(dtype)` as before."""
    if case.method.shared is None:
        raise NotApplicable("the method has no shared tensors")
    for path in TARGETS:
        subject = case.at(path)
        for dtype in (torch.float32, torch.float64):
            subject.model.to(dtype)
            subject.inputs = subject.inputs.to(dtype) if subject.inputs.is_floating_point() else subject.inputs
            subject.train()
            before = subject.out()
            shared = subject.model.get_submodule("adapter_shared.a")
            tensors = [tensor.detach() for tensor in (*shared.parameters(), *shared.buffers())]
            if not tensors:
                raise NotApplicable("what the layers share has no tensors")
            for tensor in tensors:
                tensor.mul_(2)
            acts = differ(before, subject.out())
            for tensor in tensors:
                tensor.div_(2)
            expect(
                acts, f"At {path!r} in {dtype}: expected a change of the shared tensors to act; the layer has a copy."
            )


def check_deepcopy_is_independent(case: Case) -> None:
    """A deep copy of the model gives the same outputs, and training it leaves the original as it was."""
    for subject in case.subjects():
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
    for subject in case.subjects():
        adapted = subject.train().out()
        file = io.BytesIO(pickle.dumps(subject.model))
        model = pickle.load(file)
        expect_close(subject.out(model), adapted, f"The unpickled model's outputs on {subject}")


def check_compiles(case: Case) -> None:
    """`torch.compile(model, fullgraph=True)` takes the adapted model, in training too: the layer breaks no graph."""
    subjects = list(case.subjects())
    some = [s for s in subjects if s.probe.name in ("Linear", "Conv2d", "Embedding")]  # to compile takes long
    for subject in some or subjects[:1]:
        case.now = subject.train()
        adapted, gradients = subject.out(), _gradients(subject, subject.model)
        with warnings.catch_warnings():  # torch's own imports
            warnings.simplefilter("ignore")
            torch.compiler.reset()
            compiled = torch.compile(subject.model, fullgraph=True, backend="eager")
            out, again = subject.out(compiled), _gradients(subject, compiled)
        expect_close(out, adapted, f"The compiled model's outputs on {subject}")
        for one, other in zip(gradients, again, strict=True):
            expect_close(other, one, f"The compiled model's gradients on {subject}", torch.float32)


def _gradients(subject: Subject, model: Callable[[Tensor], Tensor]) -> list[Tensor]:
    loss = (model(subject.inputs) ** 2).mean()
    return list(torch.autograd.grad(loss, list(subject.adapters.parameters("a"))))
