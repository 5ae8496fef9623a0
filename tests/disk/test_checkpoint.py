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
from adapterkit.disk.checkpoint import Checkpoint
from adapterkit.files.tensors import read_header

INDEX = "model.safetensors.index.json"
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
@settings(deadline=None, max_examples=40)
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


def test_a_header_of_odd_length_is_read(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(
        raw(b" " * 3 + json.dumps({"a": entry()}).encode() + b" ", torch.tensor([1.0, 2.0]).numpy().tobytes())
    )
    assert Checkpoint.open(file).tensor("a").tolist() == [1.0, 2.0]


def test_writing_to_a_mapped_tensor_leaves_the_file_alone(tmp_path: Path) -> None:
    save_file({"a": torch.ones(4)}, tmp_path / "model.safetensors")
    found = Checkpoint.open(tmp_path)
    found.tensor("a").zero_()
    assert found.tensor("a").tolist() == [1.0] * 4


def test_a_name_that_is_not_there_is_an_error_with_the_nearest(tmp_path: Path) -> None:
    save_file({"alpha": torch.ones(4)}, tmp_path / "model.safetensors")
    with pytest.raises(ak.UnknownNameError, match=r"Unknown tensor 'alpa'.*Did you mean 'alpha'"):
        Checkpoint.open(tmp_path).tensor("alpa")


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
@settings(deadline=None, max_examples=150)
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


def test_an_index_is_followed(tmp_path: Path) -> None:
    sharded(tmp_path, one={"a": torch.ones(2)}, two={"b": torch.zeros(2)})
    found = Checkpoint.open(tmp_path)
    assert list(found.shards) == ["one.safetensors", "two.safetensors"]
    assert found.tensor("a").tolist() == [1, 1]
    assert found.tensor("b").tolist() == [0, 0]
    assert found.index is not None
    assert found.index["metadata"] == {"total_size": 8}


def test_shards_may_be_links_as_in_the_hubs_cache(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    sharded(tmp_path / "snapshot", one={"a": torch.ones(2)})
    (tmp_path / "snapshot/one.safetensors").rename(tmp_path / "blobs/5e1f")
    (tmp_path / "snapshot/one.safetensors").symlink_to("../blobs/5e1f")
    assert Checkpoint.open(tmp_path / "snapshot").tensor("a").tolist() == [1, 1]


@pytest.mark.parametrize(
    "file",
    ["../x.safetensors", "/etc/x.safetensors", "a/x.safetensors", "..\\x.safetensors", "", "..", "x.bin", "a\0b"],
)
def test_an_index_that_points_elsewhere_is_refused(file: str, tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": file}}))
    with pytest.raises(ak.CheckpointError, match=r"a shard is a .safetensors file beside the index, without a path"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("text", ["[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}', '{"weight_map": []}'])
def test_an_index_of_another_form_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(ak.CheckpointError, match=r"needs a 'weight_map' from tensor names|must hold a JSON object"):
        Checkpoint.open(tmp_path)


def test_an_index_that_is_no_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text("{")
    with pytest.raises(ak.CheckpointError, match="is no valid JSON"):
        Checkpoint.open(tmp_path)


def test_an_index_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ak.CheckpointError, match=r"cannot be read: .*No such file"):
        Checkpoint.open(tmp_path / INDEX)


def broken(change: Callable[[Path], object], folder: Path) -> str:
    sharded(folder, one={"a": torch.ones(2)}, two={"b": torch.zeros(2)})
    change(folder)
    with pytest.raises(ak.CheckpointError) as caught:
        Checkpoint.open(folder)
    return str(caught.value)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    text = broken(lambda folder: (folder / "two.safetensors").unlink(), tmp_path)
    assert "names 'two.safetensors', which is not there" in text


def test_a_tensor_that_its_shard_lacks_is_named(tmp_path: Path) -> None:
    text = broken(lambda folder: save_file({"c": torch.ones(1)}, folder / "two.safetensors"), tmp_path)
    assert "places 'b' in 'two.safetensors', which does not hold it" in text


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    both = {"a": torch.ones(2), "b": torch.zeros(2)}
    text = broken(lambda folder: save_file(both, folder / "two.safetensors"), tmp_path)
    assert "'a' is in " in text
    assert "so its values are not known" in text


@pytest.mark.parametrize(
    ("files", "text"),
    [
        ([], "has neither model.safetensors nor model.safetensors.index.json. It holds nothing"),
        (["pytorch_model.bin"], "It holds pytorch_model.bin. Only safetensors files are read. To convert others, load"),
        (["model.fp16.safetensors"], "It holds model.fp16.safetensors: give the path of the right one"),
    ],
)
def test_a_folder_without_a_checkpoint_says_what_it_has(files: list[str], text: str, tmp_path: Path) -> None:
    for file in files:
        (tmp_path / file).touch()
    with pytest.raises(ak.CheckpointError, match=re.escape(text)):
        Checkpoint.open(tmp_path)
