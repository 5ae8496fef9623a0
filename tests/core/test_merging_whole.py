"""A merge, and any other call, that an error, a full memory or Ctrl-C breaks off: it is done, or nothing is."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from tests.combining import bits, has_bits, nothing_changes, randomise, registered, scaling_method
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.merging.changes import Part
from adapterkit.merging.weights import Kept
from adapterkit_loha import LoHaConfig
from adapterkit_lora import LoraConfig

X = torch.randn(3, 8, generator=torch.Generator().manual_seed(2))
KEPT = pytest.mark.parametrize("keep_base", [True, False], ids=["base kept", "base not kept"])


def adapted(config: type[ak.AdapterConfig] = LoraConfig, dtype: torch.dtype = torch.float32) -> ak.Adapters:
    torch.manual_seed(0)
    adapters = ak.attach(nn.Sequential(*(nn.Linear(8, 8) for _ in range(4))).to(dtype).eval())
    adapters.add("a", config(target_modules=["0", "1", "2", "3"], bias="all"))
    randomise(adapters, "a", 0)
    return adapters


def output(adapters: ak.Adapters) -> Tensor:
    weight: Any = adapters.model[0].weight
    return adapters.model(X.to(weight.dtype)).detach()


def third(monkeypatch: pytest.MonkeyPatch, act: Callable[[], None], cls: type = Part, name: str = "adder") -> None:
    """`act` is called when the third layer is about to be merged, or given back."""
    original, calls = getattr(cls, name), []

    def replaced(self: Any, *args: Any) -> Any:
        calls.append(self)
        if len(calls) == 3:
            act()
        return original(self, *args)

    monkeypatch.setattr(cls, name, replaced)


def raising(error: BaseException) -> Callable[[], None]:
    def act() -> None:
        raise error

    return act


def ctrl_c() -> None:
    signal.raise_signal(signal.SIGINT)


ERRORS: dict[str, tuple[Callable[[], BaseException], type[BaseException]]] = {
    "an error": (lambda: RuntimeError("no such kernel"), ak.StateError),
    "memory": (lambda: torch.OutOfMemoryError("CUDA out of memory"), ak.StateError),
    "our own": (lambda: ak.UnsupportedError("no"), ak.UnsupportedError),
    "an interrupt": (KeyboardInterrupt, KeyboardInterrupt),
}


def test_after_a_second_merge_broke_off_the_first_can_be_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    adapters = adapted()
    adapters.copy("a", "b")
    base = bits(adapters.model)
    adapters.merge("a")
    third(monkeypatch, raising(RuntimeError("no such kernel")))
    with pytest.raises(ak.StateError, match="no such kernel"):
        adapters.merge("b")
    adapters.unmerge()
    assert has_bits(adapters.model, base)


@KEPT
@pytest.mark.parametrize("config", [LoraConfig, LoHaConfig])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", ERRORS)
def test_an_error_in_the_middle_takes_the_layers_before_it_back(
    case: str, dtype: torch.dtype, config: type[ak.AdapterConfig], keep_base: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    error, expected_type = ERRORS[case]
    adapters = adapted(config, dtype)
    expected, flags = output(adapters), [p.requires_grad for p in adapters.model.parameters()]
    before = bits(adapters.model)
    third(monkeypatch, raising(error()))
    with pytest.raises(expected_type) as caught:
        adapters.merge("a", keep_base=keep_base)
    said = f"{caught.value} {getattr(caught.value, '__notes__', '')}"
    assert ("the changes of 2 layers were subtracted again" in said) == (not keep_base)
    assert (adapters.active, adapters.merged) == (("a",), ())
    assert [p.requires_grad for p in adapters.model.parameters()] == flags
    assert not keep_base or has_bits(adapters.model, before)
    tolerance = {"rtol": 4e-2, "atol": 4e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(output(adapters), expected, **tolerance)
    monkeypatch.undo()
    adapters.merge("a")
    torch.testing.assert_close(output(adapters), expected, **tolerance)


def test_methods_that_are_no_sums_are_given_back_bit_for_bit_even_if_the_base_is_not_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with registered(scaling_method(mergeable=True)) as plugin:
        adapters = adapted()
        adapters.add("s", plugin.config(target_modules=["0", "1", "2", "3"], modules_to_save=None))
        randomise(adapters, "s", 1)
        third(monkeypatch, raising(RuntimeError("no")))
        with nothing_changes(adapters), pytest.raises(ak.StateError, match="Nothing was changed"):
            adapters.merge("a", "s", keep_base=False)


@KEPT
def test_ctrl_c_in_a_merge_leaves_all_or_nothing(keep_base: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    adapters = adapted()
    expected = output(adapters)
    third(monkeypatch, ctrl_c)
    with pytest.raises(KeyboardInterrupt):
        adapters.merge("a", keep_base=keep_base)
    assert (adapters.active, adapters.merged) == ((("a",), ()) if keep_base else ((), ("a",)))
    torch.testing.assert_close(output(adapters), expected)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_in_merge_and_detach_waits_for_the_plain_model(monkeypatch: pytest.MonkeyPatch) -> None:
    adapters = adapted()
    model, expected = adapters.model, output(adapters)
    third(monkeypatch, ctrl_c)
    with pytest.raises(KeyboardInterrupt):
        adapters.merge_and_detach("a")
    assert not any(hasattr(type(module), "_adapted_from") for module in model.modules())
    torch.testing.assert_close(model(X), expected)


@pytest.mark.parametrize("error", [None, torch.OutOfMemoryError("no memory")], ids=["Ctrl-C", "error"])
def test_unmerge_is_whole_or_may_be_called_again(error: Exception | None, monkeypatch: pytest.MonkeyPatch) -> None:
    adapters = adapted()
    base = bits(adapters.model)
    adapters.merge("a")
    third(monkeypatch, raising(error) if error else ctrl_c, Kept, "give_back")
    expected = (ak.StateError, r"no memory\)\. Call unmerge\(\) again") if error else (KeyboardInterrupt, None)
    with pytest.raises(expected[0], match=expected[1]):
        adapters.unmerge()
    assert adapters.merged == (("a",) if error else ())
    monkeypatch.undo()
    if error:
        adapters.unmerge()
    assert adapters.active == ("a",)
    assert has_bits(adapters.model, base)


HERE = Path(ak.__file__).parent


class InLine:
    """Acts in the n-th line of a folder of the library that runs."""

    def __init__(self, number: int, folder: Path, act: Callable[[], None]) -> None:
        self.left, self.folder, self.act = number, str(folder), act

    def __call__(self, frame: FrameType, event: str, _: object) -> Any:
        if not frame.f_code.co_filename.startswith(self.folder):
            return None
        if event == "line":
            self.left -= 1
            if not self.left:
                self.act()
        return self


@KEPT
def test_an_interrupt_in_any_line_of_a_merge_leaves_all_or_nothing_or_says_so(keep_base: bool) -> None:
    for number in range(1, 5000, 23 if keep_base else 41):
        adapters = adapted()
        expected, base, before, said = output(adapters), bits(adapters.model), sys.gettrace(), None
        flags = [p.requires_grad for p in adapters.model.parameters()]
        sys.settrace(InLine(number, HERE / "merging", raising(KeyboardInterrupt())))
        try:
            adapters.merge("a", keep_base=keep_base)
        except KeyboardInterrupt as error:
            said = " ".join(getattr(error, "__notes__", ()))
        finally:
            sys.settrace(before)
        assert (adapters.active, adapters.merged) in ((("a",), ()), ((), ("a",)))
        if keep_base or "is partly merged" not in (said or ""):
            torch.testing.assert_close(output(adapters), expected, rtol=1e-5, atol=1e-5)
        if keep_base:
            if adapters.merged:
                adapters.unmerge()
            assert has_bits(adapters.model, base)
            assert [p.requires_grad for p in adapters.model.parameters()] == flags
        if said is None:
            break
    assert number > 200


def block(adapters: ak.Adapters, **how: bool) -> None:
    with adapters.activated("b", **how), torch.no_grad():  # a graph would keep the adapter's flags
        adapters.model(X)


# The call, and every how many lines it is interrupted.
CALLS: dict[str, tuple[Callable[[ak.Adapters], object], int]] = {
    "add": (lambda a: a.add("c", LoraConfig(target_modules=["2"], bias="all")), 193),
    "copy": (lambda a: a.copy("a", "c"), 41),
    "rename": (lambda a: a.rename("a", "c"), 41),
    "remove": (lambda a: a.remove("a"), 41),
    "activate": (lambda a: a.activate("b", "a"), 41),
    "block": (lambda a: block(a, trainable=False), 5),
    "training block": (block, 41),
    "detach": (lambda a: a.detach(), 41),
}


@pytest.mark.parametrize("call", CALLS)
def test_ctrl_c_in_any_line_of_a_call_leaves_it_done_or_not_begun(call: str) -> None:
    act, every = CALLS[call]
    for number in range(1, 20000, every):
        adapters = adapted()
        adapters.add("b", LoraConfig(target_modules=["0", "3"]), activate=False)
        base, before, model, finished = bits(adapters.model), sys.gettrace(), adapters.model, False
        sys.settrace(InLine(number, HERE, ctrl_c))
        try:
            act(adapters)
            finished = True
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(before)
        found = ak.attach(model)
        assert set(found.names) in ({"a", "b"}, set("b"), {"a", "b", "c"}, {"b", "c"}, set())
        held = {id(p) for name in found.names for p in found.parameters(name)}
        assert {id(p) for path, p in model.named_parameters() if ".adapter" in path} == held
        assert set(found.trainable) == set(found.active) <= set(found.names)
        model(X)
        if "block" in call:
            assert found.active == ("a",)
        found.detach()
        assert all(torch.equal(value, base[key]) for key, value in model.state_dict().items())
        assert all(parameter.requires_grad for parameter in model.parameters())
        if finished:
            break
    assert number > 200


@pytest.fixture(autouse=True)
def own_handler() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
