"""One adapter of a model, `adapters["mood"]`, and what `load`, `merge` and `status` tell and take without a name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import adapterkit as ak
from adapterkit_lora import LoraConfig


def adapted(*names: str) -> ak.Adapters:
    adapters = ak.attach(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)))
    for name in names:
        adapters.add(name, LoraConfig(r=2, target_modules=["0"], modules_to_save=["1"], init_lora_weights=False))
    return adapters


def test_a_view_gives_what_the_adapters_give_for_that_name(tmp_path: Path) -> None:
    adapters = adapted("a", "b")
    view = adapters["a"]
    assert view.config is adapters.config("a")
    assert dict(view.layers) == dict(adapters.layers("a"))
    assert dict(view.heads) == dict(adapters.heads("a"))
    assert list(view.parameters()) == list(adapters.parameters("a"))
    assert view.status == adapters.status().rows[0]
    assert ak.attach(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))).load(view.save(tmp_path / "a")).ok
    view.merge(heads="a")
    assert adapters.merged == ("a",)


def test_a_view_prints_what_the_adapter_is() -> None:
    adapters = adapted("a")
    assert str(adapters["a"]).splitlines()[:2] == [
        "adapter 'a': lora, 1 layer of rank 2, head 1, 26 parameters",
        "  active: yes, trains: yes, merged: no",
    ]
    assert repr(adapters["a"]) == str(adapters["a"])


def test_no_view_of_an_adapter_that_is_not_there() -> None:
    adapters = adapted("mood")
    with pytest.raises(ak.UnknownNameError, match="Did you mean 'mood'"):
        adapters["mod"]
    view = adapters["mood"]
    adapters.remove("mood")
    with pytest.raises(ak.UnknownNameError):
        str(view)


def test_load_takes_the_folder_s_name_and_tells_what_came(tmp_path: Path) -> None:
    folder = adapted("a").save("a", tmp_path / "mood")
    adapters = ak.attach(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)))
    report = adapters.load(folder)
    assert adapters.names == ("mood",)
    assert report.adapter == adapters["mood"].status
    assert str(report).splitlines()[:2] == [
        "adapter 'mood': lora, 1 layer of rank 2, head 1, 26 parameters",
        "  it acts, and does not train: adapters.activate('mood') lets it act and train",
    ]
    assert "it acts, and trains" in str(adapters.load(folder, "again", trainable=True))


def test_merge_without_names_merges_the_active_adapters() -> None:
    adapters = adapted("a", "b")
    adapters.activate("a", "b", heads="a")
    x = torch.ones(1, 4)
    with torch.no_grad():
        expected = adapters.model(x)
    adapters.merge()
    assert adapters.merged == ("a", "b")
    with torch.no_grad():
        torch.testing.assert_close(adapters.model(x), expected)


def test_status_tells_what_trains_what_share_that_is_and_the_memory() -> None:
    status = adapted("a").status()
    assert (status.trainable_parameters, status.base_parameters, status.memory) == (26, 30, 4 * 26)
    assert str(status).splitlines()[-1].startswith("trainable: 26 parameters, 86.67% of the base model's 30; ")
