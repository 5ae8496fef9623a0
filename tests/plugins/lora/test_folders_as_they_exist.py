"""Folders as PEFT 0.2 to 0.21 and programs around it write them: what PEFT reads rightly loads as in PEFT."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from peft.tuners.lora.config import MontecloraConfig, VeloraConfig
from safetensors.torch import load_file, save_file
from tests.models import SIZES, VOCABULARY, build
from tests.plugins.parity import assert_same, loaded_here, loaded_in_peft, perturb, saved_by_peft
from torch import Tensor

import adapterkit as ak

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")

UNKNOWN = "the method 'lora' does not know"
# What a config has more than PEFT's fields of then, and whether that is worth a warning.
PEFT_0_2 = {"enable_lora": None, "merge_weights": False, "fan_in_fan_out": False}
FIELDS: dict[str, tuple[dict[str, Any], str | None]] = {
    "PEFT 0.2": (PEFT_0_2, None),
    "PEFT 0.2, merge_weights": ({**PEFT_0_2, "merge_weights": True}, f"{UNKNOWN} merge_weights = True"),
    "PEFT 0.14, EVA": ({"init_lora_weights": "eva", "eva_config": {"rho": 2.0, "tau": 0.99}}, None),
    "PEFT 0.21, MiCA": ({"init_lora_weights": "MiCA"}, None),
    "gaussian in capitals": ({"init_lora_weights": "Gaussian"}, None),
    "an unused loftq_config": ({"loftq_config": {"loftq_bits": 4, "loftq_iter": 1}}, None),
    "an unused eva_config": ({"eva_config": {"rho": 1.0}}, None),
    "QA-LoRA off, another group size": ({"use_qalora": False, "qalora_group_size": 32}, None),
    "null for what is off": (
        {"fan_in_fan_out": None, "use_rslora": None, "lora_bias": None, "init_lora_weights": None},
        None,
    ),
    "empty lists": ({"layers_to_transform": [], "exclude_modules": [], "layers_pattern": []}, None),
    "runtime_config": ({"runtime_config": {"ephemeral_gpu_offload": True}}, None),
    "megatron": ({"megatron_core": "megatron.core.v2", "megatron_config": None}, None),
    "unsloth": ({"auto_mapping": {"base_model_class": "LlamaForCausalLM", "unsloth_fixed": True}}, None),
    "langchain": ({"_from_model_config": True}, f"{UNKNOWN} _from_model_config = True"),
    "LoRA+": ({"lorap_emb_lr": 1e-6, "lorap_lr_ratio": None}, f"{UNKNOWN} lorap_emb_lr = 1e-06"),
    "a model's field": ({"torch_dtype": "bfloat16"}, f"{UNKNOWN} torch_dtype = 'bfloat16'"),
    "ms-swift": ({"lora_dtype": "float32", "lorap_lr_ratio": None}, f"{UNKNOWN} lora_dtype = 'float32'"),
    "another method's scale": ({"alpha": 16}, f"{UNKNOWN} alpha = 16"),
    "mlx's field": ({"fine_tune_type": "lora"}, None),
    "next year's default": ({"peft_version": "0.99.0", "new": "auto"}, "new = 'auto'. It was written with PEFT 0.99.0"),
}
# Fields that change what a trained adapter computes.
CHANGES: dict[str, dict[str, Any]] = {
    "fused layers of PEFT 0.2": {"enable_lora": [True, False, True]},
    "DoRA": {"use_dora": True},
    "DoRA of mlx": {"fine_tune_type": "dora"},
    "QA-LoRA": {"use_qalora": True},
    "activated LoRA": {"alora_invocation_tokens": [1, 2]},
    "replicated layers": {"layer_replication": [[0, 2], [1, 2]]},
    "LoftQ": {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}},
    "CorDA": {"init_lora_weights": "corda", "corda_config": {}},
    "LoRA-GA": {"init_lora_weights": "lora_ga"},
    "KaSA": {"kasa_config": {"beta": 1e-4}},
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    saved_by_peft("lora", build("llama"), folder, "llama")
    return folder


def with_fields(saved: Path, folder: Path, fields: dict[str, Any]) -> Path:
    """A folder with the weights of `saved`, and its config with other fields."""
    (folder / "adapter_model.safetensors").symlink_to(saved / "adapter_model.safetensors")
    config = json.loads((saved / "adapter_config.json").read_text(encoding="utf-8"))
    (folder / "adapter_config.json").write_text(json.dumps({**config, **fields}), encoding="utf-8")
    return folder


@pytest.mark.parametrize(("fields", "warning"), FIELDS.values(), ids=FIELDS)
def test_a_config_loads_as_in_peft(saved: Path, tmp_path: Path, fields: dict[str, Any], warning: str | None) -> None:
    folder = with_fields(saved, tmp_path, fields)
    expected = loaded_in_peft(build("llama"), folder, "llama")
    model = build("llama")
    if warning is None:
        found = loaded_here(model, folder, "llama")
    else:
        with pytest.warns(ak.AdapterWarning) as caught:
            found = loaded_here(model, folder, "llama")
        assert warning in str(caught[0].message)
    assert_same(found, expected, "llama")


@pytest.mark.parametrize("version", ["0.2", "0.4", "0.7"])
def test_a_config_with_the_few_fields_of_an_old_version_loads_as_in_peft(
    saved: Path, tmp_path: Path, version: str
) -> None:
    names = ["base_model_name_or_path", "bias", "fan_in_fan_out", "inference_mode", "lora_alpha", "lora_dropout"]
    names += ["modules_to_save", "peft_type", "r", "target_modules", "task_type"]
    names += ["auto_mapping", "init_lora_weights", "layers_pattern", "layers_to_transform", "revision"] * (
        version > "0.2"
    )
    names += ["rank_pattern", "alpha_pattern"] * (version == "0.7")
    config = json.loads((saved / "adapter_config.json").read_text(encoding="utf-8"))
    (tmp_path / "adapter_config.json").write_text(json.dumps({name: config[name] for name in names}), encoding="utf-8")
    (tmp_path / "adapter_model.safetensors").symlink_to(saved / "adapter_model.safetensors")
    expected = loaded_in_peft(build("llama"), tmp_path, "llama")
    assert_same(loaded_here(build("llama"), tmp_path, "llama"), expected, "llama")


def test_olora_in_any_case_is_computed_from_the_base_as_in_peft(tmp_path: Path) -> None:
    saved_by_peft("lora", build("llama"), tmp_path, "llama", init_lora_weights="OLoRA")
    expected = loaded_in_peft(build("llama"), tmp_path, "llama")
    assert_same(loaded_here(build("llama"), tmp_path, "llama"), expected, "llama")


@pytest.mark.parametrize("fields", CHANGES.values(), ids=CHANGES)
def test_a_field_that_changes_what_the_adapter_computes_is_refused(
    saved: Path, tmp_path: Path, fields: dict[str, Any]
) -> None:
    folder = with_fields(saved, tmp_path, fields)
    with pytest.raises(ak.UnsupportedError) as error:
        ak.attach(build("llama")).load(folder, name="a")
    assert next(iter(fields)) in str(error.value)
    assert "emove" not in str(error.value)


@pytest.mark.parametrize(
    "fields",
    [{"velora_config": VeloraConfig(num_groups=2)}, {"monteclora_config": MontecloraConfig()}],
    ids=["VeLoRA", "MonteCLoRA"],
)
def test_variants_that_differ_in_training_alone_are_plain_lora(tmp_path: Path, fields: dict[str, Any]) -> None:
    saved_by_peft("lora", build("llama"), tmp_path, "llama", **fields)
    expected = loaded_in_peft(build("llama"), tmp_path, "llama")
    assert_same(loaded_here(build("llama"), tmp_path, "llama"), expected, "llama")
    assert not ak.inspect_adapter(tmp_path).unknown


# Classifiers of 2023 and early 2024, whose config does not name the head that the file holds

WORDS = {"vocab_size": 32, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
DISTILBERT = {"vocab_size": 32, "dim": 8, "hidden_dim": 12, "n_layers": 1, "n_heads": 2, "max_position_embeddings": 16}
CLASSIFIERS: dict[str, tuple[str, str, dict[str, Any], str, list[str]]] = {
    "classifier": ("BertForSequenceClassification", "SEQ_CLS", WORDS, "query", ["classifier"]),
    "tokens": ("BertForTokenClassification", "TOKEN_CLS", WORDS, "query", ["classifier"]),
    "two layers": ("RobertaForSequenceClassification", "SEQ_CLS", WORDS, "query", ["classifier"]),
    "an end alike": (
        "DistilBertForSequenceClassification",
        "SEQ_CLS",
        DISTILBERT,
        "q_lin",
        ["classifier", "pre_classifier"],
    ),
    "score": ("LlamaForSequenceClassification", "SEQ_CLS", {**WORDS, "pad_token_id": 0}, "q_proj", ["score"]),
    "answers": ("BertForQuestionAnswering", "QUESTION_ANS", WORDS, "query", ["qa_outputs"]),
}


def classifier(name: str) -> Any:
    cls = getattr(transformers, CLASSIFIERS[name][0])
    torch.manual_seed(0)
    return cls(cls.config_class(**CLASSIFIERS[name][2])).eval()


def outputs(model: Any) -> Tensor:
    with torch.no_grad():
        found = model(input_ids=torch.arange(12).view(2, 6) + 2).to_tuple()
        return torch.cat([t.flatten() for t in found if isinstance(t, Tensor)])


def old_classifier(name: str, folder: Path, task_type: str | None) -> None:
    """A folder of the real PEFT with `modules_to_save: null`, as it wrote it then."""
    _, task, _, target, _ = CLASSIFIERS[name]
    model = peft.get_peft_model(classifier(name), peft.LoraConfig(task_type=task, r=2, target_modules=[target]))
    perturb(p for p in model.parameters() if p.requires_grad)
    model.save_pretrained(folder)
    path = folder / "adapter_config.json"
    fields = {**json.loads(path.read_text(encoding="utf-8")), "modules_to_save": None, "task_type": task_type}
    path.write_text(json.dumps(fields), encoding="utf-8")


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_the_head_of_an_old_classifier_is_the_adapters_as_in_peft(name: str, tmp_path: Path) -> None:
    old_classifier(name, tmp_path / "a", CLASSIFIERS[name][1])
    base, heads = classifier(name), CLASSIFIERS[name][4]
    before = outputs(base)
    expected = outputs(peft.PeftModel.from_pretrained(classifier(name), tmp_path / "a").eval())
    assert ak.attach(base).load(tmp_path / "a", name="a").ok
    torch.testing.assert_close(outputs(base), expected, rtol=1e-5, atol=1e-5)
    assert (expected - before).abs().max() > 1e-2
    assert sorted(ak.inspect_adapter(tmp_path / "a").heads) == heads
    ak.convert_file(tmp_path / "a", tmp_path / "b", to="lora", rank=2)
    assert sorted(ak.inspect_adapter(tmp_path / "b").heads) == heads
    classifier(name).save_pretrained(tmp_path / "base")
    ak.merge_checkpoint(tmp_path / "base", tmp_path / "a", tmp_path / "merged")
    merged = getattr(transformers, CLASSIFIERS[name][0]).from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(outputs(merged), expected, rtol=1e-5, atol=1e-5)


def test_a_heads_name_tells_without_a_task(tmp_path: Path) -> None:
    old_classifier("score", tmp_path, None)
    base = classifier("score")
    assert ak.attach(base).load(tmp_path, name="a").ok
    assert [*ak.attach(base).heads("a")] == [*ak.inspect_adapter(tmp_path).heads] == ["score"]


def test_modules_in_full_that_the_config_does_not_name_are_refused_with_the_cure(tmp_path: Path) -> None:
    saved_by_peft("lora", build("llama"), tmp_path, "llama", modules_to_save=["norm"])
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, "modules_to_save": None}), encoding="utf-8")
    with pytest.raises(ak.CheckpointError, match=r"holds '.*norm\.weight' of the base in full, .* in modules_to_save"):
        ak.attach(build("llama")).load(tmp_path, name="a")


def test_biases_that_peft_0_7_lost_are_refused_with_the_cause(tmp_path: Path) -> None:
    saved_by_peft("lora", build("bert"), tmp_path, "bert", bias="lora_only")
    file = tmp_path / "adapter_model.safetensors"
    save_file({key: tensor for key, tensor in load_file(file).items() if not key.endswith("bias")}, file)
    with pytest.raises(ak.CheckpointError, match="lacks the biases that were trained: with bias="):
        ak.attach(build("bert")).load(tmp_path, name="a")


# What a folder holds beside the adapter, or for another model


@pytest.mark.parametrize(
    "name", ["non_lora_trainables.bin", "trainable_params.bin", "mm_projector.bin", "value_head.safetensors", "vit.pt"]
)
def test_weights_in_a_second_file_are_told_of(saved: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(saved, tmp_path / "a")
    (tmp_path / "a" / name).write_bytes(b"")
    build("llama").save_pretrained(tmp_path / "base")
    calls = {
        "load": lambda: ak.attach(build("llama")).load(tmp_path / "a", name="a"),
        "inspect": lambda: ak.inspect_adapter(tmp_path / "a"),
        "convert": lambda: ak.convert_file(tmp_path / "a", tmp_path / "b"),
        "merge": lambda: ak.merge_checkpoint(tmp_path / "base", tmp_path / "a", tmp_path / "merged"),
    }
    for call in calls.values():
        with pytest.warns(ak.AdapterWarning, match=rf"holds weights beside the adapter: {name}\. They are not read"):
            call()


def test_files_of_a_training_beside_an_adapter_are_not_told_of(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "a")
    names = ("optimizer.pt", "scheduler.pt", "rng_state_0.pth", "training_args.bin", "model-00001-of-00002.safetensors")
    names += ("pytorch_model_fsdp.bin", "lr_scheduler.bin", "training_state.pt", "random_states_0.pkl", "sampler.bin")
    for name in (*names, "pytorch_model.bin", "adapter_model.bin", "scaler.pt", "tokenizer.json", "model.safetensors"):
        (tmp_path / "a" / name).write_bytes(b"")
    assert ak.attach(build("llama")).load(tmp_path / "a", name="a").ok


@pytest.mark.parametrize("part", ["text_encoder", "transformer", "unet", "prior"])
def test_keys_for_another_part_of_a_pipeline_in_a_folder_of_pefts_are_refused(
    saved: Path, tmp_path: Path, part: str
) -> None:
    folder = shutil.copytree(saved, tmp_path / "a")
    tensors = load_file(saved / "adapter_model.safetensors")
    key, tensor = next(iter(tensors.items()))
    other = key.replace("base_model.model.model", f"base_model.model.{part}")
    save_file({**tensors, other: tensor.clone()}, folder / "adapter_model.safetensors")
    build("llama").save_pretrained(tmp_path / "base")
    with pytest.raises(ak.CheckpointError, match=f"{part}.layers.0"):
        ak.attach(build("llama")).load(folder, name="a")
    with pytest.raises(ak.CheckpointError, match=f"has no '{part}', as the adapters have"):
        ak.merge_checkpoint(tmp_path / "base", folder, tmp_path / "merged")
    with pytest.raises(ak.CheckpointError, match=f"{part}.layers.0"):
        ak.inspect_adapter(folder, base=tmp_path / "base")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("targets", [["embed_tokens"], ["embed_tokens", "lm_head"], ["q_proj"]], ids=" ".join)
def test_tied_layers_that_peft_trains_alike_are_both_read(targets: list[str], tied: bool, tmp_path: Path) -> None:
    """With `ensure_weight_tying` the file has tensors of both, and its config need not name the second."""

    def base() -> transformers.PreTrainedModel:
        config = transformers.LlamaConfig(**SIZES, vocab_size=VOCABULARY, tie_word_embeddings=tied)
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(config).eval()

    fields = {"target_modules": targets, "ensure_weight_tying": True}
    expected = saved_by_peft("lora", base(), tmp_path, "llama", **fields)
    model = base()
    assert_same(loaded_here(model, tmp_path, "llama"), expected, "llama")
    again = ak.attach(model).save("loaded", tmp_path / "again")
    assert_same(loaded_in_peft(base(), again, "llama"), expected, "llama")
    layers = [layer.path for layer in ak.inspect_adapter(tmp_path).layers]
    ak.convert_file(tmp_path, tmp_path / "converted")
    assert [layer.path for layer in ak.inspect_adapter(tmp_path / "converted").layers] == layers


def test_an_alpha_beside_the_tensors_counts_and_a_config_that_disagrees_raises_a_warning(
    saved: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(saved, tmp_path / "a")
    tensors = load_file(saved / "adapter_model.safetensors")
    layer = next(key for key in tensors if "q_proj.lora_A" in key).removesuffix("lora_A.weight")
    expected = loaded_here(build("llama"), saved, "llama")
    save_file({**tensors, f"{layer}alpha": torch.tensor(8.0)}, folder / "adapter_model.safetensors")
    assert_same(loaded_here(build("llama"), folder, "llama"), expected, "llama")  # the config says 8, too
    save_file({**tensors, f"{layer}alpha": torch.tensor(2.0)}, folder / "adapter_model.safetensors")
    tensors[f"{layer}lora_B.weight"] /= 4
    with pytest.warns(ak.AdapterWarning, match=r"The config scales 'model.*q_proj' by 1, and .*alpha' by 0.25. The al"):
        found = loaded_here(build("llama"), folder, "llama")
    save_file(tensors, folder / "adapter_model.safetensors")
    assert_same(found, loaded_here(build("llama"), folder, "llama"), "llama")


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_biases_without_base_layer_as_before_peft_0_7(tmp_path: Path, bias: str) -> None:
    expected = saved_by_peft("lora", build("bert"), tmp_path / "new", "bert", bias=bias)
    old = shutil.copytree(tmp_path / "new", tmp_path / "old")
    tensors = load_file(old / "adapter_model.safetensors")
    renamed = {key.replace(".base_layer.bias", ".bias"): tensor for key, tensor in tensors.items()}
    assert renamed.keys() != tensors.keys()
    save_file(renamed, old / "adapter_model.safetensors")
    assert_same(loaded_here(build("bert"), old, "bert"), expected, "bert")
    assert ak.inspect_adapter(old).biases == ak.inspect_adapter(tmp_path / "new").biases
    base: Any = build("bert")
    base.save_pretrained(tmp_path / "base")
    for name in ("old", "new"):
        ak.merge_checkpoint(tmp_path / "base", tmp_path / name, tmp_path / f"merged {name}")
    one, other = (load_file(tmp_path / f"merged {name}" / "model.safetensors") for name in ("old", "new"))
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
        {"target_modules": ["embed_tokens", "lm_head"]},  # PEFT saves both tables beside the factors
    ],
    ids=["some layers", "embeddings"],
)
@pytest.mark.parametrize("with_base", [False, True])
def test_what_is_converted_without_a_change_loads_as_before(
    fields: dict[str, Any], with_base: bool, tmp_path: Path
) -> None:
    expected = saved_by_peft("lora", build("llama"), tmp_path / "a", "llama", **fields)
    ak.convert_file(tmp_path / "a", tmp_path / "b", base=build("llama") if with_base else None)
    assert_same(loaded_here(build("llama"), tmp_path / "b", "llama"), expected, "llama")
