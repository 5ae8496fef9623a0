"""Adapter files cost no more than they are large, run no code, and are not needed once they are read."""

from __future__ import annotations

import json
import os
import pickle
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tests.processes import python
from torch import nn

import adapterkit as ak
from adapterkit import files
from adapterkit.checkpoints import training_files

A, B = (f"base_model.model.layer.lora_{name}.weight" for name in "AB")
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["layer"]}
# What the interpreter and torch take, and a little: an attack wants gigabytes.
LIMITS = """
import resource, sys
import torch, adapterkit as ak
before = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (before + (1 << 30), before + (1 << 30)))
resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
for place in sys.argv[1:]:
    model = torch.nn.Sequential()
    model.layer = torch.nn.Linear(4, 4)
    try:
        text = f"{ak.attach(model).load(place, 'a')} {ak.inspect_adapter(place)}"
    except ak.AdapterError as error:
        text = f"refused: {error}"
    assert len(text) < 5000, text
    print(place, text)
"""


def tensors() -> dict[str, torch.Tensor]:
    return {A: torch.ones(2, 4), B: torch.ones(4, 2)}


def folder(place: Path, held: object = None, **fields: Any) -> Path:
    """An adapter, in a pickle if it is not of tensors alone."""
    place.mkdir(exist_ok=True)
    (place / "adapter_config.json").write_text(json.dumps(CONFIG | fields))
    if held is None:
        save_file(tensors(), place / "adapter_model.safetensors")
    else:
        torch.save(held, place / "adapter_model.bin")
    return place


def model() -> nn.Module:
    made = nn.Sequential()
    made.layer = nn.Linear(4, 4)
    return made


def refused(place: Path) -> str:
    """The message with which both ways to read an adapter refuse it."""
    with pytest.raises(ak.AdapterError):
        ak.inspect_adapter(place)
    with pytest.raises(ak.AdapterError) as error:
        ak.attach(model()).load(place, "a")
    assert len(str(error.value)) < 1500
    return str(error.value)


# Loaded tensors have memory of their own


@pytest.mark.skipif(sys.platform != "linux", reason="how a file is changed under a process")
@pytest.mark.parametrize("held", [None, tensors()], ids=["safetensors", "pickle"])
def test_what_happens_to_a_file_later_does_not_change_a_loaded_adapter(held: object, tmp_path: Path) -> None:
    """A map of the file would show what is written there, and end the process where the file is cut off."""
    adapters, place = ak.attach(model()), folder(tmp_path / "a", held)
    adapters.load(place, "a", dtype="file")
    with next(place.glob("adapter_model.*")).open("r+b") as opened:
        opened.write(bytes(os.fstat(opened.fileno()).st_size))
        assert all(float(p.min()) == 1 for p in adapters.parameters("a"))
        opened.truncate(0)
    assert all(float(p.min()) == 1 for p in adapters.parameters("a"))


# Pickles


class Runs:
    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return (os.mkdir, (self.marker,))


def test_code_in_a_pickle_is_not_run_and_no_advice_is_given_to_run_it(tmp_path: Path) -> None:
    for held in ({A: Runs(tmp_path / "ran")}, {**tensors(), "extra": Runs(tmp_path / "ran")}, Runs(tmp_path / "ran")):
        message = refused(folder(tmp_path / "a", held))
        assert "mkdir, which is not data. Code of a file is not run here" in message
        assert "weights_only" not in message
    for damaged in (
        b"\x80\x02cos\nsystem\n",
        b"PK\x03\x04" + bytes(100),
        pickle.dumps(print),
        b"\x80\x02]q\x00h\x00a.",
    ):
        (tmp_path / "a" / "adapter_model.bin").write_bytes(damaged)
        assert "weights_only" not in refused(tmp_path / "a")
    assert not (tmp_path / "ran").exists()


def expanded() -> dict[str, torch.Tensor]:
    return {A: torch.ones(1).expand(2, 1 << 30), B: torch.ones(4, 2)}


def quantized() -> dict[str, torch.Tensor]:
    return {A: torch.quantize_per_tensor(torch.ones(2, 4), 0.1, 0, torch.qint8), B: torch.ones(4, 2)}


def many_of_one() -> dict[str, torch.Tensor]:
    one = torch.ones(1 << 18)
    return {f"base_model.model.layer{i}.lora_A.weight": one for i in range(5000)}


PICKLES: dict[str, tuple[Callable[[], object], str]] = {
    "stride 0": (expanded, "is larger than what the file holds of it"),
    "overlapping": (lambda: {A: torch.ones(9).as_strided((4, 4), (1, 1)), B: torch.ones(4, 4)}, "is larger than what"),
    "one tensor under many names": (many_of_one, "is larger than what the file holds of it"),
    "meta": (lambda: {A: torch.ones(2, 4, device="meta"), B: torch.ones(4, 2)}, "holds no values"),
    "quantized": (quantized, "quantized, sparse or nested"),
}


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated", "ignore:torch.quantize_per_tensor")
@pytest.mark.filterwarnings("ignore:.*quantiz.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*Sparse.*:UserWarning")
@pytest.mark.parametrize(("held", "text"), PICKLES.values(), ids=PICKLES.keys())
def test_pickles_hold_plain_tensors_as_large_as_the_file(held: Callable[[], object], text: str, tmp_path: Path) -> None:
    assert text in refused(folder(tmp_path / "a", held()))


def test_a_mapping_that_holds_itself_is_refused(tmp_path: Path) -> None:
    held: dict[str, Any] = {"x": 1}
    held["state_dict"] = held
    assert "holds no mapping" in refused(folder(tmp_path / "a", held))


def test_tied_tensors_of_a_pickle_are_read(tmp_path: Path) -> None:
    one = torch.ones(4, 4)
    ak.attach(model()).load(folder(tmp_path / "a", {A: one, B: one}, r=4), "a")


def test_compressed_entries_of_a_pickle_are_refused(tmp_path: Path) -> None:
    place = folder(tmp_path / "a", {A: torch.zeros(2, 1 << 24), B: torch.ones(4, 2)})
    file = place / "adapter_model.bin"
    with zipfile.ZipFile(file) as archive, zipfile.ZipFile(tmp_path / "b", "w", zipfile.ZIP_DEFLATED) as packed:
        for entry in archive.infolist():
            packed.writestr(entry.filename, archive.read(entry))
    (tmp_path / "b").replace(file)
    assert "has compressed entries" in refused(place)


# Headers of safetensors files


def header(entry: dict[str, Any], size: int = 4, name: str = A) -> bytes:
    table = {name: {"dtype": "F32", "shape": [1], "data_offsets": [0, size], **entry}}
    text = json.dumps(table).encode()
    return struct.pack("<Q", len(text)) + text + bytes(size)


HEADERS = {
    "80,000 sizes": header({"shape": [1] * 80_000}),
    "sizes over 2^63": header({"shape": [0, 1 << 63], "data_offsets": [0, 0]}, 0),
    "sizes over 2^64": header({"shape": [0, 1 << 70], "data_offsets": [0, 0]}, 0),
    "a product of 4,300 digits": header({"shape": [0] + [1 << 62] * 300, "data_offsets": [0, 0]}, 0),
    "a product over 2^63": header({"shape": [0] + [1 << 40] * 20, "data_offsets": [0, 0]}, 0),
    "a number of 5,000 digits": header({}).replace(b"[1]", b"[" + b"9" * 5000 + b"]"),
    "negative": header({"shape": [-1]}),
    "not numbers": header({"shape": ["1"]}),
    "not whole": header({"shape": [1.0]}),
    "true": header({"shape": [True]}),
    "not a list": header({"shape": "1"}),
    "a long name": header({}, name="x" * 1_000_000),
    "half of a pair": header({}).replace(b"layer", b"\\ud800"),
    "a header of 2^62 bytes": struct.pack("<Q", 1 << 62) + b"{}",
    "a deep header": struct.pack("<Q", 200_000) + b"[" * 200_000,
    "offsets beyond the file": header({"data_offsets": [0, 1 << 40], "shape": [1 << 38]}),
}


@pytest.mark.parametrize("content", HEADERS.values(), ids=HEADERS.keys())
def test_headers_are_checked_before_they_cost_anything(content: bytes, tmp_path: Path) -> None:
    place = folder(tmp_path / "a")
    (place / "adapter_model.safetensors").write_bytes(content)
    refused(place)


def test_a_header_of_more_tensors_than_any_adapter_has_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adapterkit.door._MOST_TENSORS", 100)
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    text = json.dumps({f"layer{i}": entry for i in range(101)}).encode()
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    with pytest.raises(ak.CheckpointError, match="has 101 tensors; the limit here is 100"):
        ak.inspect_adapter(tmp_path / "a.safetensors")


# Configs

CONFIGS: dict[str, dict[str, Any]] = {
    "rank": {"r": 1_000_000_000},
    "rank of a pattern": {"rank_pattern": {"layer": 10**12}},
    "rank over 64 bits": {"r": 1 << 80},
    "scaling": {"lora_alpha": 3e38},
    "scaling of many digits": {"lora_alpha": 10**400},
    "layers": {"layers_to_transform": [10**9], "layers_pattern": "layers"},
    "a surrogate": {"base_model_name_or_path": "\ud800"},
    "a surrogate in a key": {"rank_pattern": {"\udfff": 1}},
    "a deep value": {"rank_pattern": eval("[" * 80 + "]" * 80)},
    "a long list": {"target_modules": ["x" * 100] * 100_000},
}


@pytest.mark.skipif(sys.platform != "linux", reason="limits of a process")
def test_absurd_configs_cost_nothing(tmp_path: Path) -> None:
    places = [str(folder(tmp_path / name, **fields)) for name, fields in CONFIGS.items()]
    said = python("-c", LIMITS, *places)
    assert all(place in said for place in places)


ABSURD: dict[str, dict[str, Any]] = {
    "a scaling": {"lora_alpha": 3e38},
    "a scaling of a layer": {"alpha_pattern": {"layer": -3e38}},
    "a rank": {"r": 1_000_000_000},
    "a rank of a layer": {"rank_pattern": {"layer": 10**12}},
    "a rank over 64 bits": {"r": 1 << 80},
    "a dropout": {"lora_dropout": 2.0},
    "not a number": {"lora_alpha": float("nan")},
    "infinite": {"lora_alpha": float("inf")},
    "a scaling of LoHa": {"peft_type": "LOHA", "alpha": 3e38},
    "a rank of VeRA": {"peft_type": "VERA", "r": 1_000_000, "save_projection": False},
    "a value of VeRA": {"peft_type": "VERA", "d_initial": 1e30},
    "a seed of VeRA": {"peft_type": "VERA", "projection_prng_key": 1 << 64},
}


@pytest.mark.filterwarnings("ignore:.*does not know:adapterkit.AdapterWarning")
@pytest.mark.parametrize("fields", ABSURD.values(), ids=ABSURD.keys())
def test_absurd_numbers_of_a_config_are_refused_in_one_line(fields: dict[str, Any], tmp_path: Path) -> None:
    message = refused(folder(tmp_path / "a", **fields))
    assert "adapter_config.json: " in message
    assert "\n" not in message
    assert len(message) < 400


def test_an_absurd_scaling_in_another_programs_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    held = {"lora_unet_layer.alpha": torch.tensor(3e38)}
    held |= {"lora_unet_layer.lora_down.weight": torch.ones(2, 4), "lora_unet_layer.lora_up.weight": torch.ones(4, 2)}
    save_file(held, file)
    assert "e+38 is too large" in refused(file)


SETTINGS = ("", "null", "[" * 100_000, "{}", '{"configs": {"a": 1}}', '{"configs": {}, "acting": [1], "trains": 1}')


@pytest.mark.parametrize("text", SETTINGS, ids=range(len(SETTINGS)))
def test_a_training_state_of_any_json_is_refused_as_damaged(text: str, tmp_path: Path) -> None:
    adapters = ak.attach(model())
    adapters.add("a", ak.config("lora", r=2, target_modules=["layer"]))
    training_files.save_training(adapters, "a", tmp_path, writes=True)
    file = tmp_path / training_files.STATE_FILE
    held, metadata = files.read_tensors(file)
    assert "adapterkit.setting" in metadata
    files.write_tensors(held, file, metadata | {"adapterkit.setting": text})
    with pytest.raises(ak.CheckpointError) as error:
        training_files.load_state(adapters, "a", tmp_path, resumes=True)
    assert len(str(error.value)) < 1000
