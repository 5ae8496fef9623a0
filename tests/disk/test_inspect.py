"""What `inspect_adapter` says of files, against dense matrices and the model's own adapters."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tests import combining
from tests.combining import deltas, randomise, tiny
from tests.diffusion import lycoris_file, unet
from tests.disk.test_combine_files import WEIGHTS, change, classifiers, fields, mixed, peft_file, read, without
from tests.models import build
from torch import nn

import adapterkit as ak
from adapterkit_lora import LoraConfig


def test_norms_and_ranks_are_those_of_the_dense_changes(tmp_path: Path) -> None:
    adapters = mixed(build("bert").double())
    for name in "ahv":
        adapters.save(name, tmp_path / name)
        found = ak.inspect_adapter(tmp_path / name, base=build("bert").to("meta") if name == "v" else None)
        dense = deltas(adapters, name)
        assert {layer.path for layer in found.layers} == set(dense)
        for layer in found.layers:
            s = torch.linalg.svdvals(dense[layer.path])
            share = s / s.sum()
            assert layer.shape == tuple(dense[layer.path].shape)
            assert layer.norm == pytest.approx(float(dense[layer.path].norm()), rel=1e-5)
            wanted = math.exp(-float((share * share.clamp(min=1e-300).log()).sum()))
            assert layer.effective_rank == pytest.approx(wanted, rel=1e-4)
            energy = s.square().cumsum(0) / s.square().sum()
            assert (layer.rank_90, layer.rank_99) == tuple(int((energy < e).sum()) + 1 for e in (0.9, 0.99))
        total = math.sqrt(sum(float(d.norm()) ** 2 for d in dense.values()))
        assert found.norm == pytest.approx(total, rel=1e-5)
        assert found.parameters == sum(t.numel() for t in read(tmp_path / name)[0].values())


def test_it_says_what_the_files_say(tmp_path: Path) -> None:
    classifiers((2, 4)).save("b", tmp_path / "b")
    found = ak.inspect_adapter(tmp_path / "b")
    assert (found.method, found.provider, found.base) == ("lora", f"adapterkit {ak.__version__}", None)
    assert (found.heads, found.labels) == (
        {"classifier": {"weight": (4, 16), "bias": (4,)}},
        dict(enumerate(["none", "b1", "b2", "b3"])),
    )
    (first, _) = found.layers
    assert (first.kind, first.shape, first.rank, first.scaling) == ("Linear", (16, 16), 2, 4.0)
    assert first.tensors == {"lora_A.weight": (2, 16), "lora_B.weight": (16, 2)}
    assert (found.size, found.dtypes) == ((tmp_path / "b" / WEIGHTS).stat().st_size, {"float32": 6})
    assert found.config["task_type"] == "SEQ_CLS"
    assert (found.unknown, found.missing, found.mismatched, found.notes) == ((), (), (), ())
    text = str(found)
    assert "head classifier: weight (4, 16), bias (4,)" in text
    assert "labels: none, b1, b2, b3" in text
    assert json.loads(json.dumps(found.to_dict()))["layers"][0]["rank"] == 2


def test_without_values_only_headers_are_read(tmp_path: Path) -> None:
    adapters = mixed(build("bert"))
    for name in "ah":
        file = adapters.save(name, tmp_path / name) / WEIGHTS
        data = file.read_bytes()
        header = 8 + int.from_bytes(data[:8], "little")
        file.write_bytes(data[:header] + os.urandom(len(data) - header))  # no number of these makes sense
        found = ak.inspect_adapter(tmp_path / name, values=False)
        assert found.norm is None
        assert {layer.rank for layer in found.layers} == ({3, 2} if name == "a" else {4})
        assert all(layer.norm is None and layer.rank_99 is None for layer in found.layers)


def test_what_the_tensors_do_not_tell_is_left_open(tmp_path: Path) -> None:
    mixed(build("bert")).save("v", tmp_path / "v")
    found = ak.inspect_adapter(tmp_path / "v")
    assert all((layer.kind, layer.shape, layer.norm) == (None, None, None) for layer in found.layers)
    assert found.layers[0].tensors.keys() == {"vera_lambda_b", "vera_lambda_d"}
    assert found.shared == {"vera_A": (5, 16), "vera_B": (24, 5)}
    (note,) = found.notes
    assert note.startswith("the tensors of a 'vera' adapter do not tell the sizes of the layers that it changes. Give")
    assert not found.unknown


def test_keys_that_are_nobodys_missing_or_do_not_fit_are_listed(tmp_path: Path) -> None:
    folder = classifiers().save("a", tmp_path / "a")
    without(folder, "layer.1.attention.self.query.lora_B")
    odd = {"base_model.model.x.lora_Q.weight": torch.zeros(2), "base_model.model.y": torch.zeros(2)}
    change(folder, lambda held: held | odd)
    found = ak.inspect_adapter(folder)
    assert set(found.unknown) == {"x.lora_Q.weight", "y"}
    assert found.missing == ("bert.encoder.layer.1.attention.self.query.lora_B.weight",)
    norms = {layer.path: layer.norm for layer in found.layers}
    assert [norm is None for norm in norms.values()] == [False, True]
    fields(folder, r=5)
    found = ak.inspect_adapter(folder)
    assert "(2, 16) in the file, (5, 16)" in found.mismatched[0]
    assert [layer.norm for layer in found.layers] == [None, None]


@pytest.mark.parametrize("options", [{"algo": "locon", "use_tucker": True, "conv_dim": 2}, {"algo": "loha"}], ids=str)
def test_files_of_other_programs_with_and_without_the_model(options: dict[str, object], tmp_path: Path) -> None:
    model, file = unet(), tmp_path / "x.safetensors"
    lycoris_file(model, file, **options)
    alone, given = ak.inspect_adapter(file), ak.inspect_adapter(file, base=model)
    names = {layer.path: layer for layer in alone.layers}
    assert len(given.layers) == len(alone.layers) > 20
    for layer in given.layers:
        other = names["lycoris_" + layer.path.replace(".", "_")]
        assert (other.shape, other.rank, other.scaling, other.norm) == (
            layer.shape,
            layer.rank,
            layer.scaling,
            pytest.approx(layer.norm, rel=1e-5),
        )
    assert (alone.unknown, given.unknown, alone.missing, given.missing) == ((), (), (), ())


def test_a_method_that_is_not_additive_has_no_norms_and_is_compared_by_its_tensors(tmp_path: Path) -> None:
    plugin = combining.scaling_method(mergeable=True)
    ak.register(plugin)
    adapters, base = ak.attach(build("bert")), build("bert").to("meta")
    adapters.add("s", plugin.config(target_modules=["query"], modules_to_save=None))
    one, two = (adapters.save("s", tmp_path / name) for name in ("one", "two"))
    found = ak.inspect_adapter(one, base=base)
    assert [(layer.kind, layer.rank, layer.norm) for layer in found.layers] == [("Linear", None, None)] * 2
    assert ak.diff_adapters(one, two, base=base).same_function is True
    randomise(adapters, "s", 1)
    adapters.save("s", two)
    assert ak.diff_adapters(one, two, base=base).same_function is None


def test_pissa_factors_of_peft_alone_need_the_base(tmp_path: Path) -> None:
    import peft

    folder = peft_file(tmp_path, peft.LoraConfig(target_modules=["query"], r=2), build("bert"))
    fields(folder, init_lora_weights="pissa")
    found = ak.inspect_adapter(folder)
    assert found.layers[0].norm is None
    assert "needs the weight of" in found.notes[0]
    assert "needs the weight of" in ak.diff_adapters(folder, folder).notes[0]


def test_trained_biases_and_numbers_that_are_not_finite_are_told(tmp_path: Path) -> None:
    adapters = tiny("bert", {"a": {"bias": "all"}}, torch.float32)
    with torch.no_grad():
        next(adapters.parameters("a")).fill_(float("nan"))
    found = ak.inspect_adapter(adapters.save("a", tmp_path))
    assert "bert.embeddings.LayerNorm" in found.biases
    assert (found.layers[0].norm, found.norm) == (None, None)
    assert found.notes == (f"{found.layers[0].path} has values that are not finite",)


def test_what_is_no_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ak.CheckpointError, match="is not an adapter"):
        ak.inspect_adapter(tmp_path)
    adapters = tiny("bert", {"a": {}}, torch.float32)
    adapters.save("a", tmp_path / "a")
    (tmp_path / "a" / WEIGHTS).rename(tmp_path / "bare.safetensors")
    with pytest.raises(ak.CheckpointError, match="has PEFT's keys; the scaling that goes with them"):
        ak.inspect_adapter(tmp_path / "bare.safetensors")
    save_file({"nothing": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ak.CheckpointError, match=r"has no adapter_config\.json, and no method finds layers"):
        ak.inspect_adapter(tmp_path / "other.safetensors")


def many_layers(folder: Path) -> Path:
    torch.manual_seed(0)
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"q": nn.Linear(4, 4)}) for _ in range(30)])})
    adapters = ak.attach(model)
    adapters.add("a", LoraConfig(r=2, target_modules=["q"], rank_pattern={"layers.7.q": 3}, init_lora_weights=False))
    return adapters.save("a", folder)


def test_many_layers_that_differ_in_numbers_alone_share_a_row(tmp_path: Path) -> None:
    text = str(ak.inspect_adapter(many_layers(tmp_path / "a"), values=False))
    (row,) = [line for line in text.splitlines() if "layers." in line and "config:" not in line]
    assert row.split()[:6] == ["layers.{0-29}.q", "Linear", "4", "x", "4", "2"]
    assert "2 to 3" in row


def test_the_largest_come_first_and_top_leaves_the_others_out(tmp_path: Path) -> None:
    folder = many_layers(tmp_path / "a")
    every = ak.inspect_adapter(folder)
    largest = ak.inspect_adapter(folder, sort="norm", top=5)
    norms = sorted((row.norm or 0.0 for row in every.layers), reverse=True)
    assert [row.norm for row in largest.layers] == norms[:5]
    assert "30 layers, 5 of them shown" in str(largest)
    assert sum("Linear" in line for line in str(largest).splitlines()) == 5
    assert ak.inspect_adapter(folder, sort="rank", top=1).layers[0].path == "layers.7.q"


@pytest.mark.parametrize("wrong", [{"sort": "size"}, {"top": 0}])
def test_an_order_that_does_not_exist_is_refused(wrong: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ak.ConfigError, match=r"must be one of 'path', 'norm', .* and top at least 1"):
        ak.inspect_adapter(tmp_path, **wrong)
