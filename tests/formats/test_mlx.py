"""mlx-lm's folders, read and written: `W + scale (a b)^T`, and its DoRA `m (W + scale (a b)^T) / |rows|`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.formats.dora import dora
from tests.models import build
from torch import Tensor, nn

import adapterkit as ak
from adapterkit_lora import LoraConfig

LAYERS = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj", "model.embed_tokens", "lm_head")


def folder(place: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    """What mlx-lm writes."""
    place.mkdir()
    fields = {"fine_tune_type": "lora", "num_layers": 2, "model": "mlx-community/tiny", "train": True, **config}
    (place / "adapter_config.json").write_text(json.dumps(fields))
    save_file({k: t.contiguous() for k, t in tensors.items()}, place / "adapters.safetensors", {"format": "mlx"})
    return place


def factors(model: nn.Module, *paths: str, r: int = 2) -> dict[str, Tensor]:
    """`lora_a` of (in, r) and `lora_b` of (r, out); of an embedding (rows, r) and (r, size)."""
    torch.manual_seed(0)
    tensors = {}
    for path in paths:
        weight = model.get_submodule(path).weight
        rows, columns = weight.shape if "embed" in path else weight.shape[::-1]  # type: ignore[union-attr, misc]
        tensors |= {f"{path}.lora_a": torch.randn(rows, r) / 4, f"{path}.lora_b": torch.randn(r, columns) / 4}
    return tensors


def expected(model: nn.Module, tensors: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    """The weights by mlx-lm's formula."""
    found = {}
    for path in {key.rpartition(".")[0] for key in tensors}:
        weight: Any = model.get_submodule(path).weight
        change = scale * tensors[f"{path}.lora_a"] @ tensors[f"{path}.lora_b"]
        found[path] = weight.detach() + (change if "embed" in path else change.T)
        if f"{path}.m" in tensors:
            found[path] = (tensors[f"{path}.m"] / found[path].norm(dim=1))[:, None] * found[path]
    return found


def merged(model: nn.Module, place: Path) -> nn.Module:
    adapters = ak.attach(model)
    assert adapters.load(place, "x") == ak.LoadReport()
    adapters.merge("x")
    return model


def check(model: nn.Module, wanted: dict[str, Tensor]) -> None:
    for path, weight in wanted.items():
        torch.testing.assert_close(model.get_submodule(path).weight, weight, rtol=0, atol=1e-5)


def parameters(**fields: float) -> dict[str, float]:
    return {"rank": 2, "scale": 20.0, "dropout": 0.0, **fields}


def test_folder_of_mlx_lm_loads_with_its_scale(tmp_path: Path) -> None:
    model = build("llama")
    tensors = factors(model, *LAYERS)
    wanted = expected(model, tensors, 20.0)
    place = folder(tmp_path / "a", tensors, lora_parameters=parameters(dropout=0.1))
    found = ak.inspect_adapter(place)
    assert found.layout == "mlx-lm"
    assert {layer.path for layer in found.layers} == {*LAYERS}
    check(merged(model, place), wanted)
    config: Any = ak.attach(model).config("x")
    assert (config.r, config.lora_alpha, config.lora_dropout) == (2, 40.0, 0.1)


OTHERS: dict[str, tuple[dict[str, Any], dict[str, str], float]] = {
    "converted for mlx-vlm, with PEFT's fields too": (
        {"lora_parameters": parameters(scale=3.0), "peft_type": "LORA", "r": 2, "lora_alpha": 6},
        {},
        3.0,
    ),
    "mlx-vlm": ({"rank": 2, "alpha": 0.1, "dropout": 0.1}, {"lora_a": "A", "lora_b": "B"}, 0.1),
}


@pytest.mark.parametrize(("config", "names", "scale"), OTHERS.values(), ids=OTHERS)
def test_other_folders_of_mlx(config: dict[str, Any], names: dict[str, str], scale: float, tmp_path: Path) -> None:
    model = build("llama")
    tensors = factors(model, *LAYERS[:2])
    wanted = expected(model, tensors, scale)
    ends = {key: key.rpartition(".") for key in tensors}
    named = {f"{path}.{names.get(end, end)}": tensors[key] for key, (path, _, end) in ends.items()}
    place = folder(tmp_path / "a", named, **config)
    check(merged(model, place), wanted)
    assert ak.inspect_adapter(place).layout.endswith("mlx-vlm" if names else "mlx-lm")


def test_old_alpha_multiplies_the_scale_and_is_told(tmp_path: Path) -> None:
    model = build("llama")
    tensors = factors(model, LAYERS[0])
    wanted = expected(model, tensors, 10.0 * 16 / 2)
    place = folder(tmp_path / "a", tensors, lora_parameters=parameters(alpha=16, scale=10.0))
    with pytest.warns(ak.AdapterWarning, match="multiplied the scale by alpha / rank, so 80 is taken"):
        check(merged(model, place), wanted)


def test_dora_of_mlx_lm(tmp_path: Path) -> None:
    model = build("llama")
    tensors = factors(model, LAYERS[0]) | {f"{LAYERS[0]}.m": torch.rand(model.get_submodule(LAYERS[0]).weight.shape[0])}
    wanted = expected(model, tensors, 20.0)
    place = folder(tmp_path / "a", tensors, fine_tune_type="dora", lora_parameters=parameters())
    with dora():
        check(merged(model, place), wanted)
        assert ak.inspect_adapter(place, base=build("llama")).method == "dora"
        ak.convert_file(place, tmp_path / "back", to="dora", naming="mlx", base=build("llama"))
        check(merged(build("llama"), tmp_path / "back"), wanted)


def test_whole_folder_on_disk(tmp_path: Path) -> None:
    model = build("llama")
    model.save_pretrained(tmp_path / "base")
    tensors = factors(model, *LAYERS[:2])
    place = folder(tmp_path / "a", tensors, lora_parameters=parameters())
    ak.merge_checkpoint(tmp_path / "base", place, tmp_path / "merged")
    check(type(model).from_pretrained(tmp_path / "merged"), expected(model, tensors, 20.0))
    ak.convert_file(place, tmp_path / "peft")
    check(merged(build("llama"), tmp_path / "peft"), expected(model, tensors, 20.0))


CONFIGS = {
    "plain": LoraConfig(r=3, lora_alpha=12, lora_dropout=0.1, target_modules=["q_proj", "down_proj"]),
    "rslora": LoraConfig(r=4, lora_alpha=12, use_rslora=True, target_modules=["q_proj"]),
    "several": LoraConfig(
        r=3, lora_alpha=2, rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 7}, target_modules=["q_proj", "v_proj"]
    ),
    "embedding": LoraConfig(r=2, lora_alpha=4, target_modules=["embed_tokens", "lm_head", "v_proj"]),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_written_folder_is_mlx_lm_s_and_reads_back(config: LoraConfig, tmp_path: Path) -> None:
    model = build("llama")
    adapters = ak.attach(model)
    adapters.add("a", config)
    with torch.no_grad():
        for parameter in adapters.parameters("a"):
            parameter.normal_()
    adapters.save("a", tmp_path / "a")
    adapters.merge("a")
    ak.convert_file(tmp_path / "a", tmp_path / "mlx", naming="mlx", base=build("llama"))
    fields = json.loads((tmp_path / "mlx" / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "mlx" / "adapters.safetensors")
    given = fields["lora_parameters"]
    assert fields["num_layers"] == 2
    assert all(t.shape[1 if key.endswith("a") else 0] == given["rank"] for key, t in tensors.items())
    assert {key.rpartition(".")[0] for key in tensors} <= {
        path for path, _ in model.named_modules() if path.removeprefix(f"model.layers.{path[13:14]}.") in given["keys"]
    }
    base = build("llama")
    wanted = expected(base, tensors, given["scale"])
    check(model, wanted)
    check(merged(build("llama"), tmp_path / "mlx"), wanted)


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    adapters = ak.attach(build("convnet"))
    adapters.add("a", LoraConfig(r=2, target_modules=["conv2d"]))
    adapters.save("a", tmp_path / "a")
    adapters.save("a", tmp_path / "c")
    with pytest.raises(ak.UnsupportedError, match=r"mlx-lm has LoRA and DoRA of linear layers and embeddings alone"):
        ak.convert_file(tmp_path / "a", tmp_path / "b", naming="mlx")
    with pytest.raises(ak.SaveError, match=r"is an adapter in PEFT's format; give mlx-lm's a folder of its own"):
        ak.convert_file(tmp_path / "a", tmp_path / "c", naming="mlx", overwrite=True)


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Tensor], str]] = {
    "full": ({"fine_tune_type": "full"}, {"model.norm.weight": torch.ones(4)}, "fine_tune_type: full"),
    "experts": ({}, {"model.layers.0.mlp.up.lora_a": torch.ones(4, 2, 8)}, "of all experts of a layer"),
    "quantised": ({}, {"model.layers.0.q.lora_a_scales": torch.ones(4, 2)}, "is quantised"),
    "no scale": ({"lora_parameters": {"rank": 2}}, {"x.lora_a": torch.ones(4, 2)}, "have no number 'scale'"),
}


@pytest.mark.parametrize(("config", "tensors", "said"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_read_is_refused(
    config: dict[str, Any], tensors: dict[str, Tensor], said: str, tmp_path: Path
) -> None:
    place = folder(tmp_path / "a", tensors, **{"lora_parameters": parameters(), **config})
    with pytest.raises((ak.UnsupportedError, ak.CheckpointError), match=said):
        ak.attach(build("llama")).load(place, "x")


def test_weights_without_their_config_ask_for_the_folder(tmp_path: Path) -> None:
    save_file({"model.layers.0.self_attn.q_proj.lora_a": torch.ones(4, 2)}, tmp_path / "0000100_adapters.safetensors")
    with pytest.raises(ak.UnsupportedError, match=r"its scale is in adapter_config\.json\. Give the folder"):
        ak.inspect_adapter(tmp_path / "0000100_adapters.safetensors")
