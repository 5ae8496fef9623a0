"""How the records that calls return print, in a terminal and in a notebook."""

from __future__ import annotations

from typing import Any

import pytest

import adapterkit as ak
from adapterkit.results import AdapterStatus, Mismatch, Printed, brief

HALF = AdapterStatus("a", "lora", 2, ("head",), 1234, ("float32",), ("cpu",), True, True, False, ("odd",), 200)
WHOLE = AdapterStatus("b", "vera", 12, (), 5, ("float32", "float16"), ("cpu",), False, True, True, (), 5)
RECORDS: dict[str, tuple[Printed, list[str]]] = {
    "add": (
        ak.AddReport("a", ("p", "q"), ("head",), 1000, 8000, ("target_modules 'x'",), ("take care",)),
        [
            "adapter 'a': 2 layers, 1,000 parameters, 12.50% of the base model's 8,000",
            "  trained in full: head",
            "  matched nothing: target_modules 'x'",
            "  note: take care",
        ],
    ),
    "load": (
        ak.LoadReport(tuple("abcdef"), mismatched=(Mismatch("k", (1, 2), (3, 4)),), ignored=("z",)),
        [
            "the tensors do not fit this adapter",
            *("  missing (6):", *(f"    {key}" for key in "abcde"), "    ..."),
            *("  mismatched (1):", "    k: (1, 2) in the file, (3, 4) on this model"),
            *("  ignored (1):", "    z"),
        ],
    ),
    "load ok": (ak.LoadReport(exempt=("x",)), ["every tensor of the adapter fits", "  exempt (1):", "    x"]),
    "swap": (
        ak.SwapReport("a", ("p",), ("q",), ("head",), ("k",)),
        ["adapter 'a': new values in 1 layer", "  changes nothing now: q", "  head: head", "  ignored: k"],
    ),
    "combine": (
        ak.CombineReport("ab", "lora", {"p": 4, "q": 2}, {"p": 0.0, "q": 0.125}, ("head",), ("q",)),
        [
            "adapter 'ab' (lora): 2 layers of rank 2 to 4",
            "  largest relative error of truncation: 12.50% at q",
            *("  clipped to rank 2: q", "  head: head"),
        ],
    ),
    "combine exactly": (
        ak.CombineReport("ab", "lora", {"p": 4, "q": 4}, {"p": 0.0, "q": 9e-7}),
        ["adapter 'ab' (lora): 2 layers of rank 4"],
    ),
    "status": (
        ak.Status((HALF, WHOLE)),
        [
            "adapter  method  layers  heads  parameters  dtype             device  active  trainable  merged",
            "a        lora    2       head   1,234       float32           cpu     yes     200        no",
            "b        vera    12      -      5           float32, float16  cpu     no      yes        yes",
            "a: odd",
        ],
    ),
    "no status": (ak.Status(()), ["no adapters"]),
}


@pytest.mark.parametrize(("record", "lines"), RECORDS.values(), ids=RECORDS)
def test_a_record_prints_as_text_and_a_notebook_shows_the_same(record: Printed, lines: list[str]) -> None:
    shown: list[str] = []

    class Printer:
        text = staticmethod(shown.append)

    printer: Any = Printer()
    record._repr_pretty_(printer, cycle=False)
    assert str(record).splitlines() == lines
    assert shown == ["\n".join(lines)]


def test_html_escapes_what_a_file_may_hold() -> None:
    report = ak.LoadReport(("<script>alert(1)</script>",))
    assert "<pre>the tensors do not fit" in report._repr_html_()
    assert "&lt;script&gt;" in report._repr_html_()
    assert "<script>" not in report._repr_html_()


def test_a_long_value_is_cut() -> None:
    assert brief(None) == "not set"
    assert brief("x" * 201) == "x" * 200 + "..."
    assert brief(["name"] * 50) == "['name', 'name', 'name', ... 50 in all]"
    assert brief(["name"] * 3) == "['name', 'name', 'name']"


@pytest.mark.parametrize(
    "name", ["AdapterDiff", "AdapterInspection", "MergeReport", "MethodsReport", "Preview", "Selection"]
)
def test_reports_of_other_rooms_print_in_notebooks_too(name: str) -> None:
    assert issubclass(getattr(ak, name), Printed)
