"""What notebooks show of the records that calls report: everything that the text says, escaped."""

from __future__ import annotations

import re
from html import escape, unescape

import pytest
from tests.combining import tiny

import adapterkit as ak
from adapterkit.results import Mismatch, Shown, Table

EVIL = "<script>alert(1)</script>"


NAMES = ("status", "no status", "selection", "add", "combine", "load", "load ok")


@pytest.fixture(scope="module")
def records() -> dict[str, Shown]:
    adapters = tiny("bert", {"a": {}, "b": {"r": 2}})
    config = ak.config("lora", target_modules=["query", "key"], exclude_modules=["key"], modules_to_save=["classifier"])
    return {
        "status": adapters.status(),
        "no status": ak.Status(()),
        "selection": ak.select(adapters.model, config),
        "add": adapters.add("c", config),
        "combine": adapters.combine("ab", {"a": 1, "b": 1}, rank=1),
        "load": ak.LoadReport(missing=("x.y",), mismatched=(Mismatch("k", (1, 2), (3, 4)),), ignored=("z",)),
        "load ok": ak.LoadReport(),
    }


def text_of(html: str) -> str:
    return unescape(re.sub(r"<[^>]+>", " ", html))


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_shows_every_word_of_the_text(records: dict[str, Shown], name: str) -> None:
    """But for the marks of its layout, and the words that only a line has."""
    record = records[name]
    shown = text_of(record._repr_html_()).split()
    said = set(re.findall(r"[\w.'%]+", str(record))) - {"largest", "relative", "of", "at", "head"}
    found = set(re.findall(r"[\w.'%]+", " ".join(shown)))
    assert said <= found | {"trained", "in", "full", "left", "out", "matched", "nothing", "by", "..."}, said - found


@pytest.mark.parametrize("name", NAMES)
def test_every_element_is_closed(records: dict[str, Shown], name: str) -> None:
    html = records[name]._repr_html_()
    for tag in ("p", "b", "table", "thead", "tbody", "tr", "th", "td"):
        assert len(re.findall(rf"<{tag}[ >]", html)) == html.count(f"</{tag}>")


def test_names_are_escaped() -> None:
    record = ak.LoadReport(unexpected=(EVIL,), mismatched=(Mismatch(EVIL, (1,), (2,)),))
    combined = ak.CombineReport(EVIL, EVIL, {EVIL: 1}, {EVIL: 0.5}, heads=(EVIL,))
    for shown in (record, combined):
        assert "<script" not in shown._repr_html_()
        assert escape(EVIL) in shown._repr_html_()


class Long(Shown):
    def _shown(self) -> tuple[str, list[Table]]:
        return "many", [Table(("n",), [(i,) for i in range(500)], "all of them"), Table(("none",), [])]


def test_a_long_table_is_cut_and_says_so_and_an_empty_one_is_not_shown() -> None:
    html = Long()._repr_html_()
    assert html.count("<tr>") == 201
    assert "… and 300 more" in html
    assert "all of them" in html
    assert "none" not in html
