"""Reports by files alone: the same page as on a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.combining import randomise
from tests.models import build

import adapterkit as ak
from adapterkit.report.measuring import AdapterFinding

METHODS = {"lora": {"r": 3}, "loha": {"r": 2}, "vera": {"r": 4, "save_projection": False}}


def adapters_of(model: torch.nn.Module, *methods: str) -> ak.Adapters:
    adapters = ak.attach(model)
    for seed, method in enumerate(methods):
        fields: dict[str, Any] = {"target_modules": ["query", "output.dense"], **METHODS[method]}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            adapters.add(method, ak.config(method, **fields), num_labels=2 + seed)
        randomise(adapters, method, seed)
    return adapters


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model's folder, and an adapter of each method beside it."""
    folder = tmp_path_factory.mktemp("stored")
    model = build("bert")
    model.save_pretrained(folder / "base")  # type: ignore[operator]
    adapters = adapters_of(model, *METHODS)
    for name in METHODS:
        adapters.save(name, folder / name)
    return folder


def same(found: AdapterFinding, expected: AdapterFinding) -> None:
    assert set(found.layers) == set(expected.layers)
    for path, layer in expected.layers.items():
        other = found.layers[path]
        assert (other.shape, other.rank) == (layer.shape, layer.rank)
        assert (other.rank_90, other.rank_99) == (layer.rank_90, layer.rank_99)
        assert other.norm == pytest.approx(layer.norm, rel=1e-5)
        assert other.relative == pytest.approx(layer.relative, rel=1e-5)
    for field in ("kinds", "heads", "labels", "in_layers", "parameters", "dtypes"):
        assert getattr(found, field) == getattr(expected, field)


def test_files_and_their_base_give_what_the_model_gives(folder: Path, tmp_path: Path) -> None:
    report = ak.write_report([folder / name for name in METHODS], tmp_path / "r.html", base=folder / "base")
    assert (tmp_path / "r.html").read_text(encoding="utf-8") == report.html
    live = adapters_of(build("bert"), *METHODS).report()
    for found, expected in zip(report.findings.adapters, live.findings.adapters, strict=True):
        assert found.name == expected.name
        same(found, expected)
    for pair, expected_pair in live.findings.pairs.items():
        found_pair = report.findings.pairs[pair]
        assert found_pair.cosine == pytest.approx(expected_pair.cosine, abs=1e-5)
        assert found_pair.inside == pytest.approx(expected_pair.inside, rel=1e-3)


def test_a_model_in_memory_is_a_base_too(folder: Path, tmp_path: Path) -> None:
    report = ak.write_report([folder / "lora"], tmp_path / "r.html", base=build("bert"))
    same(report.findings.adapters[0], adapters_of(build("bert"), "lora").report().findings.adapters[0])


@pytest.mark.parametrize("method", ["lora", "loha"])
def test_without_a_base_sizes_are_the_changes_own(folder: Path, tmp_path: Path, method: str) -> None:
    report = ak.write_report([folder / method], tmp_path / "r.html")
    (found,) = report.findings.adapters
    assert not found.has_base
    assert all(layer.norm > 0 for layer in found.layers.values())
    assert "are not available" in report.html


def test_a_base_of_which_only_the_config_is_there_gives_shapes(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((folder / "base" / "config.json").read_text(encoding="utf-8"))
    report = ak.write_report([folder / "vera"], tmp_path / "r.html", base=tmp_path)
    assert not report.findings.adapters[0].has_base
    assert report.findings.adapters[0].layers


def test_a_folder_s_name_is_the_adapter_s_unless_one_is_given(folder: Path, tmp_path: Path) -> None:
    places = [str(folder / "lora"), folder / "loha"]
    named = ak.write_report(places, tmp_path / "r.html", names=["one", "two"], title="Mine")
    assert [a.name for a in named.findings.adapters] == ["one", "two"]
    assert "<title>Mine</title>" in named.html
    assert [a.name for a in ak.write_report(places, tmp_path / "r.html").findings.adapters] == ["lora", "loha"]


def test_what_makes_no_report(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ak.ConfigError, match=r"write_report takes a list of adapters, such as \['lora'\], not a single one"
    ):
        ak.write_report("lora", tmp_path / "r.html")
    with pytest.raises(ak.ConfigError, match=r"names= has 1 names for 2 adapters\. Give one name for each"):
        ak.write_report([folder / "lora", folder / "loha"], tmp_path / "r.html", names=["a"])
    with pytest.raises(ak.CheckpointError, match="is not an adapter"):
        ak.write_report([tmp_path], tmp_path / "r.html")
    with pytest.raises(ak.CheckpointError, match="do not tell the sizes of the layers that it changes"):
        ak.write_report([folder / "vera"], tmp_path / "r.html")
    with pytest.raises(ak.ConfigError, match="is not a folder"):
        ak.write_report([folder / "lora"], "")
    assert not (tmp_path / "r.html").exists()
