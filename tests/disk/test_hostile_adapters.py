"""Adapter files that are odd: what is shown of them, and what is refused. `tests/fuzz` draws others."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.combining import tiny
from tests.disk.test_combine_files import change, classifiers, fields
from tests.models import build
from torch import Tensor

import adapterkit as ak


def edited(folder: Path, ending: str, tensor: Tensor | None) -> Path:
    """Put another tensor into the folder's file, by the end of its key; `None`: remove it."""

    def edit(held: dict[str, Tensor]) -> dict[str, Tensor]:
        key = next(key for key in held if key.endswith(ending))
        rest = {k: t for k, t in held.items() if k != key}
        return rest if tensor is None else {**rest, key: tensor}

    return change(folder, edit)


def test_heads_of_other_tensors_or_of_whole_numbers_are_shown_and_not_used(tmp_path: Path) -> None:
    adapters = classifiers((3, 3))
    lacking, bias, weight, sound = (adapters.save("b", tmp_path / n) for n in ("lacking", "bias", "weight", "sound"))
    edited(lacking, "classifier.bias", None)
    edited(bias, "classifier.bias", torch.ones(3, dtype=torch.int64))
    edited(weight, "classifier.weight", torch.ones(3, 16, dtype=torch.int64))
    assert ak.inspect_adapter(bias).dtypes == {"float32": 5, "int64": 1}
    assert str(ak.diff_adapters(bias, sound).tensors[0].a) == "('int64', (3,))"
    with pytest.raises(ak.CheckpointError, match=r"'classifier\.bias' holds torch\.int64, and floating numbers are"):
        ak.convert_file(bias, tmp_path / "out")
    for heads in ("average", "concat"):
        for odd, message in (
            (
                lacking,
                "needs heads with the same tensors, but at 'classifier' 'lacking' has weight, and",
            ),
            (weight, r"'classifier\.weight' holds torch\.int64, and floating numbers are needed"),
            (bias, r"'classifier\.bias' holds torch\.int64, and floating numbers are needed"),
        ):
            with pytest.raises(ak.AdapterError, match=message):
                ak.combine_files({odd: 0.5, sound: 0.5}, tmp_path / "out", heads=heads)
    assert not (tmp_path / "out").exists()


def test_trained_biases_of_a_wrong_size_are_named(tmp_path: Path) -> None:
    adapters = tiny("bert", {"a": {"bias": "lora_only"}}, torch.float32)
    odd, sound = (adapters.save("a", tmp_path / name) for name in ("odd", "sound"))
    edited(odd, "query.base_layer.bias", torch.ones(2, 16))
    found = ak.inspect_adapter(odd)
    assert [
        text.endswith("base_layer.bias: (2, 16) in the file, (16,) on this model") for text in found.mismatched
    ] == [True]
    with pytest.raises(ak.CheckpointError, match="some have other shapes"):
        ak.convert_file(odd, tmp_path / "out", rank=1)
    with pytest.raises(ak.CheckpointError, match=r"are not of one base model: .* one trains a bias of shape \(2, 16\)"):
        ak.combine_files({odd: 0.5, sound: 0.5}, tmp_path / "out")


def test_a_bias_that_the_base_has_and_the_file_lacks_is_missing(tmp_path: Path) -> None:
    folder = tiny("bert", {"a": {"bias": "lora_only"}}, torch.float32).save("a", tmp_path / "a")
    edited(folder, "query.base_layer.bias", None)
    assert ak.inspect_adapter(folder).missing == ()
    (missing,) = ak.inspect_adapter(folder, base=build("bert")).missing
    assert missing.endswith("query.base_layer.bias")


def test_a_layer_that_is_not_there_is_nobodys_and_differs(tmp_path: Path) -> None:
    adapters = tiny("bert", {"a": {}}, torch.float32)
    odd, sound = (adapters.save("a", tmp_path / name) for name in ("odd", "sound"))
    change(odd, lambda held: {**held, "base_model.model.nowhere.lora_A": torch.ones(1)})
    assert ak.inspect_adapter(odd).unknown == ("nowhere.lora_A",)
    assert [layer.path for layer in ak.diff_adapters(odd, sound).layers if not layer.same_tensors] == ["nowhere"]


@pytest.mark.parametrize(
    "named", [{"target_modules": ["key"]}, {"exclude_modules": ["query"]}, {"target_modules": ".*key"}]
)
def test_a_layer_that_the_config_does_not_select_is_nobodys_as_on_a_model(
    named: dict[str, object], tmp_path: Path
) -> None:
    folder = tiny("bert", {"a": {"target_modules": ["key", "query"]}}, torch.float32).save("a", tmp_path / "a")
    fields(folder, **named)
    found = ak.inspect_adapter(folder)
    assert found.unknown
    assert all(".query." in key for key in found.unknown)
    with pytest.raises(ak.CheckpointError, match="which its config does not select"):
        ak.attach(build("bert")).load(folder, "a")
    for job in (
        lambda: ak.combine_files({folder: 1.0}, tmp_path / "out"),
        lambda: ak.convert_file(folder, tmp_path / "out", rank=1),
    ):
        with pytest.raises(ak.CheckpointError, match=r"query.*, which its config does not select"):
            job()


@pytest.mark.parametrize(("bias", "unknown"), [("none", True), ("lora_only", False)])
def test_a_bias_of_a_layer_is_nobodys_if_the_config_trains_none(bias: str, unknown: bool, tmp_path: Path) -> None:
    folder = tiny("bert", {"a": {"bias": "lora_only"}}, torch.float32).save("a", tmp_path / "a")
    fields(folder, bias=bias)
    found = ak.inspect_adapter(folder)
    layers = {layer.path for layer in found.layers if layer.kind == "Linear"}
    keys = {f"{path}.base_layer.bias" for path in layers}
    assert ({*found.biases}, {*found.unknown}) == ((set(), keys) if unknown else (layers, set()))
