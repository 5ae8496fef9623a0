"""Heads and label sets: an adapter's own copy of the output layers, which comes and goes with it."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
import transformers
from tests.core.conftest import assert_as_before, different, set_parameters, snapshot
from tests.models import assert_same_outputs, build, inputs, run, tokens
from torch import Tensor, nn
from torch.nn.utils import prune

import adapterkit as ak
from adapterkit_lora import LoraConfig

Trained = Callable[..., ak.Adapters]

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
BERT = {**SIZES, "vocab_size": 32, "max_position_embeddings": 16}
DISTIL = {"vocab_size": 32, "dim": 16, "hidden_dim": 24, "n_layers": 1, "n_heads": 2}
GPT2 = {"vocab_size": 32, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16, "pad_token_id": 0}
T5 = {"vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
BART = {"vocab_size": 32, "d_model": 16, "max_position_embeddings": 16, "eos_token_id": 1, "pad_token_id": 0}
BART |= {f"{part}_{what}": 1 for part in ("encoder", "decoder") for what in ("layers", "attention_heads", "ffn_dim")}
RESNET = {"embedding_size": 8, "hidden_sizes": [8], "depths": [1], "layer_type": "basic"}
IDS, ENDING = {"input_ids": tokens()}, {"input_ids": torch.tensor([[3, 4, 5, 1], [6, 7, 8, 1]])}
CHOICES = {"input_ids": tokens().unsqueeze(0)}
PIXELS = {"pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))}

# name -> (class, config, its sizes, inputs, heads, target)
TASKS: dict[str, tuple[str, str, dict[str, Any], dict[str, Tensor], tuple[str, ...], str]] = {
    "bert": ("BertForSequenceClassification", "BertConfig", BERT, IDS, ("classifier",), "query"),
    "roberta": ("RobertaForSequenceClassification", "RobertaConfig", BERT, IDS, ("classifier",), "query"),
    "distilbert": (
        *("DistilBertForSequenceClassification", "DistilBertConfig", DISTIL),
        *(IDS, ("pre_classifier", "classifier"), "q_lin"),
    ),
    "gpt2": ("GPT2ForSequenceClassification", "GPT2Config", GPT2, IDS, ("score",), "c_attn"),
    "t5": ("T5ForSequenceClassification", "T5Config", T5, ENDING, ("classification_head",), "q"),
    "bart": ("BartForSequenceClassification", "BartConfig", BART, ENDING, ("classification_head",), "q_proj"),
    "tokens": ("BertForTokenClassification", "BertConfig", BERT, IDS, ("classifier",), "query"),
    "vit": (
        *("ViTForImageClassification", "ViTConfig", {**SIZES, "image_size": 32, "patch_size": 8}),
        *(PIXELS, ("classifier",), "q_proj"),
    ),
    "resnet": ("ResNetForImageClassification", "ResNetConfig", RESNET, PIXELS, ("classifier",), "convolution"),
    "questions": ("BertForQuestionAnswering", "BertConfig", BERT, IDS, ("qa_outputs",), "query"),
    "choices": ("BertForMultipleChoice", "BertConfig", BERT, CHOICES, ("classifier",), "query"),
}


def task_model(name: str, cls: Any = None) -> Any:
    made, config, sizes, *_ = TASKS[name]
    sizes = sizes if name in ("questions", "choices") else {**sizes, "num_labels": 3}
    sizes = {**sizes, "decoder_start_token_id": 0} if name == "t5" else sizes
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return (cls or getattr(transformers, made))(getattr(transformers, config)(**sizes)).eval()


def outputs(model: nn.Module, name: str) -> Tensor:
    with torch.no_grad():
        out = model(**TASKS[name][3])
    return torch.stack([out.start_logits, out.end_logits]) if name == "questions" else out.logits


def add(adapters: ak.Adapters, name: str, seed: int = 1, **arguments: Any) -> ak.AddReport:
    """Add an adapter on `query` with the model's own head, as if trained, and activate it."""
    fields = {k: arguments.pop(k) for k in ("modules_to_save", "bias", "target_modules") if k in arguments}
    report = adapters.add(name, LoraConfig(**{"r": 2, "target_modules": ["query"], **fields}), **arguments)
    set_parameters(adapters, name, seed)
    return report


# Which module is the head


@pytest.mark.parametrize("name", TASKS)
def test_the_task_head_is_found_acts_is_disabled_saved_loaded_and_removed_with_its_adapter(
    name: str, tmp_path: Path
) -> None:
    model = task_model(name)
    before, base = snapshot(model), outputs(model, name)
    adapters = ak.attach(model)
    labels = None if name in ("questions", "choices") else 5
    report = adapters.add("a", LoraConfig(r=2, target_modules=[TASKS[name][5]]), num_labels=labels)
    assert report.heads == TASKS[name][4]
    assert all(f"trained in full: {head}" in str(report) for head in report.heads)
    with torch.no_grad():
        for path, parameter in adapters.named_parameters("a"):
            if "lora_" not in path:  # the head alone: lora_B is zero
                parameter.add_(0.5 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    expected = outputs(model, name)
    assert different(expected, base)
    for classes in (5, 3) if labels else ():  # the loss follows the label set of the head that acts
        assert model.config.num_labels == classes
        given = torch.tensor([classes - 1, 0])
        given = given[:, None].repeat(1, 6) if name == "tokens" else given
        out = model(**TASKS[name][3], labels=given)
        assert out.logits.shape[-1] == classes
        torch.testing.assert_close(out.loss, nn.functional.cross_entropy(out.logits.view(-1, classes), given.view(-1)))
        adapters.activate()
    adapters.activate("a")
    with adapters.disabled():
        assert torch.equal(outputs(model, name), base)
    adapters.save("a", tmp_path)
    fresh = task_model(name)
    assert ak.attach(fresh).load(tmp_path, "b").ok
    assert_same_outputs(outputs(fresh, name), expected)
    assert labels is None or fresh.config.num_labels == 5
    adapters.remove("a")
    model.config.problem_type = None  # transformers set it at the base's own loss
    assert torch.equal(outputs(model, name), base)
    assert_as_before(adapters.detach(), before)


def test_no_head_is_taken_where_modules_to_save_is_none_and_of_language_models() -> None:
    report = add(ak.attach(build("bert")), "a", modules_to_save=None)
    assert report.heads == ()
    assert "trained in full" not in str(report)
    for name in ("gpt2", "llama", "t5"):
        assert ak.select(build(name), LoraConfig()).heads == ()


def test_a_nested_head_is_saved_under_its_whole_path(tmp_path: Path) -> None:
    model = task_model("roberta")
    adapters = ak.attach(model)
    add(adapters, "a", modules_to_save=["classifier.dense", "encoder.layer.0.output"])
    expected = outputs(model, "roberta")
    adapters.save("a", tmp_path)
    keys = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors").keys()
    assert "base_model.model.classifier.dense.weight" in keys
    assert "base_model.model.roberta.encoder.layer.0.output.LayerNorm.weight" in keys
    fresh = ak.attach(task_model("roberta"))
    assert fresh.load(tmp_path, "a").ok
    assert_same_outputs(outputs(fresh.model, "roberta"), expected)


def test_a_head_is_copied_without_the_heads_of_other_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    copied, copy_parameter = list[nn.Parameter](), nn.Parameter.__deepcopy__
    monkeypatch.setattr(nn.Parameter, "__deepcopy__", lambda own, memo: copied.append(own) or copy_parameter(own, memo))
    adapters = ak.attach(build("bert"))
    for count, name in enumerate("abc", 1):
        adapters.add(name, LoraConfig(target_modules=["query", "classifier"], modules_to_save=["classifier"]))
        assert len(copied) == 2 * count


def test_a_head_holds_no_part_of_another_adapter() -> None:
    model = build("bert")
    adapters = ak.attach(model)
    add(adapters, "a", target_modules=["classifier"], modules_to_save=None, bias="all")
    add(adapters, "b")
    assert not [key for key, _ in adapters.named_parameters("b") if "adapter" in key]
    expected = run(model, "bert")
    adapters.remove("a")
    assert torch.equal(run(model, "bert"), expected)


# Switching


@pytest.mark.parametrize("order", [("a", "b"), ("b", "a")])
@pytest.mark.parametrize(("chosen", "labels"), [("a", 5), ("b", 7)])
def test_heads_chooses_whose_head_and_labels_act(chosen: str, labels: int, order: tuple[str, str]) -> None:
    model = build("bert")
    adapters = ak.attach(model)
    add(adapters, "a", num_labels=5)
    add(adapters, "b", num_labels=7)
    adapters.activate(*order, heads=chosen)
    assert run(model, "bert").shape[-1] == model.config.num_labels == model.num_labels == labels


def test_adapters_with_and_without_heads_act_together() -> None:
    model = build("bert")
    adapters = ak.attach(model)
    add(adapters, "a", num_labels=5)
    add(adapters, "b", modules_to_save=None, target_modules=["value"])
    adapters.activate("a", trainable=False)
    alone = run(model, "bert")
    adapters.activate("b", "a", trainable=False)
    together = run(model, "bert")
    assert together.shape == (2, 5)
    assert different(alone, together)


@pytest.mark.parametrize("target", ["classifier", "classifier.dense"])
def test_a_head_acts_in_place_of_its_module_and_of_what_others_change_in_it(target: str) -> None:
    name = "bert" if target == "classifier" else "roberta"
    model = task_model(name)
    adapters = ak.attach(model)
    add(adapters, "a", seed=1)
    add(adapters, "b", seed=2, target_modules=[target], modules_to_save=None)
    base = outputs(model, name)
    adapters.activate("a", trainable=False)
    alone = outputs(model, name)
    with pytest.warns(ak.AdapterWarning, match=rf"'a' has its head at 'classifier', what 'b' changes at '{target}'"):
        adapters.activate("a", "b", trainable=False)
    assert torch.equal(outputs(model, name), alone)
    assert different(base, alone)


@pytest.mark.parametrize(("name", "path"), [("bert", "classifier"), ("roberta", "classifier.dense")])
def test_a_hook_on_the_head_or_inside_it_fires_once_whichever_head_acts(name: str, path: str) -> None:
    model = task_model(name)
    calls: list[nn.Module] = []
    model.get_submodule(path).register_forward_hook(lambda module, args, output: calls.append(module))
    adapters = ak.attach(model)
    add(adapters, "a")
    outputs(model, name)
    adapters.activate()
    outputs(model, name)
    assert len(calls) == 2
    assert name != "bert" or all(module is model.classifier for module in calls)


def test_a_hook_stays_when_the_head_becomes_the_models_own() -> None:
    model = build("bert")
    adapters, calls = ak.attach(model), list[object]()
    add(adapters, "a", num_labels=5)
    handle = model.classifier.register_forward_hook(lambda *given: calls.append(given[2]), with_kwargs=True)
    run(model, "bert")
    run(adapters.merge_and_detach(), "bert")
    assert calls == [{}, {}]
    handle.remove()
    run(model, "bert")
    assert len(calls) == 2


# Label sets


def test_labels_follow_the_active_adapter_and_go_back() -> None:
    model = build("bert")
    adapters = ak.attach(model)
    before = model.config.to_dict()
    names = {0: "sport", 1: "science", 2: "art", 3: "war"}
    add(adapters, "topic", id2label=names)
    assert model.config.id2label == names
    assert model.config.label2id == {"sport": 0, "science": 1, "art": 2, "war": 3}
    assert model.config.num_labels == model.num_labels == 4
    adapters.copy("topic", "copy")
    adapters.rename("topic", "b")
    with adapters.disabled():
        assert model.config.to_dict() == before
        assert model.num_labels == 3
    assert model.config.num_labels == model.num_labels == 4
    adapters.activate()
    assert model.config.to_dict() == before
    for name in ("copy", "b"):
        adapters.activate(name)
        assert model.config.id2label == names
    adapters.remove("b")
    assert model.config.to_dict() == before
    assert model.num_labels == 3


@pytest.mark.parametrize("names", [("no", "ja", "ça va", "?"), ("no", "ja", "maybe")], ids=len)
def test_labels_survive_save_and_load_in_the_safetensors_header(names: tuple[str, ...], tmp_path: Path) -> None:
    model = build("bert")
    adapters = ak.attach(model)
    add(adapters, "a", id2label=dict(enumerate(names)))
    adapters.save("a", tmp_path)
    with safetensors.safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        assert "ja" in file.metadata()["adapterkit.id2label"]
    assert "ja" not in (tmp_path / "adapter_config.json").read_text()
    fresh = build("bert")
    ak.attach(fresh).load(tmp_path, "x")
    assert fresh.config.id2label == dict(enumerate(names))
    assert fresh.num_labels == len(names)


def test_names_that_are_set_in_the_config_while_a_head_acts_are_its_names(tmp_path: Path) -> None:
    model = build("bert")
    adapters = ak.attach(model)
    add(adapters, "x", num_labels=2)
    adapters.rename("x", "a")
    model.config.id2label, model.config.label2id = {0: "no", 1: "yes"}, {"no": 0, "yes": 1}
    adapters.save("a", tmp_path / "a")
    model.save_pretrained(tmp_path / "model")
    adapters.activate()
    assert model.config.num_labels == 3
    adapters.activate("a")
    assert (model.config.id2label, model.config.label2id) == ({0: "no", 1: "yes"}, {"no": 0, "yes": 1})
    for name in ("a", "model"):
        fresh = build("bert")
        ak.attach(fresh).load(tmp_path / name)
        assert fresh.config.id2label == {0: "no", 1: "yes"}


def test_a_file_with_another_number_of_rows_and_no_labels_loads_at_its_size(tmp_path: Path) -> None:
    adapters = ak.attach(build("bert"))
    add(adapters, "a", num_labels=6)
    expected = run(adapters.model, "bert")
    adapters.save("a", tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    safetensors.torch.save_file(safetensors.torch.load_file(weights), weights, metadata={"format": "pt"})
    fresh = build("bert")
    assert ak.attach(fresh).load(tmp_path, "a").ok
    assert_same_outputs(run(fresh, "bert"), expected)
    assert fresh.config.num_labels == fresh.num_labels == 6
    assert fresh.config.id2label[5] == "LABEL_5"


def test_regression_does_not_leak_into_a_classification_adapter_or_the_base() -> None:
    model = build("bert")
    adapters = ak.attach(model)
    add(adapters, "score", num_labels=1)
    out = model(**IDS, labels=torch.tensor([0.5, 2.0]))
    torch.testing.assert_close(out.loss, nn.functional.mse_loss(out.logits.squeeze(), torch.tensor([0.5, 2.0])))
    assert model.config.problem_type == "regression"
    adapters.rename("score", "grade")
    add(adapters, "topic", num_labels=4)
    labels = torch.tensor([3, 1])
    out = model(**IDS, labels=labels)
    torch.testing.assert_close(out.loss, nn.functional.cross_entropy(out.logits, labels))
    with adapters.disabled():
        assert model.config.problem_type is None
    adapters.activate("grade")
    assert model.config.problem_type == "regression"
    adapters.detach()
    assert model.config.problem_type is None


def test_num_labels_finds_the_output_layer_whatever_other_heads_come_after_it() -> None:
    class Reordered(transformers.BertForSequenceClassification):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.extra = nn.Linear(config.hidden_size, 2)

    model = task_model("bert", Reordered)
    report = add(ak.attach(model), "a", num_labels=5)
    assert set(report.heads) == {"classifier", "extra"}
    assert outputs(model, "bert").shape == (2, 5)


def test_a_new_head_of_another_size_is_initialised_as_the_model_does_it() -> None:
    model = build("bert")
    adapters = ak.attach(model)
    adapters.add("a", LoraConfig(target_modules=["query"]), num_labels=500)
    head = model.classifier.adapter_heads["a"]
    assert head.out_features == 500
    assert head.weight.std().item() == pytest.approx(model.config.initializer_range, rel=0.1)
    assert not head.bias.any()


# Batch norms, biases and dtypes


def test_the_report_says_that_batch_norms_keep_counting() -> None:
    report = ak.attach(task_model("resnet")).add("a", LoraConfig(r=2, target_modules=["convolution"]))
    (note,) = [n for n in report.notes if "batch norms" in n]
    assert "running statistics" in note
    assert f"note: {note}" in str(report)


def test_a_batch_norm_in_modules_to_save_has_its_own_statistics(tmp_path: Path) -> None:
    model = build("convnet")
    base = run(model, "convnet")
    adapters = ak.attach(model)
    report = adapters.add("a", LoraConfig(r=2, target_modules=["fc"], modules_to_save=["norm"]))
    assert report.notes == ()
    model.train()
    for _ in range(3):
        model(torch.randn(4, 4, 12) + 2)
    model.eval()
    expected = run(model, "convnet")
    assert different(expected, base)
    with adapters.disabled():
        assert torch.equal(run(model, "convnet"), base)
    adapters.save("a", tmp_path)
    fresh = ak.attach(build("convnet"))
    fresh.load(tmp_path, "a")
    assert_same_outputs(run(fresh.model, "convnet"), expected)


HALF = [torch.float16, torch.bfloat16]


def half(name: str, dtype: torch.dtype, *heads: str, **fields: Any) -> ak.Adapters:
    """The adapters of a half-precision model: one, `"a"`, with these heads, as if trained."""
    adapters = ak.attach(build(name).to(dtype))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        adapters.add("a", LoraConfig(**{"r": 2, "target_modules": "all-linear", **fields}, modules_to_save=list(heads)))
    set_parameters(adapters, "a", scale=0.1)
    return adapters


def near(one: Tensor, other: Tensor) -> bool:
    """Whether they differ by roundings to bfloat16 only."""
    return bool((one.float() - other.float()).norm() < 0.15 * other.float().norm())


@pytest.mark.parametrize("dtype", HALF)
def test_everything_that_trains_on_a_half_precision_model_is_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    adapters = half("bert", dtype, "classifier", "word_embeddings", bias="all")
    assert {p.dtype for p in adapters.parameters("a")} == {torch.float32}
    expected = run(adapters.model, "bert")
    assert expected.dtype == dtype
    adapters.save("a", tmp_path)
    fresh = ak.attach(build("bert").to(dtype))
    fresh.load(tmp_path, "a")
    assert {p.dtype for p in fresh.parameters("a")} == {torch.float32}
    torch.testing.assert_close(run(fresh.model, "bert"), expected)
    merged = fresh.merge_and_detach()  # which gives the heads the model's dtype
    assert {p.dtype for p in merged.parameters()} == {dtype}
    assert near(run(merged, "bert"), expected)
    optimizer = torch.optim.SGD(list(adapters.parameters("a")), 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)  # takes float32 gradients alone
    start = adapters.model.classifier.adapter_heads["a"].weight.detach().clone()
    scaler.scale(adapters.model(**inputs("bert")).logits.float().square().mean()).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    assert different(adapters.model.classifier.adapter_heads["a"].weight, start)


@pytest.mark.parametrize(
    ("name", "heads"),
    [
        ("bert", ["classifier"]),
        ("bert", ["word_embeddings", "LayerNorm"]),
        ("bert", ["encoder.layer.1", "pooler"]),  # a block that gives a tuple; a module in modules
        ("gpt2", ["wte", "ln_f"]),
        ("embednet", ["embed", "head"]),
        ("convnet", ["norm", "conv2d"]),
    ],
)
def test_float32_heads_give_a_half_precision_model_what_its_own_modules_would(name: str, heads: list[str]) -> None:
    adapters = half(name, torch.bfloat16, *heads)
    model = adapters.model
    wide = ak.attach(build(name).to(torch.bfloat16).float())
    wide.add("a", adapters.config("a"))
    wide.load_state_dict("a", adapters.state_dict("a"))
    given = {key: x.bfloat16() if x.is_floating_point() else x for key, x in inputs(name).items()}

    def out(of: nn.Module, tensors: dict[str, Tensor]) -> Tensor:
        found = of(**tensors)
        return getattr(found, "logits", found)

    found = out(model, given)
    assert found.dtype == torch.bfloat16
    expected = out(wide.model, {key: x.float() if x.is_floating_point() else x for key, x in given.items()})
    assert near(found, expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert near(out(model, given), expected)
    with adapters.per_sample(["a", None]):
        assert near(out(model, given)[:1], found[:1])


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
def test_peft_reads_a_float32_head_of_a_half_precision_model_and_we_read_its(tmp_path: Path) -> None:
    from peft import PeftModel

    dtype = torch.bfloat16
    adapters = half("bert", dtype, "classifier", target_modules=["query"], task_type="SEQ_CLS")
    adapters.save("a", tmp_path / "ours")
    other = PeftModel.from_pretrained(build("bert").to(dtype), tmp_path / "ours").eval()
    assert near(run(other, "bert"), run(adapters.model, "bert"))
    other.save_pretrained(tmp_path / "peft")
    adapters.load(tmp_path / "peft", "b")
    assert near(run(adapters.model, "bert"), run(other, "bert"))


def test_float32_heads_of_a_half_precision_model_compile() -> None:
    torch._dynamo.reset()
    adapters = half("embednet", torch.bfloat16, "embed", "head")
    compiled = torch.compile(adapters.model, fullgraph=True, backend="eager")
    torch.testing.assert_close(run(compiled, "embednet"), run(adapters.model, "embednet"))


def test_a_float32_model_calls_its_heads_without_casts() -> None:
    adapters = ak.attach(build("bert"))
    add(adapters, "a")
    run(adapters.model, "bert")
    head = adapters.model.classifier
    plan = head.__dict__["_adapter_active"].state.plan(head)
    assert plan.call_head is plan.head


def weight_norm(layer: nn.Linear) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(layer)


def whole_numbers(layer: nn.Linear) -> None:
    layer.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)


def unknown_to_copy(layer: nn.Linear) -> None:
    layer.lock = threading.Lock()  # type: ignore[assignment]


UNTRAINABLE: dict[str, tuple[Callable[[nn.Linear], None], str]] = {
    "weight_norm of old": (weight_norm, "WeightNorm computes its weight before each forward. Make it permanent first"),
    "pruned": (lambda layer: prune.identity(layer, "weight"), "Identity computes its weight before each forward"),
    "of whole numbers": (whole_numbers, r"its weight is a Parameter \(torch.int8\), which takes no gradient"),
    "with a lock": (unknown_to_copy, "copying it raises TypeError: cannot pickle '_thread.lock' object"),
}


@pytest.mark.parametrize("inside", [False, True], ids=["itself", "inside"])
@pytest.mark.parametrize(("change", "message"), UNTRAINABLE.values(), ids=UNTRAINABLE.keys())
def test_module_of_which_no_copy_can_be_trained_is_refused(
    change: Callable[[nn.Linear], None], message: str, inside: bool
) -> None:
    layer = nn.Linear(4, 4)
    change(layer)
    model = nn.ModuleDict({"body": nn.Linear(4, 4), "head": nn.Sequential(layer) if inside else layer})
    adapters = ak.attach(model)
    message = message.replace("its weight", "0.weight") if inside and "computes" in message else message
    message = message.replace("its weight", "its 0.weight") if inside else message
    with pytest.raises(ak.UnsupportedError, match="'head' cannot be trained as a copy: " + message):
        adapters.add("a", LoraConfig(target_modules=["body"], modules_to_save=["head"]))
    assert adapters.names == ()


@pytest.mark.parametrize("call", ["add", "load"])
def test_an_adapter_that_may_not_be_activated_beside_merged_ones_is_not_added(call: str, tmp_path: Path) -> None:
    adapters = ak.attach(build("bert"))
    add(adapters, "a")
    adapters.save("a", tmp_path)
    adapters.merge("a")
    with pytest.raises(ak.ConfigError, match="heads"):
        adapters.load(tmp_path, "b") if call == "load" else add(adapters, "b")
    assert adapters.names == ("a",)
