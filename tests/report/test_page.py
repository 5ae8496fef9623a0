"""The page: complete, escaped, small, without script or network; and how it is saved and shown."""

from __future__ import annotations

import html
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from tests.combining import adapted
from tests.models import MODELS, build
from tests.report.sources import low_rank, source, stack

import adapterkit as ak
from adapterkit.report import Report

VOID = {"meta", "wbr", "br", "th", "td", "tr", "use", "path"}


class Page(HTMLParser):
    """What a browser would see: tags with their attributes, and the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


@pytest.fixture(scope="module")
def report() -> Report:
    a = source("first", stack(4), dict.fromkeys(stack(4), 3.0), heads=("classifier",), labels=("x", "y", "z"))
    b = source("second", stack(5, seed=9), heads=("other",))
    return Report.of([a, b])


def test_every_target_has_a_cell_in_the_heat_map_of_its_adapter(report: Report) -> None:
    page = Page(report.html)
    titles = [str(attrs.get("title")) for tag, attrs in page.tags if tag == "td"]
    assert sum(t.startswith("|dW|") for t in titles) == 8 + 10
    for adapter in report.findings.adapters:
        for layer in adapter.layers.values():
            assert any(f"99 % {layer.rank_99} of {layer.rank}" in t for t in titles)


def test_each_picture_says_how_to_read_it(report: Report) -> None:
    page = Page(report.html)
    assert "var(--line)" in report.html  # colours are the page's
    assert page.count("svg") == 2 * 2  # for each adapter the spectra of two module names
    assert all(attrs["role"] == "img" and attrs["aria-label"] for tag, attrs in page.tags if tag == "svg")
    assert page.text.count("How to read:") == 4


def test_the_page_says_what_sizes_are_relative_to() -> None:
    with_base = Report.of([source("a", stack(2), dict.fromkeys(stack(2), 3.0))]).html
    without = Report.of([source("a", stack(2))]).html
    assert "|dW| / |W| in percent" in with_base
    assert "|dW| in percent of the largest, because the base&#39;s weights are not available" in without


def test_the_facts_of_each_adapter_are_there(report: Report) -> None:
    text = Page(report.html).text
    assert "3: x, y, z" in text
    assert "8 Linear" in text
    assert "parameters336" in text


def test_the_page_is_well_formed_has_no_script_and_loads_nothing(report: Report) -> None:
    page = Page(report.html)
    assert page.open == []
    assert not {tag for tag, _ in page.tags} & {"script", "link", "img", "iframe", "object", "embed", "base", "form"}
    for _, attrs in page.tags:
        assert not [name for name in attrs if name.startswith("on")]
        for name in ("src", "href", "xlink:href", "action", "data"):
            assert str(attrs.get(name) or "#").startswith("#")
    assert not re.search(r"@import|url\((?!#)", report.html)
    policy = next(a for t, a in page.tags if t == "meta" and a.get("http-equiv") == "Content-Security-Policy")
    assert policy["content"] == "default-src 'none'; style-src 'unsafe-inline'"


EVIL = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>&amp;"


def test_names_from_files_are_escaped() -> None:
    """Module names, an adapter's, labels, the base's name, settings, heads: all of them come from files."""
    changes = {f"layers.{i}.{EVIL}": low_rank(4, 3, 2, seed=i) for i in range(2)}
    config = ak.config("lora", target_modules=[EVIL], base_model_name_or_path=EVIL, task_type=EVIL)
    sources = [source(name, changes, config=config, heads=(EVIL,), labels=(EVIL,)) for name in (EVIL, EVIL + "b")]
    text = Report.of(sources, title=EVIL).html
    page = Page(text)
    assert not {tag for tag, _ in page.tags} & {"script", "img"}
    assert page.open == []
    assert not [a for _, attrs in page.tags for a in attrs if a.startswith("on")]
    assert html.escape("<script>alert(1)</script>") in text.replace("<wbr>", "")
    assert page.text.count("alert(1)") >= 10


def test_hundreds_of_layers_of_three_adapters_make_a_small_page() -> None:
    """The page of 200 layers with 3 modules has less than 1 MB: as many bytes a layer as those of 9 and of 41."""
    modules = tuple(f"self_attn.m{i}_proj" for i in range(3))
    pages = {n: Report.of([source(x, stack(n, modules, seed=i)) for i, x in enumerate("abc")]).html for n in (9, 41)}
    few, many = (len(page.encode()) for page in pages.values())
    assert many + (200 - 41) * (many - few) / 32 < 1_000_000
    assert (pages[9].count('class="box tall"'), pages[41].count('class="box tall"')) == (0, 3 * (2 + 3))


@pytest.mark.parametrize("name", ["gpt2", "t5", "convnet", "embednet"])
def test_every_sort_of_model_has_a_report(name: str) -> None:
    adapters = adapted(build(name), {"a": {}}, list(MODELS[name].targets))
    report = adapters.report()
    found = report.findings.adapters[0]
    assert found.has_base
    assert len(found.layers) == adapters.status().rows[0].targets
    assert Page(report.html).open == []


def test_a_base_on_the_meta_device_has_no_sizes_and_the_adapter_has_its_own() -> None:
    adapters = adapted(build("bert"), {"a": {}}, ["query"])
    for module in adapters.model.modules():
        if "adapters" in module._modules:
            module.weight = torch.nn.Parameter(module.weight.detach().to("meta"), requires_grad=False)
    found = adapters.report().findings.adapters[0]
    assert not found.has_base
    assert found.norm > 0


@pytest.mark.parametrize(
    ("factors", "said", "shown"),
    [
        ({"fc": low_rank(4, 3, 1)}, "a: Rank 1 keeps 99 %", "single layers"),
        ({"p": None, "q": None}, "a: Its changes cannot be measured.", "2 targets are not shown, for example p"),
        (
            {"p": low_rank(4, 3, 1)._replace(up=torch.zeros(4, 1).double())},
            "a: It changes nothing.",
            "Every change is zero.",
        ),
    ],
    ids=["one layer of rank one", "nothing measured", "no change"],
)
def test_the_smallest_reports(factors: dict[str, ak.Factors | None], said: str, shown: str) -> None:
    report = Report.of([source("a", factors)])
    assert said in str(report)
    assert shown in report.html


def test_saving_replaces_a_file_in_one_step_or_changes_nothing(report: Report, tmp_path: Path) -> None:
    out = tmp_path / "new" / "r.html"
    assert report.save(out) == out
    assert out.read_text(encoding="utf-8") == report.html
    out.write_text("<!DOCTYPE html> old")
    report.save(str(out))
    assert out.read_text(encoding="utf-8") == report.html
    (tmp_path / "adapter_model.safetensors").write_text("weights")
    with pytest.raises(ak.SaveError, match=r"adapter_model\.safetensors is there, and not a page. Choose another name"):
        report.save(tmp_path / "adapter_model.safetensors")
    assert (tmp_path / "adapter_model.safetensors").read_text() == "weights"
    with pytest.raises(ak.SaveError, match=r"The report cannot be written to .*new"):
        report.save(out.parent)
    assert [p.name for p in out.parent.iterdir()] == ["r.html"]
    with pytest.raises(ak.SaveError, match=r"The report cannot be written to .*embedded null"):
        report.save("a\0b")


def test_a_notebook_shows_the_page_in_a_frame_of_its_own(report: Report) -> None:
    (frame,) = Page(report._repr_html_()).tags
    assert frame[0] == "iframe"
    assert "sandbox" in frame[1]
    assert frame[1]["srcdoc"] == report.html


def test_adapters_of_a_model_report(tmp_path: Path) -> None:
    adapters = adapted(build("bert"), {"a": {}, "b": {"r": 2}}, ["query"])
    report = adapters.report(out=tmp_path / "r.html", title="Mine")
    assert (tmp_path / "r.html").read_text(encoding="utf-8") == report.html
    assert "<title>Mine</title>" in report.html
    assert [a.name for a in report.findings.adapters] == ["a", "b"]
    assert [a.name for a in adapters.report("b").findings.adapters] == ["b"]


def test_what_makes_no_report() -> None:
    with pytest.raises(ak.ConfigError, match="A report needs at least one adapter"):
        Report.of([])
    with pytest.raises(ak.ConfigError, match="Two adapters have one name"):
        Report.of([source("a", stack(1)), source("a", stack(1))])


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (float("nan"), "values at .* that are not finite"),
        (float("inf"), "values at .* that are not finite"),
        (None, "meta"),
    ],
)
def test_changes_without_finite_values_are_refused(value: float | None, message: str) -> None:
    adapters = adapted(build("bert"), {"a": {}}, ["query"])
    with torch.no_grad():
        if value is None:
            adapters.model.to("meta")
        else:
            next(iter(adapters.parameters("a")))[0, 0] = value
    with pytest.raises(ak.StateError, match=f"Adapter 'a' has .*{message}"):
        adapters.report()
