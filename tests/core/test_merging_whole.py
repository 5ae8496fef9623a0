"""A merge that breaks off in the middle, by an error, a full memory or Ctrl-C: it is done, or nothing is."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from tests.combining import nothing_changes, scaling_method
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.merging import weights as merging
from adapterkit.merging.changes import Part
from adapterkit_loha import LoHaConfig
from adapterkit_lora import LoraConfig

X = torch.randn(3, 8, generator=torch.Generator().manual_seed(2))
KEPT = pytest.mark.parametrize("keep_base", [True, False], ids=["base kept", "base not kept"])


def adapted(config: type[ak.AdapterConfig] = LoraConfig, dtype: torch.dtype = torch.float32) -> ak.Adapters:
    torch.manual_seed(0)
    adapters = ak.attach(nn.Sequential(*(nn.Linear(8, 8) for _ in range(4))).to(dtype).eval())
    adapters.add("a", config(target_modules=["0", "1", "2", "3"]))
    for parameter in adapters.parameters("a"):
        nn.init.normal_(parameter, std=0.3)
    return adapters


def output(adapters: ak.Adapters) -> Tensor:
    weight: Any = adapters.model[0].weight
    return adapters.model(X.to(weight.dtype)).detach()


def third(monkeypatch: pytest.MonkeyPatch, act: Callable[[], None]) -> None:
    """`act` is called when the third layer is about to be merged."""
    original, calls = Part.adder, []

    def adder(self: Part, dtype: torch.dtype) -> Any:
        calls.append(self)
        if len(calls) == 3:
            act()
        return original(self, dtype)

    monkeypatch.setattr(Part, "adder", adder)


def raising(error: BaseException) -> Callable[[], None]:
    def act() -> None:
        raise error

    return act


ERRORS: dict[str, tuple[Callable[[], BaseException], type[BaseException]]] = {
    "an error": (lambda: RuntimeError("no such kernel"), ak.StateError),
    "memory": (lambda: torch.OutOfMemoryError("CUDA out of memory"), ak.StateError),
    "our own": (lambda: ak.UnsupportedError("no"), ak.UnsupportedError),
    "an interrupt": (KeyboardInterrupt, KeyboardInterrupt),
}


def test_after_a_second_merge_broke_off_the_first_can_be_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    adapters = adapted()
    adapters.copy("a", "b")
    base = {key: value.clone() for key, value in adapters.model.state_dict().items()}
    adapters.merge("a")
    third(monkeypatch, raising(RuntimeError("no such kernel")))
    with pytest.raises(ak.StateError, match="no such kernel"):
        adapters.merge("b")
    adapters.unmerge()
    assert all(torch.equal(value, base[key]) for key, value in adapters.model.state_dict().items())


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
    before = {key: value.clone() for key, value in adapters.model.state_dict().items()}
    third(monkeypatch, raising(error()))
    with pytest.raises(expected_type) as caught:
        adapters.merge("a", keep_base=keep_base)
    said = f"{caught.value} {getattr(caught.value, '__notes__', '')}"
    assert ("the changes of 2 layers were subtracted again" in said) == (not keep_base)
    assert (adapters.active, adapters.merged) == (("a",), ())
    assert [p.requires_grad for p in adapters.model.parameters()] == flags
    if keep_base:
        assert all(torch.equal(value, before[key]) for key, value in adapters.model.state_dict().items())
    tolerance = {"rtol": 4e-2, "atol": 4e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(output(adapters), expected, **tolerance)
    monkeypatch.undo()
    adapters.merge("a")
    torch.testing.assert_close(output(adapters), expected, **tolerance)


def test_methods_that_are_no_sums_are_given_back_bit_for_bit_even_if_the_base_is_not_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plugin = scaling_method(mergeable=True)
    ak.register(plugin)
    try:
        adapters = adapted()
        adapters.add("s", plugin.config(target_modules=["0", "1", "2", "3"], modules_to_save=None))
        for parameter in adapters.parameters("s"):
            nn.init.uniform_(parameter, 0.5, 2.0)
        third(monkeypatch, raising(RuntimeError("no")))
        with nothing_changes(adapters), pytest.raises(ak.StateError, match="Nothing was changed"):
            adapters.merge("a", "s", keep_base=False)
    finally:
        ak.default_registry.unregister("scale")


@KEPT
def test_ctrl_c_in_a_merge_leaves_all_or_nothing(keep_base: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    adapters = adapted()
    expected = output(adapters)
    third(monkeypatch, lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        adapters.merge("a", keep_base=keep_base)
    assert (adapters.active, adapters.merged) == ((("a",), ()) if keep_base else ((), ("a",)))
    torch.testing.assert_close(output(adapters), expected)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_in_merge_and_detach_waits_for_the_plain_model(monkeypatch: pytest.MonkeyPatch) -> None:
    adapters = adapted()
    model, expected = adapters.model, output(adapters)
    third(monkeypatch, lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        adapters.merge_and_detach("a")
    assert not any(hasattr(type(module), "_adapted_from") for module in model.modules())
    torch.testing.assert_close(model(X), expected)


def test_ctrl_c_in_unmerge_waits_until_all_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    adapters = adapted()
    base = {key: value.clone() for key, value in adapters.model.state_dict().items()}
    adapters.merge("a")
    third_kept(monkeypatch, lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        adapters.unmerge()
    assert (adapters.active, adapters.merged) == (("a",), ())
    assert all(torch.equal(value, base[key]) for key, value in adapters.model.state_dict().items())


def test_unmerge_may_be_called_again_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    adapters = adapted()
    base = {key: value.clone() for key, value in adapters.model.state_dict().items()}
    adapters.merge("a")
    third_kept(monkeypatch, raising(torch.OutOfMemoryError("no memory")))
    with pytest.raises(ak.StateError, match=r"no memory\)\. Call unmerge\(\) again"):
        adapters.unmerge()
    assert adapters.merged == ("a",)
    monkeypatch.undo()
    adapters.unmerge()
    assert all(torch.equal(value, base[key]) for key, value in adapters.model.state_dict().items())


def third_kept(monkeypatch: pytest.MonkeyPatch, act: Callable[[], None]) -> None:
    original, calls = merging.Kept.give_back, []

    def give_back(self: merging.Kept) -> None:
        calls.append(self)
        if len(calls) == 3:
            act()
        original(self)

    monkeypatch.setattr(merging.Kept, "give_back", give_back)


HERE = Path(merging.__file__).parent


class InLine:
    """Raises KeyboardInterrupt in the n-th line of the library that runs, as Ctrl-C may."""

    def __init__(self, number: int) -> None:
        self.left = number

    def __call__(self, frame: FrameType, event: str, _: object) -> Any:
        if Path(frame.f_code.co_filename).parent != HERE:
            return None
        if event == "line":
            self.left -= 1
            if not self.left:
                raise KeyboardInterrupt
        return self


def interrupted(adapters: ak.Adapters, number: int, call: Callable[[], None]) -> str | None:
    """What the interrupt in a line of a call says, or `None` if there are not so many lines."""
    before = sys.gettrace()
    sys.settrace(InLine(number))
    try:
        call()
    except KeyboardInterrupt as error:
        return " ".join(getattr(error, "__notes__", ()))
    finally:
        sys.settrace(before)
    return None


def test_an_interrupt_in_any_line_of_a_merge_leaves_all_or_nothing_bit_for_bit() -> None:
    adapters = adapted()
    expected = output(adapters)
    base = {key: value.clone() for key, value in adapters.model.state_dict().items()}
    flags = [p.requires_grad for p in adapters.model.parameters()]
    for number in range(1, 5000, 23):
        said = interrupted(adapters, number, lambda: adapters.merge("a"))
        assert (adapters.active, adapters.merged) in ((("a",), ()), ((), ("a",)))
        torch.testing.assert_close(output(adapters), expected)
        if adapters.merged:
            adapters.unmerge()
        assert all(torch.equal(value, base[key]) for key, value in adapters.model.state_dict().items())
        assert [p.requires_grad for p in adapters.model.parameters()] == flags
        if said is None:
            break
    assert number > 200


def test_an_interrupt_in_any_line_where_the_base_is_not_kept_says_so_if_a_layer_is_lost() -> None:
    for number in range(1, 5000, 41):
        adapters = adapted()
        expected = output(adapters)
        said = interrupted(adapters, number, lambda: adapters.merge("a", keep_base=False))  # noqa: B023
        assert (adapters.active, adapters.merged) in ((("a",), ()), ((), ("a",)))
        if said is None or "is partly merged" not in said:
            torch.testing.assert_close(output(adapters), expected, rtol=1e-5, atol=1e-5)
        if said is None:
            break
    assert number > 200


@pytest.fixture(autouse=True)
def own_handler() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
