"""Whether vLLM and SGLang serve an adapter, and converting one so that they do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.combining import randomise
from tests.models import build, run
from torch import Tensor, nn

import adapterkit as ak

SERVERS = ("vllm", "sglang")
Saved = Callable[..., Path]


@pytest.fixture
def saved(tmp_path: Path) -> Saved:
    """`saved("lora", r=2)`: the folder of an adapter on the tiny llama, or on another model."""

    def make(method: str = "lora", name: str = "llama", **fields: Any) -> Path:
        adapters = ak.attach(build(name))
        defaults = {"target_modules": ["q_proj", "down_proj"], "modules_to_save": None}
        adapters.add("a", ak.config(method, **{**defaults, **fields}))
        randomise(adapters, "a", 0)
        return adapters.save("a", tmp_path / f"{method}-{len(list(tmp_path.iterdir()))}")

    return make


def edited(folder: Path, **fields: Any) -> Path:
    """The folder with other fields in its config, as other programs write it."""
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
    save_file(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.safetensors")
    return folder


def served(folder: Path, server: str) -> nn.Module:
    """What a server computes: one rank and one alpha for all layers, and nothing but factors of LoRA.

    vLLM divides alpha by the root of r if the config says so; SGLang does not look at that.
    """
    config, model = json.loads((folder / "adapter_config.json").read_text()), build("llama")
    tensors = load_file(folder / "adapter_model.safetensors")
    root = server == "vllm" and config["use_rslora"]
    scale = config["lora_alpha"] / (config["r"] ** 0.5 if root else config["r"])
    for key, down in tensors.items():
        if key.endswith("lora_A.weight"):
            assert down.shape[0] == config["r"]
            layer = model.get_submodule(key.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
            with torch.no_grad():
                layer.weight.add_(scale * tensors[key.replace("lora_A", "lora_B")] @ down)
    return model


def output(folder: Path) -> Tensor:
    adapters = ak.attach(build("llama"))
    adapters.load(folder, "a")
    return run(adapters.model, "llama")


@pytest.mark.parametrize("server", SERVERS)
def test_plain_lora_is_served_and_stays_as_it_is(saved: Saved, server: Any, tmp_path: Path) -> None:
    folder = saved(r=4, lora_alpha=6)
    report = ak.check_serving(folder, server)
    assert report.ok, report
    assert "serves" in str(report)
    torch.testing.assert_close(run(served(folder, server), "llama"), output(folder))
    ak.convert_file(folder, tmp_path / "out", server=server)
    before, after = (load_file(place / "adapter_model.safetensors") for place in (folder, tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


CONVERTED = {
    "ranks": {"r": 4, "rank_pattern": {"down_proj": 2}},
    "alphas": {"r": 4, "alpha_pattern": {"down_proj": 3}},
    "rslora and ranks": {"r": 4, "use_rslora": True, "rank_pattern": {"q_proj": 7}},
    "pissa": {"r": 2, "init_lora_weights": "pissa", "rank_pattern": {"q_proj": 3}},
    "loha": {"method": "loha", "r": 2},
    "vera": {"method": "vera", "r": 8},
    "expression": {"r": 2, "target_modules": r".*\.(q_proj|down_proj)", "alpha_pattern": {"q_proj": 1}},
}


@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("case", CONVERTED)
def test_what_they_scale_otherwise_or_refuse_is_converted_exactly(
    saved: Saved, case: str, server: Any, tmp_path: Path
) -> None:
    folder = saved(**CONVERTED[case])
    assert not ak.check_serving(folder, server).ok
    ak.convert_file(folder, tmp_path / "out", server=server, max_rank=16, base=build("llama"))
    assert ak.check_serving(tmp_path / "out", server, max_rank=16).ok
    expected = output(folder)
    torch.testing.assert_close(run(served(tmp_path / "out", server), "llama"), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output(tmp_path / "out"), expected, atol=1e-5, rtol=1e-5)


def test_rank_stabilised_lora_is_served_by_vllm_alone(saved: Saved, tmp_path: Path) -> None:
    folder = saved(r=4, use_rslora=True)
    assert ak.check_serving(folder, "vllm").ok
    torch.testing.assert_close(run(served(folder, "vllm"), "llama"), output(folder))
    assert "use_rslora" in ak.check_serving(folder, "sglang").problems[0]
    ak.convert_file(folder, tmp_path / "out", server="sglang")
    torch.testing.assert_close(run(served(tmp_path / "out", "sglang"), "llama"), output(folder), atol=1e-5, rtol=1e-5)


def test_a_rank_beyond_the_limit_is_truncated_only_if_asked_for(saved: Saved, tmp_path: Path) -> None:
    assert ak.check_serving(saved(r=16), "vllm").notes == ()  # the server's own limit
    folder = saved(r=24)
    report = ak.check_serving(folder, "vllm")
    assert report.ok
    assert report.notes == ("start the server with --max-lora-rank 32",)
    assert ak.check_serving(folder, "sglang").notes == ("start the server with --max-lora-rank 24",)
    assert "its rank is 24, and the limit is 16" in ak.check_serving(folder, "vllm", max_rank=16).problems[0]
    with pytest.raises(ak.UnsupportedError, match="the limit is 8"):
        ak.convert_file(folder, tmp_path / "out", server="vllm", max_rank=8)
    assert not (tmp_path / "out").exists()
    made = ak.convert_file(folder, tmp_path / "out", server="vllm", max_rank=8, rank=8)
    assert max(made.errors.values()) > 0
    assert ak.check_serving(tmp_path / "out", "vllm", max_rank=8).ok


@pytest.mark.parametrize("server", SERVERS)
def test_a_head_is_left_out_only_if_asked_for(saved: Saved, server: Any, tmp_path: Path) -> None:
    folder = saved(modules_to_save=["lm_head"])
    assert any("modules_to_save" in problem for problem in ak.check_serving(folder, server).problems)
    with pytest.raises(ak.UnsupportedError, match="heads='drop'"):
        ak.convert_file(folder, tmp_path / "out", server=server)
    ak.convert_file(folder, tmp_path / "out", server=server, heads="drop")
    assert ak.check_serving(tmp_path / "out", server).ok


@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("fields", [{"bias": "all"}, {"lora_bias": True}], ids=["bias", "lora_bias"])
def test_biases_are_refused(saved: Saved, fields: dict[str, Any], server: Any, tmp_path: Path) -> None:
    folder = saved(name="bert", target_modules=["query"], **fields)
    assert any("biases" in problem for problem in ak.check_serving(folder, server).problems)
    with pytest.raises(ak.UnsupportedError, match="bias"):
        ak.convert_file(folder, tmp_path / "out", server=server)


@pytest.mark.parametrize(
    ("fields", "servers", "problem"),
    [
        ({"use_dora": True}, SERVERS, "DoRA"),
        ({"peft_type": "LOKR"}, SERVERS, "not LoRA"),
        ({"layer_replication": [[0, 1]]}, SERVERS, "layer_replication"),
        ({"r": 3}, SERVERS, "several ranks"),
        *(
            (fields, SERVERS, "must be numbers")
            for fields in ({"r": [2]}, {"r": None}, {"lora_alpha": "8"}, {"alpha_pattern": [8]})
        ),
        ({"target_modules": "model.*q_proj"}, ("sglang",), "expression"),
    ],
)
def test_files_of_others_are_judged_by_their_config(
    saved: Saved, fields: dict[str, Any], servers: tuple[Any, ...], problem: str
) -> None:
    folder = edited(saved(r=2), **fields)
    for server in servers:
        assert any(problem in found for found in ak.check_serving(folder, server).problems)


def test_modules_and_layers_that_sglang_does_not_know(saved: Saved) -> None:
    bert = saved(name="bert", target_modules=["query"])
    problems = ak.check_serving(bert, "sglang").problems
    assert any("'query'" in problem for problem in problems)
    assert any("outside of the model's `layers`" in problem for problem in problems)
    folder = saved(r=2)
    (folder / "added_tokens.json").write_text('{"<new>": 32}')
    assert "added_tokens" in ak.check_serving(folder, "sglang").problems[0]


def test_convolutions_are_not_served(saved: Saved, tmp_path: Path) -> None:
    folder = saved(name="convnet", target_modules=["conv2d", "fc"], r=2)
    assert any("is a convolution" in problem for problem in ak.check_serving(folder, "vllm").problems)
    with pytest.raises(ak.UnsupportedError, match="is a convolution"):
        ak.convert_file(folder, tmp_path / "out", server="vllm")


def test_numbers_in_place_of_matrices_are_not_served(saved: Saved) -> None:
    folder = saved(r=2)
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({key: torch.tensor(1.0) for key in tensors}, folder / "adapter_model.safetensors")
    assert not ak.check_serving(folder, "vllm").ok


def test_a_file_of_another_program_is_no_folder_of_pefts(saved: Saved, tmp_path: Path) -> None:
    ak.convert_file(saved(r=2), tmp_path / "x.safetensors", naming="diffusers")
    assert "not a folder in PEFT's format" in ak.check_serving(tmp_path / "x.safetensors", "vllm").problems[0]


def test_arguments_that_no_server_has(saved: Saved, tmp_path: Path) -> None:
    folder = saved(r=2)
    with pytest.raises(ak.ConfigError, match="'vllm', 'sglang'"):
        ak.check_serving(folder, "tgi")  # type: ignore[arg-type]
    with pytest.raises(ak.ConfigError, match="max_rank = 20"):
        ak.check_serving(folder, "vllm", max_rank=20)
    with pytest.raises(ak.ConfigError, match="leave `naming` out"):
        ak.convert_file(folder, tmp_path / "out", server="vllm", naming="kohya")
