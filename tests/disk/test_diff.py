"""What `diff_adapters` says of two adapters' files, against dense matrices."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tests.combining import deltas, tiny
from tests.diffusion import lycoris_file, unet
from tests.disk.test_combine_files import WEIGHTS, change, classifiers, fields, mixed, read, wider
from tests.models import build

import adapterkit as ak


def test_equal_files_are_said_to_be_equal(tmp_path: Path) -> None:
    adapters = classifiers((2, 4))
    for folder in ("one", "two"):
        adapters.save("b", tmp_path / folder)
    found = ak.diff_adapters(tmp_path / "one", tmp_path / "two")
    assert (found.equal, found.same_function) == (True, True)
    assert (found.config, found.metadata, found.tensors) == ({}, {}, ())
    assert str(found) == f"{tmp_path}/one and {tmp_path}/two are equal: the same config, tensors and metadata."


def test_distance_and_cosine_are_those_of_the_dense_changes(tmp_path: Path) -> None:
    adapters = mixed(build("bert").double())
    for name in "ah":
        adapters.save(name, tmp_path / name)
    found = ak.diff_adapters(tmp_path / "a", tmp_path / "h")
    one, other = deltas(adapters, "a"), deltas(adapters, "h")
    assert (found.methods, found.same_function, found.equal) == (("lora", "loha"), False, False)
    assert {layer.path for layer in found.layers} == set(one)
    for layer in found.layers:
        a, b = one[layer.path], other[layer.path]
        assert layer.distance == pytest.approx(float((a - b).norm() / max(a.norm(), b.norm())), rel=1e-6)
        assert layer.cosine == pytest.approx(float((a * b).sum() / (a.norm() * b.norm())), abs=1e-6)
        assert layer.a is not None
        assert layer.b is not None
        assert (layer.a.norm, layer.b.norm) == (pytest.approx(float(a.norm())), pytest.approx(float(b.norm())))
        assert (layer.a.rank, layer.b.rank) == (2 if "value" in layer.path else 3, 4)
    assert found.config["peft_type"] == ("LORA", "LOHA")
    text = str(found)
    assert "method: lora | loha" in text
    assert "0 of 4 layers have the same change" in text
    assert json.loads(json.dumps(found.to_dict()))["same_function"] is False


@pytest.mark.parametrize("name", ["a", "h", "v"])
def test_other_factors_of_the_same_change_do_the_same(name: str, tmp_path: Path) -> None:
    adapters = mixed(build("bert"))
    source = adapters.save(name, tmp_path / name)
    base = build("bert").to("meta")
    ak.combine_files({source: 1.0}, tmp_path / "lora", base=base)
    found = ak.diff_adapters(source, tmp_path / "lora", base=base)
    assert not found.equal
    assert found.same_function is True
    assert str(found).startswith(f"{source} and {tmp_path}/lora do the same, but their files differ.")


def test_what_only_one_has_is_listed_and_counts_unless_it_changes_nothing(tmp_path: Path) -> None:
    adapters = tiny("bert", {"a": {"target_modules": ["query"]}, "b": {"target_modules": ["query", "value"]}})
    for name in "ab":
        adapters.save(name, tmp_path / name)
    found = ak.diff_adapters(tmp_path / "a", tmp_path / "b")
    assert found.config["target_modules"] == (["query"], ["query", "value"])
    only = [layer for layer in found.layers if layer.a is None]
    assert [layer.path.rpartition(".")[2] for layer in only] == ["value", "value"]
    assert "value: only in the second" in str(found)
    assert found.same_function is False
    change(
        tmp_path / "b",
        lambda held: {k: t * 0 if "value.lora_B" in k else t for k, t in held.items()} | read(tmp_path / "a")[0],
    )
    found = ak.diff_adapters(tmp_path / "a", tmp_path / "b")
    assert (found.same_function, found.equal) == (True, False)


def test_heads_labels_and_biases_are_compared(tmp_path: Path) -> None:
    adapters = classifiers((3, 3))
    a, b = (adapters.save("a", tmp_path / name) for name in "ab")
    tensors, metadata, _ = read(a)
    head = "base_model.model.classifier.weight"
    labels = json.dumps({"0": "x", "1": "y", "2": "z"})
    save_file(tensors | {head: 2 * tensors[head]}, b / WEIGHTS, metadata | {"adapterkit.id2label": labels})
    fields(b, lora_dropout=0.5)
    found = ak.diff_adapters(a, b)
    assert found.same_function is False
    (tensor,) = found.tensors
    assert (tensor.key, tensor.a, tensor.distance) == ("classifier.weight", ("float32", (3, 16)), pytest.approx(0.5))
    assert found.config == {"lora_dropout": (0.0, 0.5)}
    assert found.metadata["adapterkit.id2label"][1] == labels
    text = str(found)
    assert "config lora_dropout: 0.0 | 0.5" in text
    assert "tensor classifier.weight: float32 (3, 16) | float32 (3, 16), distance 50.00%" in text
    assert "header adapterkit.id2label" in text
    biased = tiny("bert", {"a": {"lora_bias": True, "target_modules": ["query"]}}, torch.float32)
    one, other = (biased.save("a", tmp_path / name) for name in ("one", "other"))
    key = next(k for k in read(one)[0] if k.endswith("lora_B.bias"))
    change(other, lambda held: held | {key: held[key] + 1})
    assert [layer.same for layer in ak.diff_adapters(one, other).layers].count(False) == 1


def test_other_scalings_and_sizes_and_orders(tmp_path: Path) -> None:
    adapters = tiny("bert", {"a": {"target_modules": ["query", "value"]}}, torch.float32)
    for name in ("one", "two", "wide"):
        adapters.save("a", tmp_path / name)
    fields(tmp_path / "two", lora_alpha=10, target_modules=["value", "query"])
    found = ak.diff_adapters(tmp_path / "one", tmp_path / "two")
    assert found.config == {"lora_alpha": (5, 10)}  # the order of names says nothing
    assert all(layer.same_tensors for layer in found.layers)
    assert {round(layer.distance or 0, 6) for layer in found.layers} == {0.5}
    assert found.same_function is False
    change(tmp_path / "wide", wider)
    found = ak.diff_adapters(tmp_path / "one", tmp_path / "wide")
    assert "query: 16 x 16 | 16 x 32" in str(found)
    assert found.same_function is False


def test_without_the_base_what_cannot_be_told_is_not_guessed(tmp_path: Path) -> None:
    adapters = mixed(build("bert"))
    for name in ("one", "two"):
        adapters.save("v", tmp_path / name)
    assert ak.diff_adapters(tmp_path / "one", tmp_path / "two").equal
    key = next(k for k in read(tmp_path / "two")[0] if "query.vera_lambda_d" in k)
    change(tmp_path / "two", lambda held: held | {key: held[key] * 2})
    found = ak.diff_adapters(tmp_path / "one", tmp_path / "two")
    assert found.same_function is None
    assert "whether they do the same cannot be told" in str(found)
    assert "how far apart cannot be told" in str(found)
    assert "do not tell the sizes of the layers that it changes. Give base=" in found.notes[0]
    assert ak.diff_adapters(tmp_path / "one", tmp_path / "two", base=build("bert").to("meta")).same_function is False


def test_files_of_other_programs(tmp_path: Path) -> None:
    model = unet()
    lycoris_file(model, tmp_path / "x.safetensors", algo="loha")
    ak.convert_file(tmp_path / "x.safetensors", tmp_path / "lora", base=model)
    assert ak.diff_adapters(tmp_path / "x.safetensors", tmp_path / "lora", base=model).same_function is True
    ak.convert_file(tmp_path / "lora", tmp_path / "y.safetensors", naming="lycoris")
    assert ak.diff_adapters(tmp_path / "x.safetensors", tmp_path / "y.safetensors").same_function is True


def test_bad_input_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ak.ConfigError, match=r"tolerance = 2 must be a share, at least 0 and below 1"):
        ak.diff_adapters(tmp_path, tmp_path, tolerance=2)
    with pytest.raises(ak.CheckpointError, match="is not an adapter"):
        ak.diff_adapters(tmp_path, tmp_path)


def test_of_many_layers_the_text_shows_the_most_different(tmp_path: Path) -> None:
    model = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(30)))
    adapters = ak.attach(model)
    for name in ("a", "b"):
        adapters.add(name, ak.LoraConfig(r=1, target_modules="all-linear"))
        with torch.no_grad():
            for number, layer in enumerate(adapters.layers(name).values()):
                torch.nn.init.constant_(layer.lora_A.weight, 1.0)
                torch.nn.init.constant_(layer.lora_B.weight, 1.0 + number * (name == "b"))
        adapters.save(name, tmp_path / name)
    lines = str(ak.diff_adapters(tmp_path / "a", tmp_path / "b")).splitlines()
    assert "1 of 30 layers have the same change" in lines[1]
    assert [line.split()[1] for line in lines if "distance" in line] == [f"{i}:" for i in range(29, 9, -1)]
    assert lines[-1].startswith("  9 more layers differ")
