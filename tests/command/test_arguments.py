"""The values that the text of the command line stands for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import typer

from adapterkit_command.arguments import fields, modules, names, weighted


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with adapters of ordinary and of odd names."""
    for name in ("A", "B", "dir:with:colon", "A:0.7"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


WEIGHTED = {
    "alone": (["B"], {"B": 1.0}),
    "weight": (["B:0.3"], {"B": 0.3}),
    "negative": (["B:-0.3"], {"B": -0.3}),
    "zero, and in powers of ten": (["A:0", "B:1e-2"], {"A": 0.0, "B": 0.01}),
    "hub id": (["user/name:0.5", "user/other"], {"user/name": 0.5, "user/other": 1.0}),
    "colons of the path": (["dir:with:colon"], {"dir:with:colon": 1.0}),
    "colons of the path and a weight": (["dir:with:colon:0.5"], {"dir:with:colon": 0.5}),
    "what exists as it is written": (["A:0.7"], {"A:0.7": 1.0}),
    "and its weight": (["A:0.7:2"], {"A:0.7": 2.0}),
    "drive": ([r"C:\adapters\mood"], {r"C:\adapters\mood": 1.0}),
    "drive and weight": ([r"C:\adapters\mood:0.5"], {r"C:\adapters\mood": 0.5}),
    "nothing there": (["nobody:knows"], {"nobody:knows": 1.0}),
    "no path before it": ([":0.5"], {":0.5": 1.0}),
}


@pytest.mark.parametrize(("texts", "found"), WEIGHTED.values(), ids=WEIGHTED.keys())
def test_adapters_with_weights(texts: list[str], found: dict[str, float], here: Path) -> None:
    assert weighted(texts) == found


BAD_WEIGHTS = {
    "text": (["A:much"], "'A:much': 'much' is not a number. Write, for example, A:0.5."),
    "comma": (["A:0,5"], "'0,5' is not a number"),
    "nothing": (["A:"], "'' is not a number"),
    "twice": (["B:1", "B:2"], "'B' is given twice. Give it once, with the sum of its weights."),
}


def test_names_one_by_one_and_with_commas() -> None:
    assert names(["a,b", " c ", "d,"]) == ["a", "b", "c", "d"]
    assert names(None) is names([]) is names([","]) is None


def test_modules_are_a_list_or_an_expression_or_a_word() -> None:
    assert modules(["query,value"], None) == ["query", "value"]
    assert modules(None, r".*\.(q|v)") == r".*\.(q|v)"
    assert modules(["all-linear"], None) == "all-linear"
    assert modules(None, None) is None
    with pytest.raises(typer.BadParameter, match="give --target-modules or --target-regex, not both"):
        modules(["query"], ".*")


def test_fields_are_json_or_text() -> None:
    texts = [
        "r=16",
        "use_rslora=true",
        "bias=lora_only",
        'rank_pattern={"query": 4}',
        "layers_pattern=a=b",
        "revision=",
    ]
    assert fields(texts) == {
        "r": 16,
        "use_rslora": True,
        "bias": "lora_only",
        "rank_pattern": {"query": 4},
        "layers_pattern": "a=b",
        "revision": "",
    }


BAD_FIELDS = {
    "no value": (["r"], "'r': give FIELD=VALUE, such as r=16"),
    "no field": (["=3"], "'=3': give FIELD=VALUE"),
    "no name": (["a b=3"], "give FIELD=VALUE"),
    "twice": (["r=1", "r=2"], "the field 'r' is given twice."),
}


REFUSED = [(weighted, *case) for case in BAD_WEIGHTS.values()] + [(fields, *case) for case in BAD_FIELDS.values()]


@pytest.mark.parametrize(
    ("parse", "texts", "message"),
    REFUSED,
    ids=[f"weight: {k}" for k in BAD_WEIGHTS] + [f"field: {k}" for k in BAD_FIELDS],
)
def test_texts_that_are_refused(
    parse: Callable[[list[str]], object], texts: list[str], message: str, here: Path
) -> None:
    with pytest.raises(typer.BadParameter) as caught:
        parse(texts)
    assert message in str(caught.value)
