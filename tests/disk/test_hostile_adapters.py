"""Adapter files that are odd in any way: they are read or refused, and never fail in another way."""

from __future__ import annotations

import json
import random
import shutil
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tests.combining import tiny
from tests.disk.test_combine_files import CONFIG, WEIGHTS, change, classifiers, mixed, read
from tests.models import build
from torch import Tensor

import adapterkit as ak

VALUES: list[Any] = [None, True, 0, -1, 1.5, "", "x", [], ["x"], {}, {"x": 1}, 10**30, [[1]], ["query", 3]]
QUERY = "base_model.model.bert.encoder.layer.0.attention.self.query"
KEYS = [*("", "a", ".", "a..b", ".lora_A.weight", "lora_A.weight", "x.lora_A.weight", "train.lora_A.weight")]
KEYS += [f"base_model.model.{name}" for name in ("", "classifier", "classifier.weight.x", "bert.bias", "bert.weight")]
KEYS += [f"{QUERY}.base_layer.weight", f"{QUERY}.base_layer.bias", f"{QUERY}.lora_A.bias", "classifier.x"]
DTYPES = [torch.int8, torch.bool, torch.float16, torch.float8_e4m3fn, torch.int64, torch.complex64]


def spoil(dice: random.Random, tensors: dict[str, Tensor]) -> None:
    """Change one of the tensors, its key, or what is beside it."""
    key = dice.choice(list(tensors))
    match dice.randrange(5):
        case 0:
            tensors[key + dice.choice([".x", "x", ".weight", ".lora_A.weight"])] = tensors.pop(key)
        case 1:
            tensors[key] = tensors[key].to(dice.choice(DTYPES))
        case 2:
            tensors[key] = torch.zeros([dice.choice([0, 1, 2, 16, 17]) for _ in range(dice.randint(0, 4))])
        case 3:
            tensors[dice.choice(KEYS)] = torch.ones([dice.choice([1, 2, 16]) for _ in range(dice.randint(0, 2))])
        case _:
            tensors[key] = torch.full_like(tensors[key], float("nan"))


def damage(dice: random.Random, folder: Path) -> None:
    tensors, metadata, config = read(folder)
    if dice.random() < 0.6:
        spoil(dice, tensors)
    else:
        config[dice.choice([*config, "use_dora", "unknown"])] = dice.choice(VALUES)
    save_file({k: t.contiguous().clone() for k, t in tensors.items()}, folder / WEIGHTS, metadata)
    (folder / CONFIG).write_text(json.dumps(config), encoding="utf-8")
    if dice.random() < 0.1:
        data = bytearray((folder / WEIGHTS).read_bytes())
        data[dice.randrange(400)] = dice.randrange(256)
        (folder / WEIGHTS).write_bytes(data)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("adapters")
    places = [mixed(build("bert")).save(name, root / name) for name in "ahv"]
    places += [classifiers((2, 4)).save("b", root / "heads")]
    return [*places, tiny("bert", {"a": {"bias": "all"}}, torch.float32).save("a", root / "biases")]


@pytest.mark.parametrize("seed", range(8))
def test_odd_files_are_read_or_refused(seed: int, folders: list[Path], tmp_path: Path) -> None:
    base, read_well = build("bert").to("meta"), 0
    for number in range(3):
        dice = random.Random(f"{seed} {number}")
        source, odd, out = dice.choice(folders), tmp_path / str(number), tmp_path / "out"
        shutil.copytree(source, odd)
        damage(dice, odd)
        given = dice.choice([None, base])
        calls: list[Callable[[], object]] = [
            lambda: str(ak.inspect_adapter(odd, base=given)),  # noqa: B023 - called at once
            lambda: ak.combine_files({odd: 0.5, source: 0.5}, out, heads="concat", base=given, overwrite=True),  # noqa: B023
            lambda: ak.convert_file(odd, out, rank=1, base=given, overwrite=True),  # noqa: B023
            lambda: str(ak.diff_adapters(odd, source, base=given)),  # noqa: B023
        ]
        for call in calls:
            with suppress(ak.AdapterError), warnings.catch_warnings():
                warnings.simplefilter("ignore", ak.AdapterWarning)
                call()
                read_well += 1
        assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert read_well < 12


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
