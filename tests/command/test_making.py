"""The commands that make: `combine`, ..., `new`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from tests.command.conftest import run
from transformers import AutoModelForSequenceClassification

import adapterkit as ak


def same_files(one: Path, other: Path) -> bool:
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in other.iterdir())
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in names)


def test_merge_is_merge_checkpoint(here: Path) -> None:
    done = run("merge", "base", "mood:0.5", "loha:-1", "--heads", "mood", "--safe", "--out", "merged")
    assert (done.exit_code, done.stderr) == (0, "")
    report = ak.merge_checkpoint("base", {"mood": 0.5, "loha": -1.0}, "expected", heads="mood", safe=True)
    assert done.stdout == f"{report}\n".replace("expected", "merged")
    assert (here / "merged" / "model.safetensors").read_bytes() == (here / "expected/model.safetensors").read_bytes()
    again = run("merge", "base", "mood", "--out", "merged")
    assert (again.exit_code, "Say --overwrite to replace it" in again.stderr) == (1, True)
    replaced = run("merge", "base", "mood", "--out", "merged", "--overwrite", "--json")
    assert set(json.loads(replaced.stdout)) == {
        *("out", "adapters", "merged", "heads", "added", "absent", "not_copied", "nbytes", "resumed", "vocabulary")
    }


def test_merge_that_is_interrupted_says_how_to_go_on(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setattr(ak, "merge_checkpoint", interrupted)
    done = run("merge", "base", "mood", "--out", "merged")
    assert (done.exit_code, done.stderr) == (130, "adapterkit: interrupted; continue with --resume\n")


def test_combine_is_combine_files(here: Path) -> None:
    done = run("combine", "mood:0.7", "topic:-0.3", "--heads", "mood", "--out", "both")
    assert (done.exit_code, done.stderr) == (0, "")
    report = ak.combine_files({"mood": 0.7, "topic": -0.3}, "expected", heads="mood")
    assert done.stdout.splitlines()[-1] == "written: both"
    assert done.stdout.startswith(str(report).replace("expected", "both"))
    assert same_files(here / "both", here / "expected")


def test_combine_with_every_choice(here: Path) -> None:
    options = ["--method", "dare_ties", "--density", "0.5", "--seed", "3", "--rank", "2", "--heads", "concat"]
    options += ["--majority-sign-method", "frequency", "--dtype", "bfloat16", "--isotropize", "--same-base"]
    done = run("combine", "mood", "topic:2", *options, "-o", "both", "--json")
    assert done.exit_code == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["folder"], report["report"]["method"]) == ("both", "lora")
    assert set(report["report"]["ranks"].values()) == {2}


def test_convert_is_convert_file(here: Path) -> None:
    done = run("convert", "loha", "--rank", "2", "--dtype", "bfloat16", "--out", "lora")
    assert (done.exit_code, done.stderr) == (0, "")
    ak.convert_file("loha", "expected", rank=2, dtype=torch.bfloat16)
    assert same_files(here / "lora", here / "expected")


def test_convert_to_another_programs_names(here: Path) -> None:
    ak.combine_files({"topic": 1.0}, "bare", heads="drop")
    options = ("--naming", "kohya", "--as-component", "lora_te1", "--out", "te.safetensors")
    assert run("convert", "bare", *options).exit_code == 0
    ak.convert_file("bare", "expected.safetensors", naming="kohya", as_component="lora_te1")
    assert (here / "te.safetensors").read_bytes() == (here / "expected.safetensors").read_bytes()
    done = run("convert", "te.safetensors", "--component", "lora_te1", "--base", "base", "--out", "back", "--json")
    assert set(json.loads(done.stdout)["report"]["ranks"]) == {row.path for row in ak.inspect_adapter("bare").layers}


def test_extract_is_extract_files(here: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained("base")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)), alpha=0.01)
    model.save_pretrained("tuned")
    options = ("--rank", "2", "--target-modules", "query,value", "--exclude-modules", "layer.1.attention.self.value")
    done = run("extract", "base", "tuned", *options, "--modules-to-save", "none", "--out", "adapter")
    assert (done.exit_code, done.stderr) == (0, "")
    chosen = {"target_modules": ["query", "value"], "exclude_modules": ["layer.1.attention.self.value"]}
    ak.extract_files("base", "tuned", "expected", rank=2, modules_to_save=None, **chosen)
    assert same_files(here / "adapter", here / "expected")
    done = run("extract", "base", "tuned", "--energy", "0.5", "--out", "all", "--json")
    assert json.loads(done.stdout)["report"]["heads"] == ["classifier"]
    done = run("extract", "base", "tuned", "--out", "other")
    assert (done.exit_code, "--rank" in done.stderr, "--energy" in done.stderr) == (2, True, True)


def test_new_writes_a_package(here: Path) -> None:
    done = run("new", "low_sum")
    assert (done.exit_code, done.stderr) == (0, "")
    assert done.stdout.splitlines()[::3] == ["written: adapterkit-low-sum", "  cd adapterkit-low-sum"]
    assert (here / "adapterkit-low-sum" / "src" / "adapterkit_low_sum" / "plugin.py").is_file()
    assert json.loads(run("new", "low_sum", "--folder", "other", "--json").stdout) == {"folder": "other"}
    done = run("new", "low_sum")
    assert (done.exit_code, done.stderr) == (
        1,
        "error: adapterkit-low-sum already exists. Remove it, or choose another folder.\n",
    )
