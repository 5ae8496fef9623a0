"""The commands that look: `targets`, `inspect`, `diff`, `report`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.command.conftest import run

import adapterkit as ak
from adapterkit_lora import LoraConfig

TEXTS: dict[str, tuple[list[str], Callable[[], object]]] = {
    "targets": (
        ["targets", "base", "--target-modules", "query,value", "--set", "r=3"],
        lambda: ak.preview("base", LoraConfig(r=3, target_modules=["query", "value"])),
    ),
    "inspect": (["inspect", "mood"], lambda: ak.inspect_adapter("mood")),
    "diff": (["diff", "mood", "topic"], lambda: ak.diff_adapters("mood", "topic")),
    "methods": (["methods"], ak.describe_methods),
}


@pytest.mark.parametrize(("arguments", "call"), TEXTS.values(), ids=TEXTS.keys())
def test_the_text_is_that_of_the_report_in_python(arguments: list[str], call: Callable[[], object], here: Path) -> None:
    done = run(*arguments)
    assert (done.exit_code, done.stderr, done.stdout) == (0, "", f"{call()}\n")


SELECTIONS: dict[str, tuple[list[str], dict[str, Any]]] = {
    "one by one": (["--target-modules", "query", "--target-modules", "value"], {"target_modules": ["query", "value"]}),
    "an expression": (["--target-regex", r".*\.(query|value)"], {"target_modules": r".*\.(query|value)"}),
    "a word": (["--target-modules", "all-linear"], {"target_modules": "all-linear"}),
    "the default": ([], {}),
    "left out": (["--exclude-modules", "value"], {"exclude_modules": ["value"]}),
    "fields": (["--set", "layers_to_transform=[-1]", "--set", "r=5"], {"layers_to_transform": [-1], "r": 5}),
}


@pytest.mark.parametrize(("options", "fields"), SELECTIONS.values(), ids=SELECTIONS.keys())
def test_targets_is_preview_of_the_config(options: list[str], fields: dict[str, Any], here: Path) -> None:
    report = json.loads(run("targets", "base", *options, "--json").stdout)
    expected = ak.preview("base", LoraConfig(**fields))
    assert tuple(report["paths"]) == expected.paths
    assert (report["parameters"], report["total"]) == (expected.parameters, expected.total)
    assert set(report) == {
        *("model", "method", "groups", "paths", "heads", "biases", "total", "skipped", "unmatched", "notes"),
        *("parameters", "share", "shared"),
    }


def test_targets_of_another_method(here: Path) -> None:
    report = json.loads(run("targets", "base", "--method", "vera", "--set", "r=8", "--json").stdout)
    assert report["method"] == "vera"
    assert run("targets", "base", "--method", "verra").stderr.count("Did you mean 'vera'?") == 1


def test_targets_of_a_config_in_a_file_and_changes_of_it(here: Path) -> None:
    plain = json.loads(run("targets", "base", "--config", "mood", "--json").stdout)
    changed = run("targets", "base", "--config", "mood/adapter_config.json", "--set", "r=8", "--json")
    doubled = json.loads(changed.stdout)
    assert plain["paths"] == doubled["paths"]
    layers = [sum(g["layers"] * g["parameters"] for g in report["groups"]) for report in (plain, doubled)]
    assert layers[1] == 2 * layers[0]


def test_inspect_in_json(here: Path) -> None:
    report = json.loads(run("inspect", "loha", "--json").stdout)
    assert report == json.loads(json.dumps(ak.inspect_adapter("loha").to_dict()))
    headers = json.loads(run("inspect", "loha", "--headers-only", "--json").stdout)
    assert {layer["norm"] for layer in headers["layers"]} == {None}


def test_diff_says_whether_two_do_the_same_and_exits_as_it_is_told(here: Path) -> None:
    ak.convert_file("loha", "lora")
    done = run("diff", "loha", "lora", "--exit-code")
    assert (done.exit_code, done.stderr) == (0, "")
    assert done.stdout.startswith("loha and lora do the same, but their files differ.")
    assert "  config r: 2 | 4\n" in done.stdout
    assert run("diff", "loha", "loha").stdout.startswith("loha and loha are equal")
    for others, status, same in ((("loha", "lora"), 0, True), (("mood", "topic"), 4, False)):
        done = run("diff", *others, "--json", "--exit-code")
        assert (done.exit_code, done.stderr, json.loads(done.stdout)["same_function"]) == (status, "", same)


def test_check_says_whether_a_server_serves_it_and_exits_so(here: Path) -> None:
    done = run("check", "mood", "--for", "vllm", "--json")
    report = json.loads(done.stdout)
    assert (done.exit_code == 0) == report["ok"] == ak.check_serving("mood", "vllm").ok
    assert run("check", "mood", "--for", "sglang").exit_code == 4


def test_report_writes_the_page_and_says_its_answers(here: Path) -> None:
    done = run(
        "report", "mood", "topic", "--name", "a", "--name", "b", "--title", "Two", "--out", "page.html", "--json"
    )
    assert done.exit_code == 0, done.stderr
    expected = ak.write_report(["mood", "topic"], "expected.html", names=["a", "b"], title="Two")
    assert (here / "page.html").read_bytes() == (here / "expected.html").read_bytes()
    answers = json.loads(done.stdout)
    assert answers["page"] == "page.html"
    assert [a["headline"] for a in answers["verdicts"]] == [v.headline for v in expected.verdicts]
    lines = run("report", "loha", "--out", "page.html").stdout.splitlines()
    assert lines[0].startswith("loha: ")
    assert lines[-1] == "written: page.html"
    assert "made the folder" not in done.stderr


def test_a_folder_that_is_made_for_an_output_is_named(here: Path) -> None:
    done = run("report", "mood", "--out", "new/deep/page.html")
    assert done.stderr == "note: made the folder new\n"
    assert (here / "new/deep/page.html").is_file()


def test_long_lists_are_cut_in_text_and_whole_in_json(here: Path) -> None:
    shutil.copytree(here / "mood", here / "many")
    config = json.loads((here / "many/adapter_config.json").read_text())
    names = [f"a.module.that.is.not.there.{i}" for i in range(500)]
    config["target_modules"] += names
    (here / "many/adapter_config.json").write_text(json.dumps(config))
    text = run("inspect", "many").stdout
    assert "target_modules=['query', 'value', 'a.module.that.is.not.there.0', ... 502 in all]" in text
    assert json.loads(run("inspect", "many", "--json").stdout)["config"]["target_modules"][-1] == names[-1]
