"""Adapters whose files call a model's layers as an earlier transformers did, or as the model with another head does."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tests import models

import adapterkit as ak
from adapterkit_lora import LoraConfig
from adapterkit_vera import VeraConfig

TEXT = {**models.SIZES, "num_key_value_heads": 1, "vocab_size": models.VOCABULARY, "num_hidden_layers": 1}
IMAGE = {**models.SIZES, "image_size": 8, "patch_size": 4, "num_hidden_layers": 1}
QWEN_IMAGE = {"depth": 1, "hidden_size": 16, "num_heads": 2, "patch_size": 4, "fullatt_block_indexes": [0]}
ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
LLAVA = ((r"^lm_head", "language_model.lm_head"), (r"^model\.language_model", "language_model.model"))


def two_towers(name: str, text: dict[str, Any], image: dict[str, Any], **fields: Any) -> Callable[[], Any]:
    cls: Any = getattr(transformers, f"{name}ForConditionalGeneration")
    return lambda: cls(cls.config_class(text_config=text, vision_config=image, **fields))


def of(cls: Any, **fields: Any) -> Callable[[], Any]:
    return lambda: cls(cls.config_class(**fields))


MLLAMA_IMAGE = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_global_layers": 1,
    "attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
    "vision_output_dim": 32,
    "intermediate_layers_indices": [0],
    "supported_aspect_ratios": [[1, 1]],
}
# How each model is made, and how its names of today become those of before, one replacement after another.
EARLIER: dict[str, tuple[Callable[[], Any], tuple[tuple[str, str], ...]]] = {
    "Qwen2.5-VL": (
        two_towers("Qwen2_5_VL", {**TEXT, "rope_parameters": ROPE}, QWEN_IMAGE),
        ((r"^model\.language_model", "model"), (r"^model\.visual", "visual")),
    ),
    "LLaVA": (
        two_towers("Llava", {"model_type": "llama", **TEXT}, {"model_type": "clip_vision_model", **IMAGE}),
        (*LLAVA, (r"^model\.vision_tower", "vision_tower.vision_model"), (r"^model\.multi", "multi")),
    ),
    "Gemma 3": (
        two_towers("Gemma3", {"model_type": "gemma3_text", "head_dim": 8, **TEXT}, IMAGE, mm_tokens_per_image=4),
        (*LLAVA, (r"^model\.vision_tower", "vision_tower.vision_model")),
    ),
    "Mllama": (
        two_towers("Mllama", {**TEXT, "cross_attention_layers": [], "pad_token_id": 0}, MLLAMA_IMAGE),
        (*LLAVA, (r"^model\.(vision_model|multi)", r"\1")),
    ),
    "CLIP's text encoder": (of(transformers.CLIPTextModel, **IMAGE, vocab_size=32), ((r"^", "text_model."),)),
    "ViT": (
        of(transformers.ViTModel, **IMAGE),
        (
            *((r"^layers", "encoder.layer"), (r"mlp\.fc1", "intermediate.dense"), (r"mlp\.fc2", "output.dense")),
            *((f"attention.{old[0]}_proj", f"attention.attention.{old}") for old in ("query", "key", "value")),
            (r"attention\.o_proj", "attention.output.dense"),
        ),
    ),
}


def before(path: str, names: tuple[tuple[str, str], ...]) -> str:
    for today, earlier in names:
        path = re.sub(today, earlier, path)
    return path


def made(model: Any, folder: Path, config: ak.AdapterConfig) -> ak.Adapters:
    adapters = ak.attach(model.eval())
    adapters.add("a", config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for parameter in adapters.parameters("a"):
            torch.nn.init.normal_(parameter, std=0.3)
    adapters.save("a", folder)
    return adapters


def rename(folder: Path, out: Path, name: Callable[[str], str], **fields: Any) -> dict[str, torch.Tensor]:
    """Write the adapter again, with other paths in its keys and config; its tensors."""
    prefix = "base_model.model."
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors = {prefix + name(key.removeprefix(prefix)): tensor.contiguous() for key, tensor in tensors.items()}
    config = json.loads((folder / "adapter_config.json").read_text())
    out.mkdir()
    save_file(tensors, out / "adapter_model.safetensors")
    (out / "adapter_config.json").write_text(json.dumps({**config, **fields}))
    return tensors


def assert_same_files(one: Path, other: Path) -> None:
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (one, other))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("case", EARLIER)
def test_an_adapter_under_earlier_names_is_that_of_today(case: str, tmp_path: Path) -> None:
    make, names = EARLIER[case]
    model = make()
    heads = ["lm_head"] if hasattr(model, "lm_head") else None
    adapters = made(model, tmp_path / "new", LoraConfig(r=2, target_modules="all-linear", modules_to_save=heads))
    paths = list(adapters._adapter("a").layers)
    earlier = [before(path, names) for path in paths]
    fields = {
        "target_modules": ".*" + "|.*".join(re.escape(path) for path in earlier),
        "rank_pattern": {},
        "alpha_pattern": {earlier[0]: 3, "^" + re.escape(earlier[-1]): 5},
        "modules_to_save": heads and [before("lm_head", names)],
    }
    tensors = rename(tmp_path / "new", tmp_path / "old", lambda key: before(key, names), **fields)
    loaded = ak.attach(make())
    assert loaded.load(tmp_path / "old", "a").ok
    alphas = [layer.config.lora_alpha for layer in loaded._adapter("a").layers.values()]
    assert alphas == [3, *[8] * (len(paths) - 2), 5]
    loaded.save("a", tmp_path / "again")
    assert_same_files(tmp_path / "new", tmp_path / "again")
    config = (tmp_path / "again/adapter_config.json").read_text()
    assert not any(f'"{path}"' in config for path in {*earlier, before("lm_head", names)} - {*paths, "lm_head"})
    assert ak.attach(make()).load(tmp_path / "again", "a").ok
    assert loaded.load_state_dict("a", tensors).ok


def llava(folder: Path) -> tuple[Any, dict[str, torch.Tensor]]:
    """The base and an adapter under earlier names, in folders; the model, and the adapter's tensors."""
    make, names = EARLIER["LLaVA"]
    model = make().eval()
    model.save_pretrained(folder / "base")
    made(model, folder / "new", LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    return model, rename(folder / "new", folder / "old", lambda key: before(key, names))


def test_files_alone_are_read_by_the_bases_names(tmp_path: Path) -> None:
    llava(tmp_path)
    base = tmp_path / "base"
    for name in ("new", "old"):
        ak.merge_checkpoint(base, tmp_path / name, tmp_path / f"{name}-merged")
    first, second = (load_file(tmp_path / f"{name}-merged/model.safetensors") for name in ("new", "old"))
    assert all(torch.equal(first[key], second[key]) for key in first)
    rows = [ak.inspect_adapter(tmp_path / name, base=base).layers for name in ("new", "old")]
    assert [row.path for row in rows[0]] == [row.path for row in rows[1]]
    ak.combine_files({tmp_path / "new": 0.5, tmp_path / "old": 0.5}, tmp_path / "mean", base=base)
    assert ak.diff_adapters(tmp_path / "mean", tmp_path / "new", base=base).same_function


@pytest.mark.parametrize("prefix", ["", "text_model."])
def test_a_folder_of_clip_in_the_names_of_transformers_4_is_a_base(prefix: str, tmp_path: Path) -> None:
    make, names = EARLIER["CLIP's text encoder"]
    model = make().eval()
    model.save_pretrained(tmp_path / "base")
    weights = load_file(tmp_path / "base/model.safetensors")
    weights = {prefix + key.removeprefix("text_model."): tensor for key, tensor in weights.items()}
    save_file(weights, tmp_path / "base/model.safetensors", {"format": "pt"})
    adapters = made(model, tmp_path / "new", LoraConfig(r=2, target_modules=["q_proj", "fc1"]))
    rename(tmp_path / "new", tmp_path / "old", lambda key: before(key, names))
    expected = adapters.merge_and_detach("a").state_dict()
    for name in ("new", "old"):
        ak.merge_checkpoint(tmp_path / "base", tmp_path / name, tmp_path / "out", overwrite=True)
        assert load_file(tmp_path / "out/model.safetensors").keys() == weights.keys()
        merged = type(model).from_pretrained(tmp_path / "out").state_dict()
        assert all(torch.equal(merged[key], tensor) for key, tensor in expected.items())


def test_a_layer_that_the_file_lacks_is_missing_under_earlier_names_too(tmp_path: Path) -> None:
    _, tensors = llava(tmp_path)
    lacking = {key: tensor for key, tensor in tensors.items() if "language_model.model.layers.0.self_attn.v" not in key}
    save_file(lacking, tmp_path / "old/adapter_model.safetensors")
    with pytest.raises(ak.CheckpointError, match=r"model\.language_model\.layers\.0\.self_attn\.v_proj\.lora_A"):
        ak.attach(EARLIER["LLaVA"][0]()).load(tmp_path / "old", "a")


@pytest.mark.parametrize("targets", [["q_proj", "w1"], ["w1"]], ids=" ".join)
def test_experts_that_were_layers_are_refused_with_the_reason(targets: list[str], tmp_path: Path) -> None:
    fields = {"num_experts_per_tok": 1, "num_local_experts": 2, "bos_token_id": 1, "eos_token_id": 2}
    model = of(transformers.MixtralForCausalLM, **TEXT, **fields)()
    made(model, tmp_path / "new", LoraConfig(r=2, target_modules=["q_proj"]))
    layer = "model.layers.0.self_attn.q_proj"
    earlier = {layer: "model.layers.0.block_sparse_moe.experts.1.w1"} if targets == ["w1"] else {}
    tensors = rename(tmp_path / "new", tmp_path / "old", lambda k: re.sub(layer, earlier.get(layer, layer), k))
    experts = {
        key.replace("self_attn.q_proj", "block_sparse_moe.experts.0.w1"): t.clone() for key, t in tensors.items()
    }
    save_file(tensors | experts, tmp_path / "old/adapter_model.safetensors")
    config = json.loads((tmp_path / "new/adapter_config.json").read_text())
    (tmp_path / "old/adapter_config.json").write_text(json.dumps({**config, "target_modules": targets}))
    reason = r"'model.layers.0.mlp.experts' is a MixtralExperts here and has no such layers. An earlier version"
    with pytest.raises(ak.CheckpointError, match=reason):
        ak.attach(of(transformers.MixtralForCausalLM, **TEXT, **fields)()).load(tmp_path / "old", "a")


def test_a_tensor_under_both_names_is_refused(tmp_path: Path) -> None:
    _, tensors = llava(tmp_path)
    both = {**tensors, **load_file(tmp_path / "new/adapter_model.safetensors")}
    save_file(both, tmp_path / "old/adapter_model.safetensors")
    with pytest.raises(ak.CheckpointError, match="two tensors"):
        ak.attach(EARLIER["LLaVA"][0]()).load(tmp_path / "old", "a")


@pytest.mark.parametrize("to_body", [True, False])
@pytest.mark.parametrize(
    "config",
    [LoraConfig(r=2, target_modules="all-linear", alpha_pattern={"layers.0.self_attn.q_proj": 3}), VeraConfig(r=2)],
    ids=["lora", "vera"],
)
def test_an_adapter_goes_from_a_model_with_a_head_to_one_without_and_back(
    config: ak.AdapterConfig, to_body: bool, tmp_path: Path
) -> None:
    whole = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT))
    body = copy.deepcopy(whole.model)
    source, target = (whole, body) if to_body else (body, whole)
    trained = made(source, tmp_path / "a", config.replace(target_modules=["q_proj", "down_proj"]))
    target.save_pretrained(tmp_path / "base")
    loaded = ak.attach(target.eval())
    assert loaded.load(tmp_path / "a", "a").ok
    ids = models.tokens()
    outputs = [getattr(a.model, "model", a.model)(ids).last_hidden_state for a in (trained, loaded)]
    models.assert_same_outputs(*outputs)
    ak.merge_checkpoint(tmp_path / "base", tmp_path / "a", tmp_path / "merged")
    merged = type(target).from_pretrained(tmp_path / "merged").state_dict()
    for key, tensor in loaded.merge_and_detach().state_dict().items():
        torch.testing.assert_close(merged[key], tensor, rtol=0, atol=1e-6)
