"""Checks of the merge rule, and of sums of adapters."""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.errors import AdapterError, StateError, UnsupportedError
from adapterkit.testing.case import (
    ROWS,
    TARGETS,
    TOLERANCES,
    WIDTH,
    Broken,
    Case,
    NotApplicable,
    Probe,
    Subject,
    expect,
    expect_close,
)

CANNOT_MERGE = "the method cannot be merged here"


def check_merged_equals_adapted(case: Case) -> None:
    """A merged adapter gives the outputs that it gave active, within the tolerance of the dtype."""
    tried = False
    for subject in case.subjects(*TOLERANCES):
        adapted = subject.train().out()
        try:
            subject.adapters.merge("a")
        except (UnsupportedError, StateError):
            continue
        expect_close(subject.out(), adapted, f"The outputs after merging on {subject}")
        tried = True
    if not tried:
        raise NotApplicable(CANNOT_MERGE)


def check_merge_is_linear(case: Case) -> None:
    """Merging additive adapters adds their changes to any weight: W + sum of dW, whatever W is and in any order."""
    next(case.subjects(additive=True))
    tried = False
    for dtype, (out_features, in_features) in product(TOLERANCES, [(16, 16), (40, 8), (8, 40), (7, 5)]):
        try:
            sizes = (in_features, out_features, WIDTH)
            probe = Probe("Linear", (ROWS, in_features), nn.Linear, channels=sizes)
            subject = Subject(case.config, probe, dtype, "a", "b")
        except AdapterError:  # these sizes do not suit the config
            continue
        subject.train("a").train("b", seed=1)
        try:
            _expect_linear(subject)
        except UnsupportedError as error:
            raise NotApplicable(CANNOT_MERGE) from error
        except Broken as error:
            raise Broken(f"On layers of {out_features} x {in_features} in {dtype}: {error}") from error
        tried = True
    if not tried:
        raise NotApplicable("the layers that this check makes do not suit the config")


def _expect_linear(subject: Subject) -> None:
    weight = subject.model.get_submodule("up").get_parameter("weight").data
    changes = {names: _change(subject, weight, names) for names in ("a", "b", "ab", "ba")}
    scale = max(1.0, weight.abs().max().item(), *(change.abs().max().item() for change in changes.values()))
    room = 4 * scale * max(TOLERANCES[subject.dtype], 1e-6 * (subject.dtype != torch.float64))
    for pair in ("ab", "ba"):
        apart = (changes[pair] - changes["a"] - changes["b"]).abs().max().item()
        expect(apart <= room, f"expected merging {tuple(pair)} to add both changes; the result is off by {apart:.3g}.")
    weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(2)) * 10)
    apart = (_change(subject, weight, "a") - changes["a"]).abs().max().item()
    expect(apart <= 10 * room, f"expected the same change on another weight; it is another one by {apart:.3g}.")


def _change(subject: Subject, weight: Tensor, names: str) -> Tensor:
    """What merging these adapters adds to the weight of `up`."""
    before = weight.double().clone()
    subject.adapters.merge(*names)
    change = subject.model.get_submodule("up").get_parameter("weight").detach().double() - before
    subject.adapters.unmerge()
    return change


def check_dense_forms_agree(case: Case) -> None:
    """`factors`, `few` and `tile` of a `DenseLayer` give what `change` gives."""
    tried = False
    for subject in case.subjects(torch.float64, torch.float32, additive=True):
        subject.train()
        for layer in map(subject.layer, TARGETS):
            if not isinstance(layer, ak.DenseLayer):
                continue
            tried, where = True, f"{type(layer).__name__}.{{}} on {subject}".format
            with torch.no_grad():
                change = layer.change()
                out, size = change.shape
                factors = layer.factors()
                expect_close(factors.delta(), change, where("factors"))
                right = layer.rank in (None, factors.rank)
                expect(right, where("rank") + f": expected that of its factors, {factors.rank}; it is {layer.rank}.")
                if layer.few is not None and not layer.kind.lookup:
                    x = torch.randn(2, size, dtype=change.dtype)
                    expect_close(layer.few(x), x @ change.t(), where("few"))
                if layer.tile is not None:
                    rows, columns = slice(out // 3, out), slice(0, size - size // 3)
                    expect_close(layer.tile(rows, columns), change[rows, columns], where("tile"))
    if not tried:
        raise NotApplicable("it is for dense layers, and the method has none")


def check_known_changes_become_adapters(case: Case) -> None:
    """`from_factors` gives an adapter whose change is the one that it was given."""
    if "from_factors" not in case.method.hooks:
        raise NotApplicable("the method has no hook from_factors")
    tried = False
    for subject in case.subjects(torch.float64, additive=True):
        adapted = subject.train().out()
        try:
            subject.adapters.convert("a", to=case.method.name, name="b")
        except UnsupportedError:
            continue
        subject.adapters.activate("b")
        expect_close(subject.out(), adapted, f"The outputs of an adapter from its own factors on {subject}")
        tried = True
    if not tried:
        raise NotApplicable("the method takes none of its own changes")


def check_order_does_not_matter(case: Case) -> None:
    """Additive adapters that act together add up, whatever the order they are named in."""
    for subject in case.subjects(names=("a", "b"), additive=True):
        subject.train("a").train("b", seed=1)
        up = subject.model.get_submodule("up")
        outputs = {}
        for names in ((), ("a",), ("b",), ("a", "b"), ("b", "a")):
            subject.adapters.activate(*names)
            outputs[names] = subject.out(), subject.out(up)
        both, one_after_the_other = outputs["a", "b"], outputs["b", "a"]
        expect_close(both[0], one_after_the_other[0], f"The outputs with the adapters in the other order on {subject}")
        if case.config.trained_biases == "none":  # they are added as well
            expected = outputs["a",][1] + outputs["b",][1] - outputs[()][1]
            expect_close(both[1], expected, f"The sum of two adapters at one layer on {subject}")
