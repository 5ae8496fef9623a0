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
from tests.disk.test_combine_files import CONFIG, WEIGHTS, classifiers, mixed, read
from tests.models import build
from torch import Tensor

import adapterkit as ak

VALUES: list[Any] = [None, True, 0, -1, 1.5, "", "x", [], ["x"], {}, {"x": 1}, 10**30, [[1]], ["query", 3]]
QUERY = "base_model.model.bert.encoder.layer.0.attention.self.query"
KEYS = [
    "",
    "a",
    ".",
    "a..b",
    ".lora_A.weight",
    "lora_A.weight",
    "x.lora_A.weight",
    "train.lora_A.weight",
    "classifier.x",
]
KEYS += [f"base_model.model.{name}" for name in ("", "classifier", "classifier.weight.x", "bert.bias", "bert.weight")]
KEYS += [f"{QUERY}.base_layer.weight", f"{QUERY}.base_layer.bias", f"{QUERY}.lora_A.bias"]
DTYPES = [torch.int8, torch.bool, torch.float16, torch.float8_e4m3fn, torch.int64, torch.complex64]


def rename(dice: random.Random, tensors: dict[str, Tensor], key: str) -> None:
    tensors[key + dice.choice([".x", "x", ".weight", ".lora_A.weight"])] = tensors.pop(key)


def recast(dice: random.Random, tensors: dict[str, Tensor], key: str) -> None:
    tensors[key] = tensors[key].to(dice.choice(DTYPES))


def reshape(dice: random.Random, tensors: dict[str, Tensor], key: str) -> None:
    tensors[key] = torch.zeros([dice.choice([0, 1, 2, 16, 17]) for _ in range(dice.randint(0, 4))])


def add(dice: random.Random, tensors: dict[str, Tensor], key: str) -> None:
    tensors[dice.choice(KEYS)] = torch.ones([dice.choice([1, 2, 16]) for _ in range(dice.randint(0, 2))])


def spoil(dice: random.Random, tensors: dict[str, Tensor], key: str) -> None:
    tensors[key] = torch.full_like(tensors[key], float("nan"))


CHANGES: list[Callable[[random.Random, dict[str, Tensor], str], None]] = [rename, recast, reshape, add, spoil]


def damage(dice: random.Random, folder: Path) -> None:
    tensors, metadata, config = read(folder)
    if dice.random() < 0.6:
        dice.choice(CHANGES)(dice, tensors, dice.choice(list(tensors)))
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


def change(folder: Path, **tensors: Tensor | None) -> Path:
    """Put other tensors into the folder's file, by the last two parts of their keys, `None`: none."""
    held, metadata, _ = read(folder)
    for name, tensor in tensors.items():
        key = next(key for key in held if key.replace(".", "_").endswith(name))
        held[key] = held[key] if tensor is None else tensor
        if tensor is None:
            del held[key]
    save_file({k: t.contiguous().clone() for k, t in held.items()}, folder / WEIGHTS, metadata)
    return folder


def test_a_head_with_a_bias_of_whole_numbers_is_shown_and_not_used(tmp_path: Path) -> None:
    adapters = classifiers((3, 3))
    odd, sound = (adapters.save("b", tmp_path / name) for name in ("odd", "sound"))
    change(odd, classifier_bias=torch.ones(3, dtype=torch.int64))
    assert ak.inspect_adapter(odd).dtypes == {"float32": 5, "int64": 1}
    assert str(ak.diff_adapters(odd, sound).tensors[0].a) == "('int64', (3,))"
    for write in (
        lambda: ak.convert_file(odd, tmp_path / "out"),
        lambda: ak.combine_files({odd: 0.5, sound: 0.5}, tmp_path / "out", heads="average"),
    ):
        with pytest.raises(
            ak.CheckpointError, match=r"'classifier\.bias' holds torch\.int64, and floating numbers are"
        ):
            write()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("heads", ["average", "concat"])
def test_heads_of_other_tensors_or_of_whole_numbers_are_not_joined(heads: str, tmp_path: Path) -> None:
    adapters = classifiers((3, 3))
    lacking, whole, sound = (adapters.save("b", tmp_path / name) for name in ("lacking", "whole", "sound"))
    change(lacking, classifier_bias=None)
    change(whole, classifier_weight=torch.ones(3, 16, dtype=torch.int64))
    for odd, message in (
        (
            lacking,
            "needs heads with the same tensors, but at 'classifier' 'lacking' has weight, and 'sound' has bias, weight",
        ),
        (whole, r"'classifier\.weight' holds torch\.int64, and floating numbers are needed"),
    ):
        with pytest.raises(ak.AdapterError, match=message):
            ak.combine_files({odd: 0.5, sound: 0.5}, tmp_path / "out", heads=heads)


def test_trained_biases_of_a_wrong_size_are_named(tmp_path: Path) -> None:
    adapters = tiny("bert", {"a": {"bias": "lora_only"}}, torch.float32)
    odd, sound = (adapters.save("a", tmp_path / name) for name in ("odd", "sound"))
    change(odd, query_base_layer_bias=torch.ones(2, 16))
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
    change(folder, query_base_layer_bias=None)
    assert ak.inspect_adapter(folder).missing == ()
    (missing,) = ak.inspect_adapter(folder, base=build("bert")).missing
    assert missing.endswith("query.base_layer.bias")


def test_a_layer_that_is_not_there_is_nobodys_and_differs(tmp_path: Path) -> None:
    adapters = tiny("bert", {"a": {}}, torch.float32)
    odd, sound = (adapters.save("a", tmp_path / name) for name in ("odd", "sound"))
    held, metadata, _ = read(odd)
    save_file({**held, "base_model.model.nowhere.lora_A": torch.ones(1)}, odd / WEIGHTS, metadata)
    assert ak.inspect_adapter(odd).unknown == ("nowhere.lora_A",)
    assert [layer.path for layer in ak.diff_adapters(odd, sound).layers if not layer.same_tensors] == ["nowhere"]
