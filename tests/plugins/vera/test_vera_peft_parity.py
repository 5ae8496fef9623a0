"""VeRA files against the real PEFT, both ways: the same outputs from the same files, the same random projections."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.models import assert_same_outputs, build, run
from tests.plugins import parity
from tests.plugins.parity import assert_same
from torch import Tensor

import adapterkit as ak
from adapterkit_vera import VeraConfig

pytestmark = [
    # PEFT's remarks on save_projection=False, and that it sets fan_in_fan_out for Conv1D.
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]


def saved_by_us(folder: Path, name: str, **fields: Any) -> Tensor:
    return parity.saved_by_us("vera", build(name), folder, name, **fields)


def fields_for(name: str, fields: dict[str, Any]) -> dict[str, Any]:
    return parity.fields_for("vera", name, fields)


def in_peft(folder: Path, name: str) -> Tensor:
    return parity.loaded_in_peft(build(name), folder, name)


@pytest.mark.parametrize(
    ("targets", "excluded"),
    [
        (["query", "value", "dense"], ["layer.0.attention.self.value", "output.dense", "pooler.dense"]),
        ("all-linear", ["pooler.dense", "key"]),
        (r".*layer\.[01]\..*\.(query|value)", r".*layer\.0\..*\.value"),
    ],
)
def test_exclude_modules_reaches_peft_as_a_list_of_targets(targets: Any, excluded: Any, tmp_path: Path) -> None:
    expected = saved_by_us(tmp_path, "bert", target_modules=targets, exclude_modules=excluded, save_projection=False)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert "exclude_modules" not in written
    assert isinstance(written["target_modules"], list)
    assert_same(in_peft(tmp_path, "bert"), expected, "bert")
    base = build("bert")
    assert ak.attach(base).load(tmp_path, "again").exempt == ("vera_A", "vera_B")
    assert_same_outputs(run(base, "bert"), expected)


def test_new_adapters_have_pefts_initial_values() -> None:
    for init in (True, False):
        torch.manual_seed(0)
        theirs = peft.get_peft_model(build("bert"), peft.VeraConfig(**fields_for("bert", {"init_weights": init})))
        adapters = ak.attach(build("bert"))
        adapters.add("mine", VeraConfig(**fields_for("bert", {"init_weights": init}), modules_to_save=None))
        found, expected = adapters.state_dict("mine"), peft.get_peft_model_state_dict(theirs)
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            if init or not key.endswith("lambda_d"):
                assert torch.equal(found[key], value), key
            else:
                assert found[key].std() > 0.3


# Which keys a file may lack


def edit(folder: Path, change: Any) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def say(folder: Path, **fields: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def without_projections(tensors: dict[str, Tensor]) -> None:
    del tensors["base_model.vera_A"], tensors["base_model.vera_B"]


def test_projections_that_should_be_there_and_are_not_are_an_error(tmp_path: Path) -> None:
    saved_by_us(tmp_path, "bert")
    edit(tmp_path, without_projections)
    base = build("bert")
    with pytest.raises(ak.CheckpointError, match=r"vera_A(.|\n)*vera_B"):
        ak.attach(base).load(tmp_path, "a")
    assert ak.attach(base).names == ()


def test_without_strict_they_are_made_from_the_key(tmp_path: Path) -> None:
    expected = saved_by_us(tmp_path, "bert", projection_prng_key=3)
    edit(tmp_path, without_projections)
    base = build("bert")
    with pytest.warns(ak.AdapterWarning, match="vera_A"):
        report = ak.attach(base).load(tmp_path, "a", strict=False)
    assert report.missing == ("vera_A", "vera_B")
    assert_same_outputs(run(base, "bert"), expected)


def test_the_files_projections_win_over_the_keys(tmp_path: Path) -> None:
    saved_by_us(tmp_path, "bert", projection_prng_key=3)
    edit(tmp_path, lambda tensors: tensors["base_model.vera_A"].mul_(-2))
    base = build("bert")
    assert ak.attach(base).load(tmp_path, "a").ok
    assert_same(in_peft(tmp_path, "bert"), run(base, "bert"), "bert")
    say(tmp_path, projection_prng_key=99)
    other = build("bert")
    ak.attach(other).load(tmp_path, "a")
    assert_same_outputs(run(other, "bert"), run(base, "bert"))


def test_projections_that_need_not_be_there_are_ignored_as_peft_does(tmp_path: Path) -> None:
    expected = saved_by_us(tmp_path, "bert", projection_prng_key=3)
    say(tmp_path, save_projection=False)
    base = build("bert")
    report = ak.attach(base).load(tmp_path, "a")  # and no warning: they are those of the key
    assert report.ok
    assert (report.ignored, report.exempt) == (("vera_A", "vera_B"), ())
    assert_same_outputs(run(base, "bert"), expected)


def test_ignored_projections_that_are_others_than_the_keys_are_warned_of(tmp_path: Path) -> None:
    expected = saved_by_us(tmp_path, "bert", projection_prng_key=3)
    say(tmp_path, save_projection=False)
    edit(tmp_path, lambda tensors: tensors["base_model.vera_A"].mul_(-2))
    base = build("bert")
    with pytest.warns(ak.AdapterWarning) as caught:
        ak.attach(base).load(tmp_path, "a")
    assert str(caught[0].message) == (
        "This file holds projections vera_A, vera_B that are not those of its projection_prng_key = 3, and says "
        "save_projection = false, so they are not used. If the adapter was trained with them, set save_projection to "
        "true in its adapter_config.json."
    )
    assert_same_outputs(run(base, "bert"), expected)
    assert_same(in_peft(tmp_path, "bert"), expected, "bert")


def test_a_missing_vector_is_an_error_whatever_is_exempt(tmp_path: Path) -> None:
    saved_by_us(tmp_path, "bert", save_projection=False)
    edit(tmp_path, lambda tensors: tensors.pop(next(k for k in tensors if k.endswith("lambda_b"))))
    with pytest.raises(ak.CheckpointError, match="vera_lambda_b"):
        ak.attach(build("bert")).load(tmp_path, "a")
