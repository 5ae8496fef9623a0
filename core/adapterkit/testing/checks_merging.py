"""Checks of the merge rule, and of sums of adapters."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from adapterkit.contract import AdapterLayer
from adapterkit.errors import AdapterError, PluginError, StateError, UnsupportedError
from adapterkit.forward import delta
from adapterkit.testing.case import TOLERANCES, Broken, Case, NotApplicable, Subject, expect, expect_close, expect_equal
from adapterkit.testing.probes import TARGETS, linear

# Derandomised: whoever runs the kit has the same examples each time. Not shrunk: they are small as they are.
_DRAWS: dict[str, Any] = {
    "max_examples": 25,
    "deadline": None,
    "derandomize": True,
    "database": None,
    "phases": (Phase.generate,),
    "report_multiple_bugs": False,
    "suppress_health_check": list(HealthCheck),
}
CANNOT_MERGE = "the method cannot be merged here"


def _merges(subject: Subject, *names: str) -> bool:
    """Merge, or say that the method cannot do that here."""
    with contextlib.suppress(UnsupportedError, StateError):
        subject.adapters.merge(*names)
        return True
    return False


def check_merged_equals_adapted(case: Case) -> None:
    """A merged adapter gives the outputs that it gave active, within the tolerance of the dtype."""
    tried = 0
    for dtype in TOLERANCES:
        for subject in case.subjects(dtype):
            adapted = subject.train().out()
            if _merges(subject, "a"):
                expect_close(subject.out(), adapted, f"The outputs after merging on {subject}")
                tried += 1
    if not tried:
        raise NotApplicable(CANNOT_MERGE)


def check_unmerge_restores_every_bit(case: Case) -> None:
    """After `merge` and `unmerge` the base has every bit it had, and the adapter gives what it gave."""
    tried = 0
    for dtype in (torch.float32, torch.bfloat16):
        for subject in case.subjects(dtype):
            adapted, tensors = subject.train().out(), subject.tensors("a")
            if not _merges(subject, "a"):
                continue
            tried += 1
            subject.adapters.unmerge()
            after = subject.model.state_dict()
            for key, value in subject.before.items():
                expect_equal(after[key], value, f"The base's {key!r} after unmerging on {subject}")
            for key, tensor in subject.tensors("a").items():
                expect_equal(tensor, tensors[key], f"The adapter's {key!r} after unmerging on {subject}")
            expect_close(subject.out(), adapted, f"The adapter's outputs after unmerging on {subject}")
    if not tried:
        raise NotApplicable(CANNOT_MERGE)


def check_merge_rule_is_pure(case: Case) -> None:
    """`factors`, `change` and `merged` change neither their arguments nor the adapter, and answer the same again."""
    tried = False
    for subject in case.subjects():
        subject.train()
        before = subject.tensors("a")
        for path in TARGETS:
            layer = subject.layer(path)
            if not case.method.merges(layer):
                continue
            tried = True
            weight, bias = _canonical(subject, path)
            kept = weight.clone(), None if bias is None else bias.clone()
            first = _answer(case, subject, path, weight, bias)
            for name, now, was in zip(("weight", "bias"), (weight, bias), kept, strict=True):
                if now is not None and was is not None:
                    expect_equal(now, was, f"The {name} that was given to the merge rule on {subject}")
            again = _answer(case, subject, path, weight, bias)
            for one, other in zip(first, again, strict=True):
                expect_equal(other, one, f"The merge rule's second answer on {subject}")
        for key, tensor in subject.tensors("a").items():
            expect_equal(tensor, before[key], f"The adapter's {key!r} after its merge rule was asked on {subject}")
    if not tried:
        raise NotApplicable(CANNOT_MERGE)


def _canonical(subject: Subject, path: str) -> tuple[Tensor, Tensor | None]:
    module = subject.model.get_submodule(path)
    weight = subject.layer(path).kind.read(module).float().clone()
    bias = module._parameters.get("bias")
    return weight, None if bias is None else bias.detach().float().clone()


@torch.no_grad()
def _answer(case: Case, subject: Subject, path: str, weight: Tensor, bias: Tensor | None) -> list[Tensor]:
    layer = subject.layer(path)
    factors = case.method.factors(layer)
    if factors is not None:
        return [t.clone() for t in factors if isinstance(t, Tensor)]
    try:
        return [t.clone() for t in case.method.merge(layer, weight, bias) if t is not None]
    except UnsupportedError:
        return []


def check_merge_is_linear(case: Case) -> None:
    """Merging additive adapters adds their changes to any weight: W + sum of dW, whatever W is and in any order."""
    next(case.additive())

    @settings(**_DRAWS)
    @given(
        out_features=st.integers(4, 40),
        in_features=st.integers(4, 40),
        dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
        seeds=st.tuples(st.integers(0, 99), st.integers(0, 99)),
        size=st.sampled_from([0.0, 0.1, 10.0]),
    )
    def holds(out_features: int, in_features: int, dtype: torch.dtype, seeds: tuple[int, int], size: float) -> None:
        example = f"out={out_features}, in={in_features}, {dtype}, seeds={seeds}, weights of size {size}"
        try:
            subject = Subject(case.config, linear(out_features, in_features), dtype, ("a", "b"))
        except PluginError:
            raise
        except AdapterError:
            assume(False)
        try:
            subject.train("a", seed=seeds[0]).train("b", seed=seeds[1])
            _expect_linear(subject, size)
        except UnsupportedError as error:
            raise NotApplicable(CANNOT_MERGE) from error
        except Broken as error:
            raise Broken(f"With the drawn example ({example}): {error}") from error

    holds()


def _expect_linear(subject: Subject, size: float) -> None:
    module = subject.model.get_submodule("up")
    weight = module._parameters["weight"]
    assert weight is not None
    change = {names: _change(subject, weight, names) for names in (("a",), ("b",), ("a", "b"), ("b", "a"))}
    scale = max(1.0, *(c.abs().max().item() for c in change.values()), weight.abs().max().item())
    room = 4 * scale * max(TOLERANCES[subject.dtype], 1e-6 * (subject.dtype != torch.float64))
    for pair in (("a", "b"), ("b", "a")):
        apart = (change[pair] - change["a",] - change["b",]).abs().max().item()
        expect(apart <= room, f"expected merging {pair} to add both changes; the result is off by {apart:.3g}.")
    with torch.no_grad():
        weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(2)) * size)
    other = _change(subject, weight, ("a",))
    room *= max(1.0, size)
    apart = (other - change["a",]).abs().max().item()
    expect(apart <= room, f"expected the same change on another weight; it is another one by {apart:.3g}.")


def _change(subject: Subject, weight: nn.Parameter, names: tuple[str, ...]) -> Tensor:
    """What merging these adapters adds to the weight of `up`."""
    before = weight.detach().double().clone()
    subject.adapters.merge(*names)
    change = subject.model.get_submodule("up").get_parameter("weight").detach().double() - before
    subject.adapters.unmerge()
    return change


def check_factors_equal_delta(case: Case) -> None:
    """`factors(layer)` is the layer's change exactly: through the layer kind it gives what the layer adds."""
    tried = 0
    for dtype in (torch.float64, torch.float32):
        for subject in case.additive(dtype):
            subject.train()
            layer = subject.layer("up")
            factors = case.method.factors(layer)
            if factors is None:
                continue
            tried += 1
            with torch.no_grad():
                found, expected = layer.kind.apply(subject.inputs, factors), delta(layer, subject.inputs)
            expect(factors.up.shape[0] == layer.kind.out_features, f"On {subject}: expected up of shape (out, r).")
            expect_close(found, expected, f"What the factors add on {subject}")
    if not tried:
        raise NotApplicable("the method has no factors")


def check_order_does_not_matter(case: Case) -> None:
    """Additive adapters that act together add up, whatever the order they are named in."""
    for subject in case.additive(names=("a", "b")):
        subject.train("a").train("b", seed=1)
        subject.adapters.activate("a", "b")
        one = subject.out()
        subject.adapters.activate("b", "a")
        expect_close(subject.out(), one, f"The outputs with the adapters in the other order on {subject}")
        if case.config.trained_biases != "none":
            continue  # they are added as well
        up = subject.model.get_submodule("up")
        with torch.no_grad():
            both = up(subject.inputs)
            total = _bare(up)(subject.inputs) + sum(delta(subject.layer("up", n), subject.inputs) for n in ("b", "a"))
        expect_close(both, total, f"The sum of two adapters at one layer on {subject}")


def _bare(module: nn.Module) -> nn.Module:
    from adapterkit.forward import strip

    strip(duplicate := copy.deepcopy(module))
    return duplicate


def check_mathematics_is_pure(case: Case) -> None:
    """`factors`, `change` and `merged` read tensors alone: they change and keep nothing, and branch on no value."""
    asked = False
    for subject in case.subjects():
        subject.train()
        for path in TARGETS:
            layer: Any = subject.layer(path)
            for name in ("factors", "change", "merged"):
                if getattr(type(layer), name, None) is getattr(AdapterLayer, name, None):
                    continue
                asked, where = True, f"{type(layer).__name__}.{name} on {subject}"
                _expect_pure(layer, name, where)
                _expect_shapes(layer, name, where)
    if not asked:
        raise NotApplicable("the layers define no factors, change or merged")


def _expect_pure(layer: Any, name: str, where: str) -> None:
    fresh = copy.deepcopy(layer)
    before = {key: tensor.clone() for key, tensor in layer.state_dict().items()}
    first, second = _asked(layer, name), _asked(layer, name)
    for one, other in zip(first, second, strict=True):
        expect_equal(other, one, f"{where}, asked a second time")
    for key, tensor in layer.state_dict().items():
        expect_equal(tensor, before[key], f"{where} changed {key!r}")
    with torch.no_grad():
        for one in (layer, fresh):
            for parameter in one.parameters():
                parameter.mul_(1.5)
    for found, expected in zip(_asked(layer, name), _asked(fresh, name), strict=True):
        expect_equal(found, expected, f"{where}, asked again with other parameters (was something kept?)")


def _expect_shapes(layer: Any, name: str, where: str) -> None:
    """On the meta device tensors have shapes and no values."""
    empty = copy.deepcopy(layer).to("meta")
    if empty.shared is not None:
        empty.shared.to("meta")
    try:
        found = _asked(empty, name)
    except (RuntimeError, NotImplementedError) as error:
        raise Broken(f"{where}: expected shapes alone to be enough; it reads values: {error}") from error
    out, size = layer.kind.out_features, layer.kind.in_features
    if name == "factors" and found:
        up, down = (tuple(f.flatten(1).shape) for f in found[:2])
        fits = (up[0], down[-1]) == (out, size) and up[1] == down[0]
        expect(fits, f"{where}: expected up ({out}, r) and down (r, {size}); found {up} and {down}. Are they swapped?")
    elif found:
        expect(found[0].shape == (out, size), f"{where}: expected ({out}, {size}); found {tuple(found[0].shape)}.")


@torch.no_grad()
def _asked(layer: Any, name: str) -> list[Tensor]:
    """The tensors that a function of a layer gives."""
    if name != "merged":
        found = getattr(layer, name)()
        return [found] if isinstance(found, Tensor) else [t for t in found or () if isinstance(t, Tensor)]
    device = next((tensor.device for tensor in (*layer.parameters(), *layer.buffers())), torch.device("cpu"))
    weight, bias = torch.ones(layer.kind.out_features, layer.kind.in_features), torch.ones(layer.kind.out_features)
    given = weight.to(device), None if layer.kind.lookup else bias.to(device)
    found = layer.merged(*given)
    if device.type != "meta":
        expect_equal(given[0], weight.to(device), f"{type(layer).__name__}.merged changed the weight it was given")
    return [t for t in found or () if isinstance(t, Tensor)]
