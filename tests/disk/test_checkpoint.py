"""Checkpoints by their headers: what is read, and every sort of damage by its message."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import adapterkit as ak
from adapterkit.disk.checkpoint import WEIGHTS_FILES, Checkpoint
from adapterkit.files.tensors import read_header

INDEX = WEIGHTS_FILES[1]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool)


def raw(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(shape: Any = (2,), offsets: Any = (0, 8), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@given(
    st.lists(st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 3), max_size=3)), max_size=5),
    st.dictionaries(st.text(max_size=3), st.text(max_size=3), max_size=2),
)
@settings(deadline=None, max_examples=20)
def test_every_tensor_is_what_safetensors_reads(
    tmp_path_factory: pytest.TempPathFactory, sorts: list[tuple[torch.dtype, list[int]]], metadata: dict[str, str]
) -> None:
    file = tmp_path_factory.mktemp("c") / "model.safetensors"
    tensors = {f"t{i}": torch.randint(0, 2, shape).to(dtype) for i, (dtype, shape) in enumerate(sorts)}
    save_file(tensors, file, metadata or None)
    found = Checkpoint.open(file.parent)
    assert set(found.entries) == set(tensors)
    assert found.shards[file.name].metadata == metadata
    for name, tensor in load_file(file).items():
        assert found.tensor(name).dtype == tensor.dtype
        assert torch.equal(found.tensor(name), tensor)
        found.tensor(name).zero_()  # which leaves the file alone
        assert torch.equal(found.tensor(name), tensor)
    with pytest.raises(ak.UnknownNameError, match="Unknown tensor 'alpa'"):
        found.tensor("alpa")


def test_a_header_of_odd_length_is_read(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    header = b" " * 3 + json.dumps({"a": entry()}).encode() + b" "
    file.write_bytes(raw(header, torch.tensor([1.0, 2.0]).numpy().tobytes()))
    assert Checkpoint.open(file).tensor("a").tolist() == [1.0, 2.0]


DAMAGED: dict[str, bytes] = {
    "empty": b"",
    "header beyond the file": raw({}, length=99),
    "header length of gigabytes": raw({}, length=1 << 60),
    "no JSON": raw(b"pickle"),
    "no text": raw(b"\xff\xfe\xfa"),
    "deep JSON": raw(b"[" * 99999),
    "a name twice": raw(b'{"a":1,"a":2}'),
    "a whole tensor twice": raw(
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        bytes(4),
    ),
    "half a character": raw(b'{"\\ud800":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'),
    "a list": raw([1]),
    "metadata of numbers": raw({"__metadata__": {"a": 1}}),
    "metadata of text": raw({"__metadata__": "a"}),
    "entry no object": raw({"a": 1}),
    "unknown dtype": raw({"a": entry(dtype="F31")}, bytes(8)),
    "dtype no text": raw({"a": entry(dtype=["F32"])}, bytes(8)),
    "no dtype": raw({"a": {}}),
    "negative size": raw({"a": entry([-2])}, bytes(8)),
    "fractional size": raw({"a": entry([2.0])}, bytes(8)),
    "true as a size": raw({"a": entry([True])}, bytes(4)),
    "offsets of one": raw({"a": entry(offsets=[0])}, bytes(8)),
    "offsets backwards": raw({"a": entry(offsets=[8, 0])}, bytes(8)),
    "wrong size": raw({"a": entry([3])}, bytes(8)),
    "half a byte": raw({"a": entry([3], [0, 1], "F4")}, bytes(1)),
    "overlap": raw({"a": entry(), "b": entry(offsets=[4, 12])}, bytes(12)),
    "the same bytes": raw({"a": entry(), "b": entry()}, bytes(8)),
    "gap": raw({"a": entry(offsets=[4, 12])}, bytes(12)),
    "cut off": raw({"a": entry()}, bytes(7)),
    "more than described": raw({"a": entry()}, bytes(9)),
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED.keys())
def test_a_damaged_file_is_refused_by_its_name(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    text = f"{tmp_path / 'model.safetensors'} is not a safetensors file, or it is damaged or cut off: "
    with pytest.raises(ak.CheckpointError, match=re.escape(text)):
        Checkpoint.open(tmp_path)


def test_a_name_that_stands_twice_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(DAMAGED["a whole tensor twice"])
    with pytest.raises(ak.CheckpointError, match="damaged or cut off: a name stands twice in its header"):
        read_header(tmp_path / "a.safetensors")


def test_a_header_larger_than_the_format_allows_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "a.safetensors").open("wb") as file:
        file.write((100_000_001).to_bytes(8, "little"))
        file.truncate(100_000_009)
    with pytest.raises(ak.CheckpointError, match=r"damaged or cut off: .*header too large"):
        read_header(tmp_path / "a.safetensors")


def test_a_dtype_that_torch_lacks_is_refused_where_it_is_used(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(raw({"a": entry([4], [0, 3], "F6_E2M3")}, bytes(3)))
    found = Checkpoint.open(tmp_path)
    assert found.entries["a"].numel == 4
    with pytest.raises(ak.CheckpointError, match=r"'a' has dtype F6_E2M3, which torch .* lacks"):
        found.tensor("a")


@given(st.data())
@settings(deadline=None, max_examples=60)
def test_whatever_bytes_are_changed_a_file_opens_or_is_refused(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    file = tmp_path_factory.mktemp("f") / "model.safetensors"
    save_file({"a": torch.ones(3, 2), "b": torch.zeros(5, dtype=torch.bfloat16)}, file, {"format": "pt"})
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place : place + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
        content = content or bytearray(b"x")
    file.write_bytes(content)
    try:
        found = Checkpoint.open(file)
        for name in found.entries:
            found.tensor(name)
    except ak.CheckpointError:
        pass


# Several files


def sharded(folder: Path, **files: dict[str, Tensor]) -> dict[str, str]:
    """Shards, and the index of them."""
    for name, tensors in files.items():
        save_file(tensors, folder / f"{name}.safetensors")
    places = {key: f"{name}.safetensors" for name, tensors in files.items() for key in tensors}
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 8}, "weight_map": places}))
    return places


def test_an_index_is_followed_also_through_links_as_in_the_hubs_cache(tmp_path: Path) -> None:
    sharded(tmp_path, one={"a": torch.ones(2)}, two={"b": torch.zeros(2)})
    (tmp_path / "blobs").mkdir()
    (tmp_path / "one.safetensors").rename(tmp_path / "blobs/5e1f")
    (tmp_path / "one.safetensors").symlink_to("blobs/5e1f")
    found = Checkpoint.open(tmp_path)
    assert list(found.shards) == ["one.safetensors", "two.safetensors"]
    assert found.tensor("a").tolist() == [1, 1]
    assert found.tensor("b").tolist() == [0, 0]
    assert found.index is not None
    assert found.index["metadata"] == {"total_size": 8}


ELSEWHERE = ["../x.safetensors", "/x.safetensors", "a/x.safetensors", "..\\x.safetensors", "", "..", "x.bin", "a\0b"]
INDEXES = {json.dumps({"weight_map": {"a": file}}): "is a .safetensors file beside the index" for file in ELSEWHERE}
WRONG_MAPS = ["{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}', '{"weight_map": []}']
INDEXES |= dict.fromkeys(WRONG_MAPS, "is not an index: it needs a 'weight_map' from tensor names to file names.")
INDEXES |= {"[]": "must hold a JSON object, not a list", "{": "is not valid JSON"}


@pytest.mark.parametrize("text", INDEXES)
def test_an_index_that_is_wrong_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(ak.CheckpointError, match=re.escape(INDEXES[text])):
        Checkpoint.open(tmp_path)


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "a shard is missing": (lambda f: (f / "two.safetensors").unlink(), "names 'two.safetensors', which is not there"),
    "a shard lacks a tensor": (
        lambda f: save_file({"d": torch.ones(1)}, f / "two.safetensors"),
        "places 'b' in 'two.safetensors', which does not hold it",
    ),
    "the index is wrong": (
        lambda f: (f / INDEX).write_text((f / INDEX).read_text().replace('"a": "one', '"a": "two')),
        "places 'a' in 'two.safetensors', which does not hold it",
    ),
    "a tensor is in two": (
        lambda f: save_file({"a": torch.ones(2), "b": torch.zeros(2)}, f / "two.safetensors"),
        "so its values are not known",
    ),
    "no checkpoint": (
        lambda f: [path.unlink() for path in f.iterdir()],
        f" has neither model.safetensors nor {INDEX}. It holds nothing",
    ),
    "another format": (
        lambda f: [path.rename(f / f"{path.stem}.bin") for path in f.iterdir()],
        "It holds model.safetensors.index.bin, one.bin, two.bin. Only safetensors files are read. To convert others",
    ),
    "another name": (lambda f: (f / INDEX).unlink(), "It holds one.safetensors, two.safetensors: give the path"),
    "an adapter": (
        lambda f: (f / INDEX).rename(f / "adapter_config.json"),
        "It is an adapter; give the model that it was trained on",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_files_that_do_not_go_together_are_refused(case: str, tmp_path: Path) -> None:
    change, text = BROKEN[case]
    sharded(tmp_path, one={"a": torch.ones(2), "c": torch.ones(2)}, two={"b": torch.zeros(2)})
    change(tmp_path)
    with pytest.raises(ak.CheckpointError, match=re.escape(text)):
        Checkpoint.open(tmp_path)


def test_an_index_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ak.CheckpointError, match=r"cannot be read: .*No such file"):
        Checkpoint.open(tmp_path / INDEX)
